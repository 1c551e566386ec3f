"""Where the parts of an attention layer lie in each `transformers` model family: one row a family.

To add a family: check that the input of the output projection is `pattern @ value` of each head, concatenated
head-major (no gate or norm between), that the outputs of the projection and of the MLP are added to the residual stream
as they are (no norm after them), that its norms are LayerNorms or have a `variance_epsilon`, and that its attention
calls an `AttentionInterface` function. Then add a row, and a random-weight model of it to `tests/test_models.py` with
its parts in `tests/naive_model.py`.
"""

import operator
from dataclasses import dataclass

from torch import nn

from headscope.errors import ModelError


@dataclass(frozen=True)
class Block:
    """The parts of one layer."""

    block: nn.Module
    attention_norm: nn.Module
    attention: nn.Module
    output_projection: nn.Module
    """Its input is z."""
    mlp_norm: nn.Module
    mlp: nn.Module


@dataclass(frozen=True)
class Family:
    """Dotted paths of the parts; those below `blocks` are relative to one block."""

    blocks: str
    attention_norm: str
    attention: str
    output_projection: str
    """Relative to `attention`."""
    mlp_norm: str
    mlp: str
    final_norm: str
    transposed: bool = False
    """GPT-2's Conv1D keeps weights as [in, out]; torch's Linear as [out, in]."""

    def parts(self, block: nn.Module) -> Block:
        """Find the parts of a block."""
        attention = operator.attrgetter(self.attention)(block)
        return Block(
            block=block,
            attention_norm=operator.attrgetter(self.attention_norm)(block),
            attention=attention,
            output_projection=operator.attrgetter(self.output_projection)(attention),
            mlp_norm=operator.attrgetter(self.mlp_norm)(block),
            mlp=operator.attrgetter(self.mlp)(block),
        )


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
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
        blocks="gpt_neox.layers",
        attention_norm="input_layernorm",
        attention="attention",
        output_projection="dense",
        mlp_norm="post_attention_layernorm",
        mlp="mlp",
        final_norm="gpt_neox.final_layer_norm",
    ),
    "llama": Family(
        blocks="model.layers",
        attention_norm="input_layernorm",
        attention="self_attn",
        output_projection="o_proj",
        mlp_norm="post_attention_layernorm",
        mlp="mlp",
        final_norm="model.norm",
    ),
}
"""By the `model_type` of a model's config.json."""


def family_of(model_type: str) -> Family:
    """Look up a family.

    Raises:
        ModelError: the family is not in the table.
    """
    if model_type not in FAMILIES:
        raise ModelError(
            f"a model of type {model_type!r}",
            expected=f"one of {', '.join(sorted(FAMILIES))}",
            do="add its row to headscope/models/families.py, which says what to check first",
        )
    return FAMILIES[model_type]
