import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from headscope.corpus import PADDING, Corpus
from headscope.errors import CorpusError, ModelError, SAEError
from headscope.models.hf import Model
from headscope.sae.model import SAE, ReLU
from headscope.sae.quality import DENSITY_EDGES, Quality, evaluate
from headscope.sae.quality_table import quality_rows
from headscope.site import Kind, Site
from headscope.stats import Estimate, bootstrap_ratio, wilson

SITES = [Site("z", 0), Site("z", 1), Site("attn_out", 0), Site("mlp_out", 0), Site("mlp_out", 1), Site("resid_pre", 1)]
SITES += [Site("resid_post", 0), Site("resid_post", 1)]
CONDITIONS = ("clean", "sae", "mean", "c", "zero")


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Model]) -> Model:
    return random_model("gpt_neox", dtype=torch.float64)


@pytest.fixture(scope="module")
def corpus(model: Model, random_corpus: Callable[..., Corpus]) -> Corpus:
    made = random_corpus(model, n_blocks=12, block_size=14)
    assert (made.blocks[:, 1:-1] == model.bos).sum() > 3
    return made


# ------------------------------------------------------------------------------ the measures again, as a naive program
def naive_offset(model: Model, layer: int) -> Tensor:
    """b_V + b_ln1 @ W_V of a NeoX model, whose rows of the joint weight are q, k and v of each head in turn."""
    block, d_head = model.module.gpt_neox.layers[layer], model.spec.d_head
    qkv, norm = block.attention.query_key_value, block.input_layernorm
    parts = []
    for head in range(model.spec.n_heads):
        rows = slice(3 * d_head * head + 2 * d_head, 3 * d_head * (head + 1))
        parts.append(qkv.bias[rows] + qkv.weight[rows] @ norm.bias)
    return torch.cat(parts)


def hook_at(model: Model, site: Site, edit: Callable[[Tensor], Tensor]) -> Any:
    """Put `edit` at a site of a NeoX model by torch's own hooks."""
    block = model.module.gpt_neox.layers[site.layer]

    def before(_module: nn.Module, args: tuple) -> tuple:
        return (edit(args[0]), *args[1:])

    def after(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        return edit(output)

    match site.kind:
        case "z":
            return block.attention.dense.register_forward_pre_hook(before)
        case "attn_out":
            return block.attention.dense.register_forward_hook(after)
        case "mlp_out":
            return block.mlp.register_forward_hook(after)
        case "resid_pre":
            return block.register_forward_pre_hook(before)
        case "resid_post":
            return block.register_forward_hook(after)


def naive_losses(model: Model, tokens: Tensor, site: Site, edit: Callable[[Tensor], Tensor]) -> Tensor:
    handle = hook_at(model, site, edit)
    try:
        logits = model.module(input_ids=tokens).logits
    finally:
        handle.remove()
    return -logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]


@dataclasses.dataclass
class Naive:
    """Sums of each block."""

    n: np.ndarray
    l0: np.ndarray
    l0_all: float
    variance: np.ndarray
    error: np.ndarray
    hat_square: np.ndarray
    inner: np.ndarray
    cosine: float
    fired: np.ndarray
    losses: dict[str, np.ndarray]
    n_predicting: np.ndarray
    n_predicting_bos: np.ndarray

    def recovered(self, ablated: str, repaired: str, end: str) -> Estimate:
        clean, lost = self.losses[f"clean{end}"], self.losses[f"{ablated}{end}"]
        return bootstrap_ratio(lost - self.losses[f"{repaired}{end}"], lost - clean)


