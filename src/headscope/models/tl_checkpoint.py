"""Models saved in TransformerLens' format: gelu-1l to gelu-4l, solu-*, attn-only-* and similar ones.

A checkpoint is a weights file (`.pth`, `.pt` or `.safetensors`) that holds a HookedTransformer's state dict, with
`tl_config.json` or `config.json` in TransformerLens' names in the same folder. It becomes a `transformers` GPT-2 that
computes the same function: learned absolute positions, pre-norm blocks, causal attention scaled by 1/sqrt(d_head).

Supported: LayerNorm with its weights (`LN`) or with them folded into the next layer's (`LNPre`), so also models saved
after TransformerLens' processing; the activations of `ACTIVATIONS`; attention-only models; a bias of the unembedding.
Other settings that change the function are rejected by name, see `_READ`. Pickles are opened with `weights_only=True`:
no code runs.
"""

import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from headscope.artefact import read_json
from headscope.errors import ModelError
from headscope.hub import advice
from headscope.models.families import NoMLP

ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2", "silu", "solu_ln")

HUB: dict[str, str] = {
    **{f"gelu-{n}l": f"NeelNanda/GELU_{n}L512W_C4_Code" for n in (1, 2, 3, 4)},
    **{f"attn-only-{n}l": f"NeelNanda/Attn_Only_{n}L512W_C4_Code" for n in (1, 2, 3, 4)},
    **{f"solu-{n}l": f"NeelNanda/SoLU_{n}L{max(512, 128 * n)}W_C4_Code" for n in (1, 2, 3, 4, 6, 8, 10, 12)},
}
"""The published models by TransformerLens' names, and their location on the hub."""

_FINAL = "model_final.pth"  # the weights of a published model
_CONFIGS = ("tl_config.json", "config.json")
_SUFFIXES = (".pth", ".pt", ".safetensors")
_SIZES = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "n_ctx", "d_vocab")
_BUFFERS = re.compile(r"blocks\.\d+\.attn\.(mask|IGNORE)")

_SAME = {
    "embed.W_E": "transformer.wte.weight",
    "pos_embed.W_pos": "transformer.wpe.weight",
    "ln_final.w": "transformer.ln_f.weight",
    "ln_final.b": "transformer.ln_f.bias",
    "unembed.b_U": "lm_head.bias",
}
_SAME_IN_BLOCK = {
    "ln1.w": "ln_1.weight",
    "ln1.b": "ln_1.bias",
    "attn.b_O": "attn.c_proj.bias",
    "ln2.w": "ln_2.weight",
    "ln2.b": "ln_2.bias",
    "mlp.W_in": "mlp.c_fc.weight",
    "mlp.b_in": "mlp.c_fc.bias",
    "mlp.ln.w": "mlp.act.weight",
    "mlp.ln.b": "mlp.act.bias",
    "mlp.W_out": "mlp.c_proj.weight",
    "mlp.b_out": "mlp.c_proj.bias",
}
"""Weights with the same layout in TransformerLens and GPT-2; W_Q, W_K, W_V, W_O and W_U differ."""

_NO = (False, None)
_READ: dict[str, tuple[Any, ...]] = {
    "normalization": ("LN", "LNPre"),
    "normalization_type": ("LN", "LNPre"),
    "positional_embedding_type": ("standard",),
    "shortformer_pos": _NO,
    "attention_dir": ("causal",),
    "attn_only": (False, True),
    "use_attn_scale": (True,),
    "scale_attn_by_inverse_layer_idx": _NO,
    "use_local_attn": _NO,
    "use_qk_norm": _NO,
    "clip_qkv": (None,),
    "use_logn_attn": _NO,
    "use_attention_sinks": _NO,
    "n_key_value_heads": (None,),
    "attn_scores_soft_cap": (-1, 0, None),
    "output_logits_soft_cap": (-1, 0, None),
    "parallel_attn_mlp": _NO,
    "gated_mlp": _NO,
    "num_experts": (None,),
    "post_embedding_ln": _NO,
    "use_normalization_before_and_after": _NO,
    "final_rms": _NO,
    "load_in_4bit": _NO,
    "neuron_scale": (1,),
    "neuron_temp": (1,),
    "architecture": ("neel", None),
}
"""The configuration fields that change the function, with their supported values."""


@dataclass(frozen=True)
class _Config:
    """The fields of a configuration that determine the function."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    n_ctx: int
    d_vocab: int
    act_fn: str
    attn_only: bool
    folded: bool
    """Whether LayerNorm's weights are folded into others (`LNPre`)."""
    eps: float
    tokenizer_name: str | None


class SoLU(nn.LayerNorm):
    """`LN(x * softmax(x))`: TransformerLens' `solu_ln`.

    Source: Elhage et al., "Softmax Linear Units" (2022), https://transformer-circuits.pub/2022/solu/index.html
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply to activations `[..., d_mlp]`."""
        return super().forward(input * input.softmax(-1))


