"""Ablations by rows are those of edited runs, one at a time; paths, shares, samples and what is not there."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from headscope.errors import HeadscopeError, IndexFormatError
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.interventions import add, at, pin, reconstruction, replace
from headscope.site import Site
from headscope.studies.what import ablation, paths
from headscope.studies.what.ablation import downstream

FAMILIES = {
    "gpt_neox": ("gpt_neox", {}),
    "parallel": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt2": ("gpt2", {}),
}
LATENTS = [0, 3, 17]
DEAD = 7
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def made(random_model, random_corpus, random_sae, folder, family, layer, activation="relu"):
    name, changes = FAMILIES[family]
    model = random_model(name, dtype=torch.float64, n_layers=3, **changes)
    sae = random_sae(model, 20, activation, site=Site("z", layer))
    sae.b_enc[DEAD] = -1e4
    corpus = random_corpus(model, 8, 16)
    build_index(model, [(sae, SAERecord("random", "sha256:0"))], corpus, folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae), corpus


@pytest.fixture(scope="module", params=[f"{family} {layer}" for family in FAMILIES for layer in (0, 2)])
def case(request, random_model, random_corpus, random_sae, tmp_path_factory):
    family, layer = request.param.split()
    folder = tmp_path_factory.mktemp("downstream") / "index"
    return made(random_model, random_corpus, random_sae, folder, family, int(layer))


@pytest.fixture(scope="module")
def last(random_model, random_corpus, random_sae, tmp_path_factory):
    return made(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("last") / "i", "gpt_neox", 2, "topk")


def counted(corpus, position):
    """Whether a position is text and the next one too, in the same block."""
    block, query = divmod(position, corpus.block_size)
    row = corpus.offset[block]
    return query + 1 < len(row) and row[query] > 0 and row[query + 1] > 0


def busiest(live):
    """The latent with the most active tokens."""
    return int(live.index.table()["n_active"].to_numpy().argmax())


def active(live, corpus, latent):
    return [p for p in live.index.activations(latent).position.tolist() if counted(corpus, p)]


def naive(live, corpus, latent, position, *, baseline="error kept", where="one", norms="recomputed", path="total"):
    """Loss changes of the position's whole block by one edited run, everything else in the run as it says."""
    model, sae, layer = live.model, live.sae, live.sae.site.layer
    block, query = divmod(position, corpus.block_size)
    tokens = torch.from_numpy(corpus.blocks[block : block + 1].astype(np.int64))
    text = torch.from_numpy(corpus.offset[block : block + 1] > 0)
    places = text if where == "everywhere" else query
    z = model.read(tokens, [sae.site])[sae.site]
    kept = {} if baseline == "error kept" else {sae.site: reconstruction(sae)}
    f = sae.encode(z)[..., latent] * text
    if where == "one":
        f = f * (torch.arange(corpus.block_size) == query)
    if baseline == "reconstruction":
        places = f > 0
    write = -f[..., None] * (sae.W_dec[latent] @ model.W_O(layer))
    with model.edit(kept):
        clean = model.losses(tokens)
        sites = [Site("resid_post", m) for m in range(3)]
        for m in range(3):
            sites += [
                Site(kind, m) for kind in ("attn_out", "mlp_out", "mlp_in", "resid_pre", "ln1_scale", "ln2_scale")
            ]
        found = model.read(tokens, [*sites, Site("ln_final_scale", 2)])
    later = [s for s in found if s.kind.startswith("ln") and s.depth > sae.site.depth]
    held = {site: replace(found[site]) for site in later} if norms == "frozen" else {}
    if path == "total":
        ablated = at(reconstruction(sae, pin(latent), with_error=baseline == "error kept"), positions=places)
        whole = {} if baseline == "error kept" else {sae.site: lambda _value: torch.where(f[..., None] > 0, z, sae(z))}
        with model.edit(held), model.edit(whole), model.edit({sae.site: ablated}):
            return (model.losses(tokens) - clean)[0]
    added = write
    if path != "direct":
        kind, m = path.split(".")
        place = Site("mlp_in" if kind == "mlp" else "resid_pre", int(m))
        out = Site(f"{kind}_out", int(m))
        own = {s: e for s, e in held.items() if s == Site("ln2_scale" if kind == "mlp" else "ln1_scale", int(m))}
        with model.edit(kept), model.edit({place: add(write)} | own):
            added = model.read(tokens, [out])[out] - found[out]
    final = Site("ln_final_scale", 2)
    own = {s: e for s, e in held.items() if s == final}
    with model.edit(kept), model.edit({Site("resid_post", 2): add(added)} | own):
        return (model.losses(tokens) - clean)[0]


