"""Each activation and each file format through evaluation, an index and DFA of single tokens."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from headscope import attribution, jobs
from headscope.cli import main
from headscope.corpus import Corpus
from headscope.errors import IndexFormatError, ModelError, SAEError, StudyError
from headscope.explorer.cards import IndexCards
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.models.hf import Model
from headscope.models.load import load_model
from headscope.sae.convert import fitted
from headscope.sae.formats import load_sae, sae_hash, save_sae
from headscope.sae.model import SAE, Gated
from headscope.site import Site
from headscope.studies.heads.ablation import head_effects
from headscope.studies.how.circuit import PromptCircuit
from headscope.studies.support.replacement import Replacement
from sae_files import CASES

RandomSAE = Callable[..., SAE]
ACTIVATIONS = ("relu", "jumprelu", "topk", "gated")


@pytest.fixture(scope="module", params=ACTIVATIONS)
def live(
    request: pytest.FixtureRequest,
    random_model: Callable[..., Model],
    random_sae: RandomSAE,
    random_corpus: Callable[..., Corpus],
    tmp_path_factory: pytest.TempPathFactory,
) -> LiveIndex:
    """An index of each activation, with its model."""
    model = random_model("gpt_neox", dtype=torch.float64)
    sae, corpus = random_sae(model, 24, request.param), random_corpus(model)
    out = tmp_path_factory.mktemp(request.param) / "index"
    build_index(model, [(sae, SAERecord("random", "sha256:0"))], corpus, out)
    return LiveIndex(FeatureIndex.open(out), model, sae)


def z_of(live: LiveIndex) -> torch.Tensor:
    blocks = np.stack([live.index.tokens_of(i) for i in range(live.index.n_blocks)]).astype(np.int64)
    return live.model.read(torch.from_numpy(blocks), [live.sae.site])[live.sae.site].flatten(0, 1)


def test_the_index_holds_exactly_what_the_sae_encodes(live: LiveIndex) -> None:
    f = live.sae.encode(z_of(live))
    pre = live.sae.pre_activations(z_of(live))
    weights = attribution.HeadWeights.of(live.sae, live.model)
    for latent, active in live.index.each_latent():
        position = torch.from_numpy(active.position.astype(np.int64))
        own = torch.zeros(len(f), dtype=torch.float64)
        own[position] = torch.from_numpy(active.activation.astype(np.float64))
        tokens = np.concatenate([live.index.tokens_of(i) for i in range(live.index.n_blocks)])
        expected = f[:, latent] * torch.from_numpy(tokens != live.model.bos)
        assert_close(own, expected, rtol=1e-6, atol=1e-7)
        total = torch.from_numpy(active.heads.astype(np.float64)).sum(1) + weights.bias[latent]
        assert_close(total, pre[position, latent], rtol=1e-3, atol=1e-3)  # contributions are stored in 14 bits


def test_dfa_sums_to_the_pre_activation_at_any_token_active_or_not(live: LiveIndex) -> None:
    z = z_of(live)
    pre, f = live.sae.pre_activations(z), live.sae.encode(z)
    n_active = 0
    for position in (3, 20, 45):
        for found in live.dfa(position, list(range(24))):
            assert_close(found.pre, pre[position, found.latent].item(), rtol=1e-10, atol=1e-10)
            assert_close(found.activation, f[position, found.latent].item(), rtol=1e-10, atol=1e-10)
            assert_close(found.by_source.sum() + found.bias, found.pre, rtol=1e-9, atol=1e-9)
            n_active += found.activation > 0
    assert 0 < n_active < 72


def test_recursive_dfa_starts_from_the_same_pre_activation(live: LiveIndex) -> None:
    tokens = torch.from_numpy(live.index.tokens_of(1).astype(np.int64))
    circuit = PromptCircuit(live.model, live.sae, tokens)
    z = live.model.read(tokens[None], [live.sae.site])[live.sae.site][0]
    assert_close(circuit.activations, live.sae.encode(z), rtol=1e-10, atol=1e-10)
    root = circuit.root(5, 9)
    assert_close(sum(child.value for child in circuit.expand(root)), root.value, rtol=1e-9, atol=1e-9)


def test_what_a_head_turns_off_is_what_encoding_anew_finds_or_it_is_refused(live: LiveIndex) -> None:
    replacement = Replacement.of(live)
    if live.sae.activation.name == "topk":
        with pytest.raises(StudyError, match="a TopK SAE, where a feature that turns off turns another one on"):
            head_effects(live, replacement)
        return
    effects = head_effects(live, replacement)
    z, text = z_of(live), np.concatenate([live.index.tokens_of(i) for i in range(live.index.n_blocks)])
    is_text = torch.from_numpy(text != live.model.bos)
    instead = replacement.values(np.arange(live.index.n_blocks), live.index.block_size).flatten(0, 1)[is_text]
    z = z[is_text]
    f, d_head = live.sae.encode(z), live.model.spec.d_head
    for head in range(live.index.n_heads):
        ablated, own = z.clone(), slice(head * d_head, (head + 1) * d_head)
        ablated[:, own] = instead[:, own]
        off = ((f > 0) & (live.sae.encode(ablated) == 0)).sum(0).numpy()
        assert (np.abs(effects.n_off[:, head] - off) <= effects.n_undecided[:, head]).all()
        assert off.sum() > 0


def test_a_gated_sae_is_its_two_paths(random_model: Callable[..., Model], random_sae: RandomSAE) -> None:
    g = torch.Generator().manual_seed(0)
    w, r, b_mag, b_gate, b_dec, x = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((32, 48), (48,), (48,), (48,), (32,), (500, 32))
    )
    sae = SAE(
        W_enc=w * r.exp(),
        b_enc=b_mag,
        W_dec=torch.randn(48, 32, generator=g, dtype=torch.float64),
        b_dec=b_dec,
        activation=Gated.of_paths(r, b_mag, b_gate),
        site=Site("z", 1),
        model_name="m",
    )
    gate, magnitude = (x - b_dec) @ w + b_gate, (x - b_dec) @ (w * r.exp()) + b_mag
    expected = (gate > 0) * magnitude.relu()
    assert_close(sae.encode(x), expected, rtol=1e-12, atol=1e-12)
    shut_by_gate, shut_by_magnitude = (gate <= 0) & (magnitude > 0), (gate > 0) & (magnitude <= 0)
    assert shut_by_gate.sum() > 500
    assert shut_by_magnitude.sum() > 500


def test_head_blocks_are_the_dictionary_by_head(random_model: Callable[..., Model], random_sae: RandomSAE) -> None:
    model = random_model("llama", dtype=torch.float64)
    sae = random_sae(model)
    blocks, z = sae.head_blocks(4), torch.randn(7, 48, dtype=torch.float64)
    by_head = z.view(7, 4, 12)
    assert_close(torch.einsum("nhd,hjd->nj", by_head, blocks.encoder), z @ sae.W_enc, rtol=1e-10, atol=1e-10)
    assert_close(blocks.decoder.transpose(0, 1).flatten(1), sae.W_dec)
    written = blocks.through(model.W_O(1))
    assert_close(written.sum(0), sae.W_dec @ model.W_O(1), rtol=1e-10, atol=1e-10)
    assert_close(sae.error(z), z - sae(z))
    with pytest.raises(SAEError, match="cut into 5 heads"):
        sae.head_blocks(5)
    with pytest.raises(SAEError, match="of mlp_out"):
        random_sae(model, site=Site("mlp_out", 0)).head_blocks(4)


# ------------------------------------------------------------------------------------------------ every format, by name
@pytest.fixture(scope="module")
def model_folder(
    random_model: Callable[..., Model],
    save_model: Callable[[Model, Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return save_model(random_model("gpt_neox"), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(chr(33 + (i * 7 + j * j) % 90) for j in range(200)))
    return folder


def written(name: str, model: Model, random_sae: RandomSAE, folder: Path) -> Path:
    write, activation, settings = CASES[name]
    site = Site("attn_out", 0) if name == "sparsify" else Site("z", 1)
    sae = random_sae(model, activation=activation, site=site, **settings)
    return write(replace(sae, model_name=model.spec.name), folder)


def run(*arguments: object) -> None:
    main([str(a) for a in arguments])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_format_can_be_evaluated_indexed_and_served(
    random_sae: RandomSAE, model_folder: Path, text: Path, tmp_path: Path, name: str
) -> None:
    model = load_model(str(model_folder))
    path = written(name, model, random_sae, tmp_path / "files")
    choice = ["--model", model_folder, "--corpus", text, "--split", "all", "--block-size", "32"]
    run("eval", "--sae", path, *choice)
    files = [p for p in (tmp_path / "files").rglob("*quality.json")]
    assert len(files) == 1
    assert json.loads(files[0].read_text())["sae_hash"] == sae_hash(path)
    if name == "sparsify":  # it has none of z
        with pytest.raises(SystemExit):
            run("index", "--sae", path, "--out", tmp_path / "index", *choice)
        return
    run("index", "--sae", path, "--out", tmp_path / "index", *choice)
    live = jobs.live(tmp_path / "index", model=str(model_folder))
    assert live.index.manifest["quality"] is not None
    converted = fitted(load_sae(path), model)
    expected = "raw, converted from" if name == "authors" else converted.metadata.get("z_convention", "not stated")
    assert live.index.manifest["z_convention"].startswith(expected)
    assert live.index.manifest["sae"]["architecture"] == converted.activation.name
    latent = int(np.argmax(live.index.table()["n_active"].to_numpy()))
    active = live.index.activations(latent)
    block, query = divmod(int(active.position[0]), live.index.block_size)
    tokens = torch.from_numpy(live.index.tokens_of(block).astype(np.int64))[None]
    f = converted.encode(model.read(tokens, [converted.site])[converted.site])[0, query, latent].item()
    assert_close(float(active.activation[0]), f, rtol=1e-4, atol=1e-5)
    assert_close(live.dfa(int(active.position[0]), [latent])[0].activation, f, rtol=1e-4, atol=1e-5)
    assert IndexCards(live.index).feature(latent)["latent"] == latent


def test_an_index_of_other_weights_of_the_same_format_is_not_opened_with_these(
    random_sae: RandomSAE, model_folder: Path, text: Path, tmp_path: Path
) -> None:
    model = load_model(str(model_folder))
    path = written("authors", model, random_sae, tmp_path / "files")
    choice = ["--model", model_folder, "--corpus", text, "--split", "all", "--block-size", "32"]
    run("index", "--sae", path, "--out", tmp_path / "index", *choice)
    state = torch.load(path)
    torch.save(state | {"b_enc": state["b_enc"] + 1}, path)
    with pytest.raises(IndexFormatError):
        jobs.live(tmp_path / "index", model=str(model_folder), sae=path)
    own = fitted(load_sae(tmp_path / "index" / "sae"), model)
    assert_close(jobs.live(tmp_path / "index", model=str(model_folder)).sae.b_enc, own.b_enc, rtol=0, atol=0)
    assert not torch.equal(fitted(load_sae(path), model).b_enc, own.b_enc)


def test_info_says_what_things_are_and_whether_they_fit(
    capsys: pytest.CaptureFixture[str],
    random_sae: RandomSAE,
    random_model: Callable[..., Model],
    save_model: Callable[[Model, Path], Path],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    model = load_model(str(model_folder))
    path = written("authors", model, random_sae, tmp_path / "files")
    run("info", path, "--model", model_folder)
    said = capsys.readouterr().out
    for line in (
        "(the post's authors)",
        "architecture:           ReLU\n",
        "48 latents on vectors of 32",
        "blocks.1.attn.hook_z",
        "TransformerLens processed; converted when",
        "heads:                  4 of 8 components",
        "fit:                    yes",
        "the constant part of z joins its biases",
        sae_hash(path),
        model.fingerprint(),
    ):
        assert line in said
    run("info", model_folder)
    assert "gpt_neox" in capsys.readouterr().out
    llama = save_model(random_model("llama"), tmp_path / "llama")
    with pytest.raises(SystemExit) as stopped:
        run("info", path, "--model", llama)
    assert stopped.value.code == 1
    assert "no: an SAE for vectors of 32" in (said := capsys.readouterr().out)
    assert "expected: 48 (4 heads x 12)" in said


def test_info_holds_the_weights_of_the_model_against_those_it_was_trained_on(
    capsys: pytest.CaptureFixture[str], random_sae: RandomSAE, model_folder: Path, tmp_path: Path
) -> None:
    model = load_model(str(model_folder))
    sae = random_sae(model)
    for name, own in (("same", model.fingerprint()), ("other", "sha256:0")):
        sae.metadata["model_hash"] = own
        run("info", save_sae(sae, tmp_path / name), "--model", model_folder)
        said = capsys.readouterr().out
        assert ("same weights:           yes" in said) == (name == "same")
        assert ("same weights:           no: the SAE was trained on others" in said) == (name == "other")


def test_commands_take_an_sae_of_other_weights_when_they_are_forced(
    capsys: pytest.CaptureFixture[str],
    random_model: Callable[..., Model],
    random_sae: RandomSAE,
    save_model: Callable[[Model, Path], Path],
    model_folder: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    model, other = load_model(str(model_folder)), save_model(random_model("gpt_neox", seed=1), tmp_path / "other")
    trained = replace(random_sae(model), metadata={"model_hash": model.fingerprint()})
    sae, index = save_sae(trained, tmp_path / "sae"), tmp_path / "index"
    read = ("--model", other, "--corpus", text, "--split", "all")
    for arguments in (
        ("eval", "--sae", sae, *read),
        ("index", "--sae", sae, "--out", index, *read),
        ("convert", sae, "--model", other, "--out", tmp_path / "fits"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert "whose weights are not those of" in capsys.readouterr().err
        assert not (sae / "quality.json").exists()
        run(*arguments, "--force")
        (sae / "quality.json").unlink(missing_ok=True)
    jobs.live(index, sae=sae)
    jobs.measure(sae, trained, model, (choice := jobs.CorpusChoice(corpus=str(text), split="all")).load(model))
    for name, fits in ((str(model_folder), True), (str(other), False)):
        loaded = load_model(name)
        assert (jobs.measured_quality(sae, loaded, choice.load(loaded)) is not None) == fits
    assert load_sae(tmp_path / "fits").metadata["model_hash"] == load_model(str(other)).fingerprint()
    manifest = json.loads((index / "manifest.json").read_text())
    del manifest["sae"]["forced_from"]  # as of a version that did not look
    (index / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="whose weights are not"):
        jobs.live(index, sae=sae)


def test_convert_writes_a_folder_that_states_everything(
    capsys: pytest.CaptureFixture[str], random_sae: RandomSAE, model_folder: Path, tmp_path: Path
) -> None:
    model = load_model(str(model_folder))
    path = written("authors", model, random_sae, tmp_path / "files")
    run("convert", path, "--out", tmp_path / "raw")
    assert f"SAE: {tmp_path / 'raw'} (ReLU; blocks.1.attn.hook_z of" in capsys.readouterr().out
    made, expected = load_sae(tmp_path / "raw"), fitted(load_sae(path), model)
    assert_close(made.b_dec, expected.b_dec, rtol=0, atol=0)
    assert made.metadata["converted"]["model_hash"] == model.fingerprint()
    assert not made.processed
    with pytest.raises(SystemExit):
        run("convert", path, "--out", tmp_path / "raw")
    assert "already exists" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("convert", path, "--out", tmp_path / "b", "--site", "z")
    assert "give --site and --layer" in capsys.readouterr().err


def test_convert_takes_what_files_do_not_say(random_sae: RandomSAE, model_folder: Path, tmp_path: Path) -> None:
    model = load_model(str(model_folder))
    path = written("gemma-scope", model, random_sae, tmp_path / "files")
    alone = tmp_path / "alone" / "params.npz"
    alone.parent.mkdir()
    alone.write_bytes((path / "params.npz").read_bytes())
    run("convert", alone, "--out", tmp_path / "b", "--site", "z", "--layer", "1", "--trained-on", model_folder)
    made = load_sae(tmp_path / "b")
    assert (made.site, made.model_name) == (Site("z", 1), str(model_folder))
