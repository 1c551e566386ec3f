"""dictionary_learning (Marks, Karvonen, Mueller): a folder of `ae.pt`, a state dict, and `config.json`.

The result computes what its own `load_dictionary` gives: the decoder of an `AutoEncoder` is normalised on loading,
BatchTopK takes its threshold, `AutoEncoderTopK` the k largest of each token. Files of `AutoEncoderTopK` have a
`threshold`, which is unused, only since December 2024, and `k` among the weights only since October 2024; the
configuration always has k.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headscope.sae.formats.files import (
    Files,
    Format,
    Json,
    Stated,
    check_names,
    chosen_model,
    chosen_site,
    refusal,
    site_of,
    tensors_of,
    unsupported,
    whole_number,
)
from headscope.sae.model import MODULE_OUTPUT, SAE, Gated, JumpReLU, ReLU, TopK
from headscope.site import Kind, Site

_WEIGHTS, _CONFIG = "ae.pt", "config.json"
_NAMED = re.compile(
    r"(attn_out|attention_out|mlp_out|resid_pre|resid_mid|resid_post|hook_z|attn_z|z)_?(?:layer_?)?(\d+)"
)
_KINDS: dict[str, Kind] = {
    "attn_out": "attn_out",
    "attention_out": "attn_out",
    "mlp_out": "mlp_out",
    "resid_pre": "resid_pre",
    "resid_mid": "resid_mid",
    "resid_post": "resid_post",
    "hook_z": "z",
    "attn_z": "z",
    "z": "z",
}
_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
_DIRECT = {"W_enc", "b_enc", "W_dec", "b_dec"}


def find(path: Path) -> tuple[Path, Path | None] | None:
    """Find a folder with both files."""
    found = path / _WEIGHTS, path / _CONFIG
    return found if all(file.is_file() for file in found) else None


def read(files: Files, stated: Stated) -> SAE:
    """Read a folder.

    Raises:
        SAEError: an unsupported class, a k or sizes that differ from the configuration's, or no known site.
        UNREADABLE: damaged files.
    """
    config, tensors = files.settings(), tensors_of(files.weights)
    trainer: Json = config["trainer"]
    name = trainer["dict_class"]
    if name not in _CLASSES:
        raise refusal(files, name)
    read_from = (config.get("buffer") or {}).get("io", "out")
    if read_from != "out":
        raise unsupported(files, f"buffer.io {read_from!r}", expected="'out': one that reads a module's output")
    expected, parts = _CLASSES[name]
    check_names(tensors, expected, files, optional=_OPTIONAL.get(name, ()))
    sae = SAE(
        **parts(tensors | _k_of(files, trainer, tensors)),
        site=chosen_site(files, _site(files, trainer), stated),
        model_name=chosen_model(trainer.get("lm_name"), stated),
        metadata={
            "z_convention": "raw",
            "context_size": (config.get("buffer") or {}).get("ctx_len"),
            "training": {"config": trainer},
            **({} if _is_hook(trainer) else {"reads": MODULE_OUTPUT}),
        },
    )
    sizes = tuple(trainer.get(key, own) for key, own in (("activation_dim", sae.d_in), ("dict_size", sae.d_sae)))
    if sizes != (sae.d_in, sae.d_sae):
        raise unsupported(
            files,
            f"weights of {sae.d_in} x {sae.d_sae}",
            expected=f"{sizes[0]} x {sizes[1]}, as {_CONFIG} says",
            do="copy both files again",
        )
    return _unit_norm(files, sae) if name == "AutoEncoder" else sae


def _k_of(files: Files, trainer: Json, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the number of active latents by the weights and the configuration, which must agree; empty without one.

    Raises:
        SAEError: they do not, or it is not a whole number.
    """
    said = None if trainer.get("k") is None else whole_number(files, "k", trainer["k"])
    if "k" in tensors and int(tensors["k"]) != said:
        raise unsupported(
            files,
            f"k = {int(tensors['k'])} in {_WEIGHTS}",
            expected=f"{said}, as {_CONFIG} says",
            do="copy both files again",
        )
    return {} if said is None else {"k": torch.tensor(said)}


def _is_hook(trainer: Json) -> bool:
    """Whether the activation is named by a TransformerLens hook, rather than by a module whose output was taken."""
    return str(trainer.get("submodule_name") or "").startswith("blocks.")


def _unit_norm(files: Files, sae: SAE) -> SAE:
    """Fold decoder norms other than 1 into the encoder.

    Raises:
        SAEError: a decoder row is 0.
    """
    norms = sae.W_dec.norm(dim=1)
    if zero := (norms == 0).nonzero()[:, 0].tolist():
        raise unsupported(
            files,
            f"the decoder of {len(zero)} latents is 0: {', '.join(map(str, zero[:5]))}",
            expected="decoder vectors that can be given unit norm, as dictionary_learning does when it loads them",
            do="leave these latents out: they add nothing to the reconstruction",
        )
    if torch.isclose(norms, torch.ones_like(norms)).all():
        return sae
    return replace(sae, W_enc=sae.W_enc * norms, b_enc=sae.b_enc * norms, W_dec=sae.W_dec / norms[:, None])


