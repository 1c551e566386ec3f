"""Names of models, SAEs and text: what is a path, what it is from elsewhere, `~`, and TransformerLens' short names."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from headscope import jobs, load_corpus, load_model, load_sae, save_sae
from headscope.artefact import atomic_write, check_output
from headscope.cli import main
from headscope.commands.pages import Dive
from headscope.commands.training import Runs
from headscope.corpus import read_documents
from headscope.errors import CorpusError, ModelError, OptionError, OutputError, SAEError
from headscope.limits import check_fields
from headscope.models.aliases import repository_of
from headscope.models.families import FAMILIES
from headscope.names import absolute, is_path, lasting_corpus, lasting_model, local, places, relative, short, shown


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and a working directory that is another."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


# --------------------------------------------------------------------------------------------------------------- paths
def test_what_is_a_path_and_never_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "mine").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("/a/b", "./gpt2", "../a/b", ".", "~/a", "~", "runs", "runs/not/there", "mine", "./" + "x" * 300):
        assert is_path(name), name
    for name in ("gpt2", "EleutherAI/pythia-70m", "us/saes/z", "run", "x" * 300):
        assert not is_path(name), name


def test_a_path_is_made_absolute_and_seen_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "latest").symlink_to(tmp_path / "a" / "model")
    monkeypatch.chdir(tmp_path / "a")
    assert {absolute(n) for n in ("model", "./model", "../a/model/", "model/../model")} == {
        str(tmp_path / "a" / "model")
    }
    assert absolute(".") == absolute("model/..") == str(tmp_path / "a")
    assert absolute("../latest") == str(tmp_path / "latest"), "which may be turned to another folder"
    assert relative(absolute("model"), tmp_path / "runs" / "index") == "../../a/model"
    assert relative("gpt2", tmp_path) is None


def test_only_a_path_changes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny", "python", "prose"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert [lasting_model(n) for n in ("tiny", "gpt2", "prose")] == ["tiny", "gpt2", str(tmp_path / "prose")]
    assert [lasting_corpus(n) for n in ("python", "us/text", "prose")] == ["python", "us/text", str(tmp_path / "prose")]


def test_what_is_shown_tells_nothing_of_the_users_folders() -> None:
    assert [short(n) for n in ("/home/me/model", "tiny", "EleutherAI/pythia-70m")] == [
        "model",
        "tiny",
        "EleutherAI/pythia-70m",
    ]
    assert shown({"name": "/home/me/sae", "relative": "../sae", "d_in": 8}) == {"name": "sae", "d_in": 8}


def test_where_something_named_may_be(tmp_path: Path) -> None:
    index = tmp_path / "a" / "b" / "index"
    (tmp_path / "a" / "runs" / "sae").mkdir(parents=True)
    assert places("/x/sae", "../sae", index) == [Path("/x/sae"), tmp_path / "a" / "b" / "sae"]
    assert places(str(tmp_path / "a" / "sae"), "../../sae", index) == [tmp_path / "a" / "sae"], "it was not moved"
    assert places("/x/sae", None, index) == places("/x/sae", 5, index) == [Path("/x/sae")]
    assert places("runs/sae", None, index) == [tmp_path / "a" / "runs" / "sae"], "as older versions kept it"
    assert places("runs/other", None, index) == places("", None, index) == []
    assert places("gpt2", "../sae", index) == [], "a name that was changed by hand"


# ---------------------------------------------------------------------------------------------------------------- home
def test_home_is_read_as_by_a_shell(home: Path) -> None:
    assert local("~") == home
    assert local("~/a/b") == local(Path("~/a/b")) == home / "a" / "b"
    assert local("~root") == Path("~root").expanduser()
    assert [local(n) for n in ("~nobody-here/a", "a/~/b", "a~")] == [Path("~nobody-here/a"), Path("a/~/b"), Path("a~")]


def test_names_may_begin_with_home(home: Path, random_model: Any, save_model: Any, random_sae: Any) -> None:
    model = random_model("gpt_neox")
    save_model(model, home / "model")
    save_sae(random_sae(model), home / "sae")
    (home / "text").mkdir()
    (home / "text" / "a.txt").write_text("some text")
    loaded = load_model("~/model")
    assert (loaded.fingerprint(), loaded.spec.name) == (model.fingerprint(), str(home / "model"))
    assert load_sae("~/sae").d_sae == 48
    assert load_sae("~/sae", model_name="~/model").model_name == str(home / "model")
    for name in ("~/text", "~/text/a.txt", "~/text/*.txt"):
        assert [document.text for document in read_documents(name)] == ["some text"]
    for load, error in ((load_model, ModelError), (load_sae, SAEError)):
        with pytest.raises(error, match="/none"):
            load("~/none")
    with pytest.raises(CorpusError, match=r"no corpus '.*home/none'"):
        load_corpus("~/none", model.tokenizer, bos=0)


def test_options_may_begin_with_home_where_the_shell_leaves_it(home: Path) -> None:
    main(["convert", "tiny-z1", "--out=~/sae"])
    main(["convert", "~/sae", "--out", "~/again"])
    assert sorted(path.name for path in home.iterdir()) == ["again", "sae"]
    assert list(Path().iterdir()) == []


def test_every_name_and_path_of_a_command_or_a_job_is_read_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rule for all that is annotated as a name or a path; a proxy, which is neither, may begin with `~`."""
    dive = Dive(index=Path("~/i"), feature=3, out=Path("~/p.html"), proxy=('~token_in(["a"])',), sae="~/s")
    check_fields(dive)
    assert (dive.index, dive.out, dive.sae) == (home / "i", home / "p.html", str(home / "s"))
    assert dive.proxy == ('~token_in(["a"])',)
    runs = Runs(folders=(Path("~/a"), Path("b")), html=Path("~/c.html"))
    check_fields(runs)
    assert (runs.folders, runs.html) == ((home / "a", Path("b")), home / "c.html")
    assert jobs.CorpusChoice(corpus="~/text").corpus == str(home / "text")
    jobs.convert("tiny-z1", Path("~/python"))
    assert (home / "python" / "cfg.json").is_file()
    monkeypatch.setattr(Path, "expanduser", _without_a_home)
    with pytest.raises(OptionError, match="no home folder is known"):
        jobs.convert("tiny-z1", Path("~/again"))
    assert list(Path().iterdir()) == []


