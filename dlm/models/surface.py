"""transformers' arguments -> what the mask predictor is asked, and the loss that transformers' callers expect.

Shapes: B batch, Q tokens of a row, D d_model, V embedding_size.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig

from dlm.models.head import Head
from dlm.models.predictor import PredictCall

__all__ = ["Surface", "given", "labels_loss", "refuse_outputs"]

IGNORED = -100  # a label that carries no loss


def given(input_ids, attention_mask, position_ids, inputs_embeds, output_hidden_states) -> PredictCall:
    """The call that these arguments of `forward` ask for. Raises ValueError where they do not fit together."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give input_ids or inputs_embeds, one of them")
    source = input_ids if inputs_embeds is None else inputs_embeds
    if source.ndim != (2 if inputs_embeds is None else 3):
        raise ValueError(
            f"{'input_ids has' if inputs_embeds is None else 'inputs_embeds has'} shape {tuple(source.shape)}: "
            f"give {'(rows, tokens)' if inputs_embeds is None else '(rows, tokens, d_model)'}"
        )
    rows, tokens = source.shape[:2]
    if position_ids is not None:
        if position_ids.shape not in ((rows, tokens), (1, tokens)):
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}: give {(rows, tokens)}")
        position_ids = position_ids.expand(rows, tokens)
    return PredictCall(
        input_ids,
        position_ids,
        valid=None if attention_mask is None else _valid(attention_mask, (rows, tokens)),
        embeds=inputs_embeds,
        hidden_states=[] if output_hidden_states else None,
    )


def _valid(attention_mask: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """Which tokens exist, (B, Q) bool; None where all do, which lets the fastest kernel run."""
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give {shape}, 1 at tokens and 0 at padding "
            "(what a token may see beyond that is a rule, `visible` of `predict`)"
        )
    valid = attention_mask.bool()
    return None if not torch.compiler.is_compiling() and bool(valid.all()) else valid


def refuse_outputs(output_attentions, use_cache) -> None:
    """Raises ValueError for what the model does not give."""
    if output_attentions:
        raise ValueError("output_attentions is true: the fused kernels keep no attention weights; leave it out")
    if use_cache:
        raise ValueError(
            "use_cache is true: a mask predictor has no cache of the past; leave it out, and choose a method "
            "of `generate` (prefix, dual ...)"
        )


def labels_loss(logits: Tensor, labels: Tensor, config, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """The mean cross entropy () of labels (B, Q) in nats, in fp32 at least; -100 carries none.

    A label is predicted at its own place. In a model with shifted logits it is predicted at the place before, the
    first one at its own (Dream, arXiv:2508.15487); in an autoregressive model, as in transformers' causal models, at
    the place before, and the first one has no prediction. num_items_in_batch: the labels of the whole step, by which
    the sum is divided in place of those here. No label at all gives 0.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}: give {tuple(logits.shape[:2])}, -100 for no loss")
    if config.objective == "autoregressive":
        logits, labels = logits[:, :-1], labels[:, 1:]
    elif config.shift_logits:
        logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
    labels = labels.to(logits.device).flatten()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
    count = (labels != IGNORED).sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def _no_matter(key: str, config) -> bool:
    """Whether a tensor of a family's file may be left over: frequencies that old files hold, a tied head."""
    tied = config.weight_tying and key.endswith(("lm_head.weight", "transformer.ff_out.weight"))
    return hasattr(config, "written_as") and (tied or key.endswith("rotary_emb.inv_freq"))


class Surface:
    """What transformers expects of a model with a head beside `forward`: loading, tables of embeddings, `generate`."""

    accepts_loss_kwargs = True  # Trainer hands over num_items_in_batch

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, but a tensor missing, left over or of another shape is an error, not a warning."""
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("ignore_mismatched_sizes", True)  # so that they come back by name, and are refused below
        kwargs.pop("trust_remote_code", None)  # whatever was asked for: no code of a checkpoint runs
        model, info = super().from_pretrained(*args, output_loading_info=True, trust_remote_code=False, **kwargs)
        problems = []
        for kind in ("missing", "unexpected", "mismatched"):
            keys = sorted(info.get(f"{kind}_keys") or (), key=str)
            if kind == "unexpected":
                keys = [key for key in keys if not _no_matter(str(key), model.config)]
            if keys:
                shown = [key if isinstance(key, str) else f"{key[0]} {tuple(key[1])}" for key in keys[:4]]
                more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
                problems.append(f"{kind} {', '.join(shown)}{more}")
        if problems:
            raise ValueError(
                f"the weights of {args[0] if args else 'the checkpoint'} do not fit its config.json: "
                f"{'; '.join(problems)}. The checkpoint is damaged or of another family"
            )
        return (model, info) if wants_info else model

    @classmethod
    def can_generate(cls) -> bool:
        """So that transformers keeps a `generation_config`, which holds the sampling defaults under "dlm"."""
        return True

    def adjust_generation_fn(self, generation_config, from_auto_class, from_pipeline, path, **places) -> None:
        """Called by `from_pretrained`: reads generation_config.json; no code beside it is looked for."""
        places.pop("trust_remote_code", None)
        if generation_config is not None:
            self.generation_config = generation_config
        elif path is not None:
            with suppress(OSError):  # no such file: what the configuration says
                self.generation_config = GenerationConfig.from_pretrained(path, **places)

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As in transformers, with the sampling defaults."""
        if getattr(self.generation_config, "dlm", None):
            self.generation_config._from_model_config = False  # else "dlm" is not read again
        super().save_pretrained(save_directory, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_) -> dict:
        """For PEFT, which calls it for its CAUSAL_LM."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, tokenizer=None, **sampling
    ) -> Tensor:
        """Prompt and answer (B, P + G), as transformers' `generate` returns them.

        input_ids (B, P); attention_mask (B, P): 0 at padding. sampling: fields of `SamplingConfig` (gen_length, steps,
        method ...), before the checkpoint's defaults; what is not one is refused. tokenizer: for constraints on text.
        """
        public = import_module("dlm.checkpoints.generation")  # a room below: looked up when it is called
        return public.generate_ids(self, input_ids, attention_mask, tokenizer=tokenizer, **sampling)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        transformer = self.model.transformer
        return transformer.wte if self.config.weight_tying else transformer.ff_out

    def set_output_embeddings(self, value: nn.Module) -> None:
        if isinstance(value, nn.Linear) and not isinstance(value, Head):  # as transformers resizes one
            head = Head(value.in_features, value.out_features, bias=value.bias is not None, device="meta")
            head.weight, head.bias = value.weight, value.bias
            value = head
        self.model.transformer["wte" if self.config.weight_tying else "ff_out"] = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers. `vocab_size` becomes new_num_tokens, and `embedding_size` the rows of the table, padding
        included: tokens past the vocabulary are never proposed."""
        before = self.config.vocab_size
        table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            self.config.embedding_size = table.num_embeddings
            if "embedding_size" not in self.config.attribute_map:  # else one field is both
                self.config.vocab_size = before if new_num_tokens is None else new_num_tokens
        return table
