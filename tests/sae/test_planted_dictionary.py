import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from headscope.errors import SAEError, TrainingError
from headscope.sae.config import TrainConfig
from headscope.sae.training.trainer import Trainer
from headscope.site import Site
from planted_dictionary import MOST_FREQUENT, PlantedConfig, plant, zipf_frequencies
from recovery import Recovery, recovery

CONFIG = PlantedConfig(n_features=40, n_heads=4, d_head=8, rank=3, spread=(1, 3), l0=4.0, group_size=3)
N = 60_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------- planting
def test_frequencies_follow_zipf_and_sum_to_l0() -> None:
    found = zipf_frequencies(1000, 1.2, 40.0)
    assert found.sum() == pytest.approx(40.0, rel=1e-12)
    cut = found == MOST_FREQUENT
    assert 0 < cut.sum() < 100
    rank = np.arange(1, 1001)[~cut]
    slope = np.diff(np.log(found[~cut])) / np.diff(np.log(rank))
    np.testing.assert_allclose(slope, -1.2, rtol=1e-8)
    assert (found <= MOST_FREQUENT).all()


def test_equal_frequencies_with_exponent_zero() -> None:
    np.testing.assert_allclose(zipf_frequencies(8, 0.0, 2.0), 0.25)


def test_directions_are_unit_rows_in_low_rank_blocks_of_as_many_heads_as_asked() -> None:
    planted = plant(CONFIG)
    assert_close(planted.directions.norm(dim=1), torch.ones(40))
    blocks = planted.directions.unflatten(1, (4, 8))
    n_heads = (blocks.norm(dim=2) > 1e-6).sum(1)
    assert set(n_heads.tolist()) == {1, 3}
    for head in range(4):
        singular = torch.linalg.svdvals(blocks[:, head].double())
        assert singular[2] > 0.1
        assert singular[3] < 1e-6


def test_features_are_active_as_often_as_planted() -> None:
    planted = plant(CONFIG)
    active = planted.sample(N, generator()).activations > 0
    got = active.double().mean(0).numpy()
    error = np.sqrt(planted.frequency * (1 - planted.frequency) / N)
    assert np.abs((got - planted.frequency) / error).max() < 4.5


def test_a_child_is_active_only_where_its_parent_is() -> None:
    planted = plant(CONFIG)
    activations = planted.sample(N, generator()).activations
    children = (planted.parent >= 0).nonzero()[:, 0]
    assert len(children) == 10
    assert (planted.parent[planted.parent[children]] == -1).all()
    for child in children.tolist():
        active = activations[:, child] > 0
        assert active.any()
        assert (activations[active, planted.parent[child]] > 0).all()


def test_features_of_a_group_come_together_and_others_do_not() -> None:
    planted = plant(CONFIG)
    active = (planted.sample(N, generator()).activations > 0).double()
    correlation = torch.corrcoef(active[:, :30].T)
    group = planted.group[:30]
    assert (group.bincount() == 3).all()
    same = (group[:, None] == group) & ~torch.eye(30, dtype=torch.bool)
    assert correlation[same].min() > 0.05
    apart = correlation[~same & ~torch.eye(30, dtype=torch.bool)]
    assert apart.abs().max() < 5 / math.sqrt(N)


def test_inputs_are_sums_of_directions_plus_noise() -> None:
    planted = plant(CONFIG)
    batch = planted.sample(5000, generator())
    noise = batch.x - batch.activations @ planted.directions
    assert noise.std().item() == pytest.approx(CONFIG.noise, rel=0.02)
    mean = batch.activations.sum(0) / (batch.activations > 0).sum(0)
    frequent = planted.frequency > 0.05
    assert_close(mean[frequent], planted.magnitude[frequent], rtol=0.06, atol=0.0)


def test_the_seed_decides_everything() -> None:
    first, again, other = plant(CONFIG), plant(CONFIG), plant(PlantedConfig(**{**vars(CONFIG), "seed": 1}))
    assert torch.equal(first.directions, again.directions)
    assert torch.equal(first.sample(50, generator(3)).x, again.sample(50, generator(3)).x)
    assert not torch.equal(first.directions, other.directions)


