"""Tokenizers: train a byte-level BPE, load one, encode a prompt, decode an answer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dlm.utils.jsonio import read_object

if TYPE_CHECKING:  # its import takes a second
    from transformers import PreTrainedTokenizerFast

_FAST = ("TokenizersBackend", "PreTrainedTokenizerFast")  # names of the class that AutoTokenizer would choose
# ___, ___{12} for twelve tokens, ___{2..20} for two to twenty, ___* for any number; ___{12:/[0-9]+/} and
# ___{2..20:/[0-9]+/} for what they must match, ___{/[0-9]+/} with the length left open
BLANK = re.compile(
    r"_{3,}(?:\{(?:(?P<low>\d+)(?:\.\.(?P<high>\d+))?)?(?:(?:(?<=\d):|(?<=\{))/(?P<pattern>(?:[^/\\]|\\.)*)/)?(?<!\{)\}"
    r"|(?P<any>\*))?"
)
ANY_LENGTH, MOST_LENGTHS = 16, 64  # tokens of ___* at most; lengths of one blank


def template(tokenizer, text: str, blank_length: int, mask: int) -> list[int]:
    """Ids of a text with blanks, as `blanks`, without their patterns."""
    return blanks(tokenizer, text, blank_length, mask)[0]


def blanks(
    tokenizer, text: str, blank_length: int, mask: int, *, lengths: Sequence[int] | None = None
) -> tuple[list[int], list[tuple[int, int, str | None]]]:
    """Ids of a text with blanks (`___`, or `___{12}` for twelve tokens), the mask id in the blanks; and of each blank
    where it begins, its length, and the pattern that it must match (`___{12:/[0-9]+/}`) or None.

    In a byte-level vocabulary a word begins with its space (" mat"), so the space before a blank is left to
    the model, which writes it with the word; the text after a blank keeps its own. A pattern then has that space.
    lengths: the tokens of each blank, in place of what the text says.
    Raises ValueError as `blank_lengths`, and for a text that contains the mask token.
    """
    lengths = blank_lengths(text, blank_length) if lengths is None else lengths
    ids: list[int] = []
    places: list[tuple[int, int, str | None]] = []
    at = 0
    for blank, length in zip(BLANK.finditer(text), lengths, strict=True):
        piece, pattern = text[at : blank.start()], blank["pattern"]
        if piece.endswith(" ") and not piece.endswith("  "):
            piece = piece[:-1]
            pattern = None if pattern is None else f" (?:{pattern})"
        ids += encode_prompt(tokenizer, piece, mask, beginning=not ids)
        places.append((len(ids), length, pattern))
        ids += [mask] * length
        at = blank.end()
    return ids + encode_prompt(tokenizer, text[at:], mask, beginning=False), places


def blank_ranges(text: str, blank_length: int) -> list[tuple[int, int]]:
    """The least and the most tokens of each blank of a text; one without a number has `blank_length`, ___* has 1 to 16.

    Raises ValueError for a text without a blank, a blank of no tokens, braces that hold no number, and a range that is
    empty or has more than 64 lengths.
    """
    blanks = list(BLANK.finditer(text))
    if not blanks:
        raise ValueError(f"no blank in {text[:60]!r}: mark each with ___, or with ___{{12}} for twelve tokens")
    ranges = []
    for blank in blanks:
        if "{" not in blank[0] and text[blank.end() :].startswith("{"):
            wrong = text[blank.end() : blank.end() + 12].split("}")[0] + "}"
            raise ValueError(f"the blank ___{wrong} has no number of tokens: write ___{{12}} for twelve")
        low = blank["low"] or ("1" if blank["any"] else str(blank_length))
        high = blank["high"] or (str(ANY_LENGTH) if blank["any"] else low)
        if max(len(low), len(high)) > 12:
            raise ValueError("a blank of more than 10^12 tokens: give a number that fits the model")
        low, high = int(low), int(high)
        if low < 1:
            raise ValueError(f"the blank {blank[0]} has no tokens: give 1 or more")
        if high < low:
            raise ValueError(
                f"the blank {blank[0]} has no length: write the smaller number first, ___{{{high}..{low}}}"
            )
        if high - low >= MOST_LENGTHS:
            raise ValueError(
                f"the blank {blank[0]} has {high - low + 1:,} lengths to try, above {MOST_LENGTHS}: narrow it"
            )
        ranges.append((low, high))
    return ranges


def blank_lengths(text: str, blank_length: int) -> list[int]:
    """The tokens of each blank of a text, as `blank_ranges`. Raises ValueError for one with a range too."""
    ranges = blank_ranges(text, blank_length)
    for blank, (low, high) in zip(BLANK.finditer(text), ranges, strict=True):
        if low < high:
            raise ValueError(f"the blank {blank[0]} has several lengths, and here it needs one: write ___{{{high}}}")
    return [low for low, _ in ranges]


BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
START_HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL_TOKENS = (BOS, EOS, MASK, START_HEADER, END_HEADER, EOT)  # in this order at the end of the vocabulary
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LONG_WORD = re.compile(r"\S{1000,}")  # left out of training: BPE takes quadratic time over a word
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with `vocab_size` entries, the special tokens last.

    A corpus with too few distinct pairs gives a smaller vocabulary: `len(tokenizer)` is the real size.
    Errors: `vocab_size` below 256 bytes + the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}, but a byte-level vocabulary needs 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens: give at least {smallest}"
        )
    core = Tokenizer(models.BPE())
    # Digits one by one: numbers then have one spelling each, which arithmetic and puzzles need.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    core.train_from_iterator((LONG_WORD.sub(" ", text) for text in texts), trainer)
    core.add_special_tokens(list(SPECIAL_TOKENS))
    core.post_processor = processors.TemplateProcessing(  # a text begins as documents in training do
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        additional_special_tokens=[START_HEADER, END_HEADER, EOT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerFast | None:
    """The tokenizer in a folder; None where it has none. No Python of the folder's own runs.

    Raises ValueError for files that cannot be read, and for a tokenizer that is Python alone.
    """
    folder = Path(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    settings = folder / "tokenizer_config.json"
    fields = read_object(settings) if settings.is_file() else {}
    own_code = fields.get("auto_map") is not None  # its Python would read tokenizer.json too
    try:
        if (own_code or fields.get("tokenizer_class") in _FAST) and (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), trust_remote_code=False)
        else:
            from transformers import AutoTokenizer  # whose import takes long

            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        tokenizer("a")  # a field of the wrong type is met only here
        return tokenizer
    except Exception as error:  # each library has its own: `tokenizers` raises a bare Exception, others KeyError ...
        if own_code:
            raise ValueError(
                f"the tokenizer of {folder} is Python of its own (auto_map in tokenizer_config.json), which dlm never "
                "runs: put a tokenizer.json there"
            ) from error
        raise ValueError(f"the tokenizer of {folder} cannot be read ({' '.join(str(error).split())})") from error


# What a tokenizer_config.json may hold that `Codec` needs not read, or reads.
_NAMED = ("bos_token", "eos_token", "mask_token", "pad_token", "unk_token")
_IDLE = {"backend", "is_local", "local_files_only", "model_max_length", "tokenizer_class", "extra_special_tokens"}
_CODEC_FIELDS = {*_NAMED, *_IDLE, "clean_up_tokenization_spaces"}
_MOST_CODEC_TOKENS = 100_000  # transformers corrects some larger vocabularies


class Codec:
    """The core of a folder's tokenizer: what generating texts asks of one, without transformers, whose import takes a
    second. Whatever else is asked for comes from transformers' class, which is opened then."""

    def __init__(self, folder: Path, core: Tokenizer, named: dict[str, str | None]):
        self.folder, self.backend_tokenizer = folder, core
        for name in _NAMED:
            token = named.get(name)
            setattr(self, name, token)
            setattr(self, f"{name}_id", None if token is None else core.token_to_id(token))

    @cached_property
    def whole(self) -> PreTrainedTokenizerFast:
        """The same tokenizer as transformers has it."""
        return load_tokenizer(self.folder)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole, name)

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The ids of a text, as `input_ids`."""
        if not isinstance(text, str):
            return self.whole(text, add_special_tokens=add_special_tokens)
        return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return self.backend_tokenizer.get_vocab()

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str | None] | None:
        """The token of an id, None for one that is none."""
        one = isinstance(ids, int)
        tokens = [self.backend_tokenizer.id_to_token(number) for number in ([ids] if one else ids)]
        return tokens[0] if one else tokens


def open_codec(folder: str | os.PathLike) -> Codec | None:
    """The core of the tokenizer in a folder; None where transformers would do something beyond it, or read other files,
    and for files that cannot be read (`load_tokenizer` says why)."""
    folder = Path(folder)
    if any((folder / name).exists() for name in ("special_tokens_map.json", "added_tokens.json")):
        return None
    try:
        fields = read_object(folder / "tokenizer_config.json")
        core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        core.encode("a")
    except Exception:  # `tokenizers` raises a bare Exception
        return None
    named = {name: fields[name] for name in _NAMED if fields.get(name) is not None}
    extra = fields.get("extra_special_tokens") or []
    plain = not fields.keys() - _CODEC_FIELDS and fields.get("tokenizer_class") in _FAST
    plain = plain and fields.get("clean_up_tokenization_spaces") is False and isinstance(extra, list)
    plain = plain and isinstance(fields.get("model_max_length", 0), int | float)
    whole = core.truncation is None and core.padding is None and core.post_processor is not None
    if not plain or not whole or core.get_vocab_size() > _MOST_CODEC_TOKENS:
        return None
    special = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
    if not all(isinstance(token, str) and token in special for token in (*named.values(), *extra)):
        return None  # transformers would add it
    return Codec(folder, core, named)


def mask_id(tokenizer, config) -> int:
    """The id of the mask token: the config's `mask_token_id`, else the tokenizer's.

    Errors: neither names one, or the tokenizer's vocabulary does not hold it.
    """
    token_id = getattr(config, "mask_token_id", None)
    if token_id is None and tokenizer is not None:
        token_id = tokenizer.mask_token_id
        if token_id is None:
            token_id = tokenizer.get_vocab().get(MASK)
    if token_id is None:
        raise ValueError(
            "no mask token: the checkpoint's config has no mask_token_id and the tokenizer has no mask token; "
            "set mask_token_id in config.json"
        )
    if tokenizer is not None and tokenizer.convert_ids_to_tokens(int(token_id)) is None:
        raise ValueError(
            f"the tokenizer lacks the mask token: mask_token_id is {token_id}, but the tokenizer has "
            f"{len(tokenizer)} tokens; use the tokenizer that belongs to this checkpoint"
        )
    return int(token_id)


def encode_prompt(tokenizer, text: str, mask: int | None = None, *, beginning: bool = True) -> list[int]:
    """Encode a prompt, with what the tokenizer itself puts in front of a text (ours: begin-of-text; LLaDA's: nothing).

    `mask`: the checkpoint's mask id, where the tokenizer does not name it itself. `beginning`: False for a later
    part of a text, which has nothing in front.
    Errors: a prompt that contains the mask token, or half of a character (a lone surrogate).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text {text[:40]!a} is not UTF-8 text (half of a character at {error.start}): remove or mend it"
        ) from None
    ids = list(tokenizer(text, add_special_tokens=beginning)["input_ids"])
    if beginning and ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
        ids.pop()  # some tokenizers end every text; a prompt goes on
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids.pop(0)  # the text, of a chat template perhaps, brought its own
    vocabulary = tokenizer.get_vocab()
    forbidden = {i for i in (mask, tokenizer.mask_token_id, vocabulary.get(MASK)) if i is not None}
    masks = forbidden.intersection(ids)
    if masks:
        name = tokenizer.convert_ids_to_tokens(masks.pop())
        raise ValueError(
            f"the prompt contains the mask token {name}: it is how the model marks what it has still to write; "
            f"remove it, or use infilling (dlm infill) to mark a blank"
        )
    return ids


