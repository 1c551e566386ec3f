"""Specification of a model: sizes and block structure; and the type of an edit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from headscope.models.families import Block, Family, NoMLP
from headscope.site import KINDS, AnyKind, Site

Edit = Callable[[Tensor], Tensor]
"""Takes the value at a site, shaped as in `Site`, and returns its replacement, of the same shape."""

_WITH_MLP: tuple[AnyKind, ...] = ("resid_mid", "mlp_in", "ln2_scale", "mlp_out")


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a model, and optional features of its blocks."""

    name: str
    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_vocab: int
    context: int
    """Maximum sequence length, in tokens."""
    parallel: bool
    """Whether attention and MLP both read `resid_pre`; there is no `resid_mid` then."""
    post_norm: bool = False
    """Whether a norm follows the output projection: `attn_out` is then not linear in z."""
    qk_norm: bool = False
    """Whether queries and keys are normalised: scores are then not bilinear in the attention norm's output."""
    scores_cap: float | None = None
    """Scores are `cap * tanh(scores / cap)`."""
    logits_cap: float | None = None
    """Logits are `cap * tanh(logits / cap)`."""
    attention_only: bool = False
    """Whether there are no MLPs: a layer ends with attention."""

    @property
    def kinds(self) -> tuple[AnyKind, ...]:
        """The sites of a layer; `ln_final_scale` is one of the last layer only."""
        lacks = _WITH_MLP if self.attention_only else ("resid_mid",) if self.parallel else ()
        return tuple(kind for kind in KINDS if kind not in lacks)

    @classmethod
    def of(cls, module: PreTrainedModel, name: str, family: Family, block: Block) -> "ModelSpec":
        """Read the specification of a loaded model from the model and one of its blocks."""
        config: Any = module.config.get_text_config()
        heads: int = config.num_attention_heads
        weight: Tensor = block.output_projection.weight  # pyright: ignore[reportAssignmentType]
        unembedding: Any = module.get_output_embeddings()
        return cls(
            name=name,
            family=module.config.model_type,
            n_layers=config.num_hidden_layers,
            n_heads=heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            d_head=weight.shape[0 if family.transposed else 1] // heads,
            d_model=config.hidden_size,
            d_vocab=unembedding.out_features,
            context=config.max_position_embeddings,
            parallel=family.may_be_parallel and config.use_parallel_residual,
            post_norm=block.attention_post_norm is not None,
            qk_norm=family.qk_norm,
            scores_cap=config.attn_logit_softcapping if family.scores_capped else None,
            logits_cap=config.final_logit_softcapping if family.logits_capped else None,
            attention_only=isinstance(block.mlp, NoMLP),
        )


@dataclass(frozen=True)
class Restart:
    """A run that can be continued from a layer on, repeatedly: the inputs of each block from there."""

    layer: int
    calls: list[tuple[tuple, dict[str, Any]]]


@runtime_checkable
class SiteEdit(Protocol):
    """An edit that depends on its site; `Model.edit` calls `bind` with the site."""

    def bind(self, site: Site, spec: ModelSpec) -> Edit:
        """Return the edit for this site of a model of these sizes."""
        ...
