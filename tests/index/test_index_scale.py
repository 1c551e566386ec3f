"""Builds that are killed, shared, starved of disk, damaged, or large."""

import dataclasses
import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from headscope.errors import CorpusError, HeadscopeError, IndexFormatError, ModelError, OutputError, SAEError
from headscope.index import build as build_module
from headscope.index import parts as parts_module
from headscope.index import tables, writing
from headscope.index.build import SAERecord, build_index
from headscope.index.config import IndexPlan
from headscope.index.parts import Workers
from headscope.index.store import FeatureIndex
from headscope.site import Site
from index_worker import processes, run_job, save_job

PLAN = IndexPlan(part_tokens=30, top=3, random=2, per_quantile=1, per_interval=1, near_threshold=2, losses=True)
D_SAE = 10


def content(folder: Path) -> dict[str, dict]:
    """What the manifests of an index, or of several, say but for the time they were written."""
    return {
        str(path.relative_to(folder)): {k: v for k, v in json.loads(path.read_text()).items() if k != "created"}
        for path in sorted(folder.rglob("manifest.json"))
    }


@pytest.fixture(scope="module")
def job(random_model, random_corpus, random_sae):
    """A model, two SAEs of different layers, and a corpus of four parts."""
    model = random_model("gpt2", dtype=torch.float64)
    saes = {"one": random_sae(model, D_SAE, site=Site("z", 0)), "two": random_sae(model, D_SAE, "topk", seed=1)}
    return model, saes, random_corpus(model, n_blocks=8, block_size=12)


def build(job, out, plan=PLAN, **options):
    model, saes, corpus = job
    records = [(sae, SAERecord(name, f"sha256:{name}")) for name, sae in saes.items()]
    return build_index(model, records, corpus, out, plan=plan, **options)


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """What an uninterrupted build of `job` wrote."""
    folder = tmp_path_factory.mktemp("whole") / "index"
    for path in build(job, folder):
        FeatureIndex.open(path).verify()
    return content(folder)


def single(job):
    """The same with one SAE."""
    return job[0], {"two": job[1]["two"]}, job[2]


# -------------------------------------------------------------------------------------------------------------- killed
class Killed(BaseException):
    """In the place of a signal."""


class Counter:
    """Raises at the n-th write; each counts twice, before and after."""

    def __init__(self, monkeypatch, at: int | None, error=Killed) -> None:
        self.n, self._at, self._error = 0, at, error
        for where, name in (
            (parts_module.Parts, "write"),
            (build_module, "write_json"),
            (build_module, "move_into_place"),
            (build_module.shutil, "rmtree"),
            (writing, "write_table"),
            (writing, "write_corpus"),
            (tables, "write_examples"),
            (writing.ActivationWriter, "__call__"),
            (writing.ActivationWriter, "finish"),
        ):
            monkeypatch.setattr(where, name, self._counted(getattr(where, name)))

    def _counted(self, function):
        def counted(*args, **options):
            self._count()
            result = function(*args, **options)
            self._count()
            return result

        return counted

    def _count(self) -> None:
        self.n += 1
        if self.n == self._at:
            raise self._error


def n_writes(job, folder) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        counter = Counter(monkeypatch, None)
        build(job, folder)
    return counter.n


def check_stopped_at(job, out, at, whole, error=Killed, expected=Killed):
    with pytest.MonkeyPatch.context() as monkeypatch:
        Counter(monkeypatch, at, error)
        with pytest.raises(expected):
            build(job, out)
    if not out.exists():  # stopped before it was moved to its place
        build(job, out)
    assert content(out) == whole, at
    for path in [out / name for name in job[1]]:
        FeatureIndex.open(path).verify()
    shutil.rmtree(out)
    shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)


