"""An index, and an SAE, whose folders were moved: what they need is found, and held against its hash."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from headscope import jobs
from headscope.artefact import file_hash, read_json, write_json
from headscope.cli import main
from headscope.errors import HeadscopeError, IndexFormatError, ModelError, SAEError
from headscope.explorer.cards import IndexCards
from headscope.index.store import FeatureIndex
from headscope.jobs.finding import model_of
from headscope.models.hf import Model
from headscope.models.load import load_model
from headscope.report.run import Inputs
from headscope.report.run import run as report
from headscope.sae.formats import WEIGHTS, lasting_name, load_sae, save_sae

TEXT = ["--corpus", "text.txt", "--split", "all", "--block-size", "16"]
SaveModel = Callable[[Model, Path], Path]


def run(*arguments: object) -> None:
    main([str(a) for a in arguments])


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = read_json(path)
    change(content)
    write_json(path, content)


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Model]) -> Model:
    return random_model("gpt_neox")


@pytest.fixture(scope="module")
def built(
    model: Model, save_model: SaveModel, random_sae: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A project whose commands ran in it with relative names: `model`, `sae`, `index`, and `bare`, without its SAE."""
    project = tmp_path_factory.mktemp("built") / "project"
    save_model(model, project / "model")
    save_sae(random_sae(model, 24), project / "sae")
    (project / "text.txt").write_text("".join(chr(33 + (j * j) % 90) for j in range(600)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        run("index", "--sae", "sae", "--model", "model", "--out", "index", *TEXT)
        run("index", "--sae", "./sae", "--model", "./model", "--out", "bare", "--no-carry-sae", *TEXT)
        run(
            *("train", "--model", "model", "--layer", "1", "--out", "trained", *TEXT),
            *("--tokens", "512", "--batch", "64", "--buffer", "256", "--d-sae", "24", "--target-l0", "3"),
        )
    return project


@pytest.fixture
def project(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project after a move, seen from another working directory; nothing is where it was, and there is no hub."""
    moved = tmp_path / "moved" / "project"
    shutil.copytree(built, moved)
    for path in (moved / "index" / "manifest.json", moved / "bare" / "manifest.json", moved / "trained" / "cfg.json"):
        path.write_text(path.read_text().replace(str(built), str(tmp_path / "gone")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def ask(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("headscope.models.load.AutoConfig.from_pretrained", _only_local(ask))
    for name in ("headscope.sae.formats.fetch", "headscope.models.tl_checkpoint.hf_hub_download"):
        monkeypatch.setattr(name, ask)
    return moved


def _only_local(ask: Callable[..., None]) -> Callable[..., Any]:
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained
    return lambda name, **options: read(name, **options) if options.get("local_files_only") else ask()


def opens(index: Path, **named: Any) -> bool:
    """Whether an index opens with its model, whose numbers are then those that it stores."""
    live = jobs.live(index, **named)
    example = live.index.examples(latent := int(live.index.table()["n_active"].to_numpy().argmax()))[0].examples[0]
    (found,) = live.dfa(example.position, [latent])
    assert found.pre == pytest.approx(example.pre, abs=1e-4)
    return True


# --------------------------------------------------------------------------------------------------------- what is kept
def test_a_manifest_does_not_depend_on_the_working_directory(built: Path) -> None:
    manifest = read_json(built / "index" / "manifest.json")
    for what in ("model", "sae"):
        assert (manifest[what]["name"], manifest[what]["relative"]) == (str(built / what), f"../{what}")
    copy = built / "index" / "sae" / WEIGHTS
    assert manifest["sae"]["carried"] == file_hash(copy)
    assert not any(name.startswith("sae/") for name in manifest["files"]), "the index opens without it too"
    bare = read_json(built / "bare" / "manifest.json")
    assert "carried" not in bare["sae"]
    assert not (built / "bare" / "sae").exists()
    assert [read_json(built / n / "manifest.json")["plan"]["carry_sae"] for n in ("index", "bare")] == [True, False]


def test_the_copy_in_an_index_is_the_sae_and_says_where_its_model_is(built: Path) -> None:
    own, copy = load_sae(built / "sae"), load_sae(built / "index" / "sae")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert getattr(own, name).equal(getattr(copy, name))
    trained = read_json(built / "trained" / "cfg.json")["metadata"]
    assert (trained["model_name"], trained["model_path"]) == (str(built / "model"), "../model")


def test_names_that_are_no_paths_are_kept_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny-z1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [lasting_name(n) for n in ("tiny-z1", "us/saes/z")] == ["tiny-z1", "us/saes/z"]
    assert load_model("tiny").spec.name == "tiny"


# ------------------------------------------------------------------------------------------------------- an index moves
def test_a_project_may_be_moved_as_a_whole(project: Path) -> None:
    for name in ("index", "bare"):
        assert opens(project / name)


def test_an_index_alone_may_be_moved(built: Path, project: Path, tmp_path: Path) -> None:
    """To another place on the same machine: its model is where it was, its SAE in it."""
    shutil.copytree(built / "index", tmp_path / "alone")
    assert opens(tmp_path / "alone")


def test_an_index_may_carry_its_model_too(project: Path, tmp_path: Path) -> None:
    shutil.move(project / "index", tmp_path / "shared")
    with pytest.raises(ModelError, match="was not found"):
        jobs.live(tmp_path / "shared")
    shutil.copytree(project / "model", tmp_path / "shared" / "model")
    shutil.rmtree(project)
    assert opens(tmp_path / "shared")
    FeatureIndex.open(tmp_path / "shared").verify()


def test_a_model_that_was_put_into_an_index_is_not_deleted_with_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    shutil.move("model", "index/model")
    with pytest.raises(SystemExit):
        run("index", "--sae", "sae", "--out", "index", "--overwrite", *TEXT)
    assert "index would be replaced, and headscope did not write model" in capsys.readouterr().err
    assert opens(project / "index")


def test_what_the_user_names_comes_first_and_alone(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = shutil.move(project / "bare", tmp_path / "bare")
    for named in ({}, {"model": project / "model"}, {"sae": project / "sae"}):
        with pytest.raises(HeadscopeError, match="was not found"):
            jobs.live(index, **{key: str(value) for key, value in named.items()})
    assert opens(index, model=str(project / "model"), sae=project / "sae")
    monkeypatch.chdir(project)
    assert opens(index, model="model", sae="sae")
    with pytest.raises(ModelError, match=r"no model at './none'"):
        jobs.live(project / "index", model="./none")


def test_nothing_found_lists_where_it_was_looked_for(project: Path, tmp_path: Path) -> None:
    index = Path(shutil.move(project / "bare", tmp_path / "bare"))
    with pytest.raises(SAEError) as caught:
        jobs.live(index)
    for place in (index / "sae", tmp_path / "gone" / "sae", tmp_path / "sae"):
        assert f"{place} does not exist" in caught.value.got
    assert "--sae" in caught.value.do
    assert str(index / "sae") in caught.value.do
    with pytest.raises(ModelError) as caught:
        jobs.live(index, sae=project / "sae")
    assert "--model" in caught.value.do
    assert "sha256:" in caught.value.expected


# --------------------------------------------------------------------------------------------------------------- hashes
def test_what_has_another_hash_is_passed_over(
    project: Path,
    tmp_path: Path,
    random_model: Callable[..., Model],
    random_sae: Callable[..., Any],
    save_model: SaveModel,
) -> None:
    """In the first two of the three places lie others, one of them of another width."""
    other, index = random_model("gpt_neox", seed=1), project / "bare"
    save_model(random_model("llama"), index / "model")
    save_model(other, tmp_path / "gone" / "model")
    save_sae(random_sae(random_model("llama"), 24), index / "sae")
    save_sae(random_sae(other, 24, seed=1), tmp_path / "gone" / "sae")
    assert opens(index)
    shutil.rmtree(project / "model")
    with pytest.raises(ModelError, match=r"(?s)bare/model: .*gone/model: model sha256:.*moved/project/model does not"):
        jobs.live(index)
    shutil.rmtree(project / "sae")
    with pytest.raises(SAEError, match=r"(?s)bare/sae: SAE .*gone/sae: SAE .*project/sae does not"):
        jobs.live(index)
    for named in ({"model": tmp_path / "gone" / "model"}, {"sae": tmp_path / "gone" / "sae"}):
        with pytest.raises(IndexFormatError, match=r"sha256:[\s\S]*--(model|sae)"):
            jobs.live(
                project / "index", **{k: str(v) for k, v in named.items()} | {"model": str(tmp_path / "gone/model")}
            )


def test_files_that_are_damaged_are_passed_over(project: Path) -> None:
    for name, file in (("model", "model.safetensors"), ("sae", WEIGHTS)):
        shutil.copytree(project / name, project / "bare" / name)
        (project / "bare" / name / file).write_bytes(b"x" * 100)
    assert opens(project / "bare")


def test_a_damaged_copy_is_found_by_verify_and_not_used(project: Path) -> None:
    index = FeatureIndex.open(project / "index")
    index.verify()
    weights = project / "index" / "sae" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IndexFormatError, match=f"sae/{WEIGHTS} changed"):
        index.verify()
    assert opens(project / "index"), "by the SAE beside it"
    shutil.rmtree(project / "index" / "sae")
    shutil.copytree(project / "sae", project / "index" / "sae")
    index.verify()
    assert opens(project / "index", sae=project / "index" / "sae")


# ---------------------------------------------------------------------------------------------------------- old indexes
def test_an_index_of_before_opens_and_finds_what_lies_as_it_did(project: Path) -> None:
    """Its manifest has names relative to a working directory, which was a parent of it."""
    index = Path(shutil.copytree(project / "bare", project / "runs" / "deep" / "index"))

    def of_before(manifest: dict[str, Any]) -> None:
        for what, name in (("model", "project/model"), ("sae", "./sae")):
            manifest[what] = {k: v for k, v in manifest[what].items() if k != "relative"} | {"name": name}
        del manifest["plan"]["carry_sae"]

    edit(index / "manifest.json", of_before)
    assert opens(index)
    shutil.move(project / "sae", project / "away")
    with pytest.raises(SAEError, match=r"(?s)was not found.*--sae"):
        jobs.live(index)
    assert opens(index, sae=project / "away")


def test_what_an_index_says_of_places_may_be_anything(project: Path) -> None:
    for value in (["x"], "\0"):
        edit(project / "bare" / "manifest.json", lambda m, value=value: m["sae"].update(relative=value, carried=value))
        with pytest.raises(SAEError, match="was not found"):
            jobs.live(project / "bare")
        assert opens(project / "bare", sae=project / "sae")


# ------------------------------------------------------------------------------------------------------------- commands
def test_every_command_that_runs_the_model_takes_its_name_and_the_saes(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def live(index: Path, **named: Any) -> None:
        asked.append(named)
        raise IndexFormatError("enough", expected="", do="")

    monkeypatch.setattr("headscope.jobs.studies.live", live)
    index = project / "index"
    dive = ["dive", index, "1", "--out", tmp_path / "page.html"]
    commands = [["study", name, index] for name in ("effects", "families", "heads")]
    commands += [dive, ["serve", "--index", index]]
    options = [["--model", "m", "--sae", "s"], ["--sae", "s"], ["--with-model"]]
    for command, given in itertools.product(commands, options):
        more = [word for word in given if word != "--with-model" or command[0] in ("dive", "serve")]
        with pytest.raises(SystemExit):
            run(*command, *more)
        named = {"model": "m" if "m" in given else None, "sae": "s" if "s" in given else None}
        assert asked.pop().items() >= (named | {"device": "cpu"}).items(), command
        assert "enough" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("serve", "--index", index, "--upstream-sae", "tiny-mlp0")
    assert asked.pop().items() >= {"model": None, "sae": None, "device": "cpu"}.items()


def test_serve_finds_the_model_when_it_is_asked_to(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr("headscope.explorer.server.serve", lambda app, **_: served.append(app))
    for options in (["--with-model"], []):
        run("serve", "--index", project / "index", *options)
    about = [TestClient(app, base_url="http://127.0.0.1:1").get("/api/about").json() for app in served]
    assert [found["prompts"] for found in about] == [True, False]


def test_what_a_study_finds_is_kept_beside_an_index_that_was_moved(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Path(shutil.move(project / "bare", tmp_path / "bare"))
    with pytest.raises(SystemExit):
        run("effects", bare)
    assert "do: name it with --sae" in capsys.readouterr().err
    run("effects", bare, "--model", project / "model", "--sae", project / "sae")
    assert (FeatureIndex.open(bare).columns("effects")["n"].to_numpy() > 0).any()


def test_a_report_of_indexes_finds_their_models_and_knows_them_after_a_move(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headscope.report.exemplars.choose", lambda *_, **__: ())
    report(tmp_path / "out", Inputs(indexes=(project / "index",)), studies=[])
    shutil.move(project, tmp_path / "again")
    monkeypatch.chdir(tmp_path / "again")
    found = report(tmp_path / "out", Inputs(indexes=(Path("index"),)), studies=[])
    assert found.model["name"] == "model"


def test_pages_and_reports_tell_nothing_of_folders(built: Path, tmp_path: Path) -> None:
    about = IndexCards(FeatureIndex.open(built / "index")).about()
    assert str(built) not in json.dumps(about)
    assert (about["model"]["name"], about["sae"]["name"], about["title"]) == (
        "model",
        "sae",
        "model · blocks.1.attn.hook_z",
    )
    run("export", "--index", built / "index", "--out", tmp_path / "page.html")
    assert str(built) not in (tmp_path / "page.html").read_text()


# ------------------------------------------------------------------------------------------------------ an SAE is moved
def test_an_sae_is_evaluated_and_indexed_from_anywhere(built: Path, project: Path, tmp_path: Path) -> None:
    """With its model where it was, moved together with it, or as an older version named it."""
    text = ["--corpus", project / "text.txt", *TEXT[2:]]
    alone = Path(shutil.copytree(built / "trained", tmp_path / "alone"))
    of_before = Path(shutil.copytree(project / "trained", project / "before"))

    def name_before(config: dict[str, Any]) -> None:
        config["metadata"]["model_name"] = "project/model"
        del config["metadata"]["model_path"]

    edit(of_before / "cfg.json", name_before)
    for sae in (alone, project / "trained", of_before):
        run("eval", "--sae", sae, *text)
        assert (sae / "quality.json").is_file()
    run("index", "--sae", project / "trained", "--out", tmp_path / "index", *text)
    manifest = read_json(tmp_path / "index" / "manifest.json")
    assert manifest["model"]["name"] == str(project / "model")
    assert opens(tmp_path / "index")


def test_a_copy_of_an_sae_names_the_model_where_it_is_now(project: Path, tmp_path: Path) -> None:
    jobs.convert(project / "trained", tmp_path / "copy")
    metadata = read_json(tmp_path / "copy" / "cfg.json")["metadata"]
    assert (metadata["model_name"], metadata["model_path"]) == (str(project / "model"), "../moved/project/model")
    jobs.convert(project / "trained", tmp_path / "named", trained_on="gpt2")
    metadata = read_json(tmp_path / "named" / "cfg.json")["metadata"]
    assert metadata["model_name"] == "gpt2"
    assert "model_path" not in metadata


def test_of_several_models_the_one_with_the_hash_is_taken(
    project: Path, tmp_path: Path, random_model: Callable[..., Model], save_model: SaveModel, model: Model
) -> None:
    save_model(random_model("gpt_neox", seed=1), tmp_path / "gone" / "model")
    sae, hardware = load_sae(project / "trained"), jobs.Hardware()
    assert model_of(sae, None, hardware).fingerprint() == model.fingerprint()
    assert model_of(sae, str(tmp_path / "gone" / "model"), hardware).fingerprint() != model.fingerprint()


def test_an_sae_whose_model_is_nowhere_asks_for_its_name(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(project / "model")
    edit(project / "sae" / "cfg.json", lambda config: config["metadata"].pop("model_name"))
    for name, match in (("trained", "no model at"), ("sae", "name no model")):
        with pytest.raises(SystemExit):
            run("eval", "--sae", project / name)
        message = capsys.readouterr().err
        assert match in message
        assert "name the model with --model" in message


def test_a_sae_of_a_short_name_says_what_was_looked_for(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = dataclasses.replace(load_sae(built / "sae"), model_name="gpt2-small")
    save_sae(sae, tmp_path / "sae")
    with pytest.raises(SystemExit):
        run("eval", "--sae", tmp_path / "sae")
    message = capsys.readouterr().err
    assert "'gpt2'" in message
    assert "name the model with --model" in message
