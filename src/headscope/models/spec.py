"""What is said of a model: its sizes, how its blocks are built, and what an edit of it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from headscope.models.families import Block, Family, NoMLP
from headscope.site import KINDS, AnyKind, Site

Edit = Callable[[Tensor], Tensor]
"""Is given the value at a site, shaped as `Site` says, and returns what is to stand in its place, shaped alike."""

_WITH_MLP: tuple[AnyKind, ...] = ("resid_mid", "mlp_in", "ln2_scale", "mlp_out")


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a model, and what its blocks do that not all do."""

    name: str
    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_vocab: int
    context: int
    """Longest sequence the model was made for, in tokens."""
    parallel: bool
    """Attention and MLP both read `resid_pre`; there is no `resid_mid`."""
    post_norm: bool = False
    """A norm stands between the output projection and the residual stream: `attn_out` is not linear in z."""
    qk_norm: bool = False
    """Queries and keys are normed: scores are not bilinear in what the attention norm puts out."""
    scores_cap: float | None = None
    """Scores are `cap * tanh(scores / cap)`."""
    logits_cap: float | None = None
    """Logits are `cap * tanh(logits / cap)`."""
    attention_only: bool = False
    """There are no MLPs: a layer ends with what attention adds."""

    @property
    def kinds(self) -> tuple[AnyKind, ...]:
        """The sites of a layer; `ln_final_scale` is one of the last layer alone."""
        lacks = _WITH_MLP if self.attention_only else ("resid_mid",) if self.parallel else ()
        return tuple(kind for kind in KINDS if kind not in lacks)

    @classmethod
    def of(cls, module: PreTrainedModel, name: str, family: Family, block: Block) -> "ModelSpec":
        """Of a loaded model, one of whose blocks is given."""
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
    """A run that can be continued from a layer on, again and again: what each block from there was called with."""

    layer: int
    calls: list[tuple[tuple, dict[str, Any]]]


@runtime_checkable
class SiteEdit(Protocol):
    """An edit that must know where it is to be made; `Model.edit` asks it for the edit of its site."""

    def bind(self, site: Site, spec: ModelSpec) -> Edit:
        """The edit for this site of a model of these sizes."""
        ...
