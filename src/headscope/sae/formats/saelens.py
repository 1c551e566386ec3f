"""SAELens: a folder of `cfg.json` and `sae_weights.safetensors`, read and written without SAELens.

`sae_lens.SAE.load_from_disk(folder)` opens the folders written here. Folders of versions 3 to 6 can be read, including
training checkpoints. All that affects the computation follows its code (6.54): names of version 3 to 5 and their
defaults, `rescale_acts_by_decoder_norm`, and the activation scaling that is folded in at the end of training.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from headscope.artefact import atomic_write, new_folder, read_json, write_json
from headscope.models.placing import dtype_of
from headscope.names import exists, relative
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
from headscope.sae.formats.saelens_settings import check_settings
from headscope.sae.model import MODEL_PATH, PROCESSED, SAE, Activation, Gated, JumpReLU, ReLU, TopK

WEIGHTS = "sae_weights.safetensors"
CONFIG = "cfg.json"
_LOADED_WITH = ("center_unembed", "center_writing_weights", "fold_ln", "fold_value_biases")
"""TransformerLens' weight processing options whose effect on z, or on what is computed from z, is known."""
_SCALER = "activation_scaler.json"  # in a training checkpoint
_VERSION = "6.54.12"  # SAELens version of the format that is written
_NORM_FLOOR = 1e-8  # lower bound of decoder norms that are divided by, as in SAELens

