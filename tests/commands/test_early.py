"""What is wrong with a command's inputs is said before torch is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from headscope import jobs
from headscope.errors import CorpusError, ModelError, SAEError, TrainingError
from headscope.jobs.early import check_model, check_sae, check_size, check_text
from headscope.sae.config import TrainConfig

WRONG = [
    "train --layer 7 --out {0}/new",
    "train --model ./none --out {0}/new",
    "train --corpus none.txt --out {0}/new",
    "train --model no-such-model --out {0}/new",
    "train --out {0}/taken",
    "sweep --layer 2 --out {0}/new",
    "eval --sae none",
    "eval --sae {0}/taken",
    "eval --sae tiny-z1 --corpus none.txt",
    "index --sae tiny-z2 --out {0}/new",
    "index --sae tiny-z1 --out {0}/taken",
    "effects {0}/none",
    "families {0}/none",
    "heads {0}/none",
    "proxies {0}/none",
    "serve --index {0}/none",
    "info no-such-model",
    "trian",
    "train --d-sae 1000000000 --out {0}/new",
    "sweep --d-sae 1000000000 --out {0}/new",
    "train --max-tokens 10 --out {0}/new",
    "train --block-size 100000 --out {0}/new",
    "train --corpus {0}/empty --out {0}/new",
    "sweep --max-tokens 10 --out {0}/new",
    "eval --sae tiny-z1 --max-tokens 10",
    "index --sae tiny-z1 --block-size 100000 --out {0}/new",
    "index --sae tiny-mlp0 --out {0}/new",
    "convert tiny-z1 --out {0}/taken",
    "convert none --out {0}/new",
    "report {0}/taken",
    "report {0}/new --sae tiny-mlp0",
]


def test_no_torch_is_loaded_to_refuse_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    code = """
import sys
from headscope.cli import main
for line in sys.argv[2:]:
    try:
        main(line.format(sys.argv[1]).split())
    except SystemExit as ended:
        assert ended.code == 2, line
    else:
        raise AssertionError(line)
    assert not {"torch", "transformers"} & set(sys.modules), line
"""
    command = [sys.executable, "-c", code, str(tmp_path), *WRONG]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("\n  do: ") == len(WRONG)
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "empty"}


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "nested"])
def test_a_layer_is_held_against_the_configuration(tmp_path: Path, key: str) -> None:
    config = {"text_config": {"num_hidden_layers": 3}} if key == "nested" else {key: 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_model(str(tmp_path), 2)
    for layer in (3, -1):
        with pytest.raises(ModelError, match="0 to 2: the model has 3 layers"):
            check_model(str(tmp_path), layer)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"num_hidden_layers": "x"}'])
def test_what_a_configuration_does_not_say_is_left_to_the_loading(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    check_model(str(tmp_path), 99)


def test_what_is_there_passes(tmp_path: Path) -> None:
    for name in ("tiny", "gelu-2l"):
        check_model(name)
    for name in ("tiny-z1", "release/on-the-hub", "user/repository/folder"):
        check_sae(name)
    (tmp_path / "post.pt").write_text("")
    check_sae(tmp_path / "post")
    check_text(jobs.CorpusChoice())


def test_an_sae_that_is_not_there_and_one_whose_configuration_is_damaged(tmp_path: Path) -> None:
    sae = tmp_path / "demo" / "sae"
    sae.mkdir(parents=True)
    (sae / "cfg.json").write_text("{")
    with pytest.raises(SAEError, match=r"no SAE at .*\n.*\n  do: did you mean .*demo/sae\?"):
        check_sae(tmp_path / "demo")
    (sae / "sae_weights.safetensors").write_text("")
    with pytest.raises(SAEError, match=r"cfg\.json"):
        check_sae(sae)


def test_no_model_is_loaded_to_refuse_a_device_that_is_not_there(tmp_path: Path) -> None:
    code = """
import sys
from headscope.cli import main
try:
    main(["train", "--device", "cuda:999", "--out", sys.argv[1] + "/new"])
except SystemExit as ended:
    assert ended.code == 2
assert "transformers" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "device 'cuda:999'" in done.stderr


@pytest.mark.parametrize(
    ("config", "d_in", "context"),
    [
        ({"n_embd": 96, "n_head": 6, "n_positions": 32}, 96, 32),
        ({"hidden_size": 96, "num_attention_heads": 4, "head_dim": 32, "max_position_embeddings": 64}, 128, 64),
        ({"d_model": 96, "n_heads": 2, "d_head": 16, "n_ctx": 16}, 32, 16),
    ],
)
def test_sizes_are_held_against_the_configuration(tmp_path: Path, config: dict, d_in: int, context: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, huge = str(tmp_path), [TrainConfig(d_sae=1_000_000_000)]
    with pytest.raises(TrainingError, match=f"of {d_in} components"):
        check_size(huge, model, "z", "cpu")
    with pytest.raises(TrainingError, match="of 96 components"):
        check_size(huge, model, "mlp_out", "cpu")
    check_size([TrainConfig(d_sae=256)], model, "z", "cpu")
    with pytest.raises(CorpusError, match=f"at most {context}, the context"):
        check_text(jobs.CorpusChoice(block_size=context + 1), model)
    check_text(jobs.CorpusChoice(block_size=context), model)


def test_a_text_that_is_not_there() -> None:
    with pytest.raises(CorpusError, match="no corpus"):
        check_text(jobs.CorpusChoice(corpus="none.txt"))