@torch.no_grad()
def naive(model: Model, sae: SAE, corpus: Corpus) -> Naive:
    """One block at a time, one token at a time, plain hooks."""
    blocks = torch.from_numpy(corpus.blocks).long()
    xs: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        xs.append(value[0].clone())
        return value

    for tokens in blocks:
        naive_losses(model, tokens[None], sae.site, keep)
    counted = blocks != model.bos
    mean = torch.cat([x[c] for x, c in zip(xs, counted, strict=True)]).mean(0)
    width = len(mean)
    c = naive_offset(model, sae.site.layer) if sae.site.kind == "z" else torch.zeros(width, dtype=mean.dtype)
    n_blocks = len(blocks)
    sums = {k: np.zeros(n_blocks) for k in ("n", "l0", "variance", "error", "hat_square", "inner")}
    fired, l0_all, cosine = np.zeros(sae.d_sae, dtype=int), 0, 0.0
    losses: dict[str, np.ndarray] = {f"{k}{end}": np.zeros(n_blocks) for k in CONDITIONS for end in ("", "_bos")}
    for b, (tokens, x) in enumerate(zip(blocks, xs, strict=True)):
        for t in range(len(tokens)):
            f = sae.encode(x[t])
            x_hat = f @ sae.W_dec + sae.b_dec
            l0_all += int((f > 0).sum())
            if tokens[t] == model.bos:
                continue
            fired += (f > 0).numpy()
            sums["n"][b] += 1
            sums["l0"][b] += int((f > 0).sum())
            sums["variance"][b] += float(((x[t] - mean) ** 2).sum())
            sums["error"][b] += float(((x[t] - x_hat) ** 2).sum())
            sums["hat_square"][b] += float(x_hat @ x_hat)
            sums["inner"][b] += float(x[t] @ x_hat)
            cosine += float(x[t] @ x_hat / (x[t].norm() * x_hat.norm()))
        replacements: dict[str, Callable[[Tensor], Tensor]] = {
            "clean": lambda v: v,
            "sae": sae,
            "mean": lambda v: mean.expand_as(v),
            "c": lambda v: c.expand_as(v),
            "zero": torch.zeros_like,
        }
        special = (tokens == model.bos)[None, :, None]
        for name, replace in replacements.items():
            everywhere = naive_losses(model, tokens[None], sae.site, replace)[0]
            skipping = naive_losses(
                model, tokens[None], sae.site, lambda v, r=replace, s=special: torch.where(s, v, r(v))
            )[0]
            losses[f"{name}_bos"][b] = float(everywhere.sum())
            losses[name][b] = float(skipping[tokens[:-1] != model.bos].sum())
    return Naive(
        **sums,
        l0_all=l0_all / blocks.numel(),
        cosine=cosine / sums["n"].sum(),
        fired=fired,
        losses=losses,
        n_predicting=(corpus.blocks[:, :-1] != model.bos).sum(1),
        n_predicting_bos=np.full(n_blocks, corpus.block_size - 1),
    )


def assert_estimate(got: Estimate, expected: Estimate, **tolerance: float) -> None:
    assert_close(dataclasses.astuple(got), dataclasses.astuple(expected), **tolerance)


