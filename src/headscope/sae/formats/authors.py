"""The post's authors' files: `NAME.pt`, a state dict, and `NAME_cfg.json`; Neel Nanda's for gelu-2l are the same.

They were trained on a `HookedTransformer` with its default processing, so on `z - c` and on a centred residual stream.
"""

from pathlib import Path
from typing import get_args

from headscope.errors import SAEError
from headscope.sae.formats.files import (
    Files,
    Format,
    Json,
    Stated,
    check_names,
    chosen_model,
    chosen_site,
    site_of,
    tensors_of,
    unsupported,
)
from headscope.sae.model import PROCESSED, SAE, ReLU
from headscope.site import Kind, Site

_CONFIG = "_cfg.json"
_NAMES = {"W_enc", "b_enc", "W_dec", "b_dec"}


def find(path: Path) -> tuple[Path, Path | None] | None:
    """Find a `.pt` file from its path, its name without the suffix, or a folder with one such pair.

    Raises:
        SAEError: a folder with several.
    """
    if path.is_dir():
        pairs = [pair for config in sorted(path.glob(f"*{_CONFIG}")) if (pair := _pair(config))]
        if len(pairs) > 1:
            raise SAEError(
                f"{path} holds {len(pairs)} SAEs",
                expected="one",
                do="name one: " + ", ".join(weights.name for weights, _ in pairs[:4]),
            )
        return pairs[0] if pairs else None
    weights = path if path.suffix == ".pt" else path.with_name(f"{path.name}.pt")
    return _pair(weights.with_name(f"{weights.name.removesuffix('.pt')}{_CONFIG}"))


def _pair(config: Path) -> tuple[Path, Path] | None:
    weights = config.with_name(f"{config.name.removesuffix(_CONFIG)}.pt")
    return (weights, config) if weights.is_file() and config.is_file() else None


def read(files: Files, stated: Stated) -> SAE:
    """Read a pair of files.

    Raises:
        SAEError: an SAE of one head, of an unsupported site, or of sizes other than in its configuration.
        UNREADABLE: damaged files.
    """
    config, tensors = files.settings(), tensors_of(files.weights)
    check_names(tensors, _NAMES, files)
    found = _site(files, config)
    if found is not None and found.kind == "z" and config.get("concat_heads") is False:
        raise unsupported(
            files, f"an SAE of head {config.get('head')} alone", expected="one of all heads, concatenated"
        )
    for option, own in (("act_fn", "relu"), ("activation", "relu"), ("apply_b_dec_to_input", True)):
        if config.get(option, own) != own:
            raise unsupported(files, f"{option} {config[option]!r}", expected=repr(own))
    sizes = tuple(tensors["W_enc"].shape)
    said = tuple(config.get(name, own) for name, own in zip(("act_size", "dict_size"), sizes, strict=False))
    if said != sizes:
        raise unsupported(
            files,
            f"W_enc of {' x '.join(map(str, sizes))}",
            expected=f"{said[0]} x {said[1]}, as its configuration says",
            do="copy both files again",
        )
    return SAE(
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        activation=ReLU(),
        site=chosen_site(files, found, stated),
        model_name=chosen_model(config.get("model_name"), stated),
        metadata={"z_convention": PROCESSED, "context_size": config.get("seq_len"), "training": {"config": config}},
    )


def _site(files: Files, config: Json) -> Site | None:
    """Return the site by `act_name`, and by `site` and `layer`, which must agree.

    Raises:
        SAEError: they do not, or the site is unsupported.
    """
    kind, layer, name = config.get("site"), config.get("layer"), config.get("act_name")
    if kind is None or layer is None:
        return site_of(name, files) if name else None
    if kind not in get_args(Kind):
        raise unsupported(files, f"site {kind!r}", expected=f"one of {', '.join(get_args(Kind))}")
    own = Site(kind, int(layer))
    return site_of(own.hook_name, files) if name in (None, own.hook_name) else _disagree(files, name, own)


def _disagree(files: Files, name: str, own: Site) -> Site:
    raise unsupported(
        files, f"act_name {name!r}", expected=f"{own.hook_name}, as site and layer say", do="copy both files again"
    )


FORMAT = Format(
    name="the post's authors",
    layout="`NAME.pt`, `NAME_cfg.json` (Neel Nanda's SAEs of gelu-2l too)",
    find=find,
    read=read,
    architectures={"AutoEncoder": "ReLU"},
    refused={},
    convention="processed by TransformerLens; converted when it is put to a model",
)
