"""The labels of an index: what is kept, what counts, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from headscope import jobs
from headscope.cli import main
from headscope.errors import IndexFormatError, LabelError, OutputError
from headscope.index import labels as module
from headscope.index.build import SAERecord, build_index
from headscope.index.config import IndexPlan
from headscope.index.labels import FAMILIES, LONGEST, MAX_LINE, VERDICTS, Judgement, LabelStore, card_hash
from headscope.index.store import FeatureIndex

D_SAE, DEAD, LIVE = 20, 7, 5
YES, NO, UNSURE = (Judgement(verdict=verdict) for verdict in ("interpretable", "not interpretable", "unsure"))
FORMAT = Path(__file__).parents[2] / "docs" / "index-format.md"
CARD = "sha256:" + 64 * "0"


def build(random_model, random_corpus, random_sae, folder, seed=0):
    model = random_model("gpt2", dtype=torch.float64)
    sae = random_sae(model, D_SAE)
    sae.b_enc.add_(1)
    sae.b_enc[DEAD] = -1e4
    plan = IndexPlan(top=3, part_tokens=100)
    build_index(model, [(sae, SAERecord("s", "sha256:s"))], random_corpus(model, 12, 16, seed=seed), folder, plan=plan)
    return FeatureIndex.open(folder)


@pytest.fixture(scope="module")
def built(random_model, random_corpus, random_sae, tmp_path_factory):
    return build(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("labels") / "index")


@pytest.fixture
def store(built, tmp_path):
    shutil.copytree(built.folder, tmp_path / "index")
    return LabelStore(FeatureIndex.open(tmp_path / "index"))


def lines(store):
    return store.path.read_bytes().splitlines(keepends=True)


# ------------------------------------------------------------------------------------------------------ what is kept
def test_no_labels_yet(store):
    assert store.read().standing == ()
    assert not store.path.exists(), "reading creates nothing"


def test_a_label_is_read_as_it_was_given(store):
    said = Judgement(verdict="unsure", confidence=3, family="induction", text="שלום\n\u2028</script>", notes='"\\\x00')
    label = store.add(3, "Ann é", said, blind=True, queue="first:50")
    assert store.read().standing == (label,)
    assert (label.latent, label.annotator, label.blind, label.queue) == (3, "Ann é", True, "first:50")
    assert label.card == card_hash(store.index, 3, blind=True)
    assert Judgement(**{name: getattr(label, name) for name in asdict(said)}) == said
    assert len(lines(store)) == 1, "one line, whatever the text"


def test_the_longest_label_fits_a_line(store):
    texts = {name: "\x01" * most for name, most in LONGEST.items() if name in ("text", "notes")}
    store.add(3, "𝄞" * LONGEST["annotator"], replace(YES, **texts), queue="𝄞" * LONGEST["queue"])
    assert MAX_LINE // 2 < len(lines(store)[0]) <= MAX_LINE
    assert store.read().standing[0].notes == texts["notes"]


def test_the_last_label_of_an_annotator_counts(store):
    store.add(3, "ann", YES)
    other = store.add(3, "bob", YES)
    last = store.add(3, "ann", NO)
    labels = store.read()
    assert len(labels.standing) == 3
    assert labels.latest() == {("ann", 3): last, ("bob", 3): other}
    assert set(labels.of(3)) == {last, other}
    assert labels.of(4) == ()


def test_what_is_appended_changes_nothing_before_it(store):
    for latent in range(4):
        before = store.path.read_bytes() if store.path.exists() else b""
        label = store.add(latent, "ann", YES)
        store.retract("ann", label.id)
        assert store.path.read_bytes().startswith(before)
        assert len(lines(store)) == 2 * latent + 2


def test_a_retraction_brings_the_label_before_back(store):
    first, second = store.add(3, "ann", YES), store.add(3, "ann", NO)
    store.retract("ann", second.id)
    assert store.read().latest() == {("ann", 3): first}
    store.retract("ann", first.id)
    assert store.read().standing == ()


@pytest.mark.parametrize("who", ["bob", "ann"])
def test_only_ones_own_standing_label_can_be_retracted(store, who):
    label = store.add(3, "ann", YES)
    if who == "ann":
        store.retract("ann", label.id)
    before = store.path.read_bytes()
    with pytest.raises(LabelError, match="retraction"):
        store.retract(who, label.id)
    assert store.path.read_bytes() == before


# ----------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("verdict", ""),
        ("verdict", "Interpretable"),
        ("confidence", 0),
        ("confidence", 4),
        ("family", "mystery"),
        ("text", "x" * (LONGEST["text"] + 1)),
        ("notes", "x" * (LONGEST["notes"] + 1)),
        ("text", "\ud800"),
    ],
)
def test_a_judgement_says_only_what_it_can(field, value):
    with pytest.raises(LabelError, match=field):
        replace(YES, **{field: value})


@pytest.mark.parametrize("annotator", ["", "  ", "a\nb", "a\x00", "\u202egro", "x" * 81, "\ud800"])
def test_an_annotator_has_a_name(store, annotator):
    with pytest.raises(LabelError, match="annotator"):
        store.add(3, annotator, YES)
    assert not store.path.exists()


@pytest.mark.parametrize("latent", [-1, D_SAE])
def test_a_latent_that_is_not_there(store, latent):
    with pytest.raises(IndexFormatError, match=str(latent)):
        store.add(latent, "ann", YES)


def hostile(**changes):
    label = {
        "kind": "label",
        **asdict(YES),
        "id": 16 * "0",
        "latent": 3,
        "annotator": "ann",
        "blind": False,
        "queue": "",
        "card": CARD,
        "time": "2026-01-01T00:00:00+00:00",
    }
    return json.dumps({name: value for name, value in (label | changes).items() if value is not ...})


HOSTILE = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "a number": "1e999",
    "not a number": "NaN",
    "deep": "[" * 30000,
    "no Unicode": b"\xff\xfe",
    "a long number": '{"kind": "label", "latent": ' + "9" * 10000 + "}",
    "no kind": hostile(kind=...),
    "another kind": hostile(kind="note"),
    "a kind that is no text": hostile(kind=["label"]),
    "a field too many": hostile(extra=1),
    "a field too few": hostile(card=...),
    "latent as text": hostile(latent="3"),
    "latent as float": hostile(latent=3.0),
    "latent as bool": hostile(latent=True),
    "latent too large": hostile(latent=D_SAE),
    "latent below 0": hostile(latent=-1),
    "confidence as bool": hostile(confidence=True),
    "blind as number": hostile(blind=1),
    "verdict as list": hostile(verdict=["interpretable"]),
    "verdict null": hostile(verdict=None),
    "an unknown verdict": hostile(verdict="yes"),
    "half a character": hostile(text="\ud800"),
    "no hash": hostile(card="sha256:x"),
    "no id": hostile(id="0"),
    "no time": hostile(time="yesterday"),
    "a time without zone": hostile(time="2026-01-01T00:00:00"),
    "huge": hostile(notes="x" * MAX_LINE),
    "a retraction of nothing": json.dumps(
        {"kind": "retraction", "label": 16 * "1", "annotator": "ann", "time": "2026-01-01T00:00:00+00:00"}
    ),
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE)
def test_a_line_that_is_no_record_is_refused_by_its_number(store, no_type_checks, line):
    store.add(3, "ann", YES)
    with store.path.open("ab") as file:
        file.write((line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")) + b"\n")
    with pytest.raises(LabelError, match=r"labels\.jsonl line 2") as error:
        store.read()
    assert len(str(error.value)) < 600, "what is hostile is not repeated at length"
    before = store.path.read_bytes()
    store.add(4, "ann", NO)
    assert store.path.read_bytes().startswith(before), "an append mends nothing but a torn end"


def test_the_line_that_the_hostile_ones_are_made_of_is_good(store):
    store.path.write_text(hostile() + "\n")
    assert store.read().standing[0].latent == 3


@pytest.mark.parametrize("same", ["id"])
def test_two_labels_of_one_id_are_refused(store, same):
    store.path.write_text(2 * (hostile() + "\n"))
    with pytest.raises(LabelError, match="line 2: id"):
        store.read()


def test_a_retraction_of_anothers_label_is_refused(store):
    line = {"kind": "retraction", "label": 16 * "0", "annotator": "bob", "time": "2026-01-01T00:00:00+00:00"}
    store.path.write_text(f"{hostile()}\n{json.dumps(line)}\n")
    with pytest.raises(LabelError, match="line 2: retraction"):
        store.read()


@pytest.mark.parametrize("what", ["link", "dangling link", "folder", "fifo"])
def test_what_is_no_file_in_the_index_is_neither_read_nor_written(store, tmp_path, what):
    outside = tmp_path / "outside"
    match what:
        case "link" | "dangling link":
            if what == "link":
                outside.write_text("the user's own\n")
            store.path.symlink_to(outside)
        case "folder":
            store.path.mkdir()
        case "fifo":
            os.mkfifo(store.path)
    for attempt in (store.read, lambda: store.add(3, "ann", YES)):
        with pytest.raises((LabelError, OutputError)):
            attempt()
    assert not outside.exists() or outside.read_text() == "the user's own\n"


# --------------------------------------------------------------------------------------------------- crashes and others
@pytest.mark.parametrize("kept", [1, 10, 0.5, -2])
def test_a_torn_last_line_is_left_out_and_named_and_goes_with_the_next_append(store, kept):
    first = store.add(3, "ann", YES)
    whole = store.path.read_bytes()
    store.add(4, "ann", NO)
    torn = store.path.read_bytes()[len(whole) :]
    torn = torn[: int(len(torn) * kept) if isinstance(kept, float) else kept]
    store.path.write_bytes(whole + torn)
    labels = store.read()
    assert labels.standing == (first,)
    assert labels.torn == f"labels.jsonl line 2 was cut off ({len(torn)} bytes) and is left out"
    assert store.path.read_bytes() == whole + torn, "reading mends nothing"
    third = store.add(5, "ann", UNSURE)
    assert store.read().standing == (first, third)
    assert store.read().torn is None


def test_a_whole_last_line_without_its_end_counts(store):
    first = store.add(3, "ann", YES)
    store.path.write_bytes(store.path.read_bytes().rstrip(b"\n"))
    assert (store.read().standing, store.read().torn) == ((first,), None)
    second = store.add(4, "ann", NO)
    assert store.read().standing == (first, second)


KILLED = """
import os, signal, sys
from headscope.index import labels
from headscope.index.store import FeatureIndex
write, n = os.write, int(sys.argv[2])
store = labels.LabelStore(FeatureIndex.open(sys.argv[1]))
def cut_off(handle, line):
    write(handle, line[:n])
    os.kill(os.getpid(), signal.SIGKILL)