def assert_quality(q: Quality, judge: Naive, **tolerance: float) -> None:
    from_mean = tolerance | {"rtol": max(1e-5, tolerance["rtol"])}  # the mean that is put in is float32
    n = int(judge.n.sum())
    assert (q.n_tokens, q.n_blocks) == (n, len(judge.n))
    assert_estimate(q.l0, bootstrap_ratio(judge.l0, judge.n), **tolerance)
    assert_close(q.l0_with_bos, judge.l0_all, **tolerance)
    unexplained = bootstrap_ratio(judge.error, judge.variance)
    explained = Estimate(1 - unexplained.value, 1 - unexplained.high, 1 - unexplained.low)
    assert_estimate(q.explained_variance, explained, **tolerance)
    assert_close(q.mse, judge.error.sum() / n, **tolerance)
    assert_close(q.cosine, judge.cosine, **tolerance)
    assert_estimate(q.relative_reconstruction_bias, bootstrap_ratio(judge.hat_square, judge.inner), **tolerance)
    assert q.dead == wilson(int((judge.fired == 0).sum()), len(judge.fired))
    density = judge.fired / n
    assert q.n_below == {f"{t:g}": int((density < t).sum()) for t in (1e-6, 1e-5, 1e-4)}
    expected_histogram = np.histogram(np.log10(density[density > 0]), DENSITY_EDGES)[0]
    assert q.density_histogram == expected_histogram.tolist()
    assert sum(q.density_histogram) == (judge.fired > 0).sum()
    assert set(q.ce) == set(judge.losses)
    for name, losses in judge.losses.items():
        counts = judge.n_predicting_bos if name.endswith("_bos") else judge.n_predicting
        assert_close(q.ce[name], losses.sum() / counts.sum(), **(from_mean if "mean" in name else tolerance))
    assert_estimate(q.loss_recovered, judge.recovered("c", "sae", "_bos"), **tolerance)
    assert_estimate(q.ce_loss_score, judge.recovered("zero", "sae", ""), **tolerance)
    assert_estimate(q.loss_recovered_mean_ablation, judge.recovered("mean", "sae", "_bos"), **from_mean)
    assert_estimate(q.loss_recovered_by_mean, judge.recovered("c", "mean", "_bos"), **from_mean)


# --------------------------------------------------------------------------------------------------------- every figure
@pytest.mark.parametrize("site", SITES, ids=str)
def test_every_figure_is_that_of_a_naive_program(
    model: Model, corpus: Corpus, random_sae: Callable[..., SAE], site: Site
) -> None:
    sae = random_sae(model, site=site, activation="jumprelu")
    assert_quality(evaluate(model, sae, corpus), naive(model, sae, corpus), rtol=1e-8, atol=1e-10)


def test_in_float32_the_figures_are_the_same_to_four_digits(
    model: Model, random_model: Callable[..., Model], corpus: Corpus, random_sae: Callable[..., SAE]
) -> None:
    sae, single = random_sae(model, seed=3), random_model("gpt_neox")
    got = evaluate(single, sae.to(torch.float32), corpus)
    judge = naive(model, sae, corpus)
    assert_close(got.loss_recovered.value, judge.recovered("c", "sae", "_bos").value, rtol=1e-4, atol=1e-4)
    assert_close(got.mse, judge.error.sum() / judge.n.sum(), rtol=1e-4, atol=0)
    assert_close(got.ce["clean_bos"], judge.losses["clean_bos"].sum() / (12 * 13), rtol=1e-4, atol=0)


def test_figures_do_not_depend_on_how_blocks_fall_into_batches(
    model: Model, random_corpus: Callable[..., Corpus], random_sae: Callable[..., SAE]
) -> None:
    corpus = random_corpus(model, n_blocks=600, block_size=14)  # more than are read at a time
    assert corpus.n_tokens > 8192
    order = np.random.default_rng(0).permutation(600)
    mixed = dataclasses.replace(corpus, blocks=corpus.blocks[order], offset=corpus.offset[order])
    sae = random_sae(model, 8)
    one, two = evaluate(model, sae, corpus), evaluate(model, sae, mixed)
    assert (one.n_tokens, one.n_blocks, one.dead, one.n_below) == (two.n_tokens, two.n_blocks, two.dead, two.n_below)
    assert one.density_histogram == two.density_histogram
    for name in ("l0", "loss_recovered", "ce_loss_score", "explained_variance", "relative_reconstruction_bias"):
        assert_close(getattr(one, name).value, getattr(two, name).value, rtol=1e-9, atol=0)
    for name, value in one.ce.items():
        assert_close(value, two.ce[name], rtol=1e-6 if "mean" in name else 1e-10, atol=0)
    assert_close((one.mse, one.cosine, one.l0_with_bos), (two.mse, two.cosine, two.l0_with_bos), rtol=1e-9, atol=0)


