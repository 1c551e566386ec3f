"""What the heads of a model do on text without meaning: previous-token and induction scores.

Olsson et al. (2022), https://transformer-circuits.pub/2022/in-context-learning-and-induction-heads.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.errors import ModelError
from headscope.models.hf import Model


@dataclass(frozen=True)
class HeadScores:
    """Mean attention on `[BOS, r(n), r(n)]`, r drawn uniformly from the vocabulary without the BOS."""

    previous_token: Float[Tensor, "layer head"]
    """Attention from d to d - 1, over d >= 2."""
    induction: Float[Tensor, "layer head"]
    """Attention from d in the second copy to d - n + 1, the token after the first copy of d's token."""
    copy_loss: float
    """Nats a token on the second copy, from its second token on."""
    n_sequences: int
    n: int
    """Tokens in each copy. A head that spreads its attention evenly scores about 1 / (1.5 n)."""

    def best(self, name: str) -> tuple[str, float]:
        """The head with the largest score, e.g. `("1.3", 0.84)`; name is a field of this record."""
        scores: Tensor = getattr(self, name)
        layer, head = divmod(int(scores.argmax()), scores.shape[1])
        return f"{layer}.{head}", float(scores[layer, head])


def repeated_tokens(model: Model, n: int, n_sequences: int, seed: int = 0) -> Int[Tensor, "sequence position"]:
    """`[BOS, r(n), r(n)]` for random r; no token of r is the BOS."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(0, model.spec.d_vocab - 1, (n_sequences, n), generator=generator)
    half += half >= model.bos
    start = torch.full((n_sequences, 1), model.bos)
    return torch.cat([start, half, half], dim=1).to(model.device)


def head_scores(model: Model, *, n: int = 100, n_sequences: int = 32, seed: int = 0) -> HeadScores:
    """Score every head of every layer.

    Raises:
        ModelError: 2n + 1 tokens do not fit the model's context.
    """
    if 2 * n + 1 > model.spec.context:
        raise ModelError(
            f"two copies of {n} tokens", expected=f"at most {model.spec.context} positions in all", do="lower n"
        )
    tokens = repeated_tokens(model, n, n_sequences, seed)
    second = torch.arange(n + 1, 2 * n + 1, device=model.device)
    previous, induction = [], []
    for layer in range(model.spec.n_layers):
        pattern = model.attention(tokens, layer).pattern.mean(0)
        previous.append(pattern[:, 2:].diagonal(1, 1, 2).mean(-1))
        induction.append(pattern[:, second, second - n + 1].mean(-1))
    copy_loss = model.losses(tokens)[:, n + 1 :].mean().item()
    return HeadScores(torch.stack(previous), torch.stack(induction), copy_loss, n_sequences, n)