def _site(files: Files, trainer: Json) -> Site | None:
    """Return the site by `submodule_name`, which users choose freely; None where it is unknown."""
    named, layer = str(trainer.get("submodule_name") or ""), trainer.get("layer")
    if _is_hook(trainer):
        return site_of(named, files)
    if named in _KINDS and isinstance(layer, int):
        return Site(_KINDS[named], layer)
    found = _NAMED.fullmatch(named)
    if found is None:
        return None
    if isinstance(layer, int) and layer != int(found.group(2)):
        raise unsupported(files, f"submodule_name {named!r}", expected=f"layer {layer}, as it says too")
    return Site(_KINDS[found.group(1)], int(found.group(2)))


Parts = dict[str, Any]


def _linear(t: dict[str, Tensor], b_dec: str) -> Parts:
    return {
        "W_enc": t["encoder.weight"].T,
        "b_enc": t["encoder.bias"],
        "W_dec": t["decoder.weight"].T,
        "b_dec": t[b_dec],
    }


def _direct(t: dict[str, Tensor]) -> Parts:
    return {name: t[name] for name in _DIRECT}


def _gated(t: dict[str, Tensor]) -> Parts:
    return {
        "W_enc": t["encoder.weight"].T * t["r_mag"].exp(),
        "b_enc": t["mag_bias"],
        "W_dec": t["decoder.weight"].T,
        "b_dec": t["decoder_bias"],
        "activation": Gated.of_paths(t["r_mag"], t["mag_bias"], t["gate_bias"]),
    }


def _same_threshold(t: dict[str, Tensor], n: int) -> JumpReLU:
    return JumpReLU(t["threshold"].expand(n).contiguous())


_CLASSES: dict[str, tuple[set[str], Callable[[dict[str, Tensor]], Parts]]] = {
    "AutoEncoder": (_LINEAR | {"bias"}, lambda t: _linear(t, "bias") | {"activation": ReLU()}),
    "AutoEncoderNew": (
        _LINEAR | {"decoder.bias"},
        lambda t: _linear(t, "decoder.bias") | {"activation": ReLU(), "apply_b_dec_to_input": False},
    ),
    "GatedAutoEncoder": (
        {"encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "mag_bias", "gate_bias"},
        _gated,
    ),
    "AutoEncoderTopK": (
        _LINEAR | {"b_dec"},
        lambda t: _linear(t, "b_dec") | {"activation": TopK(int(t["k"]))},
    ),
    "BatchTopKSAE": (
        _LINEAR | {"b_dec", "threshold"},
        lambda t: _linear(t, "b_dec") | {"activation": _same_threshold(t, len(t["encoder.bias"]))},
    ),
    "MatryoshkaBatchTopKSAE": (
        _DIRECT | {"threshold", "group_sizes"},
        lambda t: _direct(t) | {"activation": _same_threshold(t, len(t["b_enc"]))},
    ),
    "JumpReluAutoEncoder": (
        _DIRECT | {"threshold"},
        lambda t: _direct(t) | {"activation": JumpReLU(t["threshold"]), "apply_b_dec_to_input": False},
    ),
}
"""By class: its tensors, and their meaning here."""
_OPTIONAL = {
    "AutoEncoderTopK": ("k", "threshold"),
    "BatchTopKSAE": ("k",),
    "MatryoshkaBatchTopKSAE": ("k",),
}
"""By class: tensors that are missing in some versions, and are in the configuration or not needed."""

FORMAT = Format(
    name="dictionary_learning",
    layout=f"folder: `{_WEIGHTS}`, `{_CONFIG}`",
    find=find,
    read=read,
    architectures={
        "AutoEncoder": "ReLU; the decoder norms go to the encoder",
        "AutoEncoderNew": "ReLU, b_dec not applied to the input",
        "GatedAutoEncoder": "Gated",
        "AutoEncoderTopK": "TopK; k from the configuration in files before October 2024",
        "BatchTopKSAE": "JumpReLU, by its threshold",
        "MatryoshkaBatchTopKSAE": "JumpReLU, by its threshold",
        "JumpReluAutoEncoder": "JumpReLU, b_dec not applied to the input",
    },
    refused={
        "CrossCoder": "it reads several layers or models",
        "IdentityDict": "it has no weights",
    },
    convention="the model's own; the site is taken from `submodule_name` where it is like `attn_out_layer_3` (also "
    "`mlp_out`, `resid_post`, `z`) or a hook name, and must be said otherwise",
)