def encode_documents(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Encode training text; a special token spelled in the text is plain text here, not the token."""
    core = tokenizer.backend_tokenizer
    before = core.encode_special_tokens
    core.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in core.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        core.encode_special_tokens = before


def decode(tokenizer, ids: Iterable[int]) -> str:
    """Text of `ids` up to the first end-of-text (or end-of-turn) token, special tokens removed."""
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get(EOT)} - {None}
    kept: list[int] = []
    for token in ids:
        if int(token) in ends:
            break
        kept.append(int(token))
    return tokenizer.decode(kept, skip_special_tokens=True)


def token_bytes(tokenizer) -> list[bytes]:
    """The bytes that each id writes, b"" for special and unused ids: V of them.

    Byte-level vocabularies (GPT-2's alphabet) and SentencePiece ones (a low line for a space, <0x0A> for a byte).
    """
    words: list[bytes] = [b""] * len(tokenizer)
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    byte_level = "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
    alphabet = _byte_alphabet()
    for word, number in tokenizer.get_vocab().items():
        if number in special or number >= len(words):
            continue
        if number in tokenizer.added_tokens_decoder:
            words[number] = word.encode()
        elif byte_level:
            words[number] = bytes(alphabet[letter] for letter in word if letter in alphabet)
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", word):
            words[number] = bytes([int(word[3:5], 16)])
        else:
            words[number] = word.replace("\u2581", " ").encode()
    return words


def _byte_alphabet() -> dict[str, int]:
    """The letter for each byte in a byte-level vocabulary: printable ones are themselves, others follow 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}
