"""Every number of every table of an index against loops written out, on random models of three families."""

import copy
import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cases import each
from headscope.errors import IndexFormatError, ModelError
from headscope.index.build import SAERecord, build_index
from headscope.index.config import DEFINITIONS, N_BINS, N_SOURCE_TOKENS, QUANTILES, IndexPlan
from headscope.index.passes import subjects_of
from headscope.index.records import Shares
from headscope.index.store import TABLES, FeatureIndex
from headscope.index.sweep import priority
from headscope.models.hf import Model
from headscope.sae.model import SAE
from headscope.site import Site
from naive_index import (
    activate,
    distinct_top,
    head_sums,
    histogram_bin,
    logit_table,
    naive_index,
    source_rows,
    token_values,
    value_weights,
)

D_SAE = 24
DEAD, ALWAYS, ONCE = 7, 3, 11
CASES = {
    "gpt2": ("gpt2", "relu", torch.float64),
    "gpt_neox": ("gpt_neox", "jumprelu", torch.float64),
    "llama": ("llama", "topk", torch.float64),
    "float32": ("gpt_neox", "relu", torch.float32),
}
THRESHOLDS = (0.0, 0.25, 1.0, 50.0)
PLAN = IndexPlan(
    n_sources=8, thresholds=THRESHOLDS, losses=True, part_tokens=96, top=5, random=6, intervals=4, near_threshold=3
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, an SAE and a corpus, their indexes by number of sources, and what loops find."""

    name: str
    indexes: dict
    naive: object

    @property
    def index(self) -> FeatureIndex:
        return self.indexes[8]

    @property
    def tolerance(self) -> dict:
        """Of numbers kept as float64."""
        return {"rtol": 1e-4, "atol": 1e-5} if self.name == "float32" else {"rtol": 1e-10, "atol": 1e-10}

    @property
    def stored(self) -> dict:
        """Of numbers kept as float32."""
        return {"rtol": 1e-4, "atol": 1e-5} if self.name == "float32" else {"rtol": 1e-6, "atol": 1e-7}


def planned_sae(random_sae, model, activation, corpus):
    """Random, with a dead latent, one that is always active and one that is active once."""
    sae = random_sae(model, D_SAE, activation)
    sae.b_enc[DEAD] = -1e3
    sae.b_enc[ALWAYS] = 20.0
    z = model.read(torch.from_numpy(corpus.blocks.astype(np.int64)), [sae.site])[sae.site]
    pre = sae.pre_activations(z)[..., ONCE][torch.from_numpy(corpus.blocks) != corpus.bos].sort().values
    threshold = sae.activation.threshold[ONCE].item() if activation == "jumprelu" else 0.0
    sae.b_enc[ONCE] -= (pre[-1] + pre[-2]) / 2 - threshold
    return sae


@pytest.fixture(scope="session", params=CASES)
def case(request, random_model, random_corpus, random_sae, tmp_path_factory):
    family, activation, dtype = CASES[request.param]
    model = random_model(family, dtype=dtype)
    corpus = random_corpus(model, n_blocks=22, block_size=16)
    corpus.blocks[corpus.blocks > 70] -= 50  # few enough source tokens that none is given up
    corpus.blocks[20:, 4:9] = corpus.blocks[0, 4:9]  # some text comes again
    sae = planned_sae(random_sae, model, activation, corpus)
    folder = tmp_path_factory.mktemp(request.param)
    indexes = {}
    for k in (8, 2, None):
        out = folder / str(k)
        build_index(
            model,
            [(sae, SAERecord("random", "sha256:0"))],
            corpus,
            out,
            plan=dataclasses.replace(PLAN, n_sources=k),
        )
        indexes[k] = FeatureIndex.open(out)
    return Case(request.param, indexes, naive_index(model, sae, corpus))


in_float64 = pytest.mark.parametrize("case", [name for name in CASES if name != "float32"], indirect=True)


def near(found, expected, tolerance):
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), **tolerance)


# --------------------------------------------------------------------------------------------------------- activations
def test_every_active_pair_is_there_and_no_other(case):
    for j in range(D_SAE):
        own, pairs = case.index.activations(j), case.naive.pairs[j]
        assert own.position.tolist() == [p.position for p in pairs]
        near(own.activation, [p.f for p in pairs], case.stored)
        if pairs:
            np.testing.assert_allclose(own.heads, [p.heads for p in pairs], rtol=1e-4, atol=1e-5)


def test_the_cases_have_what_they_should(case):
    n = [len(pairs) for pairs in case.naive.pairs.values()]
    assert n[DEAD] == 0
    assert n[ALWAYS] == case.naive.n_tokens
    if case.name != "llama":  # of TopK the others are chosen too
        assert n[ONCE] == 1
    assert (case.naive.corpus.blocks[:, 1:] == case.naive.model.bos).any()


def test_the_dictionary_is_one_sae(case):
    """The loops' activation function is the SAE's."""
    sae, z = case.naive.sae, torch.from_numpy(case.naive.z)
    own = np.stack([activate(sae, row) for row in sae.to(torch.float64).pre_activations(z).numpy()])
    near(own, case.naive.dense, {"rtol": 1e-9, "atol": 1e-9})


# ------------------------------------------------------------------------------------------------------------ features
def test_density_moments_and_maximum(case):
    n_tokens = case.naive.n_tokens
    for j in range(D_SAE):
        feature, f = case.index.feature(j), np.array([p.f for p in case.naive.pairs[j]])
        assert feature.n_active == len(f)
        assert feature.density == pytest.approx(len(f) / n_tokens, rel=1e-12)
        assert feature.density_interval[0] <= feature.density <= feature.density_interval[1]
        assert feature.alive == (len(f) > 0)
        if not len(f):
            dead = ("mean", "std", "skew", "kurtosis", "maximum", "quantiles", "histogram", "mass", "copy_rank")
            assert all(getattr(feature, name) is None for name in dead)
            continue
        stored = np.array([p.stored for p in case.naive.pairs[j]])
        centred = stored - stored.mean()
        near([feature.mean, feature.maximum], [f.mean(), f.max()], case.tolerance)
        near(feature.std, stored.std(), case.tolerance)
        if len(f) == 1:
            assert feature.skew is None
            assert feature.kurtosis is None
        else:
            near(feature.skew, (centred**3).mean() / stored.std() ** 3, case.tolerance)
            near(feature.kurtosis, (centred**4).mean() / stored.var() ** 2, case.tolerance)


def test_quantiles_histogram_and_mass(case):
    for j in range(D_SAE):
        feature, pairs = case.index.feature(j), case.naive.pairs[j]
        if not pairs:
            continue
        f = [p.stored for p in pairs]
        near(feature.quantiles, np.quantile(f, QUANTILES), case.stored)
        counts, mass = np.zeros(N_BINS, int), np.zeros(N_BINS)
        for pair in pairs:
            which = histogram_bin(pair.stored, feature.maximum, N_BINS)
            counts[which] += 1
            mass[which] += pair.f
        assert feature.histogram.tolist() == counts.tolist()
        near(feature.mass, mass, case.stored)


def test_the_seven_shares_by_head(case):
    model, sae, naive = case.naive.model, case.naive.sae, case.naive
    n_heads, layer = model.spec.n_heads, sae.site.layer
    w_dec = sae.W_dec.double().numpy().reshape(D_SAE, n_heads, -1)
    w_v, w_o = value_weights(model, layer), model.W_O(layer).double().numpy().reshape(n_heads, -1, model.spec.d_model)
    for j in range(D_SAE):
        shares, pairs = case.index.feature(j).shares, naive.pairs[j]
        norms = {
            "decoder": [np.linalg.norm(w_dec[j, h]) for h in range(n_heads)],
            "decoder_out": [np.linalg.norm(w_dec[j, h] @ w_o[h]) for h in range(n_heads)],
            "encoder": [np.linalg.norm(naive.encoder[h, :, j]) for h in range(n_heads)],
            "encoder_in": [np.linalg.norm(w_v[h] @ naive.encoder[h, :, j]) for h in range(n_heads)],
        }
        for name, norm in norms.items():
            near(getattr(shares, name), np.array(norm) / np.sum(norm), case.stored)
        if not pairs:
            assert shares.dfa is None
            assert shares.participation is None
            continue
        dfa, covariance, mean = head_sums([p.heads for p in pairs], [p.pre for p in pairs])
        near(shares.dfa, dfa, case.tolerance)
        near(shares.dfa_mean, mean, {"rtol": 1e-3, "atol": 1e-3} if case.name == "float32" else case.tolerance)
        if len(pairs) == 1:
            assert shares.dfa_covariance is None
        else:
            loose = {"rtol": 1e-3, "atol": 1e-3} if case.name == "float32" else {"rtol": 1e-7, "atol": 1e-7}
            near(shares.dfa_covariance, covariance, loose)
            assert shares.dfa_covariance.sum() == pytest.approx(1, abs=1e-3 if case.name == "float32" else 1e-9)
        assert shares.top_head == int(np.argmax(dfa))
        assert shares.participation == pytest.approx(1 / sum(dfa**2), rel=1e-4)
        assert shares.disagreement == pytest.approx(
            np.abs(dfa - np.array(norms["decoder"]) / np.sum(norms["decoder"])).sum() / 2, abs=1e-5
        )


def test_bias_and_logit_effects(case):
    table = logit_table(case.naive)
    bias = case.naive.sae.bias.double().numpy() + case.naive.offset.reshape(-1) @ case.naive.sae.W_enc.double().numpy()
    for j in range(D_SAE):
        feature, row = case.index.feature(j), table[j]
        near(feature.bias, bias[j], case.stored)
        order = np.argsort(-row)
        near([v for _, v in feature.logit_top], row[order[:20]], case.tolerance)
        near([v for _, v in feature.logit_bottom], row[order[::-1][:20]], case.tolerance)
        assert [t for t, _ in feature.logit_top] == order[:20].tolist()
        assert [t for t, _ in feature.logit_bottom] == order[::-1][:20].tolist()
        centred = row - row.mean()
        moments = [row.mean(), row.std(), (centred**3).mean() / row.std() ** 3, (centred**4).mean() / row.var() ** 2]
        found = [feature.logit_mean, feature.logit_std, feature.logit_skew, feature.logit_kurtosis]
        near(found, moments, case.tolerance)


def test_the_copying_table_is_that_of_the_values_themselves(case):
    naive, logits = case.naive, logit_table(case.naive)
    values = token_values(naive.model, naive.sae.site.layer)
    for j in range(D_SAE):
        feature = case.index.feature(j)
        if not feature.alive:
            assert feature.copy_top == ()
            continue
        h = feature.shares.top_head
        table = (values[:, h] - naive.offset[h]) @ naive.encoder[h, :, j]
        order = np.argsort(-table)[:10]
        assert [t for t, _ in feature.copy_top] == order.tolist()
        near([v for _, v in feature.copy_top], table[order], case.stored)
        assert feature.copy_rank == (table > table[np.argmax(logits[j])]).mean()


def test_correlated_latents(case):
    dense = case.naive.dense
    with np.errstate(invalid="ignore"):
        r = np.corrcoef(dense.T)
    decoder = case.naive.sae.W_dec.double().numpy()
    for j in range(D_SAE):
        together = [i for i in range(D_SAE) if i != j and (dense[:, i] * dense[:, j]).any()]
        order = sorted(together, key=lambda i: -r[j, i])[:10]
        found = case.index.feature(j).correlated
        assert [c.latent for c in found] == order
        near([c.pearson for c in found], r[j, order], {"rtol": 1e-4, "atol": 1e-5})
        cosines = [decoder[j] @ decoder[i] / np.linalg.norm(decoder[j]) / np.linalg.norm(decoder[i]) for i in order]
        near([c.decoder_cosine for c in found], cosines, {"rtol": 1e-4, "atol": 1e-5})


def test_l0_is_the_mean_number_of_active_latents(case):
    assert case.index.manifest["l0"] == pytest.approx((case.naive.dense > 0).sum(1).mean(), rel=1e-12)
    assert case.index.manifest["l0"] == pytest.approx(sum(case.index.feature(j).density for j in range(D_SAE)))
    assert case.index.manifest["n_alive"] == sum(bool(pairs) for pairs in case.naive.pairs.values())


# ------------------------------------------------------------------------------------------------------------- sources
@each("k", [8, 2, None])
@each("threshold", THRESHOLDS)
def test_source_tokens(case, k, threshold):
    for j in range(D_SAE):
        found = case.indexes[k].sources(j, threshold)
        expected, totals = source_rows(case.naive, j, threshold, k)
        if not totals["n"]:
            assert found is None
            continue
        assert found.threshold == threshold
        assert found.n_active == totals["n"]
        near(
            [found.kept, found.bos_share], [totals["kept"] / totals["d2"], totals["bos"] / totals["d2"]], case.tolerance
        )
        near(found.kept_by_head, totals["kept_heads"] / totals["heads"], case.stored)
        near(found.bos_share_by_head, totals["bos_heads"] / totals["heads"], case.stored)
        if k is None:
            assert found.kept == pytest.approx(1, abs=1e-12)
        assert [t.share for t in found.tokens] == sorted((t.share for t in found.tokens), reverse=True)
        largest = sorted(expected, key=lambda t: -expected[t]["share"])[:N_SOURCE_TOKENS]
        assert {t.token for t in found.tokens} == set(largest)
        for row in found.tokens:
            _check_source(row, expected[row.token], case.stored)


def _check_source(row, expected, tolerance):
    assert row.n == expected["n"]
    for name in ("share", "share_linear", "frequency", "share_by_head", "attention"):
        loose = {"rtol": 1e-3, "atol": 1e-4} if name == "share_linear" and tolerance["rtol"] > 1e-5 else tolerance
        near(getattr(row, name), expected[name], loose)
    if expected["attention_elsewhere"] is not None:
        near(row.attention_elsewhere, expected["attention_elsewhere"], {"rtol": 1e-4, "atol": 1e-6})


# ------------------------------------------------------------------------------------------------------------ examples
def test_every_example(case):
    for k, index in case.indexes.items():
        for j in range(0, D_SAE, 1 if k == 8 else 5):
            pairs = {p.position: p for p in case.naive.pairs[j]}
            for example in {e.position: e for g in index.examples(j) for e in g.examples}.values():
                _check_example(case, example, pairs, k or 8, index.feature(j).bias)


def _check_example(case, example, pairs, k, bias):
    size, pair = case.naive.corpus.block_size, pairs[example.position]
    exact = case.stored
    near([example.activation, example.pre, example.bias], [pair.f, pair.pre, bias], exact)
    assert abs(example.residual) < (1e-4 if case.name == "float32" else 1e-10)
    assert example.pre == pytest.approx(example.heads.sum() + example.bias + example.residual, abs=1e-4)
    near(example.heads, pair.heads, exact)
    kept = pair.kept(k)
    assert [s.position for s in example.sources] == kept
    for source in example.sources:
        near(source.heads, pair.dfa[:, source.position], exact)
        near(source.pattern, pair.pattern[:, source.position], {"rtol": 1e-4, "atol": 1e-6})
    others = [s for s in range(len(pair.tokens)) if s not in kept]
    near(example.rest, pair.dfa[:, others].sum(1), {"rtol": 1e-4, "atol": 2e-6 * (1 + np.abs(pair.heads).max())})
    near(example.rest_pattern, pair.pattern[:, others].sum(1), {"rtol": 1e-3, "atol": 1e-4})
    block = example.position // size
    there = {p % size: q.stored for p, q in pairs.items() if p // size == block}
    assert example.active_at.tolist() == sorted(there)
    near(example.active_value, [there[at] for at in sorted(there)], exact)


def test_groups_are_what_they_say(case):
    for j in range(D_SAE):
        groups, pairs = case.index.examples(j), case.naive.pairs[j]
        assert bool(groups) == bool(pairs)
        f = {p.position: p.stored for p in pairs}
        maximum, total = max(f.values(), default=0), sum(f.values())
        expected = _naive_groups(case, j, f, maximum) if pairs else []
        assert [(g.kind, g.number) for g in groups] == [(kind, number) for kind, number, *_ in expected]
        for group, (_, _, members, shown, duplicates, bounds) in zip(groups, expected, strict=True):
            assert [e.position for e in group.examples] == shown
            assert [e.duplicates for e in group.examples] == duplicates
            assert group.n == len(members)
            near([group.low, group.high], bounds, case.stored)
            assert group.share_active == pytest.approx(len(members) / len(f))
            near(group.share_mass, sum(f[p] for p in members) / total, case.stored)
        for kind in ("quantile", "interval", "random"):
            own = [g for g in groups if g.kind == kind]
            assert sum(g.share_active for g in own) == pytest.approx(1 if own else 0)
            assert sum(g.share_mass for g in own) == pytest.approx(1 if own else 0, rel=1e-5)


def _naive_groups(case, latent, f, maximum):
    """(kind, number, members, shown, duplicates of each, (low, high)) in the order of a card."""
    plan = PLAN

    def strongest_first(positions):
        return sorted(positions, key=lambda p: (-f[p], p))

    def drawn(positions, n):
        rank = dict(zip(positions, priority(np.array(positions)).tolist(), strict=True))
        return strongest_first(sorted(positions, key=lambda p: rank[p])[:n])

    def plain(kind, number, members, n, bounds=None):
        shown = drawn(members, n)
        bounds = bounds or (min(f[p] for p in members), max(f[p] for p in members))
        return kind, number, members, shown, [0] * len(shown), bounds

    everything = strongest_first(f)
    top = distinct_top(case.naive, latent, plan.top)
    shown = [p for p, _ in top]
    found = [("top", 0, shown, shown, [n for _, n in top], (min(f[p] for p in shown), max(f[p] for p in shown)))]
    found.append(plain("random", 0, everything, plan.random))
    for number, indices in enumerate(np.array_split(np.arange(len(everything)), plan.quantiles)):
        if len(indices):
            found.append(plain("quantile", number, [everything[i] for i in indices], plan.per_quantile))
    width = maximum / plan.intervals
    for number in reversed(range(plan.intervals)):
        members = [p for p in everything if histogram_bin(f[p], maximum, plan.intervals) == number]
        if members:
            bounds = (number * width, (number + 1) * width)
            found.append(plain("interval", number, members, plan.per_interval, bounds))
    weakest = everything[-plan.near_threshold :]
    found.append(("threshold", 0, weakest, weakest, [0] * len(weakest), (f[weakest[-1]], f[weakest[0]])))
    return found


# -------------------------------------------------------------------------------------------------------------- corpus
def test_tokens_next_tokens_and_losses(case):
    corpus = case.naive.corpus
    table = case.index.sql("SELECT * FROM tokens").to_pydict()
    shape = corpus.blocks.shape
    assert np.array_equal(np.reshape(table["token"], shape), corpus.blocks)
    assert np.array_equal(np.reshape(table["document"], shape), corpus.document)
    assert np.array_equal(np.reshape(table["offset"], shape), corpus.offset)
    after, loss = (np.array(table[name], dtype=float).reshape(shape) for name in ("next_token", "loss"))
    assert np.array_equal(after[:, :-1], corpus.blocks[:, 1:])
    assert np.isnan(after[:, -1]).all()
    near(loss[:, :-1], case.naive.losses[:, :-1], case.stored)
    assert np.isnan(loss[:, -1]).all()
    assert case.index.documents == list(corpus.documents)
    for block in (0, 13, 21):
        assert case.index.tokens_of(block).tolist() == corpus.blocks[block].tolist()
        assert case.index.documents_of(block).tolist() == corpus.document[block].tolist()


def test_bos_is_in_no_statistic(case):
    positions = case.index.sql("SELECT DISTINCT position FROM activations")["position"].to_numpy()
    assert (case.naive.corpus.blocks.reshape(-1)[positions] != case.naive.corpus.bos).all()
    assert not case.index.sql("SELECT * FROM sources WHERE token = ?", [case.naive.corpus.bos]).num_rows


# --------------------------------------------------------------------------------------------------------------- nulls
def test_null_directions_are_what_they_say(case):
    naive = case.naive
    subject = subjects_of(naive.model, [naive.sae], naive.corpus)[0]
    nulls, found = subject.nulls, case.index.nulls()
    live = {j for j, pairs in naive.pairs.items() if pairs}
    assert {n.latent for n in found if n.kind == "random"} == live
    assert {n.latent for n in found if n.kind == "permuted"} == live
    drawn = {(k, j): i for i, (k, j) in enumerate(zip(nulls.kind.tolist(), nulls.latent.tolist(), strict=True))}
    n_heads = naive.model.spec.n_heads
    z = naive.z.reshape(len(naive.z), n_heads, -1) - naive.offset
    for null in found:
        i = drawn[("random", "permuted").index(null.kind), null.latent]
        direction = nulls.directions[i].double().numpy()
        p = np.einsum("nhe,he->n", z, direction)
        threshold = nulls.threshold[i].item()
        active = p > threshold
        # the same words after a BOS have the same z: a threshold among them is on either side of each by rounding
        assert (p > threshold + 1e-6).sum() <= null.n_active <= (p > threshold - 1e-6).sum()
        if null.n_active != active.sum():
            continue
        n, ranked = min(len(naive.pairs[null.latent]), len(z) - 1), -np.sort(-p)
        assert null.n_active == n or ranked[n - 1] - ranked[n] < 1e-6  # the same words after a BOS have the same z
        heads = np.einsum("nhe,he->nh", z, direction)[active]
        share, covariance, _ = head_sums(list(heads), p[active].tolist())
        near(null.dfa, share, case.stored)
        assert (null.dfa_covariance is None) == (null.n_active == 1)  # what is active once varies with nothing
        near(
            null.dfa_covariance if null.n_active > 1 else covariance,
            covariance,
            {"rtol": 1e-3, "atol": 1e-3} if case.name == "float32" else case.stored,
        )
        if null.kind == "permuted":
            own = naive.encoder[:, :, null.latent]
            shifts = [s for s in range(n_heads) if np.allclose(np.roll(own, -s, axis=0), direction)]
            assert len(shifts) == 1
            assert shifts[0] != 0
            near(np.sort(np.linalg.norm(direction, axis=1)), np.sort(np.linalg.norm(own, axis=1)), case.stored)


# ------------------------------------------------------------------------------------------------------------ manifest
def test_what_the_manifest_says(case):
    manifest, corpus, model = case.index.manifest, case.naive.corpus, case.naive.model
    assert manifest["corpus"]["n_tokens"] == int((corpus.blocks != corpus.bos).sum()) == case.naive.n_tokens
    assert manifest["corpus"]["n_blocks"] == len(corpus.blocks)
    assert manifest["model"]["hash"] == model.fingerprint()
    assert manifest["definitions"] == DEFINITIONS
    assert manifest["thresholds"] == list(THRESHOLDS)
    assert manifest["site"] == Site("z", 1).hook_name
    assert manifest["n_pairs"] == sum(len(p) for p in case.naive.pairs.values())
    case.index.verify()


def test_the_files_read_without_headscope(case):
    table = pq.read_table(case.index.folder / "features.parquet").to_pydict()
    assert table["n_active"] == [len(case.naive.pairs[j]) for j in range(D_SAE)]


# --------------------------------------------------------------------------------------------------------- invariances
def build(model, saes, corpus, folder, plan=PLAN, **options):
    """Build with SAEs by name, and open."""
    records = [(sae, SAERecord(name, f"sha256:{name}")) for name, sae in saes.items()]
    return [FeatureIndex.open(path) for path in build_index(model, records, corpus, folder, plan=plan, **options)]


def same(found: FeatureIndex, expected: FeatureIndex, rtol=1e-9, atol=1e-9) -> None:
    """All tables agree: rows and whole numbers exactly, the rest within rounding."""
    for name in ("activations", *TABLES):
        own, other = (index.sql(f"SELECT * FROM {name}") for index in (found, expected))
        assert own.schema == other.schema
        assert len(own) == len(other), name
        for column in own.column_names:
            same_column(f"{name}.{column}", own[column], other[column], rtol, atol)


def same_column(name, own, other, rtol, atol):
    own, other = own.combine_chunks(), other.combine_chunks()
    assert own.is_null().equals(other.is_null()), name
    if pa.types.is_list(own.type):
        assert own.value_lengths().equals(other.value_lengths()), name
        own, other = own.flatten(), other.flatten()
    if pa.types.is_floating(own.type):
        single = own.type == pa.float32()
        near(
            own.to_numpy(False),
            other.to_numpy(False),
            {"rtol": 2e-4 if single else rtol, "atol": 2e-6 if single else atol},
        )
    else:
        assert own.equals(other), name


@in_float64  # rounding depends on it
def test_the_index_does_not_depend_on_how_the_work_was_cut(case, tmp_path, monkeypatch):
    naive = case.naive
    monkeypatch.setattr("headscope.index.passes.BATCH_TOKENS", 40)
    monkeypatch.setattr("headscope.index.passes._ROWS", 7)
    monkeypatch.setattr("headscope.index.passes._PAIRS", 3)
    monkeypatch.setattr("headscope.index.sources._COMPACT_ROWS", 50)
    monkeypatch.setattr("headscope.index.correlations._TILE_BYTES", 8 * D_SAE * 5)
    monkeypatch.setattr("headscope.index.vocabulary._ROWS", 2)
    monkeypatch.setattr("headscope.index.vocabulary.PART_TOKENS", 40)
    monkeypatch.setattr("headscope.index.writing._ROW_GROUP", 64)
    monkeypatch.setattr("headscope.index.writing._TOKEN_ROW_GROUP", 40)
    monkeypatch.setattr("headscope.index.tables.SMALL_ROW_GROUP", 5)
    monkeypatch.setattr("headscope.index.writing._FILE_ROWS", 500)
    n_largest = max(len(pairs) for pairs in naive.pairs.values())
    plan = dataclasses.replace(PLAN, part_tokens=16, range_rows=n_largest)
    again = build(naive.model, {"random": naive.sae}, naive.corpus, tmp_path / "again", plan)[0]
    assert len(list((again.folder / "activations").iterdir())) > 1
    same(again, case.index)


def test_building_twice_gives_the_same_bytes(case, tmp_path):
    again = build(case.naive.model, {"random": case.naive.sae}, case.naive.corpus, tmp_path / "again")[0]
    own, other = again.manifest["files"], case.index.manifest["files"]
    assert own == other


def test_what_people_said_outlives_an_index_built_anew(case, tmp_path):
    out = tmp_path / "index"
    build(case.naive.model, {"random": case.naive.sae}, case.naive.corpus, out)
    (out / "labels.jsonl").write_text("said\n")
    record = SAERecord("random", "sha256:0")
    build_index(case.naive.model, [(case.naive.sae, record)], case.naive.corpus, out, overwrite=True, plan=PLAN)
    assert (out / "labels.jsonl").read_text() == "said\n"


def test_several_saes_in_one_pass_are_each_alone(random_model, random_corpus, random_sae, tmp_path):
    model = random_model("gpt2", dtype=torch.float64)
    corpus = random_corpus(model, n_blocks=9, block_size=12)
    saes = {
        "first": random_sae(model, 10, "relu", site=Site("z", 0)),
        "second": random_sae(model, 12, "topk", seed=1),
        "third": random_sae(model, 7, "jumprelu", seed=2),
    }
    plan = dataclasses.replace(PLAN, part_tokens=30)
    together = build(model, saes, corpus, tmp_path / "together", plan)
    assert [index.folder.name for index in together] == list(saes)
    with pytest.raises(IndexFormatError, match="first, second, third"):
        FeatureIndex.open(tmp_path / "together")
    for index, (name, sae) in zip(together, saes.items(), strict=True):
        alone = build(model, {name: sae}, corpus, tmp_path / name, plan)[0]
        same(index, alone)  # within rounding: alone, the layers before are computed by SDPA


def test_an_sae_is_read_in_the_precision_of_its_model(random_model, random_corpus, random_sae, tmp_path):
    model = random_model("gpt2", dtype=torch.float64)
    corpus = random_corpus(model, n_blocks=9, block_size=12)
    narrow = random_sae(model, 10, "relu").to(torch.float32)
    found, expected = (
        build(model, {name: sae}, corpus, tmp_path / name)[0]
        for name, sae in (("narrow", narrow), ("wide", narrow.to(torch.float64)))
    )
    same(found, expected)


def test_a_model_too_coarse_for_sums_to_close_is_refused(random_model, random_corpus, random_sae, tmp_path):
    model = random_model("gpt2", dtype=torch.bfloat16)
    corpus = random_corpus(model, n_blocks=9, block_size=12)
    with pytest.raises(ModelError, match=r"bfloat16\n  expected: float32 or float64"):
        build(model, {"any": random_sae(model, 10, "relu")}, corpus, tmp_path / "index")


# ---------------------------------------------------------------------------------------------------------- symmetries
def changed_heads(model: Model, sae: SAE, layer: int, change) -> tuple[Model, SAE]:
    """A GPT-2 model and its SAE with the basis of each head's z changed: `change` [head, d_head, head, d_head]."""
    width = model.spec.n_heads * model.spec.d_head
    matrix = torch.as_tensor(change, dtype=torch.float64).reshape(width, width)
    inverse = torch.linalg.inv(matrix)
    other = Model(copy.deepcopy(model.module), model.tokenizer, model.bos, "changed")
    attention = other.module.transformer.h[layer].attn
    values = slice(2 * width, 3 * width)
    attention.c_attn.weight.data[:, values] @= matrix
    attention.c_attn.bias.data[values] @= matrix
    attention.c_proj.weight.data.copy_(inverse @ attention.c_proj.weight.data)
    return other, dataclasses.replace(
        sae, W_enc=inverse @ sae.W_enc, W_dec=sae.W_dec @ matrix, b_dec=sae.b_dec @ matrix
    )


def block_diagonal(blocks) -> np.ndarray:
    n, d = len(blocks), len(blocks[0])
    change = np.zeros((n, d, n, d))
    for h, block in enumerate(blocks):
        change[h, :, h] = block
    return change


@pytest.fixture(scope="module")
def plain(random_model, random_corpus, random_sae, tmp_path_factory):
    """A GPT-2 model, its SAE, a corpus and the index."""
    model = random_model("gpt2", dtype=torch.float64)
    sae, corpus = random_sae(model, 12), random_corpus(model, n_blocks=8, block_size=12)
    return model, sae, corpus, build(model, {"s": sae}, corpus, tmp_path_factory.mktemp("plain") / "index")[0]


SHARES = [f.name for f in dataclasses.fields(Shares)]


def test_exchanging_heads_exchanges_their_shares(plain, tmp_path):
    model, sae, corpus, index = plain
    order, d_head, d = [2, 0, 3, 1], model.spec.d_head, model.spec.d_model
    other = Model(copy.deepcopy(model.module), model.tokenizer, model.bos, "exchanged")
    attention = other.module.transformer.h[1].attn

    def moved(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(0, (-1, 4, d_head))[:, order].flatten(0, 2)

    attention.c_attn.weight.data.copy_(moved(attention.c_attn.weight.data.T).T)
    attention.c_attn.bias.data.copy_(moved(attention.c_attn.bias.data))
    attention.c_proj.weight.data.copy_(moved(attention.c_proj.weight.data))
    assert attention.c_proj.weight.shape == (d, d)
    exchanged = dataclasses.replace(
        sae, W_enc=moved(sae.W_enc), W_dec=moved(sae.W_dec.T).T.contiguous(), b_dec=moved(sae.b_dec)
    )
    again = build(other, {"s": exchanged}, corpus, tmp_path / "index")[0]
    for j in range(sae.d_sae):
        own, before = again.feature(j), index.feature(j)
        assert own.n_active == before.n_active
        for name in SHARES if own.alive else SHARES[:4]:
            near(getattr(own.shares, name), getattr(before.shares, name)[order], {"rtol": 1e-6, "atol": 1e-7})
        near(again.activations(j).heads, index.activations(j).heads[:, order], {"rtol": 1e-4, "atol": 1e-5})
        if not own.alive:
            continue
        tokens = {t.token: t for t in index.sources(j).tokens}
        for token in again.sources(j).tokens:
            near(token.share, tokens[token.token].share, {"rtol": 1e-9, "atol": 1e-12})
            near(token.share_by_head, tokens[token.token].share_by_head[order], {"rtol": 1e-5, "atol": 1e-6})


def test_a_rotation_of_a_heads_basis_changes_nothing(plain, tmp_path):
    model, sae, corpus, index = plain
    rng = np.random.default_rng(0)
    rotations = [np.linalg.qr(rng.normal(size=(8, 8)))[0] for _ in range(4)]
    other, turned = changed_heads(model, sae, 1, block_diagonal(rotations))
    again = build(other, {"s": turned}, corpus, tmp_path / "index")[0]
    for name in ("features", "sources", "source_totals", "activations", "groups", "examples"):
        own, before = again.sql(f"SELECT * FROM {name}"), index.sql(f"SELECT * FROM {name}")
        for column in own.column_names:
            same_column(f"{name}.{column}", own[column], before[column], 1e-8, 1e-8)


def test_a_scale_of_a_heads_basis_changes_the_shares_that_say_so_and_no_other(plain, tmp_path):
    model, sae, corpus, index = plain
    other, scaled = changed_heads(model, sae, 1, block_diagonal([np.eye(8) * s for s in (5.0, 1.0, 1.0, 0.5)]))
    again = build(other, {"s": scaled}, corpus, tmp_path / "index")[0]
    live = [j for j in range(sae.d_sae) if index.feature(j).alive]
    assert len(live) > 5
    for name in SHARES:
        own, before = (np.array([getattr(i.feature(j).shares, name) for j in live]) for i in (again, index))
        if name in ("decoder", "encoder"):
            assert np.abs(own - before).max(1).min() > 0.05
        else:
            near(own, before, {"rtol": 1e-6, "atol": 1e-7})
    assert again.sql("SELECT latent, position FROM activations") == index.sql(
        "SELECT latent, position FROM activations"
    )


def test_what_comes_later_changes_nothing_before(plain, tmp_path):
    model, sae, corpus, index = plain
    at, size = 7, corpus.block_size
    blocks = corpus.blocks.copy()
    rng = np.random.default_rng(5)
    blocks[:, at:] = rng.integers(1, model.spec.d_vocab, blocks[:, at:].shape)
    again = build(model, {"s": sae}, dataclasses.replace(corpus, blocks=blocks), tmp_path / "index")[0]
    query = "SELECT * FROM activations WHERE position % ? < ?"
    own, before = (i.sql(query, [size, at]) for i in (again, index))
    assert len(before) > 50
    for column in before.column_names:
        same_column(column, own[column], before[column], 1e-9, 1e-9)
    after = "SELECT activation FROM activations WHERE position % ? >= ?"
    assert again.sql(after, [size, at]) != index.sql(after, [size, at])


@in_float64
def test_latents_with_more_rows_than_are_held_at_a_time(case, tmp_path):
    """Quantiles and groups come from an even sample of them; what is counted is counted over all."""
    plan, naive = dataclasses.replace(PLAN, range_rows=60), case.naive
    again = build(naive.model, {"random": naive.sae}, naive.corpus, tmp_path / "again", plan)[0]
    large = [j for j, pairs in naive.pairs.items() if len(pairs) > 60]
    assert ALWAYS in large
    for j, pairs in naive.pairs.items():
        own, exact = again.feature(j), case.index.feature(j)
        assert own.n_active == exact.n_active
        for name in ("histogram", "mass", "mean", "std", "skew", "kurtosis", "maximum"):
            a, b = getattr(own, name), getattr(exact, name)
            assert (a is None) == (b is None)
            if a is not None:
                near(a, b, {"rtol": 1e-9, "atol": 1e-9})
        sampled = ("random", "quantile", "interval")  # what ends show is found among all
        assert all(g.sampled == (j in large and g.kind in sampled) for g in again.examples(j))
        if j not in large:
            shown = [[[e.position for e in g.examples] for g in i.examples(j)] for i in (again, case.index)]
            assert shown[0] == shown[1]
            near(own.quantiles if pairs else [], exact.quantiles if pairs else [], case.stored)
            continue
        assert [e.position for e in again.examples(j)[0].examples] == [
            e.position for e in case.index.examples(j)[0].examples
        ]
        drawn = priority(np.array([p.position for p in pairs])) < 60 / len(pairs)
        sample = {p.position: p.stored for p, chosen in zip(pairs, drawn, strict=True) if chosen}
        near(own.quantiles, np.quantile(list(sample.values()), QUANTILES), case.stored)
        *drawn_from, weakest = again.examples(j)[1:]
        assert [e.position for e in weakest.examples] == [e.position for e in case.index.examples(j)[-1].examples]
        for group in drawn_from:
            assert {e.position for e in group.examples} <= set(sample)
        quantiles = [g for g in again.examples(j) if g.kind == "quantile"]
        assert sum(g.share_active for g in quantiles) == pytest.approx(1, abs=len(quantiles) / len(pairs))