# -------------------------------------------------------------------------------------------------------------- finding
def find_checkpoint(name: str) -> tuple[Path, Path] | None:
    """Locate weights and configuration of a checkpoint: a file, a folder, or a published model by name.

    A published model is named as in `HUB`, or by its repository; it is downloaded, or read from the hub's cache.

    Returns:
        None when the name is not a TransformerLens checkpoint.

    Raises:
        ModelError: a file without a configuration, a folder without one weights file, or the hub is unreachable.
    """
    path = Path(name)
    if path.suffix in _SUFFIXES and path.is_file():
        config = next((path.parent / c for c in _CONFIGS if (path.parent / c).is_file()), None)
        if config is None:
            raise ModelError(
                f"no configuration beside {name!r}", expected=" or ".join(_CONFIGS), do="copy the model's there"
            )
        return path, config
    if path.is_dir():
        config = next((path / c for c in _CONFIGS if (path / c).is_file() and _is_ours(path / c)), None)
        return (_only_weights(path), config) if config else None
    if not path.exists() and (name in HUB or name.startswith(("NeelNanda/GELU_", "NeelNanda/SoLU_", "NeelNanda/Attn"))):
        return _download(HUB.get(name, name))
    return None


def _is_ours(config: Path) -> bool:
    """Whether a configuration uses TransformerLens' names, not those of `transformers`."""
    if config.name == "tl_config.json":
        return True
    try:
        raw = read_json(config)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and "d_model" in raw and "model_type" not in raw


def _only_weights(folder: Path) -> Path:
    files = sorted(f for f in folder.iterdir() if f.suffix in _SUFFIXES)
    chosen = [f for f in files if f.name == _FINAL] or files
    if len(chosen) != 1:
        raise ModelError(
            f"{folder} has {len(files)} weights files: {', '.join(f.name for f in files[:4])}",
            expected=f"{_FINAL}, or one file ending in {', '.join(_SUFFIXES)}",
            do="pass the path of the file instead",
        )
    return chosen[0]


def _download(repository: str) -> tuple[Path, Path]:
    try:
        config, weights = (Path(hf_hub_download(repository, file)) for file in ("config.json", _FINAL))
    except (OSError, EntryNotFoundError, ValueError) as error:
        raise ModelError(
            f"cannot fetch {repository} from the Hugging Face hub: {_first_line(error)}",
            expected=f"config.json and {_FINAL} on the hub, or in its cache",
            do=advice(error, repository, otherwise="pass a folder with these two files and tokenizer.json"),
        ) from error
    return weights, config


