"""Loading: what a user names or has loaded already becomes the same model, or is refused with what to do."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from headscope.corpus import load_corpus
from headscope.errors import CorpusError, HeadscopeError, IndexFormatError, ModelError, SAEError
from headscope.index.store import FeatureIndex
from headscope.models.load import load_model
from headscope.sae.formats import WEIGHTS, load_sae, save_sae
from headscope.site import Site
from judging import judged_by, run_judge

BRIDGED = ("gpt2", "gpt_neox", "llama", "gemma2", "qwen3")


def fast(tokenizer, **special):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), **special)


@pytest.fixture
def folder(random_model, save_model, tmp_path):
    return save_model(random_model("llama"), tmp_path / "model")


# ------------------------------------------------------------------------------------------------------ a user's object
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3_text"])
def test_a_users_model_shares_its_weights_and_is_left_as_it_is(random_model, tokenizer, family):
    theirs = random_model(family).module.train().requires_grad_(True)
    theirs.set_attn_implementation("eager")
    tokens = torch.randint(1, 98, (2, 9), generator=torch.Generator().manual_seed(0))
    ours = load_model(theirs, tokenizer=fast(tokenizer, bos_token="<|bos|>"))
    with torch.no_grad():
        expected = theirs.eval()(tokens, use_cache=False).logits
    theirs.train()
    assert_close(ours.logits(tokens), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    pointers = {name: p.data_ptr() for name, p in theirs.named_parameters()}
    assert pointers == {name: p.data_ptr() for name, p in ours.module.named_parameters()}
    with ours.edit({Site("z", 0): torch.zeros_like, Site("pattern", 1): torch.zeros_like}):
        ours.logits(tokens)
    assert theirs.training
    assert all(p.requires_grad for p in theirs.parameters())
    assert theirs.config._attn_implementation == "eager"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in theirs.modules())


def test_a_users_model_in_another_precision_leaves_theirs(random_model, tokenizer):
    theirs = random_model("llama").module
    ours = load_model(theirs, tokenizer=fast(tokenizer, bos_token="<|bos|>"), dtype=torch.float64)
    assert (ours.module.dtype, theirs.dtype) == (torch.float64, torch.float32)


def test_a_users_model_needs_a_tokenizer(random_model):
    with pytest.raises(ModelError, match=r"the tokenizer of[\s\S]*fast tokenizer"):
        load_model(random_model("llama").module)


def test_another_module_is_refused():
    with pytest.raises(ModelError, match=r"a Linear[\s\S]*HookedTransformer"):
        load_model(torch.nn.Linear(2, 2))


@judged_by("transformer_lens")
def test_objects_of_transformerlens_are_what_they_compute(random_model, save_model, tmp_path):
    folders = [save_model(random_model(name), tmp_path / name) for name in BRIDGED]
    run_judge("transformer_lens_objects.py", tmp_path / "out.json", *folders)
    found = json.loads((tmp_path / "out.json").read_text())
    assert "compatibility mode" in found.pop("refused compatibility")
    assert "positional_embedding_type is 'rotary'" in found.pop("refused rotary")
    assert found.keys() == {"hooked", "hooked processed", *(f"bridge {name}" for name in BRIDGED)}
    for name, misses in found.items():
        shared = misses.pop("shared")
        assert shared > 0 or name.startswith("hooked"), name
        assert misses.pop("left as it was") == 0, name
        assert all(miss < 2e-4 for miss in misses.values()), (name, misses)


# -------------------------------------------------------------------------------------------------------- first token
def test_blocks_start_with_bos_or_with_eos_where_there_is_none(random_model, tokenizer):
    module = random_model("llama").module
    for special, expected in [
        ({"bos_token": "A", "eos_token": "B"}, "A"),
        ({"eos_token": "B"}, "B"),
    ]:
        assert load_model(module, tokenizer=fast(tokenizer, **special)).bos == tokenizer.token_to_id(expected)
    with pytest.raises(ModelError, match="BOS or EOS"):
        load_model(module, tokenizer=fast(tokenizer))


# ---------------------------------------------------------------------------------------------------------- precision
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_losses_are_of_float32(folder, dtype):
    model, half = load_model(folder), load_model(folder, dtype=dtype)
    tokens = torch.randint(1, 98, (2, 20), generator=torch.Generator().manual_seed(0))
    assert half.module.dtype == half.logits(tokens).dtype == dtype
    assert half.losses(tokens).dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(
        half.logits(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    assert_close(half.losses(tokens).flatten(), expected, atol=1e-5, rtol=1e-5)
    site = Site("z", 1)
    z, near = model.read(tokens, [site])[site], half.read(tokens, [site])[site]
    assert near.dtype == dtype
    assert (near.float() - z).norm() < 0.05 * z.norm()
    attention = half.attention(tokens, 1)
    mixed = torch.einsum("bhqs,bshe->bqhe", attention.pattern.float(), attention.value.float()).flatten(2)
    assert (mixed - attention.z.float()).norm() < 0.01 * mixed.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_are_never_rounded(folder, dtype):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = plain.model.rotary_emb.inv_freq
    assert expected.dtype == torch.float32
    for given in (str(folder), AutoModelForCausalLM.from_pretrained(folder)):
        tokenizer = None if isinstance(given, str) else AutoTokenizer.from_pretrained(folder)
        half = load_model(given, dtype=dtype, tokenizer=tokenizer)
        assert torch.equal(half.module.model.rotary_emb.inv_freq, expected)
        tokens = torch.arange(1, 40)[None]
        assert_close(half.logits(tokens), plain(tokens).logits, atol=0.02, rtol=0.02)


def test_dtypes_and_devices_may_be_named(folder, random_sae, tmp_path):
    for named in ("bfloat16", "torch.bfloat16"):
        model = load_model(folder, dtype=named, device="cpu")
        assert (model.module.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
    sae = random_sae(model, dtype=torch.float32)
    assert sae.to("float64").W_enc.dtype == torch.float64
    assert sae.to("cpu").W_enc.device == torch.device("cpu")
    save_sae(sae, tmp_path / "sae", dtype="bfloat16")
    assert load_file(tmp_path / "sae" / WEIGHTS)["W_enc"].dtype == torch.bfloat16


def test_dtypes_and_devices_that_do_not_compute_are_refused(folder, random_sae, random_model, tmp_path):
    for dtype in (torch.int8, "int8", "float", "", "bf16"):
        with pytest.raises(ModelError, match=r"dtype[\s\S]*bfloat16"):
            load_model(folder, dtype=dtype)
        with pytest.raises(ModelError, match=r"dtype[\s\S]*bfloat16"):
            save_sae(random_sae(random_model()), tmp_path / "sae", dtype=dtype)
    for device in ("meta", torch.device("meta"), "abacus", "", "cuda:99"):
        with pytest.raises(ModelError, match=r"^device[\s\S]*expected: cpu"):
            load_model(folder, device=device)
    with pytest.raises(ModelError, match=r"^device 'abacus'"):
        random_sae(random_model()).to("abacus")
    assert not (tmp_path / "sae").exists()


def test_names_that_nothing_can_have_are_refused_wherever_they_are_given(tokenizer):
    for name in ("", " ", "n" * 300, "a\0b"):
        with pytest.raises(ModelError, match=r"^model = "):
            load_model(name)
        with pytest.raises(SAEError, match=r"^sae = "):
            load_sae(name)
        with pytest.raises(CorpusError, match=r"^corpus = "):
            load_corpus(name, tokenizer, bos=0)
        with pytest.raises(IndexFormatError, match=r"^index = "):
            FeatureIndex.open(name)


# ---------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, bad):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][3, 4] = bad
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"NaN or infinity in model.layers.1.self_attn.o_proj.weight"):
        load_model(folder)


class Bomb:
    """Unpickled, it would leave a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def test_a_pickle_of_weights_is_not_run(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb(tmp_path / "mark")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"a pickle with more in it than tensors[\s\S]*nothing was executed") as e:
        load_model(folder)
    assert "weights_only" not in str(e.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, r"not a multiple of the number of attention heads \(3\)[\s\S]*fetch or save"),
        ({"vocab_size": 60}, r"other sizes than its config.json says[\s\S]*mend config.json"),
        ({"model_type": "nonesuch"}, r"`nonesuch`[\s\S]*fetch or save"),
        ({"num_hidden_layers": 1}, r"of which config.json says nothing"),
        ({"num_hidden_layers": 5}, r"lack or misfit"),
    ],
)
def test_a_configuration_of_another_model_is_refused(folder, changes, message):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("tokenizer.json", "fast tokenizer"),
        ("model.safetensors", r"no file named model.safetensors[\s\S]*fetch or save"),
        ("config.json", "fetch or save"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_without_a_word_of_the_network(folder, left_out, message):
    (folder / left_out).unlink()
    with pytest.raises(ModelError, match=message) as raised:
        load_model(folder)
    assert "network" not in str(raised.value)


def test_quantised_weights_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised"):
        load_model(folder)


def test_weights_without_numbers_are_refused_as_such(random_model, tokenizer):
    theirs = random_model("llama").module
    theirs.model.layers[1].mlp.to("meta")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.\w+\.weight of 'llama' is on the device `meta`"):
        load_model(theirs, tokenizer=fast(tokenizer, bos_token="<|bos|>"))


def test_a_gguf_file_is_called_one(folder, tmp_path):
    file = tmp_path / "model-q4.gguf"
    file.write_bytes(b"GGUF\3\0\0\0")
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in (file, alone / file.name):
        path.write_bytes(b"GGUF\3\0\0\0")
    (alone / "config.json").write_text((folder / "config.json").read_text())
    for name in (file, alone):
        with pytest.raises(ModelError, match=r"as GGUF[\s\S]*gguf_file="):
            load_model(name)
    (folder / file.name).write_bytes(b"GGUF\3\0\0\0")
    assert load_model(folder).spec.family == "llama"


class Adapted(torch.nn.Module):
    """What an adapter that is not merged makes of a linear layer, in PEFT's names."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@pytest.mark.filterwarnings("ignore")  # transformers reports the names that it does not know
def test_an_adapter_on_the_unembedding_is_called_one(random_model, tokenizer, save_model, tmp_path):
    model = random_model("llama", tie_word_embeddings=False)
    model.module.lm_head = Adapted(model.module.lm_head)
    with pytest.raises(ModelError, match=r"Adapted as its unembedding[\s\S]*merge the adapter"):
        load_model(model.module, tokenizer=fast(tokenizer, bos_token="<|bos|>"))
    with pytest.raises(ModelError, match=r"an adapter that is not merged.*lora_[\s\S]*merge_and_unload"):
        load_model(save_model(model, tmp_path / "adapted"))


@pytest.mark.parametrize(
    ("d_vocab", "message"), [(60, r"the token 97[\s\S]*d_vocab, 60"), (300, r"of 98 tokens[\s\S]*d_vocab 300")]
)
def test_a_tokenizer_of_another_vocabulary_is_refused(random_model, save_model, tmp_path, d_vocab, message):
    with pytest.raises(ModelError, match=message):
        load_model(save_model(random_model("llama", vocab_size=d_vocab), tmp_path / "model"))


def test_rows_that_pad_a_vocabulary_are_none_of_it(random_model, save_model, tmp_path):
    assert load_model(save_model(random_model("llama", vocab_size=104), tmp_path / "model")).spec.d_vocab == 104


def test_an_unknown_architecture_is_refused_with_the_how_to(folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "bloom"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"type 'bloom'[\s\S]*families.py; docs/models.md"):
        load_model(folder)


RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (GatedRepoError("gated", response=RESPONSE), r"https://huggingface.co/some/model[\s\S]*hf auth login"),
        (RepositoryNotFoundError("none", response=RESPONSE), r"check the name[\s\S]*private"),
        (LocalEntryNotFoundError("not here"), r"hf download some/model --local-dir"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(monkeypatch, cause, message):
    def refuse(*_args, **_kwargs):
        raise OSError("cannot") from cause

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=message):
        load_model("some/model")


def test_code_in_a_model_folder_is_neither_run_nor_asked_about(folder, tmp_path):
    ran = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Mine: pass\n"
    (folder / "mine.py").write_text(code)
    auto = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine", "AutoTokenizer": ["mine.Mine", None]}
    loaded = load_model(folder).fingerprint()
    edited(folder, auto_map=auto)  # a type that transformers has: the code is not needed
    assert load_model(folder).fingerprint() == loaded
    for model_type in ("mine", "llama"):
        edited(folder, model_type=model_type)
        if model_type == "llama":
            settings = folder / "tokenizer_config.json"
            settings.write_text(json.dumps({"tokenizer_class": "Mine", "auto_map": auto}))
        with pytest.raises(ModelError, match=r"(?s)code that comes with it; nothing of it was executed.*another model"):
            load_model(folder)
    assert not ran.exists()


def test_weights_that_may_not_be_read_are_not_called_missing(folder, random_model, random_sae, tmp_path, monkeypatch):
    sae = save_sae(random_sae(random_model("llama")), tmp_path / "sae")
    opens = Path.open

    def refuse(path, *arguments, **named):
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opens(path, *arguments, **named)

    def none(*_args, **_named):
        raise FileNotFoundError("No such file or directory: model.safetensors")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", none)
    for load, path in ((load_model, folder), (load_sae, sae)):
        with pytest.raises(HeadscopeError, match=r"Permission denied.*safetensors"):
            load(path)


def test_without_the_network_a_name_says_how_to_use_a_folder():
    with pytest.raises(ModelError, match=r"cannot load the model 'openai-community/none-such'[\s\S]*--local-dir"):
        load_model("openai-community/none-such")


# ------------------------------------------------------------------------------------------------------- the real thing
@pytest.mark.network
def test_gelu_2l_predicts_hello_world_as_published():
    code = (
        "from headscope import load_model; import torch; m = load_model('gelu-2l');"
        "ids = [m.bos, *m.tokenizer.encode('Hello world!', add_special_tokens=False).ids];"
        "print(m.losses(torch.tensor([ids])).mean().item())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) == pytest.approx(6.501802, abs=1e-4)


# ------------------------------------------------------------------------------------- a config unlike the weights
def edited(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(folder)


def test_weights_that_the_config_does_not_describe_are_refused(random_model, save_model, tmp_path):
    biased = save_model(random_model("llama", attention_bias=True), tmp_path / "biased")
    with pytest.raises(ModelError, match=r"(?s)hold .*self_attn.*bias.*do: mend config.json"):
        load_model(edited(biased, attention_bias=False))
    deep = save_model(random_model("llama"), tmp_path / "deep")
    with pytest.raises(ModelError, match=r"(?s)hold .*layers\.1\..*do: mend config.json"):
        load_model(edited(deep, num_hidden_layers=1))


def test_settings_of_other_families_change_nothing(folder):
    tokens = torch.randint(1, 98, (2, 9), generator=torch.Generator().manual_seed(0))
    model = load_model(edited(folder, final_logit_softcapping=2.0, use_parallel_residual=True))
    logits = model.logits(tokens)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    assert_close(model.losses(tokens).flatten(), expected, rtol=1e-5, atol=1e-5)
    assert not model.spec.parallel


def test_a_family_with_capped_scores_may_have_none(random_model):
    model = random_model("gemma2", attn_logit_softcapping=None)
    tokens = torch.randint(1, 98, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model.logits(tokens)
    model.module.set_attn_implementation("eager")
    assert_close(logits, model.module(tokens).logits, rtol=1e-4, atol=1e-4)
