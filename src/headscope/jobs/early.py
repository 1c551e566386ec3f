"""What is wrong with the inputs of a job, as far as it can be said before torch is loaded, which takes seconds.

Everything is checked again, and more closely, where it is used: what cannot be known cheaply passes here.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from headscope.artefact import read_json
from headscope.corpus.sources import find_source
from headscope.errors import ModelError, SAEError
from headscope.hub import advice, trouble
from headscope.jobs.inputs import CorpusChoice
from headscope.models.aliases import repository_of
from headscope.names import bundled_model, bundled_sae, exists, is_path, local
from headscope.site import no_layer

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
"""What configurations call the number of layers: transformers', GPT-2's and TransformerLens'."""
_OF_TRANSFORMER_LENS = re.compile(r"(gelu|solu|attn-only)-\d+l")
_WEIGHTS = (".safetensors", ".pt", ".npz")
_HUB_SECONDS = 5


def check_model(name: str, layer: int | None = None) -> None:
    """Refuse a model that is nowhere, and a layer that it does not have.

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
    n_layers = _n_layers(folder)
    if layer is not None and n_layers is not None and not 0 <= layer < n_layers:
        raise no_layer(name, layer, n_layers)


def _n_layers(folder: Path) -> int | None:
    """How many layers a model has by its configuration; None where that does not tell."""
    for config in ("tl_config.json", "config.json"):
        try:
            said: Any = read_json(folder / config)
            said = said.get("text_config", said)
            return next((said[key] for key in _LAYERS if isinstance(said.get(key), int)), None)
        except (OSError, ValueError, AttributeError):
            continue
    return None


@cache
def _check_on_hub(name: str, repository: str) -> None:
    """Ask the hub once: its client asks five times for each of several files before it gives up."""
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


def check_sae(name: str | Path) -> None:
    """Refuse an SAE that is nowhere, a folder that holds none, and a configuration that cannot be read.

    Raises:
        SAEError: one of these.
    """
    if bundled_sae(str(name)):
        return
    path = local(name)
    if not exists(path):
        on_hub = "/" in str(name) and not is_path(name)
        if not on_hub and not exists(Path(f"{path}.pt")):  # the post's authors' SAEs go by this name without its ending
            raise _no_sae(name, path)
        return
    if path.is_dir() and not any(file.suffix in _WEIGHTS for file in path.glob("*")):
        raise _no_sae(name, path)
    config = path / "cfg.json"
    if config.is_file():
        try:
            read_json(config)
        except (OSError, ValueError) as error:
            raise SAEError(
                f"cannot read the SAE in {path}: cfg.json: {error}",
                expected="cfg.json as it was written",
                do="copy or train it again",
            ) from error


def _no_sae(name: str | Path, path: Path) -> SAEError:
    below = sorted(str(config.parent) for config in path.glob("*/cfg.json"))
    return SAEError(
        f"no SAE at {str(name)!r}",
        expected="a bundled one, a file or folder of one of the formats of docs/saes.md, or a name on the hub",
        do=f"did you mean {' or '.join(below[:3])}?"
        if below
        else "check the path, or train one with `headscope train`",
    )


def check_text(text: CorpusChoice) -> None:
    """Refuse a text that is nowhere.

    Raises:
        CorpusError: it is.
    """
    find_source(text.corpus, text, bos=0)