# -------------------------------------------------------------------------------------------------------------- reading
def load_checkpoint(weights: Path, config_file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load the model and its tokenizer: from the folder's `tokenizer.json`, else the configuration's, from the hub.

    Raises:
        ModelError: files that are damaged, inconsistent, or of an unsupported model.
    """
    raw, state = _read_json(config_file), _read_weights(weights)
    config = _config(raw, str(config_file))
    module = _built(config, state, str(weights), dtype, most_bytes=weights.stat().st_size)
    return module, _tokenizer(config_file.parent, config)


def build(raw: Mapping[str, Any], state: Mapping[str, Tensor], source: str, dtype: torch.dtype) -> GPT2LMHeadModel:
    """Build a model from weights in TransformerLens' layout in memory.

    Args:
        raw: their configuration, in TransformerLens' names.
        state: the state dict of a HookedTransformer.
        source: origin of the two, for messages.
        dtype: dtype of the model.

    Raises:
        ModelError: as `load_checkpoint`.
    """
    # All are copied: some are laid out anew, and a later change must not reach only the others.
    weights = {name: t.detach().clone() for name, t in state.items() if not _BUFFERS.fullmatch(name)}
    return _built(_config(raw, source), weights, source, dtype)


def _built(
    config: _Config, state: Mapping[str, Tensor], source: str, dtype: torch.dtype, *, most_bytes: int | None = None
) -> GPT2LMHeadModel:
    _check_weights(state, config, source, most_bytes)
    module = _empty_model(config)
    state = {name: t.detach().to(dtype) for name, t in state.items()}
    module.load_state_dict(_converted(_completed(state, config), config), assign=True)
    return module


def _read_json(file: Path) -> Any:
    try:
        return read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(str(file), error) from error


def _unreadable(source: str, error: Exception) -> ModelError:
    return ModelError(
        f"cannot read {source}: {_first_line(error)}",
        expected=f"a TransformerLens configuration with {', '.join(_SIZES)}",
        do="write it from the model's HookedTransformerConfig",
    )


def _config(raw: Any, source: str) -> _Config:
    try:
        if not isinstance(raw, Mapping):
            raise TypeError(f"a {type(raw).__name__}")
        sizes = {"n_heads": -1, "d_mlp": None} | {name: raw[name] for name in _SIZES if name in raw}
        if sizes["n_heads"] == -1:
            sizes["n_heads"] = sizes["d_model"] // sizes["d_head"]
        if sizes["d_mlp"] is None or raw.get("attn_only"):
            sizes["d_mlp"] = 4 * sizes["d_model"]
        act_fn, eps = raw.get("act_fn"), raw.get("eps", raw.get("ln_eps", 1e-5))
        _check_config(raw, {name: sizes[name] for name in _SIZES}, act_fn, eps, source)
        return _Config(
            **sizes,
            act_fn=act_fn or "",
            attn_only=bool(raw.get("attn_only")),
            folded=raw.get("normalization", raw.get("normalization_type")) == "LNPre",
            eps=float(eps),
            tokenizer_name=raw.get("tokenizer_name"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise _unreadable(source, error) from error


def _check_config(raw: Mapping[str, Any], sizes: Mapping[str, Any], act_fn: Any, eps: Any, source: str) -> None:
    """Raise ModelError at the first unsupported field."""

    def require(fits: bool, name: str, value: Any, expected: str) -> None:
        if not fits:
            raise ModelError(f"{source}: {name} is {value!r}", expected=expected, do="pass another model")

    for name, size in sizes.items():
        require(type(size) is int and size > 0, name, size, "a whole number from 1")
    width = sizes["n_heads"] * sizes["d_head"]
    require(width == sizes["d_model"], "n_heads * d_head", width, f"d_model, {sizes['d_model']}")
    for name in [n for n in _READ if n in raw]:
        require(raw[name] in _READ[name], name, raw[name], " or ".join(map(repr, _READ[name])))
    scale, root = raw.get("attn_scale", -1), sizes["d_head"] ** 0.5
    require(scale == -1 or math.isclose(scale, root, rel_tol=1e-6), "attn_scale", scale, f"sqrt(d_head), {root}")
    require(bool(raw.get("attn_only")) or act_fn in ACTIVATIONS, "act_fn", act_fn, f"one of {', '.join(ACTIVATIONS)}")
    require(0 < eps < 1, "eps", eps, "a small positive number")


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file, without buffers that are not weights."""
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        weights = {name: t for name, t in state.items() if not _BUFFERS.fullmatch(name)}
        others = [name for name, t in weights.items() if not isinstance(t, Tensor)]
        if others:
            raise TypeError(f"not a tensor: {others[0]}")
        return weights
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"cannot read the weights in {file}: a pickle with more in it than tensors, or damaged; nothing of it was "
            "executed",
            expected="a state dict, saved with torch.save or safetensors",
            do="ask who made it for a .safetensors file, or fetch it again",
        ) from error
    except Exception as error:  # a damaged pickle can fail anywhere in its reader
        raise ModelError(
            f"cannot read the weights in {file}: {_first_line(error)}",
            expected="a state dict, saved with torch.save or safetensors",
            do="fetch or save it again; a pickle of anything but tensors is not opened",
        ) from error


def _shapes(config: _Config, *, folded: bool) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each tensor in TransformerLens' layout."""
    h, d, e, m, v = config.n_heads, config.d_model, config.d_head, config.d_mlp, config.d_vocab
    shapes: dict[str, tuple[int, ...]] = {"embed.W_E": (v, d), "pos_embed.W_pos": (config.n_ctx, d)}
    shapes |= {"unembed.W_U": (d, v), "unembed.b_U": (v,)}
    norms = {"ln_final": d}
    for layer in range(config.n_layers):
        block = f"blocks.{layer}"
        shapes |= {f"{block}.attn.W_{p}": (h, d, e) for p in "QKV"} | {f"{block}.attn.b_{p}": (h, e) for p in "QKV"}
        shapes |= {f"{block}.attn.W_O": (h, e, d), f"{block}.attn.b_O": (d,)}
        norms[f"{block}.ln1"] = d
        if not config.attn_only:
            shapes |= {f"{block}.mlp.W_in": (d, m), f"{block}.mlp.b_in": (m,)}
            shapes |= {f"{block}.mlp.W_out": (m, d), f"{block}.mlp.b_out": (d,)}
            norms[f"{block}.ln2"] = d
            if config.act_fn == "solu_ln":
                norms[f"{block}.mlp.ln"] = m
    if not folded:
        shapes |= {f"{norm}.{part}": (width,) for norm, width in norms.items() for part in "wb"}
    return shapes


def _kind(name: str) -> str:
    """Return a tensor's name without its layer."""
    return re.sub(r"^blocks\.\d+\.", "blocks.", name)


