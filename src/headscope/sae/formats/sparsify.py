"""sparsify (EleutherAI; `eai-sparsify`): a folder of `cfg.json` and `sae.safetensors`, named after a module.

It reads module outputs, so its SAEs of attention are of attn_out. SAELens reads these files with the decoder transposed
and without b_dec at the input where the decoder is normalised; here they compute what sparsify's `SparseCoder` does.
"""

import re
from pathlib import Path

from headscope.artefact import read_json
from headscope.sae.formats.files import (
    Files,
    Format,
    Json,
    Stated,
    check_names,
    chosen_model,
    chosen_site,
    refusal,
    tensors_of,
    unsupported,
    whole_number,
)
from headscope.sae.model import MODULE_OUTPUT, SAE, TopK
from headscope.site import Kind, Site

_WEIGHTS, _CONFIG, _RUN = "sae.safetensors", "cfg.json", "config.json"
_HOOKPOINT = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)(?:\.(.+))?")
_KINDS: dict[str | None, Kind] = {
    None: "resid_post",
    "attn": "attn_out",
    "self_attn": "attn_out",
    "attention": "attn_out",
    "attn.c_proj": "attn_out",
    "self_attn.o_proj": "attn_out",
    "attention.dense": "attn_out",
    "mlp": "mlp_out",
}


def find(path: Path) -> tuple[Path, Path | None] | None:
    """Find a folder with both files."""
    found = path / _WEIGHTS, path / _CONFIG
    return found if all(file.is_file() for file in found) else None


def read(files: Files, stated: Stated) -> SAE:
    """Read a folder; the model's name is in `config.json` of the folder above, if anywhere.

    Raises:
        SAEError: a transcoder, an activation other than topk, or a module whose output is not a supported site.
        UNREADABLE: damaged files.
    """
    config = files.settings()
    architecture = _architecture(config)
    if architecture not in FORMAT.architectures:
        raise refusal(files, architecture)
    tensors = tensors_of(files.weights)
    check_names(tensors, {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}, files)
    run = _run(files)
    if run.get("hook_mode", "output") != "output":
        raise unsupported(
            files, f"hook_mode {run['hook_mode']!r}", expected="'output': one that reads a module's output"
        )
    sae = SAE(
        W_enc=tensors["encoder.weight"].T,
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        activation=TopK(whole_number(files, "k", config["k"])),
        site=chosen_site(files, _site(files), stated),
        model_name=chosen_model(run.get("model"), stated),
        metadata={
            "z_convention": "raw",
            "reads": MODULE_OUTPUT,
            "context_size": run.get("ctx_len"),
            "training": {"config": config},
        },
    )
    latents = config.get("num_latents") or config["d_in"] * config["expansion_factor"]
    if (config["d_in"], latents) != (sae.d_in, sae.d_sae):
        raise unsupported(
            files,
            f"weights of {sae.d_in} x {sae.d_sae}",
            expected=f"{config['d_in']} x {latents}, as {_CONFIG} says",
            do="copy both files again",
        )
    return sae


def _architecture(config: Json) -> str:
    for name in ("transcode", "skip_connection", "signed"):
        if config.get(name):
            return name
    return str(config.get("activation", "topk"))


def _run(files: Files) -> Json:
    above = files.weights.parent.parent / _RUN
    found = read_json(above) if above.is_file() else {}
    return found if isinstance(found, dict) else {}


def _site(files: Files) -> Site | None:
    """Return the site by the name of the folder, a module whose output was read.

    Raises:
        SAEError: a module whose output is not a supported site.
    """
    placed = _HOOKPOINT.fullmatch(files.weights.parent.name)
    if placed is None:
        return None
    layer, module = int(placed.group(1)), placed.group(2)
    if module not in _KINDS:
        raise unsupported(
            files,
            f"the output of {files.weights.parent.name}",
            expected=f"layers.L, or layers.L. and one of {', '.join(filter(None, _KINDS))}",
        )
    return Site(_KINDS[module], layer)


FORMAT = Format(
    name="sparsify",
    layout=f"folder: `{_CONFIG}`, `{_WEIGHTS}`; its name is the module's",
    find=find,
    read=read,
    architectures={"topk": "TopK"},
    refused={
        "groupmax": "one latent of each group is active, which is no activation here",
        "signed": "its features are active in both directions, and here an activation is never negative",
        "transcode": "it predicts another activation than it reads",
        "skip_connection": "it adds a linear map of its input to what it reconstructs",
    },
    convention="the model's own",
)
