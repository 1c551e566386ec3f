"""Minimum requirements of a training, in memory and passes over the text, checked before it starts."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from headscope.errors import TrainingError
from headscope.memory import available_memory
from headscope.sae.config import TrainConfig

if TYPE_CHECKING:
    import torch

MOST_EPOCHS = 10_000
"""Maximum passes over the text; more suggest a typo."""
_BYTES_A_WEIGHT = 16  # weight, gradient and Adam's two moments, in float32
_BYTES_BUFFERED = 2  # bfloat16
_LIKELY_SPEED = 1e6  # activations per second: more than a small model gives on one GPU


def check_memory(configs: Iterable[TrainConfig], d_in: int, device: "torch.device | str", n_available: int = 0) -> None:
    """Reject SAEs whose weights, gradients, moments and buffer exceed the free memory.

    Args:
        configs: recipes of all SAEs trained together.
        d_in: width of an activation.
        device: where they are trained.
        n_available: activations in the text; the buffer holds at most these.

    Raises:
        TrainingError: they do not fit.
    """
    configs = list(configs)
    n_latents, buffer = sum(c.d_sae for c in configs), min(configs[0].buffer, n_available)
    needed = d_in * (2 * _BYTES_A_WEIGHT * n_latents + _BYTES_BUFFERED * buffer)
    free = _free(device)
    if free is not None and needed > free:
        raise TrainingError(
            f"d_sae = {n_latents:,}{' in all' if len(configs) > 1 else ''}"
            + (f" and a buffer of {buffer:,} activations" if buffer else "")
            + f" of {d_in:,} components: {needed / 1e9:,.1f} GB of memory at least",
            expected=f"at most the {free / 1e9:,.1f} GB that {device} has free",
            do="lower d_sae or buffer" + (", or train fewer SAEs at once" if len(configs) > 1 else ""),
        )


def check_epochs(config: TrainConfig, n_available: int) -> None:
    """Reject a training that reads the text more than `MOST_EPOCHS` times.

    Raises:
        TrainingError: it does.
    """
    epochs, days = config.tokens / max(1, n_available), config.tokens / _LIKELY_SPEED / 86_400
    if epochs > MOST_EPOCHS:
        raise TrainingError(
            f"tokens = {config.tokens:,}: {epochs:,.0f} epochs of the {n_available:,} activations that the text gives, "
            f"{days:,.1f} days at a million a second",
            expected=f"at most {MOST_EPOCHS:,} epochs, {MOST_EPOCHS * n_available:,} tokens",
            do="lower tokens, or use more text",
        )


def _free(device: "torch.device | str") -> int | None:
    """Return the free bytes of a device; None where unknown."""
    if str(device) == "cpu":
        return available_memory()
    if not str(device).startswith("cuda"):
        return None

    import torch

    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
