"""Schedules of the learning rate and of the penalty's coefficient."""

import math

from headscope.sae.config import TrainConfig

_GAIN = 0.01  # change of log lambda per step and unit of log(L0 / target)
_FIRST = 1.0
"""Initial coefficient for steering."""
_DENSE_START = 8.0  # times the target L0
_FALL = 0.6  # share of training over which the steering target falls to the final L0


def rate(config: TrainConfig, step: int) -> float:
    """Return the factor on the learning rate at a step: warm-up, 1, linear decay to zero.

    A cosine warm-up is `0.1 + 0.9 (1 - cos(pi t / warmup_steps)) / 2`, with t counted from the last resampling.
    """
    left = config.n_steps - step
    falling = left / (config.decay * config.n_steps) if config.decay else 1.0
    if not config.warmup_steps:
        return min(1.0, falling)
    if config.warmup == "linear":
        return min(1.0, (step + 1) / config.warmup_steps, falling)
    since = step - max((at for at in config.resampled_at if at <= step), default=0)
    t = min(1.0, since / config.warmup_steps)
    return min(0.1 + 0.45 * (1 - math.cos(math.pi * t)), falling)


def first_coefficient(config: TrainConfig) -> float:
    """Return the penalty's coefficient before the first step; 0 where a variant has none."""
    return _FIRST if config.steered else (config.coefficient or 0.0)


def likely_coefficient(config: TrainConfig, threshold: float) -> float:
    """Estimate the coefficient that makes latents fire above a threshold; steering starts from it.

    With an orthogonal dictionary a penalty of `lambda f` silences activations below `lambda / 2`, and one of `lambda`
    per active latent those below `sqrt(lambda)`.
    """
    return 0.1 * threshold**2 if config.variant == "jumprelu" else 1.5 * threshold


def coefficient_at(config: TrainConfig, step: int, steered: float) -> float:
    """Return the coefficient at a step: the steered one, or the given one times its warm-up."""
    if config.steered or not config.coefficient_warmup:
        return steered
    return steered * min(1.0, step / (config.coefficient_warmup * config.n_steps))


def l0_at(config: TrainConfig, step: int) -> float:
    """Return the target number of active latents at a step.

    Jumprelu and gated start dense, and the number falls, each step by the same factor, to the target: a latent whose
    threshold or gate is closed learns nothing, and one that starts open can learn its feature before it must close.
    The penalty of relu would have to rise so far in the process that the final dictionary is worse.
    """
    if config.variant not in ("jumprelu", "gated"):
        return config.target_l0
    dense = max(1.0, min(_DENSE_START, config.d_sae / (4 * config.target_l0)))
    return config.target_l0 * dense ** max(0.0, 1 - step / (_FALL * config.n_steps))


def steer(config: TrainConfig, coefficient: float, l0: float, step: int) -> float:
    """Return the coefficient after a step: raised where too many latents are active, lowered where too few are."""
    return coefficient * math.exp(_GAIN * math.log(max(l0, 1e-3) / l0_at(config, step)))
