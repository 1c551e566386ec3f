"""What the benchmarks rest on: of training, the floor, inputs and judgement that are the same for all; the clients."""

import asyncio
import importlib
import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

import headscope.sae
from browsing import serving
from explorer_source import N_BLOCKS, FakeSource
from headscope.explorer.server import make_app

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------- floor
def test_the_floor_multiplies_the_whole_batch_by_the_whole_encoder(module) -> None:
    step = module("floor").FloorStep(24, 96, 32)
    exact = step.x.double() @ step.encoder.double()
    assert step.product().shape == (32, 96)
    assert_close(step.product().double(), exact, rtol=2**-7, atol=0.1)  # bf16 has 8 bits


def test_the_floor_moves_two_whole_matrices_by_adam(module) -> None:
    step = module("floor").FloorStep(8, 16, 4)
    before = [weight.clone() for weight in step.weights]
    step.update()
    step.update()
    for old, new in zip(before, step.weights, strict=True):
        assert new.shape == (8, 16)
        # with the same gradient in each step Adam moves by lr * sign
        assert_close(new, old - 2e-3 * new.grad.sign(), rtol=0.0, atol=1e-6)


def test_the_floor_is_the_time_of_both_parts(module) -> None:
    floor = module("floor")
    found = floor.measure(floor.FloorStep(32, 256, 64), 5)
    assert found.product_s > 0
    assert found.adam_s > 0
    assert found.floor_s >= max(found.product_s, found.adam_s) / 2


# --------------------------------------------------------------------------------------------------------------- inputs
def test_scaled_inputs_have_the_distance_that_rates_are_meant_for(module) -> None:
    rows = module("step_data").scaled(3.0 + 0.01 * normal(500, 16))
    assert (rows - rows.mean(0)).norm(dim=1).mean().item() == pytest.approx(4.0, rel=1e-5)


def test_initial_weights_are_active_on_the_shares_asked_for(module) -> None:
    step_data = module("step_data")
    rows, decoder = normal(2000, 16), step_data.unit(normal(40, 16, seed=1))
    shares = torch.linspace(0.01, 0.3, 40)
    weights = step_data.initial_weights(rows, decoder, shares)
    active = step_data.encode(weights, rows, "relu", 4) > 0
    assert_close(active.float().mean(0), shares, rtol=0.0, atol=1 / 2000)
    assert torch.equal(weights["W_enc"].T, weights["W_dec"])


def test_planted_inputs_start_sparse_and_near_their_dictionary(module, tmp_path: Path) -> None:
    files = module("step_data").inputs("planted", tmp_path, d_in=64, d_sae=256, l0=4, n=2048, batch=512)
    load = module("peers.common").load_file
    sparse, unbiased = load(files.initial("relu")), load(files.initial("topk"))
    assert np.load(files.data).shape == (2048, 64)
    assert files.held_out.shape == (512, 64)
    f = module("step_data").encode(sparse, files.held_out, "relu", 4)
    assert 3 < module("step_data").mean_l0(f) < 8
    assert not unbiased["b_enc"].any()
    planted = module("step_data").planted_for(64, 256, 4)
    cosine = (planted.directions * sparse["W_dec"][:64]).sum(1)
    assert cosine.min() > 0.8


def test_selections_and_error_by_hand(module) -> None:
    step_data = module("step_data")
    x = torch.tensor([[3.0, 2.0, 1.0], [0.5, -1.0, 0.25]])
    weights = {"W_enc": torch.eye(3), "b_enc": torch.zeros(3), "W_dec": torch.eye(3), "b_dec": torch.zeros(3)}
    expected = {
        "relu": ([[3, 2, 1], [0.5, 0, 0.25]], 1.0 / 2, 2.5),
        "topk": ([[3, 0, 0], [0.5, 0, 0]], (5 + 1.0625) / 2, 1.0),
        "batchtopk": ([[3, 2, 0], [0, 0, 0]], (1 + 1.3125) / 2, 1.0),
    }
    for variant, (activations, error, l0) in expected.items():
        f = step_data.encode(weights, x, variant, 1)
        assert_close(f, torch.tensor(activations, dtype=torch.float32))
        assert step_data.squared_error(weights, x, f) == pytest.approx(error)
        assert step_data.mean_l0(f) == l0
    gate = weights | {"threshold": torch.tensor([3.0, 1.0, 0.1])}
    assert_close(step_data.encode(gate, x, "jumprelu", 1), torch.tensor([[0, 2, 1], [0, 0, 0.25]]))


