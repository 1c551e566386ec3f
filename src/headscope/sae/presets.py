"""Published recipes, as values of `TrainConfig`; no torch.

`seed-gelu-2l` and `kissane-gpt2` are those of Kissane et al. (2024), by their run names, code and configuration files;
Adam's betas of the first are inferred from a related run. `anthropic-april-2024` is Conerly et al., "Update on how we
train SAEs" (Transformer Circuits Thread, April 2024); its number of latents, batch, buffer, BOS handling and
coefficient (5, of 2, 5 and 10) are our choices.
"""

from dataclasses import replace

from headscope.errors import TrainingError
from headscope.sae.config import TrainConfig

_KISSANE = TrainConfig(
    variant="relu",
    scaling="none",
    center="zero",
    start="random",
    batch=4096,
    buffer=384 * 4096,
    betas=(0.9, 0.99),
    warmup="cosine",
    warmup_steps=1000,
    decay=0.0,
    resample=4,
    exclude_bos=False,
)

PRESETS: dict[str, TrainConfig] = {
    "default": TrainConfig(),
    "seed-gelu-2l": replace(
        _KISSANE,
        d_sae=16_384,
        coefficient=2.0,
        lr=1e-3,
        tokens=2_000_000_000,
        resample_every=50_000,
        resample_by="random",
        dead_after=25_000 * 4096,
        dead_below=1e-7,
    ),
    "kissane-gpt2": replace(
        _KISSANE,
        d_sae=24_576,
        coefficient=1.0,
        lr=1.2e-3,
        tokens=2_000_000_000,
        resample_every=25_000,
        dead_after=12_500 * 4096,
        dead_below=1e-6,
    ),
    "anthropic-april-2024": TrainConfig(
        variant="relu",
        decoder="free",
        scaling="norm",
        center="none",
        start="transpose",
        coefficient=5.0,
        coefficient_warmup=0.05,
        lr=5e-5,
        batch=4096,
        buffer=384 * 4096,
        tokens=200_000 * 4096,
        warmup_steps=0,
        decay=0.2,
        clip=1.0,
        resample=0,
    ),
}
"""Presets by name; `kissane-gpt2` is the one of layer 2."""

KISSANE_GPT2_COEFFICIENTS = (1.8, 0.8, 1.0, 0.9, 1.1, 1.0, 1.1, 1.1, 1.3, 1.2, 1.3, 3.0)
"""L1 coefficient by layer of GPT-2 small."""
_WIDE_LAYERS = (5, 7)  # of GPT-2 small, have twice as many latents
_DEAD_BELOW = {8: 1e-5, 10: 1e-5, 11: 3.16e-6}  # layers whose cutoff differs from that of the others


def preset(name: str, *, model: str | None = None, layer: int | None = None) -> TrainConfig:
    """Return a published recipe; for `kissane-gpt2`, that of the layer if GPT-2 small's layer is given.

    Raises:
        TrainingError: no preset has that name.
    """
    if name not in PRESETS:
        raise TrainingError(f"preset {name!r}", expected=f"one of {', '.join(PRESETS)}", do="change --preset")
    config = PRESETS[name]
    if name == "kissane-gpt2" and layer is not None and _has_own(model, layer):
        wide = 2 if layer in _WIDE_LAYERS else 1
        return replace(
            config,
            coefficient=KISSANE_GPT2_COEFFICIENTS[layer],
            d_sae=wide * config.d_sae,
            dead_below=_DEAD_BELOW.get(layer, config.dead_below),
        )
    return config


def preset_note(name: str, *, model: str | None = None, layer: int | None = None) -> str | None:
    """Return the note on a preset that is for another layer or model than it is used for."""
    if name != "kissane-gpt2" or (layer is not None and _has_own(model, layer)):
        return None
    return (
        "kissane-gpt2 is of GPT-2 small, each layer with its own values; here those of layer 2 hold (coefficient "
        f"{PRESETS[name].coefficient:g}, d_sae {PRESETS[name].d_sae:,}, dead_below {PRESETS[name].dead_below:g}, "
        "unless given). "
        "With --model gpt2 --layer N they are that layer's"
    )


def _has_own(model: str | None, layer: int) -> bool:
    named = (model or "").rstrip("/").rsplit("/")[-1] in ("gpt2", "gpt2-small")
    return named and 0 <= layer < len(KISSANE_GPT2_COEFFICIENTS)
