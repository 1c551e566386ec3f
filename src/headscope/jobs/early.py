"""Early validation of a job's inputs, before torch is loaded, which takes seconds.

Everything is checked again, more thoroughly, where it is used: what cannot be checked cheaply passes here.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from headscope.artefact import read_json
from headscope.corpus.sources import find_source
from headscope.errors import CorpusError, ModelError, SAEError
from headscope.hub import advice, trouble
from headscope.jobs.inputs import CorpusChoice, usable
from headscope.models.aliases import repository_of
from headscope.names import bundled_model, bundled_sae, exists, is_path, local
from headscope.sae.config import TrainConfig
from headscope.sae.training.needs import check_memory
from headscope.site import Kind, check_z, no_layer

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_HEAD_WIDTH = ("head_dim", "d_head")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx")
"""Keys for the sizes of a model in the configurations of transformers, GPT-2 and TransformerLens."""
_OF_TRANSFORMER_LENS = re.compile(r"(gelu|solu|attn-only)-\d+l")
_WEIGHTS = (".safetensors", ".pt", ".npz")
_HUB_SECONDS = 5


@dataclass(frozen=True)
class _Sizes:
    """Sizes in a local model's configuration; None where it does not state them."""

    n_layers: int | None = None
    d_model: int | None = None
    d_z: int | None = None
    context: int | None = None

    @classmethod
    def of(cls, name: str) -> "_Sizes":
        """Read the sizes of a model from its name or folder."""
        folder = bundled_model(name) or local(name)
        for config in ("tl_config.json", "config.json"):
            try:
                said: Any = read_json(folder / config)
                return cls._said(said.get("text_config", said))
            except (OSError, ValueError, AttributeError):
                continue
        return cls()

    @classmethod
    def _said(cls, config: dict[str, Any]) -> "_Sizes":
        n_layers, d_model, n_heads, d_head, context = (
            next((config[key] for key in keys if isinstance(config.get(key), int)), None)
            for keys in (_LAYERS, _WIDTH, _HEADS, _HEAD_WIDTH, _CONTEXT)
        )
        return cls(n_layers, d_model, n_heads * d_head if n_heads and d_head else d_model, context)


def check_model(name: str, layer: int | None = None) -> None:
    """Reject a missing model, and a layer that it does not have.

    Raises:
        ModelError: one of these.
    """
    folder = bundled_model(name) or local(name)
    if not exists(folder):
        if is_path(name):
            raise ModelError(
                f"no model at {name!r}: {folder.absolute()} does not exist",
                expected="a folder with config.json",
                do="check the path",
            )
        if not _OF_TRANSFORMER_LENS.fullmatch(name):
            _check_on_hub(name, repository_of(name))
        return
    n_layers = _Sizes.of(name).n_layers
    if layer is not None and n_layers is not None and not 0 <= layer < n_layers:
        raise no_layer(name, layer, n_layers)


@cache
def _check_on_hub(name: str, repository: str) -> None:
    """Query the hub once: its client tries five times for each of several files before it gives up."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        HfApi().model_info(repository, timeout=_HUB_SECONDS)
    except Exception as error:
        missing = trouble(error) in ("missing", "unreachable")
        if not missing or any(try_to_load_from_cache(repository, file) for file in ("config.json", "tl_config.json")):
            return
        raise ModelError(
            f"cannot load the model {name!r}: it is no folder here, and not in the hub's cache",
            expected="`tiny`, a folder with config.json (or tl_config.json), weights and tokenizer.json, or a hub name",
            do=advice(error, repository, otherwise=""),
        ) from error


def check_sae(name: str | Path, *, of_z: bool = False) -> None:
    """Reject a missing SAE, a folder without one, and an unreadable configuration.

    With `of_z`, also an SAE of another site.

    Raises:
        SAEError: one of these.
    """
    path = bundled_sae(str(name)) or local(name)
    if not exists(path):
        on_hub = "/" in str(name) and not is_path(name)
        if not on_hub and not exists(Path(f"{path}.pt")):  # the post's authors' SAEs are addressed without their suffix
            raise _no_sae(name, path)
        return
    if path.is_dir() and not any(file.suffix in _WEIGHTS for file in path.glob("*")):
        raise _no_sae(name, path)
    try:
        hook_name = _metadata(path).get("hook_name")
    except (OSError, ValueError) as error:
        raise SAEError(
            f"cannot read the SAE in {path}: cfg.json: {error}",
            expected="cfg.json as it was written",
            do="copy or train it again",
        ) from error
    if of_z and isinstance(hook_name, str):
        check_z(hook_name)


def _metadata(sae: Path) -> dict[str, Any]:
    """Return the metadata of origin in the `cfg.json` of an SAE; empty where there is none."""
    config: Any = read_json(sae / "cfg.json") if (sae / "cfg.json").is_file() else None
    metadata = config.get("metadata") if isinstance(config, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def _model_of(sae: str | Path) -> str | None:
    """Return the bundled model that an SAE names; None for any other, which may have been moved."""
    with suppress(OSError, ValueError):
        name = _metadata(bundled_sae(str(sae)) or local(sae)).get("model_name")
        return name if isinstance(name, str) and bundled_model(name) else None
    return None


def _no_sae(name: str | Path, path: Path) -> SAEError:
    below = sorted(str(config.parent) for config in path.glob("*/cfg.json"))
    return SAEError(
        f"no SAE at {str(name)!r}",
        expected="a bundled one, a file or folder of one of the formats of docs/saes.md, or a name on the hub",
        do=f"did you mean {' or '.join(below[:3])}?"
        if below
        else "check the path, or train one with `headscope train`",
    )


def check_text(text: CorpusChoice, model: str | None = None, *, sae: str | Path | None = None) -> None:
    """Reject a missing or empty text, and blocks longer than the context of the model (or of the one the SAE names).

    Raises:
        CorpusError: one of these.
    """
    if not find_source(text.corpus, text, bos=0).state():
        raise CorpusError(
            f"no documents in {text.corpus!r}: an empty folder",
            expected="a file or a folder of text, JSONL, Parquet or token ids",
            do="check the path given to --corpus",
        )
    model = model or (_model_of(sae) if sae else None)
    context = _Sizes.of(model).context if model else None
    if model and context is not None:
        text.block_of(context, model)


def check_size(configs: Iterable[TrainConfig], model: str, site: Kind, device: str) -> None:
    """Reject SAEs of a site that, trained together, need more memory than the machine has.

    Raises:
        TrainingError: they do.
    """
    sizes = _Sizes.of(model)
    width = sizes.d_z if site == "z" else sizes.d_model
    if width is not None and device == "cpu":
        check_memory(configs, width, device)


def check_device(device: str) -> None:
    """Reject an unavailable device, before anything but torch is loaded.

    Raises:
        ModelError: it is unavailable.
    """
    if device != "cpu":
        usable(device)
