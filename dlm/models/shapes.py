"""Named shapes of models with random weights: what a measurement of speed needs, and no download.

Shapes: d_model, heads, layers, MLP width and vocabulary as in a checkpoint's config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dlm.utils.names import check_name

if TYPE_CHECKING:
    from dlm.models.transformer import LLaDAModelLM

__all__ = ["SHAPES", "random_model", "shape_config"]

# name: (d_model, n_heads, n_kv_heads, n_layers, mlp_hidden_size, vocabulary)
SHAPES = {
    "small": (128, 4, 4, 4, 384, 2048),
    "25m": (384, 6, 6, 8, 1536, 8192),
    "120m": (768, 12, 12, 12, 2048, 32_000),
    "wide-vocabulary": (512, 8, 8, 4, 1536, 126_464),
    "llada-1b": (2048, 32, 4, 22, 5634, 126_464),  # SMDM's 1B body (arXiv:2410.18514) with LLaDA's vocabulary
    "llada-8b": (4096, 32, 32, 32, 12_288, 126_464),
}


def shape_config(name: str, length: int = 16_384, layers: int | None = None):
    """The configuration of a named shape, for canvases of up to `length` slots; layers: how many it has in place of the
    shape's. The last id is the mask token and the one before it end-of-text. Raises ValueError for an unknown name."""
    from dlm.models.configuration import LLaDAConfig

    check_name("config", name, SHAPES)
    width, heads, kv_heads, depth, hidden, vocabulary = SHAPES[name]
    return LLaDAConfig(
        d_model=width,
        n_heads=heads,
        n_kv_heads=kv_heads,
        n_layers=layers or depth,
        mlp_hidden_size=hidden,
        vocab_size=vocabulary,
        embedding_size=vocabulary,
        mask_token_id=vocabulary - 1,
        eos_token_id=vocabulary - 2,
        pad_token_id=vocabulary - 2,
        max_sequence_length=length,
    )


def random_model(
    name: str, *, dtype=None, device="cpu", seed: int = 0, length: int = 16_384, layers: int | None = None
) -> LLaDAModelLM:
    """A model of `shape_config` with weights N(0, 1 / fan-in), in evaluation mode; dtype: float32 where it is None.

    Raises ValueError for an unknown name.
    """
    import torch

    from dlm.models.transformer import LLaDAModelLM

    config = shape_config(name, length, layers)
    config._attn_implementation = "sdpa"
    device = torch.device(device)
    with torch.device("meta"):
        model = LLaDAModelLM(config)
    model = model.to(dtype or torch.float32).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.fill_(1)
            else:
                weight.normal_(
                    std=1 if weight is model.get_input_embeddings().weight else weight.shape[1] ** -0.5,
                    generator=generator,
                )
    return model
