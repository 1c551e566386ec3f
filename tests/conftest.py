"""Small random models, corpora and SAEs: seeded, offline, made in milliseconds."""

import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share what the process that starts them has made
    os.environ["HEADSCOPE_TESTS"] = tempfile.mkdtemp(prefix="headscope-tests-")
    os.environ["HEADSCOPE_CACHE"] = f"{os.environ['HEADSCOPE_TESTS']}/cache"
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that wants the network fails at once

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cases import FULL, QUICK
from checked import unchecked
from headscope.corpus import Corpus
from headscope.models.hf import Model
from headscope.sae.model import SAE, Gated, JumpReLU, ReLU, TopK
from headscope.site import Site
from unchanged import left_unchanged

if TYPE_CHECKING:
    from playwright.sync_api import Browser

if "PYTEST_XDIST_WORKER" not in os.environ:
    atexit.register(shutil.rmtree, os.environ["HEADSCOPE_TESTS"], ignore_errors=True)
for profile, n_examples in {"full": FULL, "quick": QUICK}.items():  # chosen with --hypothesis-profile
    settings.register_profile(profile, deadline=None, max_examples=n_examples, derandomize=True)
settings.load_profile("full")

BOS_TOKEN = "<|bos|>"

_SHARED = {"vocab_size": 98, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "use_cache": False}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 12}
_LOCAL = ["sliding_attention", "full_attention"]
_CAPPED = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 20}
_LIKE_LLAMA: dict[str, dict[str, Any]] = {
    "llama": _GROUPED | {"attention_bias": True, "mlp_bias": True},
    "mistral": _GROUPED | {"sliding_window": 7},
    "qwen2": {"num_key_value_heads": 2, "sliding_window": 5, "use_sliding_window": True, "layer_types": _LOCAL},
    "qwen3": _GROUPED,
    "gemma2": _GROUPED | _CAPPED | {"sliding_window": 5, "layer_types": _LOCAL},
    "gemma3_text": _GROUPED | {"query_pre_attn_scalar": 20, "sliding_window": 5, "layer_types": _LOCAL},
    "afmoe": _GROUPED | {"num_dense_layers": 2, "layer_types": _LOCAL, "sliding_window": 5},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "first_k_dense_replace": 2,
    },
}
"""What the configurations of these families say beside `_WIDTHS`: each with whatever sets it apart turned on."""
_WIDTHS = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}


def _untrained(family: str, n_layers: int, changes: dict[str, Any]) -> PreTrainedModel:
    match family:
        case "gpt_neox":
            rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
            blocks = {"use_parallel_residual": False, "tie_word_embeddings": False, "rope_parameters": rope}
            config = GPTNeoXConfig(**(_SHARED | _WIDTHS | blocks | changes), num_hidden_layers=n_layers)
            return GPTNeoXForCausalLM(config)
        case "gpt2":
            sizes = {"n_embd": 32, "n_head": 4, "n_inner": 48, "n_positions": 64}
            dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
            return GPT2LMHeadModel(GPT2Config(**(_SHARED | sizes | dropout | changes), n_layer=n_layers))
        case "gemma3":
            text = _SHARED | _WIDTHS | _LIKE_LLAMA["gemma3_text"] | changes | {"num_hidden_layers": n_layers}
            vision = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
            vision |= {"image_size": 28, "patch_size": 14}
            config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
            return AutoModelForCausalLM.from_config(config)
        case other:
            sizes = _SHARED | _WIDTHS | _LIKE_LLAMA[other] | changes
            config = AutoConfig.for_model(other, **sizes, num_hidden_layers=n_layers)
            return AutoModelForCausalLM.from_config(config)