labels.os.write = cut_off
store.add(5, "bob", labels.Judgement(verdict="unsure"))
"""


def python(code, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment)


@pytest.mark.parametrize("n", [0, 40])
def test_killed_in_the_middle_of_an_append(store, n):
    first = store.add(3, "ann", YES)
    process = python(KILLED, store.index.folder, n)
    assert process.wait(120) == -signal.SIGKILL
    labels = store.read()
    assert labels.standing == (first,)
    assert (labels.torn is None) == (n == 0)
    second = store.add(4, "ann", NO)
    assert store.read().standing == (first, second), "the lock went with the process"


def test_a_full_disk_leaves_the_file_as_it_was(store, monkeypatch):
    store.add(3, "ann", YES)
    before = store.path.read_bytes()
    write = os.write
    monkeypatch.setattr(module.os, "write", lambda handle, line: write(handle, line[:30]))
    with pytest.raises(OutputError, match="no room"):
        store.add(4, "ann", NO)
    assert store.path.read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_index_that_cannot_be_written(store):
    store.index.folder.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="cannot write"):
            store.add(3, "ann", YES)
    finally:
        store.index.folder.chmod(0o755)


MANY = """
import sys
from headscope.index.labels import Judgement, LabelStore
from headscope.index.store import FeatureIndex
store = LabelStore(FeatureIndex.open(sys.argv[1]))
for i in range(40):
    label = store.add(i % 20, sys.argv[2], Judgement(verdict="interpretable", notes="x" * 5000))
    if i % 4 == 3:
        store.retract(sys.argv[2], label.id)