@pytest.mark.parametrize(
    "change",
    [
        {"n_features": 1},
        {"rank": 9},
        {"spread": (1, 5)},
        {"spread": ()},
        {"l0": 20.0},
        {"child_share": 1.0},
        {"group_correlation": 1.0},
        {"noise": -1.0},
    ],
)
def test_what_cannot_be_planted_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match=next(iter(change))):
        PlantedConfig(**{**vars(CONFIG), **change})


# ------------------------------------------------------------------------------------------------------------- recovery
def axes(n: int) -> Tensor:
    return torch.eye(n)


def mixed(first: int, second: int, cosine: float, n: int = 20) -> Tensor:
    """A direction with this cosine with axis `first`, the rest along axis `second`."""
    return cosine * axes(n)[first] + math.sqrt(1 - cosine**2) * axes(n)[second]


def value(measure: object) -> float:
    found = measure.value  # type: ignore[attr-defined]
    assert found is not None
    return found


def test_the_dictionary_itself_is_found_whole() -> None:
    planted = plant(CONFIG).directions
    order = torch.randperm(40, generator=generator())
    found = recovery(planted, 3.0 * planted[order], 4)
    for name, measure in found.measures().items():
        assert value(measure) == pytest.approx(0.0 if name == "head_share_error" else 1.0, abs=1e-6), name
        assert measure.n == 40
    assert value(found.mmcs) > found.mmcs.null.high  # type: ignore[union-attr]


def test_numbers_of_a_hand_made_dictionary() -> None:
    planted = axes(20)[:5]
    latents = torch.stack(
        [
            axes(20)[0],  # feature 0, exactly
            mixed(0, 10, 0.95),  # feature 0 again
            mixed(1, 11, 0.92),  # feature 1
            mixed(2, 12, 0.80),  # near feature 2
            -axes(20)[3],  # feature 3, the wrong way round
            axes(20)[15],  # nothing
        ]
    )
    found = recovery(planted, latents, 4)
    assert value(found.mmcs) == pytest.approx((1 + 0.92 + 0.8 + 0 + 0) / 5, abs=1e-6)
    assert value(found.matched_cosine) == pytest.approx((1 + 0.92 + 0.8) / 5, abs=1e-6)
    assert (value(found.recall), found.recall.n) == (2 / 5, 5)
    assert (value(found.precision), found.precision.n) == (3 / 6, 6)
    assert (value(found.uniqueness), found.uniqueness.n) == (pytest.approx(2 / 3), 3)
    assert found.head_share_error.n == 2


def test_matching_is_one_to_one() -> None:
    """Both features are nearest to the one latent: the largest cosine counts it twice, the match once."""
    planted = torch.stack([mixed(0, 1, 0.95), mixed(0, 2, 0.95)])
    found = recovery(planted, axes(20)[:1], 4)
    assert value(found.mmcs) == pytest.approx(0.95, abs=1e-6)
    assert value(found.matched_cosine) == pytest.approx(0.475, abs=1e-6)
    assert value(found.recall) == 0.5


def test_the_best_match_gives_up_a_large_cosine_for_a_larger_sum() -> None:
    planted = torch.stack([axes(20)[0], mixed(0, 1, 0.8)])  # 0.8 apart
    latents = torch.stack([mixed(0, 1, 0.95), mixed(1, 0, 0.6)])
    cosine = (planted @ latents.T).numpy()
    straight, crossed = cosine[0, 0] + cosine[1, 1], cosine[0, 1] + cosine[1, 0]
    assert value(recovery(planted, latents, 4).matched_cosine) == pytest.approx(max(straight, crossed) / 2, abs=1e-6)


