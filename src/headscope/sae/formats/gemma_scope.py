"""Gemma Scope (`params.npz`) and Gemma Scope 2 (`params.safetensors`, `config.json`): JumpReLU.

The first has no configuration: model, site and layer are in the names of its repositories and folders, as in
`gemma-scope-2b-pt-att/layer_12/width_16k/average_l0_85`; a copy must keep these names, or the user must state them.
"""

import re
from pathlib import Path

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
)
from headscope.sae.model import SAE, JumpReLU
from headscope.site import Kind, Site

_FIRST, _SECOND, _CONFIG = "params.npz", "params.safetensors", "config.json"
_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|att|mlp|transcoders)\b")
_LAYER = re.compile(r"layer_(\d+)$")
_HF_LAYER = re.compile(r"layers\.(\d+)\.(.+)$")
_KINDS: dict[str, Kind] = {"att": "z", "mlp": "mlp_out", "res": "resid_post"}
_HF_KINDS: dict[str, Kind] = {"self_attn.o_proj.input": "z", "post_feedforward_layernorm.output": "mlp_out"}
_NAMES = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}


def find_first(path: Path) -> tuple[Path, Path | None] | None:
    """Find the file, or a folder with it."""
    weights = path / _FIRST if path.is_dir() else path
    return (weights, None) if weights.name == _FIRST and weights.is_file() else None


def find_second(path: Path) -> tuple[Path, Path | None] | None:
    """Find a folder with both files."""
    found = path / _SECOND, path / _CONFIG
    return found if all(file.is_file() for file in found) else None


def read_first(files: Files, stated: Stated) -> SAE:
    """Read `params.npz`.

    Raises:
        SAEError: a transcoder, or an SAE whose site neither folders nor user name.
        UNREADABLE: damaged files.
    """
    site, model = None, None
    named = _REPOSITORY.search(str(files.weights.absolute()))
    if named:
        size, tuned, place = named.groups()
        model = f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}"
        if place not in _KINDS:
            raise refusal(files, place)
        layers = [found.group(1) for part in files.weights.parts if (found := _LAYER.match(part))]
        site = Site(_KINDS[place], int(layers[-1])) if layers else None
    return _built(files, stated, site, model, {})


def read_second(files: Files, stated: Stated) -> SAE:
    """Read `params.safetensors` and its configuration.

    Raises:
        SAEError: a transcoder, another architecture, or an unsupported site.
        UNREADABLE: damaged files.
    """
    config = files.settings()
    if config.get("architecture") != "jump_relu":
        raise refusal(files, str(config.get("architecture")))
    point = config["hf_hook_point_in"]
    if config.get("affine_connection") or config.get("hf_hook_point_out") not in (None, point):
        raise refusal(files, "transcoder")
    placed = _HF_LAYER.search(point)
    if placed is None or placed.group(2) not in _HF_KINDS:
        raise unsupported(files, f"hf_hook_point_in {point!r}", expected=f"layers.L. and one of {', '.join(_HF_KINDS)}")
    site = Site(_HF_KINDS[placed.group(2)], int(placed.group(1)))
    name = str(config.get("model_name") or "").removeprefix("google/").replace("-v3", "-3")
    return _built(files, stated, site, f"google/{name}" if name else None, config)


def _built(files: Files, stated: Stated, site: Site | None, model: str | None, config: Json) -> SAE:
    tensors = {_name(name): tensor for name, tensor in tensors_of(files.weights).items()}
    check_names(tensors, _NAMES, files)
    return SAE(
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        activation=JumpReLU(tensors["threshold"]),
        site=chosen_site(files, site, stated),
        model_name=chosen_model(model, stated),
        apply_b_dec_to_input=False,
        metadata={"z_convention": "raw"} | ({"training": {"config": config}} if config else {}),
    )


def _name(name: str) -> str:
    return f"W_{name[2:]}" if name.startswith("w_") else name


_CONVENTION = "the model's own: these models have no b_V and no b_ln1, so c = 0"
FIRST = Format(
    name="Gemma Scope",
    layout=f"`{_FIRST}`, in folders that name model, site and layer",
    find=find_first,
    read=read_first,
    architectures={"att": "JumpReLU, of z", "mlp": "JumpReLU, of mlp_out", "res": "JumpReLU, of resid_post"},
    refused={"transcoders": "it predicts another activation than it reads"},
    convention=_CONVENTION,
)
SECOND = Format(
    name="Gemma Scope 2",
    layout=f"folder: `{_SECOND}`, `{_CONFIG}`",
    find=find_second,
    read=read_second,
    architectures={"jump_relu": "JumpReLU"},
    refused={"transcoder": "it predicts another activation than it reads"},
    convention=_CONVENTION,
)