_RENAMED = {  # version 3 to 5 -> 6
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_OF_METADATA = (
    "model_name",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "hook_name",
    "hook_head_index",
    "hook_name_out",
    "prepend_bos",
    "exclude_special_tokens",
    "context_size",
    "dataset_path",
    "neuronpedia_id",
    "sae_lens_version",
    "sae_lens_training_version",
)


def find(path: Path) -> tuple[Path, Path | None] | None:
    """Find a folder with both files."""
    found = path / WEIGHTS, path / CONFIG
    return found if all(file.is_file() for file in found) else None


# -------------------------------------------------------------------------------------------------------------- writing
def save_sae(
    sae: SAE,
    folder: Path,
    *,
    overwrite: bool = False,
    dtype: str | torch.dtype = torch.float32,
    place: Path | None = None,
) -> Path:
    """Write an SAE as a SAELens folder, atomically.

    Args:
        sae: the SAE to write.
        folder: must be new or empty, unless `overwrite`.
        overwrite: replace existing output.
        dtype: dtype on disk, such as `bfloat16`; weights are always read as float32.
        place: final location of the folder, to which the path of a model folder is relative; `folder` by default.

    Raises:
        ModelError: no such dtype.
        OutputError: the folder holds something, or cannot be written.
    """
    dtype = dtype_of(dtype)
    with new_folder(folder, overwrite=overwrite) as scratch:
        content = save({name: t.detach().to("cpu", dtype).contiguous() for name, t in _tensors(sae).items()})
        with atomic_write(scratch / WEIGHTS) as file:
            file.write(content)
        write_json(scratch / CONFIG, _config(sae, Path(place or folder)))
    return Path(folder)


def _tensors(sae: SAE) -> dict[str, Tensor]:
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    match sae.activation:
        case Gated(threshold):  # exp(r_mag) is folded into W_enc, so r_mag is 0
            return tensors | {"b_mag": sae.b_enc, "b_gate": sae.b_enc - threshold, "r_mag": torch.zeros_like(threshold)}
        case JumpReLU(threshold):
            return tensors | {"b_enc": sae.b_enc, "threshold": threshold}
        case _:
            return tensors | {"b_enc": sae.b_enc}


def _config(sae: SAE, folder: Path) -> Json:
    config: Json = {
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
    return config | {"metadata": _metadata(sae, folder)}


def _metadata(sae: SAE, folder: Path) -> Json:
    """Return the SAE's metadata; a model folder is recorded by its path and by its path relative to `folder`."""
    name = sae.model_name
    if Path(name).is_absolute():
        name = str(next(filter(exists, sae.model_places), name))
    own = {"sae_lens_version": _VERSION, "model_name": name, "hook_name": sae.site.hook_name, "hook_head_index": None}
    metadata = sae.metadata | own | {MODEL_PATH: relative(name, folder)}
    return {key: value for key, value in metadata.items() if key != MODEL_PATH or value is not None}


# -------------------------------------------------------------------------------------------------------------- reading
def read(files: Files, stated: Stated) -> SAE:
    """Read a folder of SAELens 3 to 6.

    Raises:
        SAEError: an unsupported architecture, version or setting.
        UNREADABLE: damaged files.
    """
    config, metadata = _modern(files)
    architecture = config["architecture"]
    if architecture not in ARCHITECTURES:
        raise refusal(files, architecture)
    check_settings(files, config, metadata)
    tensors = _weights(files, architecture)
    hook_name = metadata.get("hook_name")
    site = chosen_site(files, site_of(hook_name, files) if hook_name else None, stated)
    convention = _convention(files, metadata.get("model_from_pretrained_kwargs") or {}, site.kind)
    sae = SAE(
        W_enc=tensors["W_enc"] if architecture != "gated" else tensors["W_enc"] * tensors["r_mag"].exp(),
        b_enc=tensors["b_mag" if architecture == "gated" else "b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        activation=_activation(files, architecture, config, tensors),
        site=site,
        model_name=chosen_model(metadata.get("model_name"), stated),
        apply_b_dec_to_input=_applied(files, config),
        metadata=convention | _trained(config) | metadata,
    )
    sizes = (config.get("d_in"), config.get("d_sae"))
    if sizes != (sae.d_in, sae.d_sae):
        raise unsupported(
            files,
            f"weights of {sae.d_in} x {sae.d_sae}",
            expected=f"{sizes[0]} x {sizes[1]}, as cfg.json says",
            do="copy or train it again",
        )
    return _folded(files, sae, config)


def _modern(files: Files) -> tuple[Json, Json]:
    """Return the configuration in the terms of version 6, and its metadata.

    Raises:
        SAEError: an unknown version.
    """
    config = files.settings()
    nested = dict(config.get("metadata") or {})
    version = config.get("sae_lens_version") or nested.get("sae_lens_version")
    major = str(version).split(".")[0] if version else ""
    if version and major not in ("3", "4", "5", "6"):
        raise unsupported(
            files,
            f"cfg.json of SAELens {version}",
            expected="version 3 to 6",
            do="save it with SAELens 6, or update headscope",
        )
    if major == "6":
        return config, nested | dict(files.overrides)
    config = {_RENAMED.get(name, name): value for name, value in config.items()}
    metadata = nested | {name: config[name] for name in _OF_METADATA if name in config}
    architecture = config.setdefault("architecture", "standard")
    activation, given = config.get("activation_fn", "relu"), config.get("activation_fn_kwargs") or {}
    if activation == "topk" and architecture in ("standard", "topk"):
        config |= {"architecture": "topk", "k": given.get("k", config.get("k"))}
    normalised = config.get("normalize_activations")
    if isinstance(normalised, bool) or normalised is None:
        config["normalize_activations"] = "expected_average_only_in" if normalised else "none"
    return config, metadata


def _weights(files: Files, architecture: str) -> dict[str, Tensor]:
    tensors = tensors_of(files.weights)
    scaling = tensors.pop("scaling_factor", None)  # versions 3 and 4: all ones if unused
    if scaling is not None and not (scaling == 1).all():
        raise unsupported(
            files, "a fine-tuned scaling_factor of each latent", expected="weights that have it folded in"
        )
    if architecture == "jumprelu" and "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if "topk_threshold" in tensors:  # one number: BatchTopK's threshold at the end of training
        tensors["topk_threshold"] = tensors["topk_threshold"].reshape(1)
    expected = {"W_enc", "W_dec", "b_dec"} | set(_OWN_TENSORS[architecture])
    check_names(tensors, expected, files)
    return tensors


def _activation(files: Files, architecture: str, config: Json, tensors: dict[str, Tensor]) -> Activation:
    match architecture:
        case "standard":
            return ReLU()
        case "jumprelu":
            return JumpReLU(tensors["threshold"])
        case "topk":
            return TopK(whole_number(files, "k", config["k"]))
        case "gated":
            return Gated.of_paths(tensors["r_mag"], tensors["b_mag"], tensors["b_gate"])
        case _:
            return JumpReLU(tensors["topk_threshold"].expand(len(tensors["b_enc"])).contiguous())


def _trained(config: Json) -> Json:
    """Return the training architecture named by a checkpoint's configuration, where it is read as another."""
    if config["architecture"] not in _BY_THRESHOLD:
        return {}
    return {"training": {"config": {key: config[key] for key in ("architecture", "k") if key in config}}}


def _applied(files: Files, config: Json) -> bool:
    applied = config.get("apply_b_dec_to_input", True)
    if not isinstance(applied, bool):
        raise unsupported(files, f"apply_b_dec_to_input {applied!r}", expected="true or false")
    return applied


def _convention(files: Files, loaded_with: Json, kind: str) -> Json:
    """Return the convention of the model's weights; SAELens does not process them by default.

    Raises:
        SAEError: a combination whose constant is neither 0 nor c.
    """
    for option in sorted(loaded_with):
        if option not in _LOADED_WITH and loaded_with[option] is True:
            raise unsupported(
                files,
                f"activations of a model loaded with {option}",
                expected=f"no processing of weights but {', '.join(_LOADED_WITH)}",
            )
    values, norm = loaded_with.get("fold_value_biases", False), loaded_with.get("fold_ln", False)
    if kind != "z":
        return {"z_convention": PROCESSED} if loaded_with.get("center_writing_weights", False) else {}
    if values and not norm:
        raise unsupported(
            files,
            "z of a model with fold_value_biases and without fold_ln",
            expected="both or neither, so that z is the model's own or less c",
        )
    return {"z_convention": PROCESSED} if values else {}


def _folded(files: Files, sae: SAE, config: Json) -> SAE:
    """Fold the activation scaling, then `rescale_acts_by_decoder_norm`, into the weights.

    With the scaling s, `pre(s x)` as a function of x: W_enc s, W_dec / s, b_dec / s; b_enc stays.
    """
    rescaled = config["architecture"] in _RESCALED and config.get("rescale_acts_by_decoder_norm", False)
    if config.get("normalize_activations", "none") == "expected_average_only_in":
        s, activation = _scaling(files), sae.activation
        if rescaled and isinstance(activation, JumpReLU):  # its threshold is in units of the decoder norm
            activation = JumpReLU(activation.threshold / s)
        sae = replace(sae, W_enc=sae.W_enc * s, W_dec=sae.W_dec / s, b_dec=sae.b_dec / s, activation=activation)
    if rescaled:
        norms = sae.W_dec.norm(dim=1).clamp_min(_NORM_FLOOR)
        sae = replace(sae, W_enc=sae.W_enc * norms, b_enc=sae.b_enc * norms, W_dec=sae.W_dec / norms[:, None])
    return sae


def _scaling(files: Files) -> float:
    """Return the factor on activations in training.

    Raises:
        SAEError: it is not known.
    """
    beside = files.weights.parent / _SCALER
    s = files.scaling
    if s is None and beside.is_file():
        s = read_json(beside).get("scaling_factor")
    if not isinstance(s, int | float) or not s > 0:
        raise unsupported(
            files,
            "normalize_activations 'expected_average_only_in', and no scaling factor",
            expected=f"the factor folded into the weights, in {_SCALER}, or in SAELens' registry",
            do="fold it first (SAELens: fold_activation_norm_scaling_factor), or name the SAE by its release",
        )
    return float(s)


_OWN_TENSORS = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "batchtopk": ("b_enc", "topk_threshold"),
    "matryoshka_batchtopk": ("b_enc", "topk_threshold"),
}
_BY_THRESHOLD = ("batchtopk", "matryoshka_batchtopk")
_RESCALED = ("topk", *_BY_THRESHOLD)

ARCHITECTURES = {
    "standard": "ReLU (TopK, where a file of version 3 to 5 says activation_fn topk)",
    "jumprelu": "JumpReLU",
    "topk": "TopK",
    "gated": "Gated",
    "batchtopk": "JumpReLU, by the threshold that training ended with (a training checkpoint)",
    "matryoshka_batchtopk": "JumpReLU, by the threshold that training ended with (a training checkpoint)",
}
_NO_SAE = "it predicts another activation than it reads"
FORMAT = Format(
    name="SAELens",
    layout=f"folder: `{CONFIG}`, `{WEIGHTS}` (versions 3 to 6)",
    find=find,
    read=read,
    architectures=ARCHITECTURES,
    refused={
        "abstopk": "its features are active in both directions, and here an activation is never negative",
        "matching_pursuit": "it encodes step by step, so it has no pre-activation that heads could share",
        "temporal": "it reads other positions too, so it has no pre-activation of one z",
        "transcoder": _NO_SAE,
        "skip_transcoder": _NO_SAE,
        "jumprelu_transcoder": _NO_SAE,
        "jumprelu_skip_transcoder": _NO_SAE,
    },
    convention="the model's own, as SAELens loads models unprocessed; processed where `model_from_pretrained_kwargs` "
    "says `fold_ln` and `fold_value_biases` (z), or `center_writing_weights` (other sites)",
)
