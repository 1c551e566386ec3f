"""Models loaded with TransformerLens: a HookedTransformer, or a TransformerBridge.

The library is not imported here: the two are recognised by their attributes. A HookedTransformer's weights are read
like those of a checkpoint (`tl_checkpoint.py`), after TransformerLens' processing: z may lack its constant part
(docs/maths.md). A Bridge wraps a model of `transformers`, whose weights are shared. The result is compared with the
original on a few tokens, and rejected if it deviates.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from headscope.errors import ModelError
from headscope.models.families import family_of
from headscope.models.tl_checkpoint import build

_BRIDGED = "._original_component"  # inserted by a Bridge into the names of wrapped weights
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


def is_hooked(model: nn.Module) -> bool:
    """Whether it is a HookedTransformer."""
    return all(hasattr(model, name) for name in ("cfg", "run_with_hooks", "blocks", "unembed")) and not is_bridge(model)


def is_bridge(model: nn.Module) -> bool:
    """Whether it is a TransformerBridge."""
    return all(hasattr(model, name) for name in ("original_model", "run_with_hooks"))


@torch.no_grad()
def unwrap(model: Any) -> tuple[PreTrainedModel, Any, str]:
    """Return an equivalent model of `transformers`, its tokenizer and its name.

    Args:
        model: a HookedTransformer or a TransformerBridge.

    Raises:
        ModelError: it computes something unsupported.
    """
    name = str(getattr(model.cfg, "model_name", None) or "TransformerLens model")
    module = _of_bridge(model, name) if is_bridge(model) else _of_hooked(model, name)
    module = module.eval()
    _check_same(model, module, name)
    return module, model.tokenizer, name


def _of_hooked(model: Any, name: str) -> PreTrainedModel:
    config = model.cfg.to_dict()
    return build(config, model.state_dict(), f"the HookedTransformer {name!r}", model.unembed.W_U.dtype)


def _of_bridge(model: Any, name: str) -> PreTrainedModel:
    if getattr(model, "compatibility_mode", False):
        raise ModelError(
            f"the TransformerBridge {name!r} in compatibility mode, whose weights are not the model's own",
            expected="a Bridge as boot_transformers makes it",
            do="pass it before enable_compatibility_mode, or load the model by its name",
        )
    config = copy.deepcopy(model.original_model.config)
    family_of(config.model_type)
    weights: dict[str, Tensor] = {}
    for key, tensor in model.original_model.state_dict().items():
        weights.setdefault(key.replace(_BRIDGED, ""), tensor)
    module: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - weights.keys())
    if missing:
        raise ModelError(
            f"the TransformerBridge {name!r} lacks {missing[:3]}",
            expected=f"the weights of {type(module).__name__}",
            do="load the model by its name",
        )
    module.load_state_dict({key: weights[key] for key in wanted}, assign=True)
    module.tie_weights()
    return module


def _check_same(theirs: Any, module: PreTrainedModel, name: str) -> None:
    """Raise ModelError unless the two give the same log-probabilities for a few tokens."""
    n = min(128, module.config.get_text_config().max_position_embeddings)
    d_vocab: int = module.get_output_embeddings().out_features  # pyright: ignore[reportAssignmentType, reportOptionalMemberAccess]
    tokens = (torch.arange(n, device=module.device) * 7919 % d_vocab)[None]
    got = module(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    expected = theirs(tokens, return_type="logits").log_softmax(-1)
    miss = (got - expected).abs().max().item()
    most = _TOLERANCE.get(module.dtype, 0.1)
    if not miss <= most:
        raise ModelError(
            f"the TransformerLens model {name!r}, of which a copy misses its log-probabilities by {miss:.2g}",
            expected=f"at most {most:g}",
            do="load the model by its name, or report what is special about it",
        )
