"""Mixture of experts: a router chooses a few small feed-forward networks for each token.

Shapes: N tokens, D d_model, E experts, K chosen for a token, F width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Experts", "MoE", "SwiGLU", "grouped_product", "mix", "route"]


@dataclass(frozen=True)
class Experts:
    """The mixtures of a model.

    layers: for each layer whether it is a mixture (else dense). number, chosen, width: E, K and F. shared: width of the
    expert that every token passes, 0 for none. score: `sigmoid` or `softmax` of the router's logits. bias: None,
    `choose` (added to scores for the choice alone) or `weigh` (for choice and weight). groups, kept: experts stand in
    `groups` groups of which `kept` compete. normalise: the weights of the chosen sum to 1. scale multiplies weights.
    Raises ValueError for numbers that do not fit each other.
    """

    layers: tuple[bool, ...]
    number: int
    chosen: int
    width: int
    shared: int = 0
    score: str = "softmax"
    bias: str | None = None
    groups: int = 1
    kept: int = 1
    normalise: bool = False
    scale: float = 1.0

    def __post_init__(self):
        if self.number < 1 or not 1 <= self.chosen <= self.number:
            raise ValueError(
                f"config has {self.number} experts of which {self.chosen} are chosen: choose from 1 to all of them"
            )
        if self.width < 1 or self.shared < 0:
            raise ValueError(f"config has experts of width {self.width} and shared {self.shared}: give 1 or more")
        if self.groups < 1 or self.number % self.groups:
            raise ValueError(
                f"config has {self.number} experts in {self.groups} groups: the groups must divide the experts"
            )
        if not 1 <= self.kept <= self.groups:
            raise ValueError(f"config keeps {self.kept} of {self.groups} groups of experts: keep 1 to all of them")
        size = self.number // self.groups
        if self.groups > 1 and size < 2:
            raise ValueError(
                f"config has {self.groups} groups of one expert each: a group is scored by its two best experts"
            )
        if self.kept * size < self.chosen:
            raise ValueError(
                f"config chooses {self.chosen} experts among {self.kept} groups of {size}: they hold too few"
            )


class SwiGLU(nn.Module):
    """ff_out(silu(ff_proj(x)) * up_proj(x))."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.ff_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.ff_out = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.ff_out(F.silu(self.ff_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """The feed-forward part of a layer as a mixture: the chosen experts' weighted sum, and the shared expert.

    router (E, D); router_bias (E,), a buffer that no gradient moves; gate_up (E, 2F, D); down (E, D, F).
    """

    def __init__(self, size: int, experts: Experts):
        super().__init__()
        self.experts = experts
        self.router = nn.Parameter(torch.empty(experts.number, size))
        self.register_buffer("router_bias", torch.zeros(experts.number) if experts.bias else None)
        self.gate_up = nn.Parameter(torch.empty(experts.number, 2 * experts.width, size))
        self.down = nn.Parameter(torch.empty(experts.number, size, experts.width))
        self.shared = SwiGLU(size, experts.shared) if experts.shared else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> the same shape."""
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights = route(tokens, self.router, self.router_bias, self.experts)
        out = mix(tokens, chosen, weights, self.gate_up, self.down).view(x.shape)
        return out if self.shared is None else out + self.shared(x)


def route(x: Tensor, router: Tensor, bias: Tensor | None, experts: Experts) -> tuple[Tensor, Tensor]:
    """The experts of each token of x (N, D): which, int64 (N, K), and their weights (N, K) in fp32 (fp64 for fp64).

    Sigmoid scores with a choosing bias and groups: DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) and LLaDA2. Softmax
    scores: OLMoE (arXiv:2409.02060) and LLaDA-MoE, not renormalised; Qwen3 (arXiv:2505.09388) and RND1, renormalised.
    """
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(x.to(wide), router.to(wide))
    scores = logits.sigmoid() if experts.score == "sigmoid" else logits.softmax(dim=-1)
    choosing = scores if bias is None else scores + bias.to(wide)
    if experts.bias == "weigh":
        scores = choosing
    if experts.groups > 1:
        grouped = choosing.unflatten(-1, (experts.groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(experts.kept, dim=-1).indices  # (N, kept)
        open_groups = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
        choosing = grouped.masked_fill(~open_groups[..., None], -torch.inf).flatten(-2)
    chosen = choosing.topk(experts.chosen, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if experts.normalise and (experts.chosen > 1 or experts.score == "softmax"):  # LLaDA2 leaves a single one as it is
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return chosen, weights * experts.scale


def mix(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The weighted sum of the chosen experts of each token: x (N, D), chosen and weights (N, K) -> (N, D).

    Tokens are sorted by expert, so that each weight is read once: one grouped product for all experts.
    """
    order = chosen.flatten().argsort(stable=True)  # pairs (token, expert) by expert
    ends = torch.bincount(chosen.flatten(), minlength=len(gate_up)).cumsum(0).to(torch.int32)
    rows = order // chosen.shape[1]
    gate, up = grouped_product(x[rows], gate_up, ends).chunk(2, dim=-1)
    out = grouped_product(F.silu(gate) * up, down, ends) * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, rows, out.to(x.dtype))


def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """x (N, I) whose rows up to ends[e] (E,) belong to expert e, times weights (E, O, I) transposed: (N, O)."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), weights.to(dtype)
    aligned = all(size * x.element_size() % 16 == 0 for size in weights.shape[1:])
    fits = x.dtype == torch.bfloat16 if x.is_cuda else x.dtype in (torch.float32, torch.bfloat16)
    if len(x) and fits and aligned and x.device.type in ("cpu", "cuda"):
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    pieces = x.tensor_split(ends[:-1].tolist())
    return torch.cat([F.linear(piece, weight) for piece, weight in zip(pieces, weights, strict=True)])
