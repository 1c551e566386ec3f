"""Load a model: by name, from a folder or a file, or from an object in memory."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from headscope.errors import ModelError
from headscope.hub import advice
from headscope.limits import NameOrPath, check
from headscope.models import transformer_lens
from headscope.models.agreement import check_agreement
from headscope.models.aliases import repository_of
from headscope.models.attention import IMPLEMENTATION
from headscope.models.families import family_of
from headscope.models.hf import Model
from headscope.models.placing import device_of, dtype_of
from headscope.models.tl_checkpoint import find_checkpoint, load_checkpoint
from headscope.models.vocabulary import check_vocabulary, checked_tokenizer, first_token, no_tokenizer
from headscope.names import absolute, bundled_model, exists, lasting_model, local

_ADAPTER = re.compile(r"\b(lora_|base_layer|modules_to_save|original_module)")
_EQUAL = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
"""Implementations of attention in `transformers` that headscope's own can replace."""
_MERGE = "merge the adapter first (PEFT: model.merge_and_unload()) and pass the result"


def load_model(
    model: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Model:
    """Load a causal language model with its tokenizer, or wrap a loaded one.

    Args:
        model: `tiny` (bundled), the path of a Hugging Face folder, a folder or weights file that TransformerLens saved,
            `gelu-2l` or another of `tl_checkpoint.HUB`, or a name on the hub, also TransformerLens' alias of it (the
                last two need the network). Or an object: a `PreTrainedModel` of transformers, whose weights are shared
                and which is not modified; or a HookedTransformer or TransformerBridge of TransformerLens.
        tokenizer: a fast tokenizer of transformers, for a `PreTrainedModel`, which has none; default: the model's own.
            Blocks of text start with its BOS, or with its EOS where it has none. It is not modified: a copy is used,
            without its truncation, padding and post-processor.
        device: device of the weights, such as `cuda:1`; default: the CPU, or an object's own.
        dtype: dtype of the weights and of the computation, such as `bfloat16` (losses, norm scales and all statistics
            are at least float32); default: float32, or an object's own.

    Raises:
        ModelError: the model is missing, truncated, of an unknown family, has weights that are not finite, or has no
            matching tokenizer; or there is no such device or dtype.
    """
    device = None if device is None else device_of(device)
    dtype = None if dtype is None else dtype_of(dtype)
    if isinstance(model, nn.Module):
        module, own, name = _loaded(model)
        tokenizer = own if tokenizer is None else tokenizer
    else:
        transformers_logging.disable_progress_bar()
        name = _lasting_name(str(check("model", model, NameOrPath, ModelError)))
        checkpoint = find_checkpoint(name)
        read = load_checkpoint(*checkpoint, dtype or torch.float32) if checkpoint else _load(name, dtype)
        module, tokenizer = read[0], read[1] if tokenizer is None else tokenizer
    bos = first_token(tokenizer, name)
    check_vocabulary(tokenizer, len(_embedding(module)), name)
    _check_weights(module, name)
    loaded = Model(_placed(module, device, dtype), checked_tokenizer(tokenizer, name), bos, name)
    check_agreement(loaded)
    return loaded


def _placed(module: PreTrainedModel, device: torch.device | str | None, dtype: torch.dtype | None) -> PreTrainedModel:
    """Move to a device and dtype; buffers such as rotary frequencies are never rounded, as in transformers."""
    rounds = dtype in (torch.bfloat16, torch.float16)
    buffers = {name: b for name, b in module.named_buffers() if rounds and b.is_floating_point()}
    placed: Any = nn.Module.to(module, device=device, dtype=dtype)
    for name, buffer in buffers.items():
        owner, _, own = name.rpartition(".")
        setattr(placed.get_submodule(owner), own, buffer.to(placed.device))
    return placed


def _embedding(module: PreTrainedModel) -> Tensor:
    return module.get_input_embeddings().weight  # pyright: ignore[reportReturnType]


def _loaded(model: nn.Module) -> tuple[PreTrainedModel, Any, str]:
    """Return a model that shares only the weights of a user's object; its tokenizer, if it has one; its name."""
    if isinstance(model, PreTrainedModel):
        _check_attention(model)
        shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        name = model.config.name_or_path or model.config.model_type
        return copy.deepcopy(model, shared), None, absolute(name) if local(name).is_dir() else name
    if transformer_lens.is_bridge(model) or transformer_lens.is_hooked(model):
        return transformer_lens.unwrap(model)
    adapted = hasattr(model, "peft_config")
    raise ModelError(
        f"a model that is a {type(model).__name__}",
        expected="a PreTrainedModel of transformers, a HookedTransformer or a TransformerBridge",
        do=_MERGE if adapted else "pass one of these, or the name of a model",
    )


def _check_attention(model: PreTrainedModel) -> None:
    """Raise ModelError where attention is computed by a custom function, which SDPA would replace."""
    own = getattr(model.config.get_text_config(), "_attn_implementation", None)
    if own not in (None, IMPLEMENTATION, *_EQUAL):
        raise ModelError(
            f"a model whose attention is computed by {own!r}",
            expected=f"one of {', '.join(_EQUAL)}, which compute the same",
            do="model.set_attn_implementation('sdpa') first, if that is the same function",
        )


def _load(name: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, Any]:
    """Load what `transformers` itself supports: a folder, or a name on the hub."""
    folder = _folder(name)
    source = str(folder or name)
    local = {"local_files_only": True} if folder else {}
    local |= {"trust_remote_code": False}  # otherwise transformers prompts whether to run a folder's code
    try:
        _check_no_adapter(name, source)
        config = AutoConfig.from_pretrained(source, **local)
        family_of(config.model_type)
        if getattr(config, "quantization_config", None) is not None:
            raise _quantised(name)
        module, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            source, dtype=dtype or torch.float32, output_loading_info=True, attn_implementation="eager", **local
        )
        if folder is not None and not (folder / "tokenizer.json").is_file():  # transformers invents an empty one
            raise no_tokenizer(name)
        tokenizer = AutoTokenizer.from_pretrained(source, **local)
    except ModelError:
        raise
    except Exception as error:  # raised by several libraries, for what is damaged, missing or unreachable
        raise _unreadable(name, _refusal_of(folder) or error, is_folder=folder is not None) from error
    if adapted := [key for key in map(str, info["unexpected_keys"]) if _ADAPTER.search(key)]:
        raise ModelError(
            f"the weights of {name!r} hold an adapter that is not merged into them: {sorted(adapted)[:3]}",
            expected="the weights that config.json describes",
            do="merge the adapter and save the model again (PEFT: merge_and_unload, then save_pretrained)",
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ModelError(
            f"the weights of {name!r} lack or misfit {sorted(map(str, info['missing_keys']))[:3]}",
            expected="the weights that config.json describes",
            do="fetch or save the model again",
        )
    if info["unexpected_keys"]:  # transformers has left out those known to be unused
        raise ModelError(
            f"the weights of {name!r} hold {sorted(map(str, info['unexpected_keys']))[:3]}, of which config.json says "
            "nothing",
            expected="the weights that config.json describes: without these the model is another one",
            do="mend config.json (biases, number of layers), or save the model again",
        )
    return module, tokenizer


def _check_no_adapter(name: str, source: str) -> None:
    """Raise ModelError where an adapter is among the weights, or instead of them."""
    if find_adapter_config_file(source) is not None:
        raise ModelError(
            f"the model {name!r} with an adapter, adapter_config.json",
            expected="one set of weights that is all that is computed",
            do=f"{_MERGE}; or, to leave the adapter out, pass a copy without adapter_config.json",
        )


def _refusal_of(folder: Path | None) -> OSError | None:
    """Return why files of a folder are unreadable; safetensors reports these as missing."""
    for path in sorted(folder.iterdir()) if folder is not None else ():
        if path.is_file():
            try:
                path.open("rb").close()
            except OSError as error:
                return error
    return None


def _unreadable(name: str, error: Exception, *, is_folder: bool) -> ModelError:
    """Make the error for a model that `transformers` does not load."""
    if isinstance(error, pickle.UnpicklingError):
        return ModelError(
            f"the weights of {name!r} are a pickle with more in it than tensors, or damaged; nothing was executed",
            expected="tensors, in .safetensors best",
            do="ask who made it for .safetensors files, or fetch it again",
        )
    if "ignore_mismatched_sizes" in str(error):
        return ModelError(
            f"the weights of {name!r} have other sizes than its config.json says",
            expected="the weights that config.json describes",
            do="mend config.json, or fetch or save the model again",
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            f"the model {name!r} needs code that comes with it; nothing of it was executed",
            expected="a model of a family that transformers itself has, in docs/models.md",
            do="use another model",
        )
    lines = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
    otherwise = "fetch or save the model again" if is_folder else "check the name, and for a hub name the network"
    return ModelError(
        f"cannot load the model {name!r}: {lines}",
        expected="`tiny`, a folder with config.json (or tl_config.json), weights and tokenizer.json, or a hub name",
        do=otherwise if is_folder else advice(error, name, otherwise=otherwise),
    )


def _quantised(name: str) -> ModelError:
    return ModelError(
        f"the model {name!r}, whose weights are quantised",
        expected="weights in float32, bfloat16 or float16, of which W_O and W_V can be read",
        do="load the model it was made from",
    )


def _check_weights(module: nn.Module, name: str) -> None:
    """Raise ModelError where weights are quantised, missing, or not finite."""
    for key, tensor in module.state_dict().items():
        if tensor.is_meta:
            raise ModelError(
                f"{key} of {name!r} is on the device `meta`: a shape without numbers",
                expected="a model with its weights in memory",
                do="load it without init_empty_weights, torch.device('meta') or offloading",
            )
        if not (tensor.is_floating_point() and tensor.dtype.itemsize > 1):
            if tensor.dtype == torch.bool:
                continue
            raise _quantised(name)
        if not tensor.isfinite().all():
            raise ModelError(
                f"NaN or infinity in {key} of {name!r}", expected="finite weights", do="fetch or save the model again"
            )


def _lasting_name(name: str) -> str:
    """Return a name that loads the same model from any working directory.

    Raises:
        ModelError: the name is a path that does not exist.
    """
    lasting = lasting_model(name)
    if Path(lasting).is_absolute() and not exists(Path(lasting)):
        raise ModelError(
            f"no model at {name!r}: {lasting} does not exist",
            expected="a folder with config.json",
            do="check the path",
        )
    return repository_of(lasting)


def _folder(name: str) -> Path | None:
    """Return the folder of a lasting name, or None for a name on the hub.

    Raises:
        ModelError: it is a file, or has weights in another program's format.
    """
    folder = bundled_model(name) or Path(name)
    if _is_gguf(folder):
        raise ModelError(
            f"{name!r} holds a model as GGUF (llama.cpp's)",
            expected="a folder with config.json, weights in .safetensors and tokenizer.json",
            do="convert it: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(OUT), and its "
            "AutoTokenizer likewise",
        )
    if folder.is_absolute() and not folder.is_dir():
        raise ModelError(f"no model folder {name!r}", expected="a folder with config.json", do="check --model")
    return folder if folder.is_absolute() else None


def _is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder with such files and no other weights."""
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(
            child.suffix in (".safetensors", ".bin") for child in path.iterdir()
        )
    return path.suffix == ".gguf" and path.is_file()