def _randomise(module: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights large enough that attention is not flat, biases that are not zero, norms that are not one."""
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim == 2:
            p.data = noise if "emb" in name or "wte" in name else noise * 1.3 / p.shape[1] ** 0.5
        elif name.endswith("bias"):
            p.data = noise * 0.3
        else:
            p.data = 1 + 0.2 * noise


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those with many: a worker takes a file at a time, and the last are short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    n_tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -n_tests[item.path]))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Thousands of small files are not written through to the disk: no test takes the power away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def no_type_checks() -> Iterator[None]:
    """Annotations are not executed, as in an installation: an error of our own is what is raised."""
    with unchecked():
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One token a printable ASCII character, space, tab and newline; BOS 0, unknown bytes 1."""
    alphabet = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    vocab = {token: i for i, token in enumerate([BOS_TOKEN, "<unk>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([BOS_TOKEN])
    return made


@pytest.fixture(scope="session")
def random_model(tokenizer: Tokenizer) -> Callable[..., Model]:
    """`random_model(family, dtype=, n_layers=, seed=, **changes of the config)`: a new model at each call."""

    def make(
        family: str = "gpt_neox",
        *,
        dtype: torch.dtype = torch.float32,
        n_layers: int = 2,
        seed: int = 0,
        **changes: Any,
    ) -> Model:
        module = _untrained(family, n_layers, changes)
        _randomise(module, torch.Generator().manual_seed(seed))
        return Model(module.to(dtype), tokenizer, 0, f"random {family}")

    return make


@pytest.fixture(scope="module")
def shared_model(random_model: Callable[..., Model]) -> Iterator[Callable[..., Model]]:
    """`random_model`, called once a file for each choice of arguments; checked at the end to be left unchanged."""
    made: dict[str, Model] = {}
    with ExitStack() as checks:

        def share(*args: Any, **options: Any) -> Model:
            key = repr((args, sorted(options.items())))
            if key not in made:
                made[key] = random_model(*args, **options)
                checks.enter_context(left_unchanged(made[key]))
            return made[key]

        yield share


@pytest.fixture(scope="session")
def save_model(tokenizer: Tokenizer) -> Callable[[Model, Path], Path]:
    """`save_model(model, folder)`: write it as a Hugging Face folder with its tokenizer."""

    def save(model: Model, folder: Path) -> Path:
        model.module.save_pretrained(folder)
        copied = Tokenizer.from_str(tokenizer.to_str())
        fast = PreTrainedTokenizerFast(tokenizer_object=copied, bos_token=BOS_TOKEN, unk_token="<unk>")
        fast.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def random_corpus() -> Callable[..., Corpus]:
    """`random_corpus(model, n_blocks=, block_size=, seed=)`: random tokens, documents that begin inside blocks."""

    def make(model: Model, n_blocks: int = 6, block_size: int = 16, *, seed: int = 0) -> Corpus:
        rng = np.random.default_rng(seed)
        size = n_blocks * (block_size - 1)
        stream = rng.integers(1, model.spec.d_vocab, size, dtype=np.int32)
        starts = np.sort(rng.choice(np.arange(1, size), max(1, size // 25), replace=False))
        stream[[0, *starts]] = model.bos
        document = (np.cumsum(stream == model.bos) - 1).astype(np.int32)
        offset = (np.arange(size) - np.array([0, *starts])[document]).astype(np.int32)

        def cut(values: np.ndarray, first: np.ndarray) -> np.ndarray:
            rows = values.reshape(n_blocks, block_size - 1)
            return np.concatenate([first[:, None].astype(np.int32), rows], axis=1)

        return Corpus(
            name="random",
            split="all",
            blocks=cut(stream, np.full(n_blocks, model.bos)),
            documents=tuple(f"document {i}" for i in range(len(starts) + 1)),
            document=cut(document, document[:: block_size - 1]),
            offset=cut(offset, np.full(n_blocks, -1)),
            bos=model.bos,
        )

    return make


@pytest.fixture(scope="session")
def random_sae() -> Callable[..., SAE]:
    """`random_sae(model, d_sae, activation, site=, dtype=, seed=)`; activation: `relu`, `jumprelu`, `topk`, `gated`."""

    def make(
        model: Model,
        d_sae: int = 48,
        activation: str = "relu",
        *,
        site: Site | None = None,
        apply_b_dec_to_input: bool = True,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> SAE:
        g = torch.Generator().manual_seed(seed)
        site = site or Site("z", model.spec.n_layers - 1)
        d_in = model.width(site)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype or model.module.dtype)

        threshold = normal(d_sae).abs() * 0.3
        kinds = {"relu": ReLU(), "jumprelu": JumpReLU(threshold), "topk": TopK(5), "gated": Gated(threshold)}
        return SAE(
            W_enc=normal(d_in, d_sae) / d_in**0.5,
            b_enc=normal(d_sae) * 0.3 - 0.3,
            W_dec=normal(d_sae, d_in) / d_in**0.5,
            b_dec=normal(d_in) * 0.2,
            activation=kinds[activation],
            site=site,
            model_name=model.spec.name,
            apply_b_dec_to_input=apply_b_dec_to_input,
        )

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """The system's Chromium. Not for a whole session: while it runs, its thread is in an event loop."""
    from playwright.sync_api import sync_playwright

    from browsing import launched

    with sync_playwright() as playwright:
        browser = launched(playwright)
        yield browser
        browser.close()
