"""LLaDA's configuration file, field for field; what it may ask for and we do not implement is refused by name."""

from typing import Any

from transformers import PretrainedConfig

from dlm.models.fields import LLaDAFields

__all__ = ["LLaDAConfig"]


class LLaDAConfig(LLaDAFields, PretrainedConfig):
    """The configuration of a mask predictor in LLaDA's layout (`model_type` llada).

    Fields and defaults are those of LLaDA-8B's `config.json`. Ours beside them, written only where set:
    `block_length` (a model trained with block-causal attention of that block length, BD3-LM), beside it
    `full_attention` (trained under full attention too: one network for both visibilities) and `shift_logits` (the guess
    for slot i is the output at slot i - 1). Two that LLaDA's own code does not know: `layer_repeats` (all layers are
    applied in order so many times, with the same weights: a recurrent transformer) and `grid_width` (the canvas is a
    square grid written row by row, a row being a label and its cells, so many tokens; heads see in turn its row, its
    column, its box and everything, `attention.grid_views`). `objective`, always written, is what the weights were
    trained for: diffusion, block_diffusion or autoregressive. The properties below say of LLaDA what the tables of
    other families say of theirs.
    Raises ValueError, naming the field, for a variant that is not implemented and for sizes that do not fit.
    """

    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }

    # Who holds what of a layer when several devices share it (Megatron-LM, arXiv:1909.08053, section 3): heads and
    # columns of the MLP are each one's own, and two sums a layer join them.
    base_model_tp_plan = {
        **{f"transformer.blocks.*.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj")},
        **{f"transformer.blocks.*.{name}": "rowwise" for name in ("attn_out", "ff_out")},
    }

    def __post_init__(self, **kwargs: Any):
        self.complete()
        if self.architectures is None:
            self.architectures = ["LLaDAModelLM"]
        PretrainedConfig.__post_init__(self, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As in transformers; a mixture of experts that carries the same `model_type` gives its own configuration."""
        if cls is LLaDAConfig and config_dict.get("num_experts") is not None:
            from dlm.models.families.llada_moe import LLaDAMoEConfig

            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: the fields that LLaDA's own code reads (`torch_dtype` by its old name), ours only
        where set."""
        fields = super().to_diff_dict()
        if fields.get("dtype") is not None:
            fields["torch_dtype"] = fields.pop("dtype")
        for name in ("block_length", "shift_logits", "grid_width"):
            if fields.get(name) is None:
                fields.pop(name, None)
        if fields.get("layer_repeats") == 1:
            del fields["layer_repeats"]
        if not fields.get("full_attention"):
            fields.pop("full_attention", None)
        return fields