@pytest.mark.slow
def test_a_build_that_is_stopped_at_a_write_goes_on(job, whole, tmp_path, no_type_checks):
    n = n_writes(job, tmp_path / "first")
    for at in {1, n // 2, *range(n - 20, n + 1, 5)}:
        check_stopped_at(job, tmp_path / "index", at, whole)


@pytest.mark.slow
def test_a_build_that_is_stopped_at_any_write_goes_on(job, whole, tmp_path, no_type_checks):
    for at in range(1, n_writes(job, tmp_path / "first") + 1, 5):  # after a write is before the next
        check_stopped_at(job, tmp_path / "index", at, whole)


@pytest.mark.slow
def test_a_build_that_is_killed_again_and_again_ends_as_if_it_had_not_been(job, whole, tmp_path):
    """SIGKILL at random moments, until one comes too late, or never again."""
    out = tmp_path / "index"
    path = save_job(tmp_path / "job", *job, PLAN)
    context, draw, killed = processes(), random.Random(0), 0
    for attempt in range(30):
        process = context.Process(target=run_job, args=(path, out))
        process.start()
        process.join(draw.uniform(0.05, 0.25) * (1 + attempt / 8))
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
        if out.exists():  # or killed once it stood
            break
    assert killed >= 3
    if not out.exists():
        build(job, out)
    assert content(out) == whole


# ------------------------------------------------------------------------------------------------------------ progress
def test_every_stage_tells_how_much_of_what_is_done(job, tmp_path):
    told = []
    build(job, tmp_path / "index", on_progress=lambda *stage: told.append(stage))
    model, saes, corpus = job
    of_all = {"activations": len(corpus.blocks), "features": D_SAE, "vocabulary": model.spec.d_vocab}
    of_all |= {"correlations": D_SAE, "logits": D_SAE, "write": len(saes)}
    for stage, total in of_all.items():
        reports = [(done, of) for name, done, of in told if name == stage]
        assert {of for _, of in reports} == {total}, stage
        assert reports[-1] == (total, total), stage
    assert all(0 <= done <= of for _, done, of in told)
    assert {name for name, _, _ in told} == {*of_all, "sources", "copying"}


def test_the_vocabulary_is_read_once_however_often_a_build_is_interrupted(job, whole, tmp_path, monkeypatch):
    interrupted(job, tmp_path / "index", "logits")

    def unread(*_arguments):
        pytest.fail("it was read before")

    monkeypatch.setattr(build_module, "read_values", unread)
    build(job, tmp_path / "index")
    assert content(tmp_path / "index") == whole


# ------------------------------------------------------------------------------------------------------------- damaged
def interrupted(job, out, at):
    """A build stopped at a stage of the progress report."""

    def stop(stage, _done, _total):
        if stage == at:
            raise Killed

    with pytest.raises(Killed):
        build(job, out, on_progress=stop)
    return out.with_name(f"{out.name}.partial")


DAMAGES = {
    "flipped": lambda raw: raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :],
    "cut": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
}


_SLOW_DAMAGES = [pytest.param(name, marks=pytest.mark.slow) for name in ("cut", "empty")]


@pytest.mark.parametrize("damage", ["flipped", *_SLOW_DAMAGES])
@pytest.mark.parametrize("stage", ["shared", "0/pairs", "0/sweep", "0/examples", "values-1"])
def test_a_damaged_part_is_named_and_made_again(job, whole, tmp_path, stage, damage):
    partial = interrupted(job, tmp_path / "index", "write")
    part = sorted((partial / stage).iterdir())[-1]
    part.write_bytes(DAMAGES[damage](part.read_bytes()))
    with pytest.warns(UserWarning, match=part.name):
        build(job, tmp_path / "index")
    assert content(tmp_path / "index") == whole


def test_damaged_activations_are_written_again(job, whole, tmp_path):
    partial = interrupted(job, tmp_path / "index", "write")
    path = partial / "final" / "two" / "activations" / "part-0000.parquet"
    path.write_bytes(DAMAGES["flipped"](path.read_bytes()))
    build(job, tmp_path / "index")
    assert content(tmp_path / "index") == whole


@pytest.mark.parametrize("plan", ["{", "[]", '{"plan": 3}', ""])
def test_a_plan_that_cannot_be_read_is_another_plan(job, whole, tmp_path, plan):
    (tmp_path / "index.partial").mkdir()
    (tmp_path / "index.partial" / "plan.json").write_text(plan)
    with pytest.raises(OutputError, match="--overwrite"):
        build(job, tmp_path / "index")
    build(job, tmp_path / "index", overwrite=True)
    assert content(tmp_path / "index") == whole


# --------------------------------------------------------------------------------------------------------------- claim
def test_another_build_in_the_way_is_refused_by_name(job, whole, tmp_path):
    partial = interrupted(job, tmp_path / "index", "features")
    other = dataclasses.replace(PLAN, n_sources=3)
    with pytest.raises(OutputError, match="interrupted build with another plan"):
        build(job, tmp_path / "index", other)
    with pytest.raises(OutputError, match="another saes"):
        build(single(job), tmp_path / "index")
    assert len(list((partial / "shared").iterdir())) == 4
    build(job, tmp_path / "index", other, overwrite=True)
    assert FeatureIndex.open(tmp_path / "index" / "one").manifest["plan"]["n_sources"] == 3
    build(job, tmp_path / "index", overwrite=True)
    assert content(tmp_path / "index") == whole
    assert not partial.exists()


