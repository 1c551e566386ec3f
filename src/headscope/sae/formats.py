"""SAEs as files: SAELens' folder of `cfg.json` and `sae_weights.safetensors`, read and written without SAELens.

`sae_lens.SAE.load_from_disk(folder)` opens what is written here, and `load_sae(folder)` opens what SAELens 6 writes
for its standard, jumprelu and topk architectures. Nothing is unpickled.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from headscope.artefact import atomic_write, file_hash, new_folder, read_json, write_json
from headscope.errors import HeadscopeError, SAEError
from headscope.sae.model import SAE, Activation, JumpReLU, ReLU, TopK
from headscope.site import Site

WEIGHTS = "sae_weights.safetensors"
_BUNDLED = Path(__file__).parent
_SAELENS_VERSION = "6.54.12"  # the version of SAELens whose file format this is


def save_sae(sae: SAE, folder: Path, *, overwrite: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Write an SAE as a SAELens folder, atomically.

    Args:
        sae: what to write.
        folder: must be new or empty, unless `overwrite`.
        overwrite: replace what is there.
        dtype: of the numbers on disk; they are always read as float32.

    Raises:
        OutputError: the folder holds something, or cannot be written.
    """
    with new_folder(folder, overwrite=overwrite) as scratch:
        tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        if isinstance(sae.activation, JumpReLU):
            tensors["threshold"] = sae.activation.threshold
        content = save({name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()})
        with atomic_write(scratch / WEIGHTS) as file:
            file.write(content)
        write_json(scratch / "cfg.json", _config(sae))
    return Path(folder)


def _config(sae: SAE) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architecture": sae.activation.name,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if sae.site.kind == "z" else "none",
    }
    if isinstance(sae.activation, TopK):
        config |= {"k": sae.activation.k, "rescale_acts_by_decoder_norm": False}
    config["metadata"] = sae.metadata | {
        "sae_lens_version": _SAELENS_VERSION,
        "model_name": sae.model_name,
        "hook_name": sae.site.hook_name,
        "hook_head_index": None,
    }
    return config


def sae_folder(name: str) -> Path:
    """The folder of a bundled SAE (e.g. `tiny-z1`) or of a path.

    Raises:
        SAEError: there is none.
    """
    bundled = _BUNDLED / name
    if "/" not in name and (bundled / "cfg.json").is_file():
        return bundled
    path = Path(name)
    if not (path / "cfg.json").is_file() or not (path / WEIGHTS).is_file():
        known = ", ".join(sorted(p.parent.name for p in _BUNDLED.glob("*/cfg.json"))) or "none"
        raise SAEError(
            f"no SAE at {name!r}",
            expected=f"a folder with cfg.json and {WEIGHTS}, or a bundled one ({known})",
            do="check the path, or train one with `headscope train`",
        )
    return path


def load_sae(name: str | Path) -> SAE:
    """Read an SAE from a SAELens folder, or a bundled one by name; all numbers become float32.

    Raises:
        SAEError: files that are missing, truncated, of an architecture not read here, or of other sizes.
    """
    folder = sae_folder(str(name))
    try:
        config = read_json(folder / "cfg.json")
        tensors = {key: t.float() for key, t in load_file(folder / WEIGHTS).items()}
        metadata = dict(config.get("metadata") or {})
        sae = SAE(
            W_enc=tensors["W_enc"],
            b_enc=tensors["b_enc"],
            W_dec=tensors["W_dec"],
            b_dec=tensors["b_dec"],
            activation=_activation(config, tensors),
            site=_site(metadata["hook_name"], folder),
            model_name=metadata.get("model_name") or "unknown",
            apply_b_dec_to_input=config["apply_b_dec_to_input"],
            metadata=metadata,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise SAEError(
            f"cannot read the SAE in {folder}: {type(error).__name__} {error}",
            expected=f"cfg.json and {WEIGHTS} as SAELens 6 writes them",
            do="copy or train it again",
        ) from error
    _check(sae, config, folder)
    return _unscaled(sae, config)


def _site(hook_name: str, folder: Path) -> Site:
    try:
        return Site.from_hook_name(hook_name)
    except HeadscopeError as error:
        raise SAEError(f"{folder}: {error.got}", expected=error.expected, do=error.do) from error


def _activation(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Activation:
    match config["architecture"]:
        case "standard":
            return ReLU()
        case "jumprelu":
            return JumpReLU(tensors["threshold"])
        case "topk":
            return TopK(int(config["k"]))
        case other:
            raise SAEError(
                f"an SAE of architecture {other!r}",
                expected="standard, jumprelu or topk",
                do="save it for inference first (SAELens: save_inference_model)",
            )


def _check(sae: SAE, config: dict[str, Any], folder: Path) -> None:
    sizes = (config.get("d_in"), config.get("d_sae"))
    if sizes != (sae.d_in, sae.d_sae):
        raise SAEError(
            f"{folder}: weights of {sae.d_in} x {sae.d_sae}",
            expected=f"{sizes[0]} x {sizes[1]}, as cfg.json says",
            do="copy or train it again",
        )
    if config.get("normalize_activations", "none") != "none":
        raise SAEError(
            f"{folder}: normalize_activations {config['normalize_activations']!r}",
            expected="'none'",
            do="fold the normalisation into the weights first (SAELens: fold_activation_norm_scaling_factor)",
        )


def _unscaled(sae: SAE, config: dict[str, Any]) -> SAE:
    """Fold SAELens' `rescale_acts_by_decoder_norm` (f scaled by the decoder norms, then unscaled) into the weights."""
    if not config.get("rescale_acts_by_decoder_norm", False):
        return sae
    norms = sae.W_dec.norm(dim=1)
    return replace(sae, W_enc=sae.W_enc * norms, b_enc=sae.b_enc * norms, W_dec=sae.W_dec / norms[:, None])


def sae_hash(name: str | Path) -> str:
    """SHA-256 of the weights file."""
    return file_hash(sae_folder(str(name)) / WEIGHTS)