def test_the_work_done_is_reported_to_its_end(model: Model, corpus: Corpus, random_sae: Callable[..., SAE]) -> None:
    calls: list[tuple[int, int]] = []
    evaluate(model, random_sae(model), corpus, lambda done, total: calls.append((done, total)))
    done = [d for d, _ in calls]
    assert done == sorted(done)
    assert calls[-1] == (2 * corpus.n_tokens, 2 * corpus.n_tokens)


def test_losses_of_some_blocks_are_those_of_a_corpus_of_these_blocks(
    model: Model, random_corpus: Callable[..., Corpus], random_sae: Callable[..., SAE]
) -> None:
    corpus, sae = random_corpus(model, n_blocks=9, block_size=14), random_sae(model)
    calls: list[tuple[int, int]] = []
    some = evaluate(model, sae, corpus, lambda *call: calls.append(call), loss_tokens=3 * 14)
    chosen = [0, 3, 6]  # spread evenly
    few = dataclasses.replace(
        corpus, **{name: getattr(corpus, name)[chosen] for name in ("blocks", "document", "offset")}
    )
    alone, whole = evaluate(model, sae, few), evaluate(model, sae, corpus)
    assert some.n_loss_tokens == alone.n_loss_tokens == (few.blocks[:, :-1] != model.bos).sum()
    assert calls[-1] == (12 * 14, 12 * 14)
    for name in ("clean", "sae", "c", "zero", "clean_bos", "sae_bos", "c_bos", "zero_bos"):  # the mean is of all blocks
        assert_close(some.ce[name], alone.ce[name], rtol=1e-10, atol=0)
    for name in ("loss_recovered", "ce_loss_score"):
        assert_estimate(getattr(some, name), getattr(alone, name), rtol=1e-9, atol=1e-12)
    for name in ("n_tokens", "n_blocks", "l0", "explained_variance", "dead", "density_histogram", "cosine"):
        assert getattr(some, name) == getattr(whole, name)
    assert evaluate(model, sae, corpus, loss_tokens=10**9) == whole
    assert evaluate(model, sae, corpus, loss_tokens=1).n_loss_tokens == (corpus.blocks[0, :-1] != model.bos).sum()


