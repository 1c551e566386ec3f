"""Validation of token ids for a model."""

import weakref

import torch
from torch import Tensor

from headscope.errors import ModelError


class TokenCheck:
    """Rejects tokens that a model cannot read, or not as intended.

    Beyond its context a model with rotary positions still computes, and on an accelerator an id outside the vocabulary
    kills the process; so this is checked before each run. It synchronises with the accelerator once for the same
    tokens, however often they are run.
    """

    def __init__(self, name: str, context: int, n_ids: int) -> None:
        """Make a check for a model of this name, context length and vocabulary size."""
        self._name, self._context, self._n_ids = name, context, n_ids
        self._seen: tuple[weakref.ref[Tensor], int] | None = None  # the last tokens, and their version

    def __call__(self, tokens: Tensor, attended: Tensor | None = None) -> None:
        """Check the tokens of one run.

        Args:
            tokens: must be ids `[batch, position]`.
            attended: must be False at padding, which does not count for the context.

        Raises:
            ModelError: they are not, there are none, a sequence is longer than the context, or an id is outside the
                vocabulary.
        """
        self._check_shape(tokens, attended)
        length = tokens.shape[1]
        if length > self._context and attended is not None:
            length = int(attended.sum(1).max())
        if length > self._context:
            raise ModelError(
                f"{length:,} tokens in a sequence",
                expected=f"at most {self._context:,}, the context of {self._name}",
                do="cut the text, or lower --block-size",
            )
        self._check_ids(tokens)

    def _check_shape(self, tokens: Tensor, attended: Tensor | None) -> None:
        if not isinstance(tokens, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ModelError(
                f"tokens of {type(tokens).__name__}",
                expected="a tensor of token ids [batch, position], in int64 or int32",
                do="pass torch.tensor([ids]), one row for each sequence",
            )
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ModelError(
                f"tokens of {tokens.dtype} in {tokens.ndim} dimensions",
                expected="token ids [batch, position], in int64 or int32",
                do="pass torch.tensor([ids]), one row for each sequence",
            )
        if attended is not None and (attended.shape != tokens.shape or attended.dtype != torch.bool):
            raise ModelError(
                f"`attended` of {attended.dtype} {tuple(attended.shape)}",
                expected=f"a mask, torch.bool {tuple(tokens.shape)}, as the tokens are",
                do="pass one that is False at padding alone",
            )
        if not tokens.numel():
            raise ModelError(
                f"a batch of {len(tokens)} sequences of {tokens.shape[1]} tokens",
                expected="one sequence or more, of one token or more",
                do="leave empty text out, or start it with the BOS, model.bos",
            )

    def _check_ids(self, tokens: Tensor) -> None:
        counts = not tokens.is_inference()  # its in-place changes
        if counts and self._seen is not None and self._seen[0]() is tokens and self._seen[1] == tokens._version:
            return
        low, high = torch.stack(tokens.aminmax()).tolist()
        if low < 0 or high >= self._n_ids:
            raise ModelError(
                f"the token id {low if low < 0 else high:,}",
                expected=f"0 to {self._n_ids - 1:,}: the vocabulary of {self._name} has {self._n_ids:,} tokens",
                do="tokenise the text with this model's own tokenizer",
            )
        self._seen = (weakref.ref(tokens), tokens._version) if counts else None
