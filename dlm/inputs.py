"""What a caller hands to `generate` -> the canvas, and what the checkpoint says that the sampler must know."""

import torch
from torch import Tensor

from .canvas import Canvas
from .sampling import as_ids
from .tokenizer import encode_prompt, mask_id

__all__ = ["prepare"]


def prepare(model, inputs, gen_length: int, tokenizer=None) -> tuple[Canvas, dict]:
    """The canvas for these inputs and what `denoise` should know of the checkpoint (vocab_size, eos_token_ids)."""
    settings = getattr(model, "config", None)
    vocab_size = getattr(settings, "vocab_size", None) if tokenizer is None else len(tokenizer)
    known = {"vocab_size": vocab_size, "eos_token_ids": as_ids(getattr(settings, "eos_token_id", None))}
    if isinstance(inputs, Canvas):
        return inputs, known
    if isinstance(inputs, Tensor):
        inputs = inputs.tolist()
    if isinstance(inputs, str) or (len(inputs) and isinstance(inputs[0], int | float)):
        inputs = [inputs]
    if any(isinstance(prompt, str) for prompt in inputs):
        if tokenizer is None:
            raise ValueError("text was given but no tokenizer: pass tokenizer=, or give token ids")
        inputs = [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in inputs]
    device = next((p.device for p in model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    canvas = Canvas.from_prompts(inputs, gen_length, mask_id(tokenizer, settings), device=device)
    size = getattr(settings, "embedding_size", None)
    wrong = canvas.tokens[(canvas.tokens < 0) | (canvas.tokens >= (size or 2**62))]
    if len(wrong):
        raise ValueError(
            f"the prompts hold id {int(wrong[0])}, but the model's ids go from 0 to {size - 1 if size else '…'}"
        )
    return canvas, known
