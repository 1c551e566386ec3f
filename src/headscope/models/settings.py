"""Meaning of the keys of a `transformers` configuration: which settings determine a model's function.

Every key declared by a supported family is classified here. Names and defaults of keys differ between versions of
`transformers`, so artefacts identify a model by the result of `computed`, never by the raw configuration.
"""

from functools import cache
from typing import Any

from transformers import PreTrainedConfig

from headscope.errors import ModelError
from headscope.models.spec import ModelSpec

_COMPUTED: dict[str, tuple[str, ...]] = {
    "activation": ("activation_function", "hidden_act", "hidden_activation"),
    "eps": ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps"),
    "score_scale": ("query_pre_attn_scalar",),
    "scaled_scores": ("scale_attn_weights",),
    "scores_scaled_by_layer": ("scale_attn_by_inverse_layer_idx",),
    "embedding_scaled": ("mup_enabled",),
    "experts": ("num_experts_per_tok",),
    "expert_groups": ("n_group",),
    "expert_groups_chosen": ("topk_group",),
    "experts_normalised": ("norm_topk_prob",),
    "experts_scale": ("route_scale", "routed_scaling_factor"),
    "rotated_width": ("qk_rope_head_dim",),
    "rotated_in_pairs": ("rope_interleave",),
}
"""Settings that determine the function, by our names, with their keys."""

_SAID_OTHERWISE = (
    "_sliding_window_pattern attention_bias attn_logit_softcapping final_logit_softcapping first_k_dense_replace "
    "global_attn_every_n_layers head_dim hidden_size intermediate_size kv_lora_rank layer_types "
    "max_position_embeddings max_window_layers mlp_bias moe_intermediate_size n_embd n_head n_inner n_layer "
    "n_positions n_routed_experts n_shared_experts num_attention_heads num_dense_layers num_experts "
    "num_hidden_layers num_key_value_heads num_shared_experts q_lora_rank qk_head_dim qk_nope_head_dim "
    "rope_parameters sliding_window tie_word_embeddings use_parallel_residual use_sliding_window v_head_dim vocab_size"
)
"""Keys whose meaning is covered by the weights' shapes, `ModelSpec`, or windows and rotation below."""

_NOT_COMPUTED = (
    "attention_dropout attn_pdrop bos_token_id classifier_dropout embd_pdrop eos_token_id hidden_dropout "
    "initializer_range is_decoder num_nextn_predict_layers output_router_logits pad_token_id pretraining_tp "
    "reorder_and_upcast_attn resid_pdrop summary_activation summary_first_dropout summary_proj_to_labels "
    "summary_type summary_use_proj use_cache"
)
"""Keys of training, generation, other tasks and other implementations of attention."""

_REFUSED: dict[str, tuple[Any, str]] = {
    "is_causal": (True, "attention that sees later tokens"),
    "use_bidirectional_attention": (False, "attention that sees later tokens"),
    "add_cross_attention": (False, "attention to another model's states"),
}
"""Keys with a single supported value: that value, and the meaning of others."""

_BY_LENGTH = ("dynamic", "longrope")  # rotations that depend on the maximum sequence length of a model


def check_settings(config: PreTrainedConfig, name: str) -> None:
    """Reject a configuration that makes a model of a supported family compute something unsupported.

    Args:
        config: configuration of the whole model.
        name: name of the model, for the message.

    Raises:
        ModelError: a setting that changes what attention sees, or an unknown one that is not at its default.
    """
    text = config.get_text_config()
    for key, (fine, what) in _REFUSED.items():
        value = getattr(text, key, fine)
        if bool(value) != fine:
            raise ModelError(
                f"{key} = {value!r} in the configuration of {name}: {what}",
                expected="a causal language model",
                do="use another model: on this one every number that goes by source token would be wrong",
            )
    other = {*(getattr(text, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if other:
        raise ModelError(
            f"layers of {name} with {', '.join(sorted(other))}",
            expected="full_attention or sliding_attention",
            do="use another model",
        )
    for key in unjudged(text):
        value, default = getattr(text, key), _defaults(type(text))[key]
        if value != default:
            raise ModelError(
                f"{key} = {value!r} in the configuration of {name}, a setting that headscope does not know",
                expected=f"its default, {default!r}, or a version of transformers without it",
                do="install an earlier version of transformers, or judge the key in headscope/models/settings.py",
            )


def unjudged(config: PreTrainedConfig) -> list[str]:
    """Return the keys declared by a configuration's class that are not classified here."""
    judged = {*_SAID_OTHERWISE.split(), *_NOT_COMPUTED.split(), *_REFUSED}
    judged |= {key for keys in _COMPUTED.values() for key in keys}
    return sorted(_defaults(type(config)).keys() - _defaults(PreTrainedConfig).keys() - judged)


def computed(config: PreTrainedConfig, spec: ModelSpec) -> dict[str, Any]:
    """Return the settings that determine the function, in names independent of the version of `transformers`.

    What follows from the weights' shapes is omitted; numbers are floats, even if they were written as integers.
    """
    text: Any = config.get_text_config()
    declared = _defaults(type(text))
    found = {name: getattr(text, key) for name, keys in _COMPUTED.items() for key in keys if key in declared}
    found |= {
        "type": config.model_type,
        "heads": [spec.n_heads, spec.n_kv_heads, spec.d_head],
        "parallel": spec.parallel,
        "scores_cap": spec.scores_cap,
        "logits_cap": spec.logits_cap,
        "windows": _windows(text, spec.n_layers) if "sliding_window" in declared else None,
        "rotation": _rotation(getattr(text, "rope_parameters", None), spec.context),
    }
    return _plain(found)


def _windows(config: Any, n_layers: int) -> list[int | None] | None:
    """Return the attention window of each layer; None where all are unlimited."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * n_layers
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    return windows if any(windows) else None


def _rotation(rope: dict[str, Any] | None, context: int) -> dict[str, Any] | None:
    """Return the parameters of the rotary embedding: one set, or one for each type of layer."""
    if rope is None:
        return None
    by_layer = {kind: _rotation(own, context) for kind, own in rope.items() if isinstance(own, dict)}
    if by_layer:
        return by_layer
    said = {"type" if key == "rope_type" else key: value for key, value in rope.items() if value is not None}
    if said.get("partial_rotary_factor") == 1:
        del said["partial_rotary_factor"]  # the full width, which is the default
    return said | ({"context": context} if said.get("type") in _BY_LENGTH else {})


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _plain(v) for key, v in value.items()}
        case list() | tuple():
            return [_plain(v) for v in value]
        case int() if not isinstance(value, bool):
            return float(value)
        case _:
            return value


@cache
def _defaults(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    return cls().to_dict()
