"""What a recipe may be."""

import json
from typing import Any

import pytest

from headscope.errors import TrainingError
from headscope.sae.config import TrainConfig
from small_training import BATCH, config


def test_the_steps_cover_the_tokens_asked_for() -> None:
    assert [config(tokens=BATCH * 100 + extra).n_steps for extra in (-1, 0, 1)] == [100, 100, 101]
    assert config(tokens=1).n_steps == 1


@pytest.mark.parametrize(
    ("changes", "steered"),
    [
        ({"variant": "relu"}, True),
        ({"variant": "gated"}, True),
        ({"variant": "jumprelu"}, True),
        ({"variant": "relu", "coefficient": 0.0}, False),
        ({"variant": "topk"}, False),
        ({"variant": "batchtopk"}, False),
    ],
)
def test_a_penalty_is_steered_where_no_coefficient_is_given(changes: dict[str, Any], steered: bool) -> None:
    assert config(**changes).steered == steered


def test_a_recipe_is_plain_values() -> None:
    made = config(prefixes=(3, 9), betas=(0.5, 0.9))
    held = json.loads(json.dumps(made.as_dict()))
    assert held == made.as_dict()
    assert (held["prefixes"], held["betas"], held["d_sae"]) == ([3, 9], [0.5, 0.9], 24)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_sae": 0},
        {"target_l0": 0.0},
        {"target_l0": float("nan")},
        {"target_l0": 24.0},
        {"target_l0": 0.005},
        {"variant": "topk", "target_l0": 2.5},
        {"tokens": 0},
        {"batch": -1},
        {"batch": 1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"buffer": 127},
        {"bandwidth": 0.0},
        {"clip": 0.0},
        {"tanh": -1.0},
        {"resample": -2},
        {"resample_every": 0},
        {"dead_after": 0},
        {"dead_below": -1e-6},
        {"dead_below": 1.0},
        {"dead_below": float("nan")},
        {"seed": -1},
        {"coefficient": -0.1},
        {"coefficient": float("nan")},
        {"auxiliary": -1.0},
        {"warmup_steps": -1},
        {"decay": 1.5},
        {"coefficient_warmup": 1.0},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"prefixes": (3, 24)},
        {"prefixes": (9, 3)},
        {"prefixes": (0, 3)},
        {"prefixes": (3, 3)},
        {"variant": "relu", "tanh": 4.0},
        {"coefficient": 1.0},
    ],
)
def test_values_that_cannot_train_anything_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"(?s)expected: .*do: "):
        config(**changes)


def test_a_short_training_finds_latents_dead_sooner() -> None:
    long = TrainConfig(variant="relu")
    assert long.dead_steps == 244  # 500,000 activations
    resampled = TrainConfig(variant="relu", tokens=500_000, resample=6)
    assert resampled.dead_steps == min(resampled.resampled_at) - 1 == 23  # of 245 steps
    assert TrainConfig(tokens=500_000).dead_steps == 30
    assert TrainConfig(tokens=1).dead_steps == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("variant", "standard"),
        ("decoder", "x"),
        ("resample_by", "anthropic"),
        ("scaling", None),
        ("center", None),
        ("start", "tied"),
        ("betas", (0.9,)),
    ],
)
def test_words_that_mean_nothing_are_refused(name: str, value: object) -> None:
    config = TrainConfig()
    object.__setattr__(config, name, value)  # these tests look at the types of arguments, who uses it does not
    with pytest.raises(TrainingError, match=name):
        config.__post_init__()