def test_error_of_head_shares_on_paper() -> None:
    """0.95 in head 0 and 0.312 in head 2, planted in head 0 alone: shares 0.7526 and 0.2474."""
    leaked = math.sqrt(1 - 0.95**2)
    found = recovery(axes(20)[:1], mixed(0, 10, 0.95)[None], 4)
    assert value(found.head_share_error) == pytest.approx(leaked / (0.95 + leaked), abs=1e-6)
    inside = recovery(axes(20)[:1], mixed(0, 1, 0.95)[None], 4)
    assert value(inside.head_share_error) == pytest.approx(0.0, abs=1e-6)


def test_nothing_found_says_so() -> None:
    found = recovery(axes(20)[:3], axes(20)[10:14], 4)
    assert value(found.recall) == value(found.precision) == 0.0
    for measure in (found.uniqueness, found.head_share_error):
        assert measure.value is None
        assert measure.missing == "nothing was found"


def test_the_null_of_random_directions_has_no_more_than_chance() -> None:
    planted = plant(CONFIG).directions
    random = torch.randn(40, 32, generator=generator(9))
    found = recovery(planted, random, 4)
    null = found.mmcs.null
    assert null is not None
    assert null.low - 0.05 < value(found.mmcs) < null.high + 0.05


@pytest.mark.parametrize(("learned", "n_heads"), [(torch.ones(3, 8), 4), (axes(20)[:0], 4), (axes(20), 3)])
def test_dictionaries_that_do_not_fit_are_refused(learned: Tensor, n_heads: int) -> None:
    with pytest.raises(SAEError, match="learned directions"):
        recovery(axes(20), learned, n_heads)


# ------------------------------------------------------------------------------------------------------------- training
LEARNT = PlantedConfig(n_features=32, n_heads=4, d_head=8, rank=6, l0=2.0, zipf=0.5, child_share=0.1)
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"variant": name} for name in ("batchtopk", "topk", "relu", "jumprelu", "gated")},
    "matryoshka": {"variant": "batchtopk", "prefixes": (8, 16, 32)},
}


def learnt(seed: int, steps: int, **changes: Any) -> Recovery:
    """What is found after some steps from random directions, so that all of it is found by training."""
    planted, batch = plant(PlantedConfig(**{**vars(LEARNT), "seed": seed})), 256
    x = planted.sample(65_536, generator(seed)).x
    options = {
        "d_sae": 64,
        "target_l0": 2.0,
        "batch": batch,
        "tokens": 700 * batch,
        "buffer": 8192,
        "start": "subspace",
    }
    options |= {"lr": 4e-3, "warmup_steps": 50, "dead_after": 20_000, "seed": seed}
    trainer = Trainer(x[:8192], TrainConfig(**options | changes))
    for step in range(steps):
        trainer.step(x[step * batch % len(x) :][:batch])
        if trainer.step_number in trainer.config.resampled_at:
            trainer.resample(x[:8192])
    sae = trainer.finish(Site("z", 0), "planted")
    alive = (sae.encode(x[-8192:]) > 0).any(0)
    return recovery(planted.directions, sae.W_dec[alive], planted.config.n_heads)


@pytest.mark.slow
@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("name", VARIANTS)
def test_training_finds_a_planted_dictionary(name: str) -> None:
    """The least of three dictionaries: MMCS 0.92, recall 0.75, share error at most 0.14; matryoshka 0.89, 0.56, 0.13.

    Prefixes make latents of what features have in common, so fewer of them are features.
    """
    start, found = learnt(0, 0, **VARIANTS[name]), learnt(0, 700, **VARIANTS[name])
    least_mmcs, least_recall = (0.82, 0.4) if name == "matryoshka" else (0.85, 0.6)
    assert value(start.mmcs) < 0.6
    assert value(start.recall) == 0.0
    assert value(found.mmcs) > least_mmcs
    assert value(found.recall) > least_recall
    assert value(found.head_share_error) < 0.2
    for measure, least in ((found.mmcs, least_mmcs), (found.recall, least_recall)):
        assert measure.null is not None
        assert measure.null.high < least - 0.25