"""


@pytest.mark.slow
def test_two_annotators_at_once_lose_nothing(store):
    processes = [python(MANY, store.index.folder, name) for name in ("ann", "bob")]
    seen = []
    while any(process.poll() is None for process in processes):
        seen.append(store.read())  # while they write: never torn, never damaged
    assert [process.returncode for process in processes] == [0, 0]
    assert all(labels.torn is None for labels in seen)
    for name in ("ann", "bob"):
        assert sum(label.annotator == name for label in store.read().standing) == 30
    assert len(lines(store)) == 100


def test_threads_of_one_process_lose_nothing(store):
    threads = [
        threading.Thread(target=lambda name=name: [store.add(i, name, YES) for i in range(15)]) for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.read().latest()) == 60


# ---------------------------------------------------------------------------------------------------------- the card
def test_the_same_card_has_the_same_hash_and_another_has_not(built):
    again = FeatureIndex.open(built.folder)
    hashes = {card_hash(built, latent, blind=blind) for latent in range(D_SAE) for blind in (False, True)}
    assert len(hashes) == 2 * D_SAE
    assert card_hash(built, 3) == card_hash(again, 3)
    with pytest.raises(IndexFormatError):
        card_hash(built, D_SAE)


def test_an_index_of_other_text_has_other_cards(built, random_model, random_corpus, random_sae, tmp_path):
    other = build(random_model, random_corpus, random_sae, tmp_path / "other", seed=1)
    live = [i for i in range(D_SAE) if built.feature(i).alive]
    assert LIVE in live
    assert all(card_hash(built, i) != card_hash(other, i) for i in live)
    assert card_hash(built, DEAD) == card_hash(other, DEAD)


@pytest.mark.parametrize("what", ["heads", "activation", "logits", "active_value", "token"])
def test_what_a_card_says_is_in_its_hash(built, monkeypatch, what):
    """A change of what only an open card shows leaves the hash of a blind one; rounding leaves both."""
    before = [card_hash(built, LIVE, blind=blind) for blind in (False, True)]
    feature, examples, tokens_of = built.feature(LIVE), built.examples(LIVE), built.tokens_of

    def changed(example, factor):
        return replace(example, **{what: getattr(example, what) * factor})

    def after(factor):
        groups = examples
        if what in ("heads", "activation", "active_value"):
            groups = tuple(replace(g, examples=tuple(changed(e, factor) for e in g.examples)) for g in examples)
        monkeypatch.setattr(built, "examples", lambda latent: groups)
        return [card_hash(built, LIVE, blind=blind) for blind in (False, True)]

    if what == "logits":
        monkeypatch.setattr(built, "feature", lambda latent: replace(feature, logit_top=feature.logit_bottom))
    if what == "token":
        monkeypatch.setattr(built, "tokens_of", lambda block: tokens_of(block)[::-1])
    hidden = what in ("heads", "logits")
    assert [a == b for a, b in zip(after(1.1), before, strict=True)] == [False, hidden]
    if what not in ("logits", "token"):
        assert after(1 + 1e-12) == before


# ------------------------------------------------------------------------------------------------------- the command
def test_the_command_prints_the_survey(store, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    live = [i for i in range(D_SAE) if store.index.feature(i).alive]
    for i in live:
        store.add(i, "[red]ann", YES if i else NO)
        store.add(i, "bob", YES if i > 1 else NO)
    result = jobs.survey(store.index.folder, sample=f"first:{D_SAE}")
    assert result.alive.value == len(live) / D_SAE
    assert [tally.n for tally in result.tallies] == [len(live)] * 2
    main(["survey", str(store.index.folder), "--sample", f"first:{D_SAE}"])
    shown = capsys.readouterr().out
    for row in result.rows():
        assert row.name in shown
        assert row.value in shown
    assert "interpretable, [red]ann" in shown, "a name is no markup"
    assert "kappa, [red]ann and bob" in shown
    for note in result.notes:
        assert note in shown


@pytest.mark.parametrize(("sample", "says"), [("nonsense", "first:N"), (f"first:{D_SAE + 1}", f"1 to {D_SAE}")])
def test_the_command_says_what_is_wrong_with_a_sample(store, capsys, sample, says):
    with pytest.raises(SystemExit) as ended:
        main(["survey", str(store.index.folder), "--sample", sample])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert says in message
    assert "Traceback" not in message


def test_the_page_of_the_format_names_all_fields():
    section = FORMAT.read_text().split("## labels.jsonl")[1].split("\n## ")[0]
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)))
    assert sorted(named) == sorted(field.name for field in fields(module.Label))
    assert f"{MAX_LINE:,} bytes" in section
    for most in (LONGEST["annotator"], LONGEST["text"], LONGEST["notes"]):
        assert f"{most:,}" in section
    for value in (*VERDICTS, *FAMILIES):
        assert not value or f"`{value}`" in section


def test_verdicts_are_three():
    assert VERDICTS == ("interpretable", "unsure", "not interpretable")
