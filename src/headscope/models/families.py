"""Locations of the parts of an attention layer in each `transformers` model family: one row per family.

docs/models.md lists the checks before a row is added, and shows the current table.
"""

import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from headscope.errors import ModelError
from headscope.models.norms import Norm


class NoMLP(nn.Module):
    """The MLP of an attention-only model: adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(x)


@dataclass(frozen=True)
class Block:
    """The parts of one layer."""

    block: nn.Module
    attention_norm: Norm
    attention: nn.Module
    output_projection: nn.Module
    """Its input is z."""
    attention_post_norm: Norm | None
    """Between the output projection and the residual stream."""
    mlp_norm: Norm
    mlp: nn.Module
    mlp_post_norm: Norm | None

    @property
    def attention_out(self) -> nn.Module:
        """The module whose output attention adds to the residual stream."""
        return self.output_projection if self.attention_post_norm is None else self.attention_post_norm.module

    @property
    def mlp_out(self) -> nn.Module:
        """The module whose output the MLP adds to the residual stream."""
        return self.mlp if self.mlp_post_norm is None else self.mlp_post_norm.module


@dataclass(frozen=True)
class Family:
    """Dotted paths of the parts; those below `blocks` are relative to one block."""

    models: str
    """Common names of the models."""
    blocks: str
    attention_norm: str
    attention: str
    output_projection: str
    """Relative to `attention`."""
    mlp_norm: str
    mlp: str
    final_norm: str
    attention_post_norm: str | None = None
    """A norm between the output projection and the residual stream: attention's output is then not linear in z."""
    mlp_post_norm: str | None = None
    transposed: bool = False
    """Whether weights are stored as [in, out] (GPT-2's Conv1D), not [out, in] (torch's Linear)."""
    qk_norm: bool = False
    """Whether queries and keys are normalised: scores are then not bilinear in the attention norm's output."""
    scores_capped: bool = False
    """Whether its config's `attn_logit_softcapping` applies."""
    logits_capped: bool = False
    """Whether its config's `final_logit_softcapping` applies."""
    may_be_parallel: bool = False
    """Whether its config's `use_parallel_residual` applies."""
    gain_from_one: bool = False
    """Whether the weights of its norms are the gains minus 1."""
    not_mixed: str | None = None
    """Reason why z is not `pattern @ v` with v linear in the normed stream; then there is no DFA by source."""

    def parts(self, block: nn.Module) -> Block:
        """Locate the parts of a block."""

        def part(path: str) -> nn.Module:
            return operator.attrgetter(path)(block)

        def norm(path: str) -> Norm:
            return Norm(part(path), self.gain_from_one)

        return Block(
            block=block,
            attention_norm=norm(self.attention_norm),
            attention=part(self.attention),
            output_projection=part(f"{self.attention}.{self.output_projection}"),
            attention_post_norm=norm(self.attention_post_norm) if self.attention_post_norm else None,
            mlp_norm=norm(self.mlp_norm),
            mlp=part(self.mlp),
            mlp_post_norm=norm(self.mlp_post_norm) if self.mlp_post_norm else None,
        )


_LLAMA = Family(
    models="Llama 1 to 3",
    blocks="model.layers",
    attention_norm="input_layernorm",
    attention="self_attn",
    output_projection="o_proj",
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    final_norm="model.norm",
)
_GEMMA = replace(
    _LLAMA,
    models="Gemma 2",
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    gain_from_one=True,
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        models="GPT-2; TransformerLens checkpoints",
        blocks="transformer.h",
        attention_norm="ln_1",
        attention="attn",
        output_projection="c_proj",
        mlp_norm="ln_2",
        mlp="mlp",
        final_norm="transformer.ln_f",
        transposed=True,
    ),
    "gpt_neox": Family(
        models="Pythia, GPT-NeoX",
        blocks="gpt_neox.layers",
        attention_norm="input_layernorm",
        attention="attention",
        output_projection="dense",
        mlp_norm="post_attention_layernorm",
        mlp="mlp",
        final_norm="gpt_neox.final_layer_norm",
        may_be_parallel=True,
    ),
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, models="Mistral"),
    "qwen2": replace(_LLAMA, models="Qwen 2 and 2.5"),
    "qwen3": replace(_LLAMA, models="Qwen 3", qk_norm=True),
    "gemma2": replace(_GEMMA, scores_capped=True, logits_capped=True),
    "gemma3_text": replace(_GEMMA, models="Gemma 3, 270m and 1b", qk_norm=True, logits_capped=True),
    "gemma3": replace(
        _GEMMA,
        models="Gemma 3, 4b and larger; text alone",
        qk_norm=True,
        blocks="model.language_model.layers",
        final_norm="model.language_model.norm",
    ),
    "afmoe": replace(
        _GEMMA,
        models="Trinity",
        qk_norm=True,
        mlp_norm="pre_mlp_layernorm",
        mlp_post_norm="post_mlp_layernorm",
        gain_from_one=False,
        not_mixed="a gate multiplies what the heads put out, before the output projection",
    ),
    "deepseek_v3": replace(
        _LLAMA,
        models="DeepSeek 3",
        not_mixed="its values are made of a compressed stream with a norm of its own (MLA)",
    ),
}
"""Families by the `model_type` of a model's config.json."""


def family_of(model_type: str) -> Family:
    """Look up a family.

    Raises:
        ModelError: the family is not in the table.
    """
    if model_type not in FAMILIES:
        raise ModelError(
            f"a model of type {model_type!r}",
            expected=f"one of {', '.join(sorted(FAMILIES))}",
            do='add its row to headscope/models/families.py; docs/models.md says how, under "To add a family"',
        )
    return FAMILIES[model_type]