# ------------------------------------------------------------------------------------------------------------ processes
def task_for(module, folder: Path, variant: str, steps: int) -> object:
    step_data = module("step_data")
    rows = step_data.scaled(normal(512, 16))
    decoder = step_data.unit(normal(64, 16, seed=1))
    np.save(folder / "rows.npy", rows.numpy())
    weights = step_data.initial_weights(rows, decoder, torch.full((64,), 0.1))
    save_file(weights, folder / "initial.safetensors")
    return module("peers.common").Task(
        variant=variant,
        option="default",
        data=str(folder / "rows.npy"),
        initial=str(folder / "initial.safetensors"),
        out=str(folder / "out.safetensors"),
        d_sae=64,
        steps=steps,
        batch=64,
        k=4,
        coefficient=0.5,
        lr=1e-3,
        threads=1,
    )


def test_a_task_survives_its_command_line(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(task_for(module, tmp_path, "topk", 3), device="cuda:1")
    monkeypatch.setattr(sys, "argv", ["script", *task.arguments()])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert type(task).from_command_line() == task


def test_batches_and_weights_are_on_the_device_of_the_task(module, tmp_path: Path) -> None:
    task = replace(task_for(module, tmp_path, "topk", 3), device="meta")
    assert next(task.batches()).is_meta
    assert all(weight.is_meta for weight in task.weights().values())


@pytest.mark.parametrize("variant", ["relu", "topk", "batchtopk"])
def test_our_trainer_starts_from_the_weights_given(module, tmp_path: Path, variant: str) -> None:
    ours, task = module("ours"), task_for(module, tmp_path, variant, 1)
    trainer = ours.trainer_for(task)
    got = ours.trained(trainer.finish(ours.Site("z", 0), "inputs"), variant)
    for name, weight in task.weights().items():
        assert_close(got[name], weight, rtol=1e-5, atol=1e-6)


def test_our_trainer_steps_at_the_rate_and_coefficient_given(module, tmp_path: Path) -> None:
    task = task_for(module, tmp_path, "relu", 1)
    trainer = module("ours").trainer_for(task)
    for _, x in zip(range(3), task.batches(), strict=False):
        status = trainer.step(x)
        assert (status.lr, status.coefficient) == (1e-3, 0.5)


@pytest.mark.slow
def test_our_process_hands_back_times_memory_and_weights(module, tmp_path: Path) -> None:
    task = task_for(module, tmp_path, "batchtopk", 4)
    found = module("processes").train("headscope", task)
    assert len(found.seconds) == 4
    assert found.peak_mb > 0
    assert not torch.equal(found.weights["W_dec"], task.weights()["W_dec"])


def test_a_process_that_fails_says_why(module) -> None:
    processes = module("processes")
    script = "import sys; print('noise', file=sys.stderr)\nraise ValueError('a width of 3\\nand more')"
    with pytest.raises(processes.ProcessError, match="ValueError: a width of 3"):
        processes.run([sys.executable, "-c", script])


def test_variables_reach_a_process_beside_those_inherited(module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "a")
    script = "import os; print(os.environ['INHERITED'], os.environ['GIVEN'])"
    assert module("processes").run([sys.executable, "-c", script], variables={"GIVEN": "b"}) == "a b\n"


@pytest.mark.parametrize(("device", "expected"), [("cpu", {"SPARSIFY_DISABLE_TRITON": "1"}), ("cuda", {})])
def test_sparsify_decodes_without_triton_on_a_cpu_alone(
    module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, expected: dict[str, str]
) -> None:
    processes, given = module("processes"), {}

    def run(_command: list[str], **settings: object) -> str:
        given.update(settings)
        raise processes.ProcessError("not run")

    monkeypatch.setattr(processes, "environment", lambda _: Path(sys.executable))
    monkeypatch.setattr(processes, "run", run)
    with pytest.raises(processes.ProcessError, match="not run"):
        processes.train("sparsify", replace(task_for(module, tmp_path, "topk", 3), device=device))
    assert given["variables"] == expected


# ------------------------------------------------------------------------------------------------------- steps on a GPU
@pytest.fixture
def gpu_step(module, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark of a GPU, on a CPU: all but the kernels."""
    found = module("gpu_step")
    monkeypatch.setattr(found, "DEVICE", "cpu")
    monkeypatch.setattr(found, "of_kernels", lambda _: {})
    monkeypatch.setattr(found, "environment", lambda _: Path(sys.executable))
    return found


def small(gpu_step: ModuleType) -> object:
    return gpu_step.Arguments(d_in=16, d_sae=64, batch=32, l0=4.0)


def test_a_step_on_a_gpu_stands_beside_every_peer(module, gpu_step, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(library: str, task: object) -> object:
        return module("processes").Trained([9.0, 9.0, 9.0, 0.5, 0.25, 0.5], 10.0, library, task.weights())

    monkeypatch.setattr(gpu_step, "train", train)
    rows = {row["name"]: row for row in gpu_step.rows(small(gpu_step), 3, best=1e9)}
    ours = {f"step, {variant}" for variant in ("relu", "topk", "batchtopk")}
    peers = {f"{name}, {peer}" for name in ours for peer in ("SAELens", "SAELens bf16")}
    peers |= {
        f"step, topk, {peer}" for peer in ("SAELens sparse", "SAELens bf16 sparse", "sparsify", "sparsify signum")
    }
    assert set(rows) == {"product", "adam"} | ours | peers
    for name in peers:
        assert (rows[name]["seconds"], rows[name]["activations_per_s"]) == (0.5, 64.0)
        assert rows[name]["share_of_peak"] == pytest.approx(2 * 32 * 16 * 64 / 0.5 / 1e9)
        assert rows[name]["version"] == ("sparsify" if "sparsify" in name else "saelens")
    assert {rows[name]["l0"] for name in peers if "topk" in name} == {4.0}
    for name in ours:
        assert rows[name]["share_of_peak"] * 1e9 * rows[name]["seconds"] == pytest.approx(2 * 32 * 16 * 64)
    assert "share_of_peak" not in rows["adam"]


def test_without_peers_our_steps_are_left(gpu_step) -> None:
    names = {row["name"] for row in gpu_step.rows(replace(small(gpu_step), peers=False), 1, best=1e9)}
    assert names == {"product", "adam", "step, relu", "step, topk", "step, batchtopk"}


def test_peers_start_from_our_batch_and_weights(gpu_step, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: dict[str, tuple[object, Tensor, dict[str, Tensor]]] = {}

    def train(_library: str, task: object) -> object:
        tasks[task.variant] = task, next(task.batches()), task.weights()
        raise gpu_step.ProcessError("enough is known")

    monkeypatch.setattr(gpu_step, "train", train)
    args = small(gpu_step)
    p = gpu_step.problem(args)
    _, trainers = gpu_step.of_trainer(args, p)
    assert len(list(gpu_step.of_peers(args, p, 4))) == 10
    for variant, (task, x, weights) in tasks.items():
        ours = trainers[f"step, {variant}"].p
        assert torch.equal(x, p.x)
        assert torch.equal(weights["W_enc"].T, ours["encoder"])
        assert torch.equal(weights["W_dec"], ours["decoder"])
        assert torch.equal(weights["b_enc"], ours["b_enc"])
        assert torch.equal(weights["b_dec"], ours["b_dec"])
        assert (task.steps, task.k, task.batch, task.device) == (7, 4, 32, "cpu")
    assert set(tasks) == {"relu", "topk", "batchtopk"}


def test_a_peer_that_is_missing_or_fails_has_a_row_that_says_why(
    module, gpu_step, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def environment(library: str) -> Path:
        asked.append(library)
        if library == "sparsify":
            raise gpu_step.ProcessError("ERROR: no network")
        return Path(sys.executable)

    def train(library: str, task: object) -> object:
        assert library != "sparsify"
        if task.option == "bf16":
            raise gpu_step.ProcessError("OutOfMemoryError: " + 50 * "much ")
        return module("processes").Trained([0.5] * 5, 10.0, "1.0", task.weights())

    monkeypatch.setattr(gpu_step, "environment", environment)
    monkeypatch.setattr(gpu_step, "train", train)
    args = small(gpu_step)
    for row in gpu_step.of_peers(args, gpu_step.problem(args), 2):
        gpu_step.show(gpu_step.rated(row, args, 1e9), as_json=False)
        gpu_step.show(gpu_step.rated(row, args, 1e9), as_json=True)
    assert sorted(asked) == ["saelens", "sparsify"]  # once: without a network each takes pip a while
    said = capsys.readouterr().out.splitlines()
    lines = {line[:36].strip(): line[36:].strip() for line in said[::2]}
    assert len(lines) == 10
    assert lines["step, topk, sparsify"] == lines["step, topk, sparsify signum"] == "failed: ERROR: no network"
    assert lines["step, relu, SAELens bf16"].startswith("failed: OutOfMemoryError: much much")
    assert "activations/s" in lines["step, relu, SAELens"]
    failures = {row["name"]: row.get("failure") for row in map(json.loads, said[1::2]) if row["seconds"] is None}
    assert len(failures) == 5
    assert failures["step, topk, sparsify"] == "ERROR: no network"


@pytest.mark.slow
def test_a_peers_own_trainer_gives_a_row(module, gpu_step, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAELens, which is installed where tests run, with the options that no other benchmark has."""
    monkeypatch.setattr(module("processes"), "environment", lambda _: Path(sys.executable))
    monkeypatch.setattr(gpu_step, "PEERS", {"topk": (("SAELens bf16 sparse", "saelens", "bf16-sparse"),)})
    args = small(gpu_step)
    (row,) = gpu_step.of_peers(args, gpu_step.problem(args), 2)
    assert row.get("failure") is None
    assert (row["name"], row["l0"]) == ("step, topk, SAELens bf16 sparse", 4.0)
    assert row["seconds"] > 0
    assert row["version"].startswith("6.54")


# ---------------------------------------------------------------------------------------------------------------- table
def row(name: str, variant: str, d_in: int, step_s: float, ratio: float) -> dict[str, object]:
    return {
        "name": name,
        "variant": variant,
        "d_in": d_in,
        "data": "planted",
        "step_s": step_s,
        "ratio": ratio,
        "floor_s": 0.1,
    }


def test_aims_are_judged_by_the_fastest_configuration_of_a_peer(module, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row("headscope", "topk", 512, 0.15, 1.0),
        row("SAELens", "topk", 512, 1.8, 12.0),
        row("SAELens bf16", "topk", 512, 1.4, 9.5),
        row("sparsify", "topk", 512, 0.45, 3.0),
        {**row("sparsify signum", "topk", 512, 0.0, 0.0), "step_s": None},
    ]
    module("train_step")._print_aims(rows)
    said = [(line.split()[0], float(line.split()[-1])) for line in capsys.readouterr().out.strip().splitlines()]
    assert said == [("miss", 9.5), ("pass", 3.0), ("pass", 1.5)]


def test_the_small_shape_alone_reads_the_models_own_activations(module) -> None:
    train_step = module("train_step")
    found = {(cell.data, cell.d_in, cell.d_sae) for cell in train_step.cells(train_step.Arguments())}
    assert found == {("planted", 128, 4096), ("tiny", 128, 4096), ("planted", 512, 16384)}


def test_rows_are_lines_of_json_with_the_keys_that_readers_expect(module) -> None:
    train_step = module("train_step")
    step_data, task = module("step_data"), module("processes").Trained
    weights = {"W_enc": torch.eye(4), "b_enc": torch.zeros(4), "W_dec": torch.eye(4), "b_dec": torch.zeros(4)}
    cell = train_step.Cell("relu", 4, 4, "planted")
    done = train_step.Runs([0.3, 0.2], task([0.2], 10.0, "1.0", weights))
    runs = {
        ("headscope", "headscope", "default"): done,
        ("SAELens", "saelens", "fp32"): train_step.Runs(failure="no pip"),
    }
    files = step_data.Inputs(Path(), Path(), Path(), normal(8, 4))
    ours, peer = map(json.loads, map(json.dumps, train_step._rows(cell, runs, 0.1, files, train_step.Arguments())))
    for key in ("name", "variant", "d_in", "d_sae", "batch", "step_s", "floor_s", "loss"):
        assert key in ours
        assert key in peer
    assert ours["step_s"] == 0.2
    assert ours["loss"] == pytest.approx(files.held_out.clamp(max=0).square().sum(1).mean().item(), rel=1e-5)
    assert (peer["step_s"], peer["failure"]) == (None, "no pip")


# ------------------------------------------------------------------------------------------------------ whole trainings
@pytest.mark.slow
def test_an_sae_is_judged_by_what_it_explains_of_held_out_text(module, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run = module("train_run")
    monkeypatch.setattr(train_run, "HELD_OUT", 5000)
    folder = Path(headscope.sae.__file__).parent / "tiny-z1"
    l0, explained_variance = train_run.judged(folder, headscope.load_model("tiny"))
    assert 10 < l0 < 16
    assert 0.8 < explained_variance < 0.9


def test_a_peers_row_is_its_best_setting_at_its_least_time(module) -> None:
    train_run = module("train_run")

    def row(setting: str, seconds: float, explained: float) -> object:
        return train_run.Row("SAELens", "relu", setting, seconds, 2 * seconds, "6", 12.0, explained)

    rows = [row("fp32, lr 1", 9.0, 0.5), row("fp32, lr 2", 8.0, 0.4), row("bf16, lr 1", 5.0, 0.3)]
    best = list(train_run._best(rows))
    assert [(r.setting, r.seconds, r.explained_variance) for r in best] == [
        ("fp32, lr 1", 8.0, 0.5),
        ("bf16, lr 1", 5.0, 0.3),
    ]


# ---------------------------------------------------------------------------------------------------------- server load
def test_clients_ask_for_what_they_are_told_to_and_no_longer(module) -> None:
    serve_load = module("serve_load")
    arguments = serve_load.Arguments(clients=3, seconds=0.3, cards=0, contexts=1, tables=0, studies=0)
    with serving(make_app(FakeSource())) as url, serve_load.idle_sockets(url, 4):
        tally = asyncio.run(serve_load.load(url, serve_load.Subject([3], N_BLOCKS), arguments))
    assert {(sample.kind, sample.status) for sample in tally.samples} == {("context", "200")}
    assert all(0 < sample.server_ms <= sample.ms for sample in tally.samples)
    rows = {row.name: row.value for row in serve_load.figures(tally)}
    assert rows["context: answered"] == len(tally.samples) > 0
    assert rows["context: p50"] <= rows["context: p99"]
    assert rows["answers that are wrong"] == 0


def test_figures_of_a_load_by_hand(module) -> None:
    serve_load = module("serve_load")
    tally = serve_load.Tally(seconds=2.0)
    right, wrong = (json.dumps({"latent": latent}).encode() for latent in (7, 8))
    for ms in range(1, 102):
        tally.add(serve_load.Sample("card", "200", float(ms)), "/api/feature/7", right if ms > 1 else wrong)
    tally.add(serve_load.Sample("dive", "503", 1.0), "/api/dive/7", b"")
    rows = {row.name: row.value for row in serve_load.figures(tally)}
    assert (rows["requests"], rows["card: answered"], rows["dive: answered"]) == (51.0, 101, 0)
    assert (rows["card: p50"], rows["card: p99"]) == (51.0, 100.0)
    assert (rows["dive: 503"], rows["answers that are wrong"]) == (1, 1)
    assert "card: server p50" not in rows


def test_a_client_opens_its_connection_again_and_no_answer_is_an_error(module) -> None:
    serve_load = module("serve_load")

    async def ask() -> list[int]:
        n = 0

        async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal n
            n += 1
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}" if n < 3 else b"HTTP/1.1 200")
            writer.close()

        async with await asyncio.start_server(closes, "127.0.0.1", 0) as server:
            client = serve_load.Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
            answers = [await client.get("/") for _ in range(2)]
            with pytest.raises(EOFError):
                await client.get("/")
            return [answer.status for answer in answers]

    assert asyncio.run(ask()) == [200, 200]


def test_a_process_is_measured(module) -> None:
    process = module("serve_load").Process(os.getpid())
    before = process.sockets()
    with socket.socket(), socket.socket():
        assert process.sockets() == before + 2
    assert 0 < process.memory() <= process.memory("VmHWM")
    assert process.busy_s() > 0
