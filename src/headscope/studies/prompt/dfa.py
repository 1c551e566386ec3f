"""Direct feature attribution (DFA) of a feature on a text, in one call."""

from collections.abc import Sequence

import torch

from headscope.attribution import DFA, HeadWeights, dfa_at
from headscope.models.hf import Model
from headscope.models.load import load_model
from headscope.sae.convert import fitted
from headscope.sae.formats import load_sae
from headscope.sae.model import SAE
from headscope.studies.how.circuit import check_z
from headscope.studies.how.corruptions import prompt
from headscope.studies.prompt.prompts import check_number


def dfa(
    model: Model | str, sae: SAE | str, text: str | Sequence[int], latent: int, *, position: int | None = None
) -> DFA:
    """Attribute a feature's pre-activation at one token of a text to heads and source tokens, exactly.

    With the attention pattern held fixed, `pre = sum over heads and sources of by_source + bias` (Kissane et al., 2024,
    "direct feature attribution").

    Args:
        model: a model, or the name that `load_model` takes.
        sae: a z SAE of the model, or the name that `load_sae` takes.
        text: a text, to which BOS is prepended, or token ids, which are used unchanged.
        latent: the feature.
        position: the token; default: the one with the largest pre-activation.

    Returns:
        A record with `.by_source` [head, source], `.by_head` [head], `.sources` [source], `.bias` and `.pre`.

    Raises:
        ModelError, SAEError: no such model or SAE, or an SAE that does not fit the model or does not read z.
        CorpusError: an empty text, or one longer than the model's context.
        StudyError: no such latent or position.
    """
    model = load_model(model) if isinstance(model, str) else model
    sae = load_sae(sae) if isinstance(sae, str) else sae
    check_z(sae)
    sae = fitted(sae, model).to(model.device).to(model.module.dtype)
    tokens = prompt(model, text)
    with torch.no_grad():
        attention = model.attention(tokens[None], sae.site.layer)
        check_number("latent", latent, sae.d_sae)
        if position is None:
            first = int(len(tokens) > 1 and tokens[0] == model.bos)
            position = first + int(sae.pre_activations(attention.z[0])[first:, latent].argmax())
        check_number("position", position, len(tokens))
        [found] = dfa_at(HeadWeights.of(sae, model), sae, attention, tokens, position, [latent])
    return found