def _without_a_home(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_path_to_write_that_python_leaves_as_it_is_is_refused(home: Path, random_model: Any, random_sae: Any) -> None:
    with pytest.raises(OutputError, match=r"~/sae[\s\S]*expanduser"):
        save_sae(random_sae(random_model("gpt_neox")), Path("~/sae"))
    with pytest.raises(OutputError, match=r"expanduser"):
        check_output(Path("~/run"), overwrite=False)
    with pytest.raises(OutputError, match=r"expanduser"), atomic_write(Path("~/file")):
        pass
    assert list(Path().iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- aliases
def test_transformerlens_names_are_those_of_the_hub() -> None:
    known = {
        "gpt2-small": "gpt2",
        "gpt2": "gpt2",
        "gpt2-xl": "gpt2-xl",
        "pythia-70m": "EleutherAI/pythia-70m",
        "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped",
        "pythia-1.3b-deduped-v0": "EleutherAI/pythia-1.4b-deduped-v0",
        "EleutherAI/pythia-125m": "EleutherAI/pythia-160m",
        "EleutherAI/pythia-70m": "EleutherAI/pythia-70m",
        "gemma-2-2b": "google/gemma-2-2b",
        "mistral-7b": "mistralai/Mistral-7B-v0.1",
        "qwen3-0.6b": "Qwen/Qwen3-0.6B",
        "Llama-2-7b": "meta-llama/Llama-2-7b-hf",
        "gelu-2l-c4-code": "gelu-2l",
        "someone/pythia-70m": "someone/pythia-70m",
        "something-else": "something-else",
    }
    assert {name: repository_of(name) for name in known} == known


def test_no_alias_is_another_models_and_those_of_supported_families_are_known() -> None:
    package = importlib.util.find_spec("transformer_lens")
    if package is None or package.origin is None:
        pytest.skip("needs transformer_lens, to read its table")
    tree = ast.parse((Path(package.origin).parent / "supported_models.py").read_text())
    table = next(n.value for n in tree.body if isinstance(n, ast.AnnAssign) and n.target.id == "MODEL_ALIASES")
    aliases = {alias: name for name, own in ast.literal_eval(table).items() for alias in own}
    assert len(aliases) > 200
    wrong = {a: repository_of(a) for a, name in aliases.items() if repository_of(a) not in (a, name)}
    assert {own for own in wrong.values() if not own.startswith(("gelu-", "solu-", "attn-only-"))} == set()
    families = ("gpt2", "distilgpt2", "EleutherAI/gpt-neox", "EleutherAI/pythia", "meta-llama/", "mistralai/Mistral-")
    families += ("Qwen/Qwen1.5", "Qwen/Qwen2", "Qwen/Qwen3", "google/gemma-2-", "google/gemma-3-", "01-ai/Yi")
    assert {"gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"} <= FAMILIES.keys()
    unknown = {a: name for a, name in aliases.items() if name.startswith(families) and repository_of(a) != name}
    assert unknown == {}


def test_a_short_name_is_looked_for_under_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(name: str, **_: object) -> None:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("headscope.models.load.AutoConfig.from_pretrained", ask)
    with pytest.raises(ModelError, match="'gpt2'"):
        load_model("gpt2-small")
    assert asked == ["gpt2"]
