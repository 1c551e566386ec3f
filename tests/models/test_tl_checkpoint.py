"""TransformerLens-format checkpoints: the model they become computes what their formulas say; bad ones are named."""

import json
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from headscope.errors import ModelError
from headscope.models import tl_checkpoint
from headscope.models.load import load_model
from headscope.site import Site
from judging import assert_same_scale, judged_by, run_judge
from tl_files import KINDS, NORMS, SIZES, configuration, random_state, write_checkpoint

TOKENS = torch.randint(1, 98, (3, 17), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------- a checkpoint and its own forward
def reference(state: dict[str, Tensor], config: dict[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    """The forward pass, written out: logits, and z, pattern, the residual stream and the MLP's output of each layer."""
    eps, seen = config.get("eps", 1e-5), {}

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * state[f"{name}.w"] + state[f"{name}.b"] if f"{name}.w" in state else x

    def act(x: Tensor, layer: int) -> Tensor:
        match config["act_fn"]:
            case "gelu":
                return x * 0.5 * (1 + torch.erf(x / 2**0.5))
            case "gelu_new":
                return x * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
            case "relu":
                return x * (x > 0)
            case _:
                return norm(x * (x.exp() / x.exp().sum(-1, keepdim=True)), f"blocks.{layer}.mlp.ln")

    resid = state["embed.W_E"][tokens] + state["pos_embed.W_pos"][: tokens.shape[1]]
    for i in range(config["n_layers"]):
        w = {name.removeprefix(f"blocks.{i}."): t for name, t in state.items()}
        seen[f"resid_pre{i}"], x = resid, norm(resid, f"blocks.{i}.ln1")
        q, k, v = (torch.einsum("bsd,hde->bhse", x, w[f"attn.W_{p}"]) + w[f"attn.b_{p}"][:, None] for p in "QKV")
        scores = (q @ k.mT / config["d_head"] ** 0.5).masked_fill(
            ~torch.ones(2 * x.shape[1:2]).tril().bool(), -math.inf
        )
        seen[f"pattern{i}"] = scores.softmax(-1)
        z = seen[f"pattern{i}"] @ v
        seen[f"z{i}"] = z.transpose(1, 2).flatten(2)
        resid = resid + torch.einsum("bhqe,hed->bqd", z, w["attn.W_O"]) + w["attn.b_O"]
        seen[f"mlp_out{i}"] = torch.zeros_like(resid)
        if not config.get("attn_only", False):
            hidden = act(norm(resid, f"blocks.{i}.ln2") @ w["mlp.W_in"] + w["mlp.b_in"], i)
            seen[f"mlp_out{i}"] = hidden @ w["mlp.W_out"] + w["mlp.b_out"]
        resid = resid + seen[f"mlp_out{i}"]
    return seen | {"logits": norm(resid, "ln_final") @ state["unembed.W_U"] + state["unembed.b_U"]}


@pytest.fixture
def save(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., Path]:
    """`save(state, config, suffix=, config_name=)`: write a folder, tokenizer included."""
    return partial(write_checkpoint, tmp_path / "checkpoint", tokenizer)


# --------------------------------------------------------------------------------------------------------- what is read
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_formulas_say(save: Callable[..., Path], kind: str, norm: str) -> None:
    config = configuration(kind, norm)
    state = random_state(config)
    model = load_model(str(save(state, config)), dtype=torch.float64)
    expected = reference(state, config, TOKENS)
    assert_close(model.logits(TOKENS), expected["logits"], rtol=1e-10, atol=1e-10)
    for layer in range(2):
        attention = model.attention(TOKENS, layer)
        assert_close(attention.pattern, expected[f"pattern{layer}"], rtol=1e-10, atol=1e-10)
        assert_close(attention.z, expected[f"z{layer}"], rtol=1e-10, atol=1e-10)
        sites = [Site(at, layer) for at in ("resid_pre", "z", "mlp_out") if at in model.spec.kinds]
        for site, value in model.read(TOKENS, sites).items():
            assert_close(value, expected[f"{site.kind}{layer}"], rtol=1e-10, atol=1e-10)


def test_edits_losses_and_weights_are_those_of_the_checkpoint(save: Callable[..., Path]) -> None:
    config = configuration("solu_ln")
    state = random_state(config)
    model = load_model(str(save(state, config)), dtype=torch.float64)
    spec = model.spec
    assert (spec.n_layers, spec.d_model, spec.n_heads, spec.d_head) == (2, 16, 4, 4)
    assert (spec.d_vocab, spec.context, model.bos) == (98, 20, 0)
    logits = reference(state, config, TOKENS)["logits"][:, :-1].log_softmax(-1)
    losses = -logits.gather(-1, TOKENS[:, 1:, None])[..., 0]
    assert_close(model.losses(TOKENS), losses, rtol=1e-10, atol=1e-10)
    assert_close(model.W_O(1), state["blocks.1.attn.W_O"].flatten(0, 1), rtol=0, atol=0)
    ln, attn = "blocks.1.ln1.b", "blocks.1.attn"
    offset = torch.einsum("d,hde->he", state[ln], state[f"{attn}.W_V"]) + state[f"{attn}.b_V"]
    assert_close(model.value_offset(1), offset.flatten(), rtol=1e-10, atol=1e-10)
    gain = state["ln_final.w"][:, None] * state["unembed.W_U"]
    gain = gain - gain.mean(0)
    assert_close(model.logit_directions, gain - gain.mean(1, keepdim=True), rtol=1e-10, atol=1e-10)
    silent = {name: t * 0 if name == "blocks.0.attn.W_O" else t for name, t in state.items()}
    with model.edit({Site("z", 0): torch.zeros_like}):
        assert_close(model.logits(TOKENS), reference(silent, config, TOKENS)["logits"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config_name", ["tl_config.json", "config.json"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_every_kind_of_file_is_the_same_model(save: Callable[..., Path], suffix: str, config_name: str) -> None:
    config = configuration()
    state = random_state(config)
    folder = save(state, config, suffix=suffix, config_name=config_name)
    expected = reference(state, config, TOKENS)["logits"]
    (file,) = (f for f in folder.iterdir() if f.suffix == suffix)
    for name in (folder, file):
        assert_close(load_model(str(name), dtype=torch.float64).logits(TOKENS), expected, rtol=1e-10, atol=1e-10)
    assert load_model(str(folder)).logits(TOKENS).dtype == torch.float32


def test_the_published_models_own_files_are_read(save: Callable[..., Path]) -> None:
    """Their configurations are those of training; there are masks, no b_U, and earlier weights beside the last."""
    config = SIZES | {"act_fn": "gelu", "attn_only": False, "normalization": "LN", "shortformer_pos": False}
    config |= {"ln_eps": 1e-3, "lr_hidden": 2e-3, "weight_decay": 0.05, "neuron_scale": 1.0, "neuron_temp": 1.0}
    state = random_state(configuration())
    masks = {f"blocks.{i}.attn.mask": torch.ones(20, 20).tril().bool() for i in range(2)}
    ignored = {f"blocks.{i}.attn.IGNORE": torch.tensor(-math.inf) for i in range(2)}
    saved = {name: t.half() for name, t in state.items() if name != "unembed.b_U"}
    folder = save(saved | masks | ignored, config, config_name="config.json")
    torch.save({}, folder / "step_100.pth")
    known = {name: t.half().double() for name, t in state.items()}
    known["unembed.b_U"] = torch.zeros(98, dtype=torch.float64)
    model = load_model(str(folder), dtype=torch.float64)
    assert_close(
        model.logits(TOKENS), reference(known, config | {"eps": 1e-3}, TOKENS)["logits"], rtol=1e-10, atol=1e-10
    )


def test_a_model_of_weights_in_memory_shares_none_of_them() -> None:
    """Those that are laid out anew cannot be shared: a change of the others alone would make a third model."""
    config = configuration()
    state = {name: weight.float() for name, weight in random_state(config).items()}
    module = tl_checkpoint.build(config, state, "x", torch.float32)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    for weight in state.values():
        weight.add_(1)
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())


def test_an_attention_only_models_width_of_the_mlp_does_not_matter(save: Callable[..., Path]) -> None:
    config = configuration("attn_only")
    state = random_state(config)
    model = load_model(str(save(state, config | {"d_mlp": -1, "act_fn": "unheard-of"})), dtype=torch.float64)
    assert_close(model.logits(TOKENS), reference(state, config, TOKENS)["logits"], rtol=1e-10, atol=1e-10)


def test_processed_weights_are_read_under_the_raw_models_configuration(save: Callable[..., Path]) -> None:
    folded = configuration("solu_ln", "LNPre")
    state = random_state(folded)
    model = load_model(str(save(state, configuration("solu_ln", "LN"))), dtype=torch.float64)
    assert_close(model.logits(TOKENS), reference(state, folded, TOKENS)["logits"], rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------- TransformerLens 3.9
@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints that TransformerLens made, each with what it computes."""
    root = tmp_path_factory.mktemp("judged")
    tokens = torch.randint(1, 98, (3, 40), generator=torch.Generator().manual_seed(0))
    np.savez(root / "tokens.npz", tokens=tokens.numpy())
    run_judge("transformer_lens_checkpoints.py", root / "tokens.npz", root)
    return root


@judged_by("transformer_lens")
@pytest.mark.parametrize("processed", ["", "-processed"])
@pytest.mark.parametrize("kind", ["gelu", "gelu_new", "solu_ln", "attn_only"])
def test_it_computes_what_transformerlens_computes(
    judged: Path, tokenizer: Tokenizer, kind: str, processed: str
) -> None:
    folder, tokens = judged / f"{kind}{processed}", torch.from_numpy(np.load(judged / "tokens.npz")["tokens"])
    copied = Tokenizer.from_str(tokenizer.to_str())
    PreTrainedTokenizerFast(tokenizer_object=copied, bos_token="<|bos|>").save_pretrained(folder)
    model = load_model(str(folder))
    expected = {name: torch.from_numpy(value) for name, value in np.load(folder / "judged.npz").items()}
    assert_same_scale(model.logits(tokens), expected["logits"], 1e-5)
    for layer in range(3):
        attention = model.attention(tokens, layer)
        assert_same_scale(attention.pattern, expected[f"pattern{layer}"], 1e-5)
        assert_same_scale(attention.z, expected[f"z{layer}"], 1e-5)
        added = [at for at in ("resid_pre", "attn_out", "mlp_out") if at in model.spec.kinds]
        parts = model.read(tokens, [Site(at, layer) for at in added])
        assert_same_scale(sum(parts.values(), torch.zeros(())), expected[f"resid_post{layer}"], 1e-5)
        offset = model.value_offset(layer)
        assert (offset.abs().max() < 1e-6) == (bool(processed) and not kind.startswith("gelu"))


# ------------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positional_embedding_type": "shortformer"}, "positional_embedding_type is 'shortformer'"),
        ({"positional_embedding_type": "rotary"}, "positional_embedding_type is 'rotary'"),
        ({"shortformer_pos": True}, "shortformer_pos is True"),
        ({"normalization_type": "RMS"}, "normalization_type is 'RMS'"),
        ({"normalization_type": None}, "normalization_type is None"),
        ({"architecture": "neel-solu-old"}, "architecture is 'neel-solu-old'"),
        ({"use_local_attn": True}, "use_local_attn is True"),
        ({"n_key_value_heads": 2}, "n_key_value_heads is 2"),
        ({"final_rms": True}, "final_rms is True"),
        ({"attn_scale": 1.0}, r"attn_scale is 1.0[\s\S]*2.0"),
        ({"attn_scale": "wide"}, "TypeError"),
        ({"act_fn": "solu"}, r"act_fn is 'solu'[\s\S]*solu_ln"),
        ({"act_fn": ["gelu"]}, "act_fn is"),
        ({"eps": 0}, "eps is 0"),
        ({"d_model": 0}, "d_model is 0"),
        ({"n_ctx": "20"}, "n_ctx is '20'"),
        ({"n_heads": 3}, r"n_heads \* d_head is 12[\s\S]*d_model, 16"),
        ({"n_layers": 10**12}, "2 layers, not 1000000000000"),
        ({"n_layers": 1}, "2 layers, not 1"),
        ({"n_heads": 2, "d_head": 8}, r"shape .*blocks.0.attn.W_Q \(4, 16, 4\)"),
        ({"d_vocab": 10**15}, r"shape embed.W_E \(98, 16\)"),
        ({"n_ctx": 21}, r"shape pos_embed.W_pos \(20, 16\)"),
        ({"d_mlp": None}, "shape blocks.0.mlp.W_in"),
        ({"normalization_type": "LNPre"}, "folded, ln_final.w"),
        ({"act_fn": "solu_ln"}, "lack blocks.0.mlp.ln.w"),
        ({"attn_only": True}, "no such model has: blocks.0.mlp.W_in"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(
    save: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    state = random_state(configuration())
    with pytest.raises(ModelError, match=message):
        load_model(str(save(state, configuration() | changes)))


@pytest.mark.parametrize("field", sorted(tl_checkpoint._READ))
def test_what_changes_the_function_and_is_not_read_is_refused(save: Callable[..., Path], field: str) -> None:
    folder = save(random_state(configuration()), configuration() | {field: 2.5})
    with pytest.raises(ModelError, match=f"{field} is 2.5"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.attn.W_K": None}, "lack blocks.1.attn.W_K"),
        ({"blocks.1.attn.b_K": None}, "lack blocks.1.attn.b_K"),
        ({"blocks.0.ln2.w": None}, "lack blocks.0.ln2.w"),
        ({"ln_final.w": None}, "lack ln_final.w"),
        ({"unembed.W_U": None}, "lack unembed.W_U"),
        ({"blocks.0.attn.W_gate": torch.ones(3)}, "no such model has: blocks.0.attn.W_gate"),
        ({"blocks.00.attn.W_Q": torch.ones(3)}, "3 layers, not 2"),
        ({7: torch.ones(3)}, "TypeError"),
        ({"unembed.W_U": torch.ones(98, 16)}, r"shape unembed.W_U \(98, 16\)"),
        ({"embed.W_E": torch.full((98, 16), math.nan)}, "not finite in embed.W_E"),
        ({"unembed.b_U": torch.full((98,), math.inf)}, "not finite in unembed.b_U"),
        ({"unembed.b_U": torch.ones(98, dtype=torch.int8)}, "not plain numbers: unembed.b_U"),
        ({"unembed.b_U": torch.ones(98).to_sparse()}, "not plain numbers: unembed.b_U"),
        ({"unembed.b_U": torch.empty(98, device="meta")}, "not plain numbers: unembed.b_U"),
        ({"unembed.b_U": "ninety-eight"}, "not a tensor"),
    ],
)
def test_weights_that_do_not_fit_are_named(save: Callable[..., Path], changes: dict[Any, Any], message: str) -> None:
    state = {name: t for name, t in (random_state(configuration()) | changes).items() if t is not None}
    with pytest.raises(ModelError, match=message):
        load_model(str(save(state, configuration())))


def test_a_tensor_larger_than_its_file_is_refused(save: Callable[..., Path]) -> None:
    state = random_state(configuration()) | {"embed.W_E": torch.ones(1, 1).expand(10**6, 16)}
    state |= {"unembed.W_U": torch.ones(1, 1).expand(16, 10**6), "unembed.b_U": torch.ones(1).expand(10**6)}
    with pytest.raises(ModelError, match=r"not plain numbers: embed\.W_E"):
        load_model(str(save(state, configuration(d_vocab=10**6))))


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("bomb"),))


def test_a_pickle_is_not_run(save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save(random_state(configuration()) | {"unembed.b_U": Bomb()}, configuration())
    with pytest.raises(ModelError, match="cannot read the weights"):
        load_model(str(folder))
    (folder / "model_final.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match="cannot read the weights"):
        load_model(str(folder))
    assert not Path("bomb").exists()


def test_a_tokenizers_code_is_not_run(save: Callable[..., Path], tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "code.py").write_text(f"open({str(tmp_path / 'bomb')!r}, 'w')\nclass Bomb: pass\n")
    (remote / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Bomb", None]}}))
    folder = save(random_state(configuration()), configuration(tokenizer_name=str(remote)))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer from"):
        load_model(str(folder))
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(save: Callable[..., Path], suffix: str) -> None:
    folder = save(random_state(configuration()), configuration(), suffix=suffix)
    (file,) = (f for f in folder.iterdir() if f.suffix == suffix)
    content = file.read_bytes()
    for size in [0, 1, 8, 100, *range(1000, len(content), len(content) // 12), len(content) - 1]:
        file.write_bytes(content[:size])
        with pytest.raises(ModelError, match="cannot read the weights"):
            load_model(str(file))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"d_model": 16}', "[" * 100_000, "\x00"])
def test_a_damaged_configuration_is_refused(save: Callable[..., Path], text: str) -> None:
    folder = save(random_state(configuration()), configuration())
    (folder / "tl_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"cannot read .*tl_config\.json"):
        load_model(str(folder))


def test_weights_without_a_configuration_or_more_than_one_are_refused(save: Callable[..., Path]) -> None:
    folder = save(random_state(configuration()), configuration(), suffix=".pt")
    torch.save({}, folder / "another.pth")
    with pytest.raises(ModelError, match=r"2 weights files: another.pth, model_final.pt[\s\S]*path of the file"):
        load_model(str(folder))
    (folder / "tl_config.json").unlink()
    with pytest.raises(ModelError, match="no configuration beside"):
        load_model(str(folder / "another.pth"))
    with pytest.raises(ModelError, match="no model at"):
        load_model(str(folder / "none.pth"))


def test_the_tokenizer_must_be_there_and_fit(save: Callable[..., Path]) -> None:
    config = configuration()
    folder = save(random_state(config), config)
    content = (folder / "tokenizer.json").read_text()
    for damaged in ("", "{}", "[]", content[:1000]):
        (folder / "tokenizer.json").write_text(damaged)
        with pytest.raises(ModelError, match="no tokenizer from"):
            load_model(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer from .*checkpoint[\s\S]*tokenizer.json"):
        load_model(str(folder))
    (folder / "tl_config.json").write_text(json.dumps(config | {"tokenizer_name": "NeelNanda/none-such"}))
    with pytest.raises(ModelError, match=r"no tokenizer from NeelNanda/none-such[\s\S]*network"):
        load_model(str(folder))
    small = configuration(d_vocab=50)
    save(random_state(small), small)
    with pytest.raises(ModelError, match=r"token 97[\s\S]*d_vocab, 50"):
        load_model(str(folder))


def test_the_tokenizer_splits_text_as_its_file_says(save: Callable[..., Path], tokenizer: Tokenizer) -> None:
    """Whatever class it names: `transformers` makes those anew, without the file's own rules (for digits, say)."""
    folder = save(random_state(configuration()), configuration())
    named = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPTNeoXTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    elsewhere = folder.with_name("tokenizer")
    elsewhere.mkdir()
    (folder / "tl_config.json").write_text(json.dumps(configuration(tokenizer_name=str(elsewhere))))
    for _ in ("beside the weights", "where tokenizer_name says"):
        loaded = load_model(str(folder))
        assert json.loads(loaded.tokenizer.to_str())["pre_tokenizer"] == json.loads(tokenizer.to_str())["pre_tokenizer"]
        assert (loaded.bos, loaded.tokenizer.get_vocab_size()) == (0, 98)
        for file in folder.glob("tokenizer*.json"):
            file.rename(elsewhere / file.name)


def test_a_tokenizer_without_bos_is_refused(save: Callable[..., Path]) -> None:
    folder = save(random_state(configuration()), configuration())
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="BOS"):
        load_model(str(folder))


# -------------------------------------------------------------------------------------------------- published, by name
def test_a_published_model_is_downloaded_by_name(save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration()
    state = random_state(config)
    folder, asked = save(state, config, config_name="config.json"), []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(folder / file)

    monkeypatch.setattr(tl_checkpoint, "hf_hub_download", download)
    for name in ("gelu-2l", "NeelNanda/GELU_2L512W_C4_Code"):
        model = load_model(name, dtype=torch.float64)
        assert model.spec.name == name
        assert_close(model.logits(TOKENS), reference(state, config, TOKENS)["logits"], rtol=1e-10, atol=1e-10)
    assert asked == [("NeelNanda/GELU_2L512W_C4_Code", f) for f in ("config.json", "model_final.pth")] * 2


@pytest.mark.parametrize("name", ["gelu-2l", "solu-12l", "attn-only-1l", "NeelNanda/SoLU_1L512W_Wiki_Finetune"])
def test_without_the_network_a_published_model_is_a_clear_error(name: str) -> None:
    with pytest.raises(ModelError, match=r"cannot fetch NeelNanda/[\s\S]*check the network"):
        load_model(name)


def test_a_folder_of_transformers_is_none_of_these(
    random_model: Callable, save_model: Callable, tmp_path: Path
) -> None:
    folder = save_model(random_model("gpt2"), tmp_path / "model")
    assert tl_checkpoint.find_checkpoint(str(folder)) is None
    other = tmp_path / "t5"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"d_model": 512, "model_type": "t5"}))
    assert tl_checkpoint.find_checkpoint(str(other)) is None
    assert load_model(str(folder)).spec.family == "gpt2"
    with pytest.raises(ModelError, match="KeyError"):
        load_model(str(folder / "model.safetensors"))