def _check_weights(state: Mapping[str, Tensor], config: _Config, source: str, most_bytes: int | None) -> None:
    """Raise ModelError where the tensors are not those of the configuration.

    A bias that no layer has is zero: the published models have no b_U. One that only some layers have counts as
    missing.
    """

    def refuse(what: str, names: list[str]) -> None:
        if names:
            raise ModelError(
                f"the weights in {source} {what} {', '.join(map(str, names[:3]))}",
                expected="a HookedTransformer of " + ", ".join(f"{size} {getattr(config, size)}" for size in _SIZES),
                do="check that the two files are of one model",
            )

    layers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    refuse(f"are of {len(layers)} layers, not", [str(config.n_layers)] if len(layers) != config.n_layers else [])
    folded = not any(name.endswith((".ln1.w", "ln_final.w")) for name in state)
    refuse("have, though they are said to be folded,", ["ln_final.w"] if config.folded and not folded else [])
    shapes, kinds = _shapes(config, folded=folded), {_kind(name) for name in state}
    refuse("have what no such model has:", [name for name in state if name not in shapes])
    needed = [n for n in shapes if n.rpartition(".")[2][0] != "b" or _kind(n) in kinds]
    refuse("lack", [name for name in needed if name not in state])
    refuse("have in another shape", [f"{n} {tuple(t.shape)}" for n, t in state.items() if t.shape != shapes[n]])
    size = most_bytes or math.inf  # a tensor with repeated strides needs less space in a file
    dense = {n: t.layout == torch.strided and not t.is_meta and t.is_floating_point() for n, t in state.items()}
    refuse("are not plain numbers:", [n for n, t in state.items() if not dense[n] or t.nbytes > size])
    refuse("are not finite in", [n for n, t in state.items() if not t.isfinite().all()])


# ----------------------------------------------------------------------------------------------------------- converting
def _empty_model(config: _Config) -> GPT2LMHeadModel:
    """Make a GPT-2 without weights."""
    sizes = GPT2Config(
        vocab_size=config.d_vocab,
        n_positions=config.n_ctx,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        n_inner=config.d_mlp,
        activation_function="gelu" if config.attn_only or config.act_fn == "solu_ln" else config.act_fn,
        layer_norm_epsilon=config.eps,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        module = GPT2LMHeadModel(sizes)
        module.lm_head = nn.Linear(config.d_model, config.d_vocab, bias=True)
        for block in module.transformer.h:
            if config.attn_only:
                block.ln_2 = nn.LayerNorm(config.d_model, config.eps, elementwise_affine=False)
                block.mlp = NoMLP()
            elif config.act_fn == "solu_ln":
                block.set_submodule("mlp.act", SoLU(config.d_mlp, eps=config.eps))
    return module


def _completed(state: Mapping[str, Tensor], config: _Config) -> dict[str, Tensor]:
    """Complete the tensors of the model: gain 1 and bias 0 for a folded norm; zeros for absent biases."""
    dtype = state["embed.W_E"].dtype
    return {
        name: state[name] if name in state else torch.full(shape, float(name.endswith(".w")), dtype=dtype)
        for name, shape in _shapes(config, folded=False).items()
    }


def _converted(state: Mapping[str, Tensor], config: _Config) -> dict[str, Tensor]:
    """Convert the weights to GPT-2's names and layout."""
    result = {ours: state[theirs] for theirs, ours in _SAME.items()}
    result["lm_head.weight"] = state["unembed.W_U"].T.contiguous()
    for layer in range(config.n_layers):
        block, attn = f"transformer.h.{layer}", f"blocks.{layer}.attn"
        weights = [state[f"{attn}.W_{p}"].movedim(0, 1).flatten(1) for p in "QKV"]  # [d_model, head * d_head]
        result[f"{block}.attn.c_attn.weight"] = torch.cat(weights, dim=1)
        result[f"{block}.attn.c_attn.bias"] = torch.cat([state[f"{attn}.b_{p}"].flatten() for p in "QKV"])
        result[f"{block}.attn.c_proj.weight"] = state[f"{attn}.W_O"].flatten(0, 1)
        for theirs, ours in _SAME_IN_BLOCK.items():
            if f"blocks.{layer}.{theirs}" in state:
                result[f"{block}.{ours}"] = state[f"blocks.{layer}.{theirs}"]
    return result


def _tokenizer(folder: Path, config: _Config) -> Any:
    """Load the tokenizer from its tokenizer.json; a class of `transformers` would split numbers differently."""
    local = (folder / "tokenizer.json").is_file() or not config.tokenizer_name
    source = str(folder if local else config.tokenizer_name)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, local_files_only=local)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ModelError(
            f"no tokenizer from {source}: {_first_line(error)}",
            expected=f"tokenizer.json and tokenizer_config.json in {folder}, or a tokenizer_name that is on the hub",
            do=advice(error, source, otherwise="save the model's tokenizer there, or check the network"),
        ) from error
    return tokenizer


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip().splitlines()[0]
