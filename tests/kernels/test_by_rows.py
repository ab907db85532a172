"""A row of a padded pass gets the bits that it gets alone, and a prompt's blocks those that they have in any prompt."""

import pytest
import torch

from dlm.kernels.by_rows import RowSizes, pieces_of
from dlm.kernels.packing import packed
from dlm.models.attention import block_causal, block_causal_from
from dlm.models.kv_cache import KVCache
from tests.helpers.toys import tiny_model

pytestmark = pytest.mark.skipif(
    not getattr(packed(tiny_model(0, dtype=torch.float32)), "exact_rows", False),
    reason="this processor's products are torch's own, whose bits depend on the batch",
)


def test_pieces_of_rows_alike_are_one():
    found = pieces_of((3, 3, 2), (5, 5, 5), None)
    assert [(piece.rows, piece.queries, piece.keys) for piece in found] == [
        (slice(0, 2), slice(0, 3), 5),
        (slice(2, 3), slice(0, 2), 5),
    ]


def test_pieces_of_blocks_see_what_is_before_them():
    """Blocks of 4 that begin 1 slot before slot 0: slots 0-2, 3-6, 7-10; 9 slots exist."""
    [first, second, third] = pieces_of((9,), (9,), None, [list(range(9))], 4, (1,))
    assert [(piece.queries, piece.keys) for piece in (first, second, third)] == [
        (slice(0, 3), 3),
        (slice(3, 7), 7),
        (slice(7, 9), 9),
    ]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rule", [None, block_causal(4), block_causal_from(4, (1, 0, 3))])
def test_a_row_of_a_padded_pass_has_the_bits_it_has_alone(rule, threads):
    """Was: another number of keys, all hidden, or one query in place of many, changed the last bits."""
    model = packed(tiny_model(3, dtype=torch.float32))
    lengths, asked = (37, 9, 21), (1, 5, 3)
    tokens = torch.randint(0, 38, (3, 37), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(37) < torch.tensor(lengths)[:, None]
    keep = torch.arange(5).repeat(3, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sizes = RowSizes(lengths, lengths, asked)
        whole = model(tokens, visible=rule, valid=valid, logits_to_keep=keep, sizes=sizes)
        for row, (length, count) in enumerate(zip(lengths, asked, strict=True)):
            offsets = getattr(rule, "offsets", None)
            own = block_causal_from(4, (offsets[row],)) if offsets else rule
            alone = model(tokens[row : row + 1, :length], visible=own, logits_to_keep=keep[:1, :count])
            assert torch.equal(whole[row, :count], alone[0])
    finally:
        torch.set_num_threads(before)


def test_blocks_of_a_prompt_have_the_same_keys_whatever_follows():
    """What prefixes may be kept for: the first two blocks of prompts of different lengths."""
    model, tokens = packed(tiny_model(3, dtype=torch.float32)), torch.arange(30)[None]
    stored = []
    for length in (9, 22, 30):
        cache, slots = KVCache(1, length), torch.arange(length)[None]
        model(tokens[:, :length], slots, visible=block_causal(4), cache=cache)
        like = torch.empty(0, 2, 8)
        stored.append([part[:, :, :8] for layer in range(2) for part in cache.stored(layer, like)])
    for other in stored[1:]:
        assert all(torch.equal(a, b) for a, b in zip(stored[0], other, strict=True))
