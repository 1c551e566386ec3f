"""Load a model by name: a bundled one, a Hugging Face folder, a TransformerLens checkpoint, or a name on the hub."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from headscope.errors import ModelError
from headscope.models.families import family_of
from headscope.models.hf import Model
from headscope.models.tl_checkpoint import find_checkpoint, load_checkpoint

_BUNDLED = Path(__file__).parent


def load_model(name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Load a causal language model with its tokenizer.

    Args:
        name: `tiny` (bundled), the path of a Hugging Face folder, a folder or weights file that TransformerLens saved,
            `gelu-2l` or another of `tl_checkpoint.HUB`, or a name on the hub (the last two need the network).
        device: where to put the weights.
        dtype: of the weights and of all that is computed.

    Raises:
        ModelError: the model is missing, truncated, of an unknown family, or has no tokenizer with a BOS.
    """
    transformers_logging.disable_progress_bar()
    checkpoint = find_checkpoint(name)
    if checkpoint:
        module, tokenizer = load_checkpoint(*checkpoint, dtype)
    else:
        module, tokenizer = _load(name, dtype)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None or not hasattr(tokenizer, "backend_tokenizer"):
        raise _no_tokenizer(name)
    return Model(module.to(device), tokenizer.backend_tokenizer, bos, name)


def _load(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """What `transformers` itself reads: a folder, or a name on the hub."""
    folder = _folder(name)
    source = str(folder or name)
    local = {"local_files_only": True} if folder else {}
    try:
        config = AutoConfig.from_pretrained(source, **local)
        family_of(config.model_type)
        module, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            source, dtype=dtype, output_loading_info=True, attn_implementation="sdpa", **local
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **local)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise ModelError(
            f"cannot load the model {name!r}: {str(error).strip().splitlines()[0] if str(error) else type(error)}",
            expected="`tiny`, a folder with config.json (or tl_config.json), weights and tokenizer.json, or a hub name",
            do="check the name, and for a hub name the network",
        ) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ModelError(
            f"the weights of {name!r} lack or misfit {sorted(map(str, info['missing_keys']))[:3]}",
            expected="the weights that config.json describes",
            do="fetch or save the model again",
        )
    if folder is not None and not (folder / "tokenizer.json").is_file():  # transformers invents an empty one
        raise _no_tokenizer(name)
    return module, tokenizer


def _no_tokenizer(name: str) -> ModelError:
    return ModelError(
        f"the tokenizer of {name!r}",
        expected="a fast tokenizer (tokenizer.json) with a BOS or EOS token",
        do="save the model with such a tokenizer",
    )


def _folder(name: str) -> Path | None:
    """The local folder a name stands for, or None for a name on the hub.

    Raises:
        ModelError: the name is a path, and nothing is there.
    """
    bundled = _BUNDLED / name
    if name.isidentifier() and (bundled / "config.json").is_file():
        return bundled
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith(("./", "../", "~")) or path.exists():
        raise ModelError(f"no model folder {name!r}", expected="a folder with config.json", do="check --model")
    return None