@pytest.mark.parametrize("norms", ["recomputed", "frozen"])
@pytest.mark.parametrize("baseline", ["error kept", "reconstruction"])
def test_each_path_at_one_token_is_an_edited_run(case, baseline, norms):
    live, corpus = case
    records = downstream(live, LATENTS, baseline=baseline, where="one", norms=norms)
    moved = 0.0
    for latent, record in zip(LATENTS, records, strict=True):
        assert record.position.tolist() == active(live, corpus, latent)
        assert tuple(record.paths) == paths.path_names(live.model.spec, live.sae.site.layer)
        for i in range(latent % 5, record.n, 12):
            position = int(record.position[i])
            query = position % corpus.block_size
            for name, effect in record.paths.items():
                kw = {"baseline": baseline, "norms": norms, "path": name}
                change = naive(live, corpus, latent, position, **kw).numpy()
                assert_allclose(effect.change[i], change[query], **EXACT)
                assert_allclose(change[:query], 0, atol=1e-12)
                if effect.later is not None:
                    assert_allclose(effect.later[i], change[query + 1 :].sum(), **EXACT)
                moved = max(moved, abs(change[query]))
    assert moved > 0.05


@pytest.mark.parametrize("norms", ["recomputed", "frozen"])
@pytest.mark.parametrize("baseline", ["error kept", "reconstruction"])
def test_each_path_everywhere_is_an_edited_run(case, baseline, norms):
    live, corpus = case
    latent = 3
    [record] = downstream(live, [latent], baseline=baseline, norms=norms)
    last_layer = live.sae.site.layer == 2
    blocks = {p // corpus.block_size for p in active(live, corpus, latent)}
    expected = active(live, corpus, latent)
    if not last_layer:
        expected = [p for p in range(corpus.n_tokens) if p // corpus.block_size in blocks and counted(corpus, p)]
    assert record.position.tolist() == expected
    for name, effect in record.paths.items():
        kw = {"baseline": baseline, "norms": norms, "path": name, "where": "everywhere"}
        changes = {b: naive(live, corpus, latent, b * corpus.block_size, **kw).numpy() for b in blocks}
        of = [changes[p // corpus.block_size][p % corpus.block_size] for p in expected]
        assert_allclose(effect.change, of, **EXACT)
        assert effect.later is None


def test_in_the_last_layer_one_token_or_all_is_the_same(last):
    live, _ = last
    one, everywhere = (downstream(live, range(20), where=where) for where in ("one", "everywhere"))
    for a, b in zip(one, everywhere, strict=True):
        for name in a.paths:
            np.testing.assert_array_equal(a.paths[name].change, b.paths[name].change)
    assert sum(record.n for record in one) > 200


def test_total_is_the_other_paths_and_the_interaction(case):
    [record] = downstream(case[0], [3], where="one")
    parts = sum(effect.change for name, effect in record.paths.items() if name != "total")
    assert_allclose(record.paths["total"].change, parts + record.interaction, **EXACT)
    assert np.abs(record.interaction).max() > 1e-4 or case[0].model.spec.parallel


def test_parallel_blocks_have_no_path_through_their_own_mlp(random_model, random_corpus, random_sae, tmp_path):
    live, _ = made(random_model, random_corpus, random_sae, tmp_path / "i", "parallel", 2)
    [record] = downstream(live, [3])
    assert tuple(record.paths) == ("total", "direct")
    assert any("no path" in note for note in record.notes)
    assert_allclose(record.interaction, 0, atol=1e-12)


def test_any_batch_and_any_company_give_the_same(case, monkeypatch):
    live, _ = case
    for where in ("one", "everywhere"):
        together = downstream(live, LATENTS, where=where)
        for batch, rerun, rows in ((16, 48, 7), (1 << 20, 1 << 20, 1)):
            monkeypatch.setattr(ablation, "_BATCH_TOKENS", batch)
            monkeypatch.setattr(ablation, "_RERUN_TOKENS", rerun)
            monkeypatch.setattr(paths, "_ROWS", rows)
            alone = [downstream(live, [latent], where=where)[0] for latent in reversed(LATENTS)]
            for a, b in zip(together, reversed(alone), strict=True):
                np.testing.assert_array_equal(a.position, b.position)
                for name in a.paths:
                    assert_allclose(a.paths[name].change, b.paths[name].change, rtol=1e-12, atol=1e-12)
                    null, other = a.paths[name].mean.null, b.paths[name].mean.null
                    assert (null is None) == (other is None) == (a.n == 0)
                    if null is not None:
                        ours, theirs = ([e.value, e.low, e.high] for e in (null, other))
                        assert_allclose(ours, theirs, **EXACT)
        monkeypatch.undo()


def test_a_sample_is_part_of_the_whole(case):
    live, _ = case
    for where in ("one", "everywhere"):
        [whole] = downstream(live, [3], where=where)
        [part] = downstream(live, [3], where=where, max_tokens=9)
        assert 9 <= part.n < whole.n
        assert part.n_active == whole.n_active
        at_ = np.searchsorted(whole.position, part.position)
        assert_allclose(part.paths["total"].change, whole.paths["total"].change[at_], rtol=1e-12, atol=1e-12)
        assert (part.activation > 0).sum() >= 9
        [other] = downstream(live, [3], where=where, max_tokens=9, seed=1)
        assert not np.array_equal(part.position, other.position)


def test_a_dead_feature_has_an_empty_record(case):
    live, _ = case
    dead, alive = downstream(live, [DEAD, 3])
    assert (dead.n, dead.n_active) == (0, 0)
    assert alive.n > 0
    for effect in dead.paths.values():
        assert (len(effect.change), effect.mean.value, effect.mean.null) == (0, None, None)
        assert "at least 30" in effect.mean.missing
    share = dead.share("total", dead.next_is(5))
    assert (share.positive.value, share.positive.n) == (None, 0)
    assert len(dead.worst()) == 0
    dead.histogram()
    assert downstream(live, []) == ()


@pytest.mark.usefixtures("no_type_checks")
def test_what_is_not_there_is_named(last):
    live, _ = last
    with pytest.raises(IndexFormatError, match="latent 20"):
        downstream(live, [20])
    for wrong in ({"baseline": "none"}, {"where": "here"}, {"norms": "none"}):
        with pytest.raises(HeadscopeError, match="expected: one of"):
            downstream(live, [0], **wrong)
    [record] = downstream(live, [busiest(live)])
    with pytest.raises(HeadscopeError, match=r"total, direct, mlp\.2"):
        record.share("attn.9", record.next_is(3))
    with pytest.raises(HeadscopeError, match="mask of 3"):
        record.holds(np.zeros(3, bool))


def test_shares_are_sums_over_sums(last):
    live, corpus = last
    [record] = downstream(live, [busiest(live)])
    chosen = record.next_is(list(range(30)))
    flat = corpus.blocks.reshape(-1)
    np.testing.assert_array_equal(chosen, flat[record.position + 1] < 30)
    mask = np.zeros(corpus.n_tokens, bool)
    mask[record.position[chosen]] = True
    np.testing.assert_array_equal(record.holds(mask), chosen)
    for path in record.paths:
        change = record.paths[path].change
        share = record.share(path, chosen)
        assert_allclose(share.positive.value, change[chosen].clip(min=0).sum() / change.clip(min=0).sum())
        assert_allclose(share.net.value, change[chosen].sum() / change.sum())
        assert_allclose(share.positive.null.value, chosen.mean())
        assert share.positive.n == record.n
    assert_allclose(record.paths["total"].mean.value, record.paths["total"].change.mean())


def test_worst_and_best_contexts_and_the_histogram(last):
    [record] = downstream(last[0], [busiest(last[0])])
    change = record.paths["direct"].change
    worst, best = record.worst("direct", 5), record.best("direct", 5)
    assert change[worst].tolist() == sorted(change, reverse=True)[:5]
    assert change[best].tolist() == sorted(change)[:5]
    assert (change[record.worst("direct", 10**6)] > 0).all()
    edges, counts = record.histogram(20)
    assert set(counts) == set(record.paths)
    for name, n in counts.items():
        assert n.sum() == record.n
        np.testing.assert_array_equal(n, np.histogram(record.paths[name].change, edges)[0])


def test_the_null_writes_as_much_as_the_feature_and_elsewhere(last):
    live, _ = last
    work = ablation._Ablation(live, LATENTS, ablation._Setting("error kept", "one", "recomputed", None, 0))
    every = slice(0, len(work.number))
    directions, null = work._directions(every), work.null
    assert 0 < null.sum() <= len(LATENTS) * ablation.N_NULL
    own = work.directions[torch.from_numpy(work.number)]
    torch.testing.assert_close(directions.norm(dim=1), own.norm(dim=1))
    cosine = torch.nn.functional.cosine_similarity(directions, own)
    assert (cosine[~null] > 1 - 1e-12).all()
    assert (cosine[null].abs() < 0.9).all()