def test_a_folder_that_only_looks_like_a_build_is_kept(job, tmp_path):
    mine = tmp_path / "index.partial" / "mine"
    mine.mkdir(parents=True)
    (mine / "text").write_text("mine")
    with pytest.raises(OutputError, match=r"index\.partial"):
        build(job, tmp_path / "index")
    with pytest.raises(OutputError, match=r"index\.partial"):
        build(job, tmp_path / "index", overwrite=True)
    assert (mine / "text").read_text() == "mine"


def test_a_second_build_is_refused_at_once(job, tmp_path):
    partial = tmp_path / "index.partial"
    partial.mkdir()
    with (partial / ".lock-0").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process"):
            build(job, tmp_path / "index")
    build(job, tmp_path / "index")


def test_a_folder_that_holds_something_is_kept(job, tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        build(job, tmp_path / "index")
    assert (tmp_path / "index" / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "index.partial").exists()


def test_an_old_index_stands_until_the_new_one_does(job, whole, tmp_path):
    build(job, tmp_path / "index", dataclasses.replace(PLAN, top=1))
    before = content(tmp_path / "index")
    interrupted_by = dataclasses.replace(PLAN, top=2)
    with pytest.raises(Killed):
        build(job, tmp_path / "index", interrupted_by, overwrite=True, on_progress=_raise_at_write)
    assert content(tmp_path / "index") == before
    build(job, tmp_path / "index", overwrite=True)
    assert content(tmp_path / "index") == whole


def _raise_at_write(stage, _done, _total):
    if stage == "write":
        raise Killed


def test_a_folder_name_is_no_pattern_and_no_sql(job, whole, tmp_path):
    out = tmp_path / "it's [a*b] {c}?"
    build(job, out)
    assert content(out) == whole
    assert FeatureIndex.open(out / "one").examples(0) is not None


# ---------------------------------------------------------------------------------------------------------------- disk
@pytest.mark.parametrize("part", [0.3, 0.9, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.1, 0.5, 0.7))])
def test_a_full_disk_keeps_what_stands(job, whole, tmp_path, part, no_type_checks):
    at = int(n_writes(job, tmp_path / "first") * part)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    check_stopped_at(job, tmp_path / "index", at, whole, error=full, expected=OutputError)


