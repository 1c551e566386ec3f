"""Where the parts of an attention layer lie in each `transformers` model family: one row a family.

To add a family: check that the input of the output projection is `pattern @ value` of each head, concatenated
head-major (no gate or norm between), and that the projection's output is added to the residual stream as it is (no
norm after it). Then add a row, and a random-weight model of it to `tests/test_models.py`.
"""

from dataclasses import dataclass

from headscope.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Dotted paths of the parts; those below `blocks` are relative to one block."""

    blocks: str
    attention_norm: str
    attention: str
    output_projection: str
    """Relative to `attention`; its input is z."""
    mlp: str
    final_norm: str
    transposed: bool = False
    """GPT-2's Conv1D keeps weights as [in, out]; torch's Linear as [out, in]."""


FAMILIES: dict[str, Family] = {
    "gpt2": Family("transformer.h", "ln_1", "attn", "c_proj", "mlp", "transformer.ln_f", transposed=True),
    "gpt_neox": Family("gpt_neox.layers", "input_layernorm", "attention", "dense", "mlp", "gpt_neox.final_layer_norm"),
    "llama": Family("model.layers", "input_layernorm", "self_attn", "o_proj", "mlp", "model.norm"),
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
