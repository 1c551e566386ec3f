"""The whole report on a small random model: what is kept, what fails, what is refused, what such a model shows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headscope import jobs
from headscope.errors import HeadscopeError, OutputError, SAEError, StudyError
from headscope.models.load import load_model
from headscope.report.claims_downstream import SECTIONS as DOWNSTREAM
from headscope.report.claims_feature import SECTIONS as FEATURE
from headscope.report.claims_training import SECTIONS as TRAINING
from headscope.report.records import Claim, Section
from headscope.report.registry import SECTIONS
from headscope.report.run import Inputs, run
from headscope.sae.formats import save_sae
from tl_files import configuration, write_checkpoint


@pytest.fixture(scope="module")
def inputs(random_model, random_sae, save_model, tmp_path_factory) -> Inputs:
    """A model, two SAEs and a text, as files."""
    folder = tmp_path_factory.mktemp("inputs")
    model = random_model("gpt_neox")
    save_model(model, folder / "model")
    for name, seed in (("one", 0), ("two", 1)):
        sae = replace(random_sae(model, 60, seed=seed), model_name=str(folder / "model"))
        save_sae(sae, folder / name)
    text = folder / "text.txt"
    rng = np.random.default_rng(0)  # without repetition, so that no rule about what came before holds of it
    documents = ["".join(chr(c) for c in rng.integers(33, 127, 120)) for _ in range(60)]
    text.write_text("\n<|doc|>\n".join(documents))
    choice = jobs.CorpusChoice(corpus=str(text), split="all", block_size=32, max_tokens=2_400)
    return Inputs(saes=(str(folder / "one"), str(folder / "two")), text=choice)


@pytest.fixture
def without_exemplars(monkeypatch):
    """No features are looked for to show: of random weights that takes most of a run, and finds none."""
    monkeypatch.setattr("headscope.report.exemplars.choose", lambda *_, **__: ())


def _counted(name: str, log: list[str], error: BaseException | None = None) -> Section:
    def study(subject):
        log.append(f"{subject.name} {name}")
        if error is not None:
            raise error
        return (Claim("M2", name, "made up", ours=float(subject.index.n_latents), n=1),)

    return Section(name, ("M2", "M3"), f"what {name} asks", study)


@pytest.mark.usefixtures("without_exemplars")
def test_a_study_that_fails_is_a_row_with_its_reason_and_loses_no_other(inputs, tmp_path):
    log: list[str] = []
    studies = [
        _counted("first", log),
        _counted("refused", log, StudyError("no such thing", expected="one", do="nothing")),
        _counted("broken", log, ZeroDivisionError("by nought")),
        _counted("last", log),
    ]
    report = run(tmp_path / "out", inputs, quick=True, studies=studies)
    assert [s.name for s in report.subjects] == ["one", "two"]
    content = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    own = [claim for claim in content["claims"] if claim["sae"] == "one"]
    assert [(c["id"], c["claim"], c["ours"]) for c in own if c["ours"] is not None] == [
        ("M2", "first", 60),
        ("M2", "last", 60),
    ]
    reasons = {c["claim"]: c["missing"] for c in own if c["ours"] is None}
    assert reasons == {
        "what refused asks": "no such thing; expected: one",
        "what broken asks": "the study failed: ZeroDivisionError: by nought",
    }
    assert {c["id"] for c in own if c["claim"] == "what broken asks"} == {"M2", "M3"}
    assert "by nought" in (tmp_path / "out" / "report.html").read_text()
    assert "by nought" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("without_exemplars")
def test_an_interrupted_run_keeps_what_is_done_and_a_failure_is_tried_again(inputs, tmp_path):
    log: list[str] = []
    out = tmp_path / "out"
    parts = [_counted("first", log), _counted("second", log)]
    with pytest.raises(KeyboardInterrupt):
        run(out, inputs, quick=True, studies=[*parts, _counted("third", log, KeyboardInterrupt())])
    assert log == ["one first", "one second", "one third"]
    assert not (out / "report.json").exists()
    built = (out / "indexes" / "one" / "manifest.json").stat().st_mtime_ns
    log.clear()
    run(out, inputs, quick=True, studies=[*parts, _counted("third", log, ValueError("not yet"))])
    assert log == ["one third", "two first", "two second", "two third"]
    assert (out / "indexes" / "one" / "manifest.json").stat().st_mtime_ns == built
    log.clear()
    report = run(out, inputs, quick=True, studies=[*parts, _counted("third", log)])
    assert log == ["one third", "two third"]
    assert all(claim.ours == 60 for subject in report.subjects for claim in subject.claims)


@pytest.mark.slow
@pytest.mark.usefixtures("without_exemplars")
def test_a_study_of_another_version_or_a_damaged_file_is_made_again(inputs, tmp_path):
    log: list[str] = []
    out, study, single = tmp_path / "out", _counted("first", log), replace(inputs, saes=inputs.saes[:1])
    run(out, single, quick=True, studies=[study])
    run(out, single, quick=True, studies=[replace(study, version=2)])
    assert log == ["one first"] * 2
    (out / "studies" / "one" / "first.json").write_text("{")
    run(out, single, quick=True, studies=[replace(study, version=2)])
    assert log == ["one first"] * 3
    run(out, single, quick=True, studies=[replace(study, version=2, kept=False)])
    assert log == ["one first"] * 4


@pytest.mark.slow
@pytest.mark.usefixtures("without_exemplars")
def test_other_inputs_are_refused_and_replaced_only_when_asked(inputs, tmp_path):
    out, log = tmp_path / "out", []
    studies = [_counted("first", log)]
    run(out, replace(inputs, saes=inputs.saes[:1]), quick=True, studies=studies)
    with pytest.raises(OutputError, match="other SAEs"):
        run(out, replace(inputs, saes=inputs.saes[1:]), quick=True, studies=studies)
    assert (out / "report.json").is_file()
    report = run(out, replace(inputs, saes=inputs.saes[1:]), quick=True, overwrite=True, studies=studies)
    assert [s.name for s in report.subjects] == ["two"]
    assert not (out / "indexes" / "one").exists()


@pytest.mark.slow
def test_an_empty_list_of_studies_runs_none(inputs, tmp_path):
    report = run(tmp_path / "out", inputs, quick=True, studies=[])
    assert [s.studies for s in report.subjects] == [(), ()]


def test_a_folder_with_something_else_is_left_alone(inputs, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="something else"):
        run(tmp_path, inputs, quick=True, overwrite=True, studies=[])
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_one_sae_twice_and_a_missing_one_are_refused(inputs, tmp_path):
    with pytest.raises(SAEError, match="twice"):
        run(tmp_path / "a", replace(inputs, saes=(inputs.saes[0],) * 2), quick=True, studies=[])
    with pytest.raises(SAEError, match="no SAE at"):
        run(tmp_path / "b", replace(inputs, saes=("nowhere",)), quick=True, studies=[])
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("without_exemplars")
def test_a_mistake_in_the_command_claims_no_folder(inputs, tmp_path):
    with pytest.raises(HeadscopeError):
        run(tmp_path / "out", replace(inputs, model="nowhere"), quick=True, studies=[])
    assert not any((tmp_path / "out").glob("*"))
    run(tmp_path / "out", inputs, quick=True, studies=[_counted("first", [])])


def test_every_method_of_the_post_has_its_rows():
    made = {name for study in SECTIONS for name in study.ids}
    assert {f"M{n}" for n in range(2, 32)} | {"M13b"} <= made


@pytest.mark.usefixtures("without_exemplars")
def test_a_finished_index_is_used_as_it_is(inputs, tmp_path):
    (index,) = jobs.index([inputs.saes[0]], tmp_path / "index", text=inputs.text)
    before = sorted(p for p in Path(index.folder).rglob("*"))
    report = run(tmp_path / "out", Inputs(indexes=(tmp_path / "index",)), quick=True, studies=[_counted("first", [])])
    assert report.subjects[0].claims[0].ours == 60
    assert sorted(p for p in Path(index.folder).rglob("*")) == before
    assert not (tmp_path / "out" / "indexes").exists()


@pytest.mark.slow
def test_a_random_model_has_no_induction_exemplar(inputs, tmp_path):
    studies = [study for study in FEATURE if study.name == "examples"]
    (subject,) = run(tmp_path / "out", replace(inputs, saes=inputs.saes[:1]), quick=True, studies=studies).subjects
    assert "induction" in [claim.kind for claim in subject.claims]
    assert "induction" not in {e.kind for e in subject.exemplars}


@pytest.mark.slow
@pytest.mark.usefixtures("without_exemplars")
def test_without_exemplars_every_claim_about_one_says_so(inputs, tmp_path):
    studies = [*TRAINING, *FEATURE, *DOWNSTREAM]
    (subject,) = run(tmp_path / "out", replace(inputs, saes=inputs.saes[:1]), quick=True, studies=studies).subjects
    by_id: dict[str, list[Claim]] = {}
    for claim in subject.claims:
        by_id.setdefault(claim.id, []).append(claim)
    assert {"M1", "M2", "M3", "M4", "M5", "M6"} <= set(by_id)
    for name in ("M8", "M9", "M11", "M12", "M13", "M13b", "M14", "M15"):
        assert all(claim.ours is None for claim in by_id[name])
        assert "proxy" in str(by_id[name][0].missing)
    assert len(by_id["M10"]) == 4  # each kind, and the study of them
    rated = next(claim for claim in by_id["M6"] if "Interpretable" in claim.claim)
    assert str(rated.missing).startswith("unlabelled")


@pytest.mark.slow
@pytest.mark.usefixtures("without_exemplars")
def test_the_loss_recovered_is_that_of_the_evaluation(inputs, tmp_path):
    (subject,) = run(tmp_path / "out", replace(inputs, saes=inputs.saes[:1]), quick=True, studies=TRAINING).subjects
    quality = jobs.eval(inputs.saes[0], text=inputs.text)
    found = {(c.id, c.claim.split(" (")[0]): c for c in subject.claims}
    assert found["M2", "Active latents on a token"].ours == pytest.approx(quality.l0.value)
    recovered = next(c for c in subject.claims if c.post == 0.87)
    assert recovered.ours == pytest.approx(quality.loss_recovered.value)
    assert found["M4", "Dead latents"].ours == pytest.approx(quality.dead.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gelu", "attn_only"])
def test_every_study_runs_on_a_checkpoint_of_transformerlens_format(inputs, random_sae, tokenizer, tmp_path, kind):
    """The format of gelu-2l, with random weights: nothing breaks, and what cannot be asked of them says why."""
    folder = write_checkpoint(tmp_path / "checkpoint", tokenizer, config=configuration(kind))
    save_sae(random_sae(load_model(str(folder)), 60), tmp_path / "sae")
    text = replace(inputs.text, block_size=16)
    chosen = Inputs(model=str(folder), saes=(str(tmp_path / "sae"),), text=text)
    (subject,) = run(tmp_path / "out", chosen, quick=True).subjects
    broken = {s.study: s.failed for s in subject.studies if s.failed and s.failed.startswith("the study failed")}
    assert broken == {}
    assert {f"M{i}" for i in range(1, 32)} <= {claim.id for claim in subject.claims}