def test_a_disk_that_fills_up_in_the_middle_of_a_file(job, whole, tmp_path, monkeypatch):
    real = os.fsync

    def full(handle):
        if os.fstat(handle).st_size > 2000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr("headscope.artefact.os.fsync", full)
        with pytest.raises(OutputError, match="space"):
            build(job, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    build(job, tmp_path / "index")
    assert content(tmp_path / "index") == whole


def test_a_place_that_cannot_be_written(job, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        build(job, tmp_path / "file" / "index")


# ------------------------------------------------------------------------------------------------------------- workers
@pytest.mark.parametrize("world", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_processes_that_share_the_work_write_the_same_index(job, whole, tmp_path, world):
    """Five processes: the last one has no part to read."""
    path = save_job(tmp_path / "job", *job, PLAN)
    started = [
        processes().Process(target=run_job, args=(path, tmp_path / "index", Workers(rank, world)))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    _all_end_well(started)
    assert content(tmp_path / "index") == whole
    assert not (tmp_path / "index.partial").exists()


def _all_end_well(started):
    for process in started:
        process.join(60)
    ended = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert ended == [0] * len(started)


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_a_process_that_comes_late_to_work_that_is_done(job, whole, tmp_path, late):
    """All parts stand from an interrupted build: the first process must not leave before the others have come."""
    interrupted(job, tmp_path / "index", "write")
    path = save_job(tmp_path / "job", *job, PLAN)
    started = [
        processes().Process(target=run_job, args=(path, tmp_path / "index", Workers(rank, 2))) for rank in range(2)
    ]
    started[1 - late].start()
    time.sleep(2)
    started[late].start()
    _all_end_well(started)
    assert content(tmp_path / "index") == whole


@pytest.mark.slow
def test_torchrun_writes_the_same_index(job, whole, tmp_path):
    path = save_job(tmp_path / "job", *job, PLAN)
    worker = Path(__file__).parents[1] / "support" / "index_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(path), str(tmp_path / "index")], check=True, timeout=300, env=environment)
    assert content(tmp_path / "index") == whole


# ------------------------------------------------------------------------------------------------------------ extremes
def one_sae(random_sae, model, d_sae=6, **options):
    return {"s": random_sae(model, d_sae, **options)}


def test_everything_dead(random_model, random_corpus, random_sae, tmp_path):
    model = random_model("gpt2")
    saes = one_sae(random_sae, model)
    saes["s"].b_enc[:] = -1e4
    index = FeatureIndex.open(build((model, saes, random_corpus(model)), tmp_path / "index")[0])
    index.verify()
    assert index.manifest["n_alive"] == index.manifest["n_pairs"] == index.manifest["l0"] == 0
    assert not index.feature(3).alive
    assert index.examples(3) == ()
    assert index.sources(3) is None
    assert len(index.activations(3).position) == 0
    assert index.search() == ()
    assert index.nulls() == ()
    assert len(index.table()) == 6


def test_many_dead_latents_after_the_last_live_one(random_model, random_corpus, random_sae, tmp_path):
    model = random_model("gpt2")
    saes = one_sae(random_sae, model, 8)
    saes["s"].b_enc[0], saes["s"].b_enc[1:] = 5.0, -1e4
    corpus = random_corpus(model)
    plan = dataclasses.replace(PLAN, range_rows=int((corpus.blocks != corpus.bos).sum()))
    index = FeatureIndex.open(build((model, saes, corpus), tmp_path / "index", plan)[0])
    assert [index.feature(j).alive for j in range(8)] == [True] + [False] * 7


def test_a_corpus_of_special_tokens_alone(random_model, random_corpus, random_sae, tmp_path):
    model = random_model("gpt2")
    corpus = random_corpus(model)
    corpus.blocks[:] = model.bos
    with pytest.raises(CorpusError, match="none of them text"):
        build((model, one_sae(random_sae, model), corpus), tmp_path / "index")


@pytest.mark.parametrize(("n_blocks", "block_size"), [(1, 16), (9, 2), (1, 2), (3, 64)])
def test_small_corpora_and_whole_contexts(random_model, random_corpus, random_sae, tmp_path, n_blocks, block_size):
    model = random_model("gpt2")
    corpus = random_corpus(model, n_blocks=max(n_blocks, 3), block_size=block_size)
    blocks = {name: getattr(corpus, name)[:n_blocks] for name in ("blocks", "document", "offset")}
    corpus = dataclasses.replace(corpus, **blocks)
    corpus.blocks[0, 1:] = np.arange(1, block_size) % 90 + 1
    corpus.offset[0, 1:] = np.arange(1, block_size)
    saes = one_sae(random_sae, model)
    saes["s"].b_enc[2] = 5.0
    index = FeatureIndex.open(build((model, saes, corpus), tmp_path / "index")[0])
    n = int((corpus.blocks != model.bos).sum())
    assert index.feature(2).n_active == n
    assert index.sources(2).kept > 0.3
    assert [len(index.tokens_of(b)) for b in range(n_blocks)] == [block_size] * n_blocks


def test_one_head(random_model, random_corpus, random_sae, tmp_path):
    model = random_model("gpt2", n_head=1)
    index = FeatureIndex.open(build((model, one_sae(random_sae, model), random_corpus(model)), tmp_path / "index")[0])
    live = next(j for j in range(6) if index.feature(j).n_active > 1)
    shares = index.feature(live).shares
    assert all(np.asarray(share) == pytest.approx([1.0]) for share in vars(shares).values())
    assert {n.kind for n in index.nulls()} == {"random", "permuted"}


def test_one_latent(random_model, random_corpus, random_sae, tmp_path):
    model = random_model("gpt2")
    saes = one_sae(random_sae, model, 1)
    saes["s"].b_enc[0] = 1.0
    index = FeatureIndex.open(build((model, saes, random_corpus(model)), tmp_path / "index")[0])
    assert index.feature(0).correlated == ()
    assert index.search() == (0,)


@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.weight"),
        ("gpt2", "transformer.wpe.weight"),
        ("gpt_neox", "lm_head.weight"),
        ("gpt_neox", "gpt_neox.final_layer_norm.weight"),
    ],
)
def test_a_model_that_is_not_finite(random_model, random_corpus, random_sae, tmp_path, family, where):
    model = random_model(family)
    dict(model.module.named_parameters(remove_duplicate=False))[where].data.view(-1)[-1] = float("nan")
    with pytest.raises((IndexFormatError, ModelError), match="NaN"):
        build((model, one_sae(random_sae, model), random_corpus(model, block_size=64)), tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_token_that_the_model_lacks(random_model, random_corpus, random_sae, tmp_path):
    model = random_model("gpt2")
    corpus = random_corpus(model)
    corpus.blocks[2, 3] = model.spec.d_vocab
    with pytest.raises(CorpusError, match=f"token id {model.spec.d_vocab}"):
        build((model, one_sae(random_sae, model), corpus), tmp_path / "index")
    assert not list(tmp_path.iterdir())


def test_an_sae_of_another_site_or_width_is_refused(random_model, random_corpus, random_sae, tmp_path):
    model = random_model("gpt2")
    for sae in (random_sae(model, 8, site=Site("mlp_out", 0)), random_sae(random_model("gpt2", n_embd=64), 8)):
        with pytest.raises(SAEError):
            build((model, {"s": sae}, random_corpus(model)), tmp_path / "index")


@pytest.mark.parametrize(
    "bad",
    [
        {"thresholds": (1.0,)},
        {"thresholds": ()},
        {"thresholds": (0.0, 2.0, 2.0)},
        {"thresholds": (0.0, float("nan"))},
        {"thresholds": (0.0, float("inf"))},
        {"n_sources": 0},
        {"part_tokens": 0},
        {"range_rows": -1},
        {"intervals": 0},
        {"quantiles": 0},
        {"top": 0},
    ],
)
def test_a_plan_that_cannot_be(bad):
    with pytest.raises(HeadscopeError):
        IndexPlan(**bad)


def test_thresholds_may_be_whole_numbers(job, tmp_path, no_type_checks):
    plan = dataclasses.replace(PLAN, thresholds=(0, 1.5, 2))
    index = FeatureIndex.open(build(single(job), tmp_path / "index", plan)[0])
    assert index.manifest["thresholds"] == [0, 1.5, 2]
    index.sources(0, 2)


# -------------------------------------------------------------------------------------------------------------- memory
_MEMORY = """
import sys, threading
from pathlib import Path
import numpy as np, torch
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel
from headscope.corpus import Corpus
from headscope.index.build import SAERecord, build_index
from headscope.index.config import IndexPlan
from headscope.models.hf import Model
from headscope.sae.model import SAE, ReLU
from headscope.site import Site
from planted import word_tokenizer

def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])

folder, n_blocks = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
config = GPT2Config(vocab_size=200, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
model = Model(GPT2LMHeadModel(config), word_tokenizer(200), 0, "tiny")
g = torch.Generator().manual_seed(0)
sae = SAE(torch.randn(32, 64, generator=g), torch.full((64,), -0.5), torch.randn(64, 32, generator=g), torch.zeros(32),
          ReLU(), Site("z", 0), "tiny")
columns = {}
for name in ("blocks", "document", "offset"):
    columns[name] = np.memmap(folder / name, np.int32, "w+", shape=(n_blocks, 64))
rng = np.random.default_rng(0)
for start in range(0, n_blocks, 256):
    n = min(256, n_blocks - start)
    columns["blocks"][start : start + n] = rng.integers(1, 200, (n, 64))
columns["blocks"][:, 0] = 0
columns["offset"][:, 1:] = 1
corpus = Corpus("synthetic", "all", **columns, documents=("d",), bos=0)
peak, before, done = 0, anonymous(), threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
plan = IndexPlan(part_tokens=1 << 13, range_rows=1 << 16, losses=True)
build_index(model, [(sae, SAERecord("s", "sha256:0"))], corpus, folder / "index", plan=plan)
done.set()
thread.join()
print(peak, before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """16 times the tokens, and at most 15 % more memory."""

    def peak(n_blocks: int) -> int:
        folder = tmp_path / str(n_blocks)
        folder.mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", _MEMORY, str(folder), str(n_blocks)]
        ran = subprocess.run(command, check=True, env=environment, timeout=900, capture_output=True, text=True)
        return int(ran.stdout.split()[0])

    small, large = peak(512), peak(8192)
    assert large < 1.15 * small, f"{small} kB, then {large} kB"


def test_a_folder_that_is_filled_during_the_build_is_not_replaced(job, tmp_path):
    out = tmp_path / "index"

    def fill(stage, _done, _total):
        if stage == "write" and not out.exists():
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")

    with pytest.raises(OutputError, match="already exists"):
        build(single(job), out, on_progress=fill)
    assert (out / "thesis.txt").read_text() == "years of work"
    out.rename(tmp_path / "elsewhere")
    (folder,) = build(single(job), out)
    FeatureIndex.open(folder).verify()