# ----------------------------------------------------------------------------------------------------------- identities
def linear_sae(model: Model, site: Site, W_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> SAE:  # noqa: N803
    return SAE(W_enc, torch.zeros(W_enc.shape[1], dtype=torch.float64), W_dec, b_dec, ReLU(), site, model.spec.name)


def constant_sae(model: Model, site: Site, value: Tensor) -> SAE:
    g = torch.Generator().manual_seed(0)
    W_enc = torch.randn(len(value), 5, generator=g, dtype=torch.float64)  # noqa: N806
    return linear_sae(model, site, W_enc, torch.zeros(5, len(value), dtype=torch.float64), value)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_sae_that_returns_its_input_recovers_everything(model: Model, corpus: Corpus, layer: int) -> None:
    eye = torch.eye(32, dtype=torch.float64)
    both = torch.cat([eye, -eye], 1)
    q = evaluate(model, linear_sae(model, Site("z", layer), both, both.T, torch.zeros_like(eye[0])), corpus)
    for estimate in (q.loss_recovered, q.ce_loss_score, q.loss_recovered_mean_ablation, q.explained_variance):
        assert_estimate(estimate, Estimate(1.0, 1.0, 1.0), rtol=1e-9, atol=1e-9)
    assert_estimate(q.relative_reconstruction_bias, Estimate(1.0, 1.0, 1.0), rtol=1e-9, atol=1e-9)
    assert_close((q.mse, q.cosine, q.l0.value), (0.0, 1.0, 32.0), rtol=1e-9, atol=1e-9)
    assert_close(q.ce["sae"], q.ce["clean"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_sae_that_returns_the_constant_recovers_none_of_the_loss(model: Model, corpus: Corpus, layer: int) -> None:
    c = naive_offset(model, layer)
    assert c.abs().min() > 1e-4
    assert_close(model.value_offset(layer), c, rtol=1e-10, atol=1e-10)
    q = evaluate(model, constant_sae(model, Site("z", layer), c), corpus)
    assert_estimate(q.loss_recovered, Estimate(0.0, 0.0, 0.0), rtol=0, atol=1e-9)
    assert abs(q.ce_loss_score.value) > 1e-3
    assert_close((q.ce["sae"], q.ce["sae_bos"]), (q.ce["c"], q.ce["c_bos"]), rtol=1e-10, atol=0)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_sae_that_returns_zero_has_a_score_of_zero(model: Model, corpus: Corpus, layer: int) -> None:
    q = evaluate(model, constant_sae(model, Site("z", layer), torch.zeros(32, dtype=torch.float64)), corpus)
    assert_estimate(q.ce_loss_score, Estimate(0.0, 0.0, 0.0), rtol=0, atol=1e-9)
    assert_close((q.ce["sae"], q.ce["sae_bos"]), (q.ce["zero"], q.ce["zero_bos"]), rtol=1e-10, atol=0)


def test_an_sae_that_returns_the_mean_recovers_what_the_mean_alone_does(model: Model, corpus: Corpus) -> None:
    site = Site("z", 1)
    x = model.read(torch.from_numpy(corpus.blocks).long(), [site])[site]
    mean = x[torch.from_numpy(corpus.blocks != model.bos)].mean(0)
    q = evaluate(model, constant_sae(model, site, mean), corpus)
    assert_estimate(q.loss_recovered, q.loss_recovered_by_mean, rtol=1e-5, atol=1e-6)
    assert_close(q.explained_variance.value, 0.0, rtol=0, atol=1e-9)


def test_without_value_biases_the_constant_is_zero(
    random_model: Callable[..., Model], random_corpus: Callable[..., Corpus], random_sae: Callable[..., SAE]
) -> None:
    llama = random_model("llama", attention_bias=False)
    q = evaluate(llama, random_sae(llama), random_corpus(llama))
    assert (q.ce["c"], q.ce["c_bos"]) == (q.ce["zero"], q.ce["zero_bos"])


# ------------------------------------------------------------------------------------------------------ what is refused
def test_parts_that_do_not_fit_one_another_are_refused(
    model: Model,
    corpus: Corpus,
    random_model: Callable[..., Model],
    random_sae: Callable[..., SAE],
    random_corpus: Callable[..., Corpus],
) -> None:
    with pytest.raises(SAEError, match="vectors of 48"):
        evaluate(model, random_sae(random_model("llama")), corpus)
    with pytest.raises(ModelError, match="layer 4"):
        evaluate(model, random_sae(model, site=Site("z", 4)), corpus)
    with pytest.raises(CorpusError, match="blocks of 65"):
        evaluate(model, random_sae(model), random_corpus(model, 2, 65))


def test_numbers_that_overflow_are_refused_by_name_and_not_summed(
    corpus: Corpus, random_model: Callable[..., Model], random_sae: Callable[..., SAE]
) -> None:
    half, model = random_model("gpt_neox", dtype=torch.float16), random_model("gpt_neox")
    sae = random_sae(model)
    evaluate(half, sae, corpus)
    half.module.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.mul_(6e4)  # after the site: the activations are finite
    with pytest.raises(ModelError, match=r"NaN or infinity in losses of random gpt_neox, .*float16\n.*ends at 65504"):
        evaluate(half, sae, corpus)
    half.module.gpt_neox.layers[0].mlp.dense_4h_to_h.weight.mul_(6e4)
    with pytest.raises(ModelError, match=r"NaN or infinity in blocks.1.attn.hook_z of random gpt_neox"):
        evaluate(half, sae, corpus)
    for name in ("W_dec", "b_dec"):
        huge = dataclasses.replace(sae, **{name: getattr(sae, name) * 1e38})
        with pytest.raises(SAEError, match=r"reconstructions of blocks.1.attn.hook_z whose squares exceed float32"):
            evaluate(model, huge, corpus)
    model.module.lm_head.weight.mul_(1e38)
    with pytest.raises(ModelError, match=r"(?s)NaN or infinity in losses .*float32.*check its weights"):
        evaluate(model, sae, corpus)


def test_text_that_predicts_nothing_is_refused(
    model: Model, random_sae: Callable[..., SAE], random_corpus: Callable[..., Corpus]
) -> None:
    bos_and_one = random_corpus(model, 4, 2)
    of_bos = dataclasses.replace(bos_and_one, blocks=np.full((4, 2), model.bos, np.int32))
    filled = np.array([[model.bos, 5, model.bos]] * 4, np.int32)
    offset = np.array([[0, 1, PADDING]] * 4, np.int32)
    padded = dataclasses.replace(bos_and_one, blocks=filled, offset=offset, document=np.zeros_like(offset))
    for corpus in (bos_and_one, of_bos, padded):
        with pytest.raises(CorpusError, match=r"(?s)without a text token that predicts another.*raise --block-size"):
            evaluate(model, random_sae(model), corpus)


# ----------------------------------------------------------------------------------------------------------- as a table
def test_the_figures_are_strict_json_and_a_table_beside_the_posts(
    model: Model, corpus: Corpus, random_sae: Callable[..., SAE]
) -> None:
    q = evaluate(model, random_sae(model), corpus).as_dict()
    read = json.loads(json.dumps(q, allow_nan=False))
    rows = {row.name: row for row in quality_rows(read)}
    assert rows["L0"].post == "12"
    assert rows["loss_recovered"].post == "87 %"
    assert rows["dead"].post == "24 %"
    assert rows["loss_recovered"].value.startswith(f"{100 * q['loss_recovered']['value']:.1f} %")
    assert all(row.definition for row in rows.values())


@pytest.mark.parametrize("kind", ["attn_out", "mlp_out", "resid_post"])
def test_the_table_names_the_site_that_is_replaced(
    model: Model, corpus: Corpus, random_sae: Callable[..., SAE], kind: Kind
) -> None:
    q = evaluate(model, random_sae(model, site=Site(kind, 1)), corpus).as_dict()
    rows = {row.name: row.definition for row in quality_rows(q)}
    assert f"{kind} set to c, which is zero" in rows["loss_recovered"]
    assert f"{kind} set to zero" in rows["ce_loss_score"]
    assert f"{kind} set to its mean" in rows["loss_recovered, mean ablation"]
    assert f"{kind} ablated" in rows["CE zero / mean / c"]
    assert " z " not in "".join(definition.replace("sites but z", "") for definition in rows.values())
    assert q["ce"]["c"] == pytest.approx(q["ce"]["zero"], rel=1e-12)
    earlier = {name: value for name, value in q.items() if name != "site"}
    assert "z set to the constant c" in {row.name: row.definition for row in quality_rows(earlier)}["loss_recovered"]


def test_an_sae_that_never_fires_still_gets_its_figures_written(model: Model, corpus: Corpus, tmp_path: Path) -> None:
    q = evaluate(model, constant_sae(model, Site("z", 1), torch.zeros(32, dtype=torch.float64)), corpus)
    json.dumps(q.as_dict(), allow_nan=False)
    quality_rows(q.as_dict())


def test_figures_without_a_number_are_shown_as_such(
    model: Model, corpus: Corpus, random_sae: Callable[..., SAE]
) -> None:
    """As in files of earlier versions, which kept what had overflowed."""

    def emptied(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: emptied(v) for name, v in value.items()}
        return None if isinstance(value, float) else value

    q = evaluate(model, random_sae(model), corpus).as_dict()
    rows = {row.name: row.value for row in quality_rows(emptied(q))}
    assert rows["loss_recovered"] == rows["L0"] == rows["L0 with BOS"] == "-"
    assert rows["CE zero / mean / c"] == "- / - / -"
