"""M1 to M6: the SAE as a whole: size, quality on held-out text, densities, and the survey of its features."""

from dataclasses import replace

import numpy as np

from headscope.corpus import Corpus
from headscope.index.labels import LabelStore
from headscope.index.store import FeatureIndex
from headscope.report.records import Claim, Figure, Finding, Section
from headscope.report.subject import Subject
from headscope.sae.quality import evaluate
from headscope.stats import Estimate, wilson
from headscope.studies.survey import DEFINITIONS, Sample, survey

OTHER_MODEL = "model, corpus, width of the dictionary"
_SURVEYED = 50  # the post's first features
_DENSE = 1e-5


def training(subject: Subject) -> tuple[Finding, ...]:
    """M1: the trained SAE."""
    sae = subject.sae
    claim = Claim("M1", "", "d_sae", ours=sae.d_sae, differs=OTHER_MODEL)
    config = sae.metadata.get("training", {}).get("config", {})
    rule = ", ".join(f"{name} {value}" for name, value in config.items() if name not in ("seed", "buffer", "d_sae"))
    return (
        replace(claim, claim="Latents of the dictionary", post=16_384),
        replace(
            claim,
            claim="Latents for each dimension of z (heads concatenated)",
            definition="d_sae / d_in",
            post=32,
            ours=sae.d_sae / sae.d_in,
            differs=f"{sae.kind}{f'; {rule}' if rule else ''}",
        ),
    )


def quality(subject: Subject) -> tuple[Finding, ...]:
    """M2, M3: L0 and loss recovered, on the first blocks of the index's corpus."""
    corpus = corpus_of(subject.index, subject.settings.quality)
    q = evaluate(subject.model, subject.sae, corpus, subject.progress)
    tokens = f"{q.n_tokens:,} text tokens of the index's corpus"
    l0 = Claim("M2", "Active latents on a token (L0)", f"mean over {tokens}", post=12, missing="", differs=OTHER_MODEL)
    recovered = Claim("M3", "", "", unit="share", missing="", differs=OTHER_MODEL)
    null = "(CE_c - CE_mean) / (CE_c - CE_clean) stands beside it: the mean alone, no SAE"
    claims = [
        l0.with_estimate(q.l0, q.n_tokens),
        Claim(
            "M2",
            "L0, BOS counted as the post did",
            "mean over all positions",
            post=12,
            ours=q.l0_with_bos,
            n=corpus.n_tokens,
            differs=OTHER_MODEL,
        ),
        replace(
            recovered,
            claim="Loss recovered against z = 0 (of TransformerLens), BOS positions included",
            definition=f"(CE_c - CE_sae) / (CE_c - CE_clean), blocks resampled; null: {null}",
            post=0.87,
            null=q.loss_recovered_by_mean.value,
        ).with_estimate(q.loss_recovered, q.n_tokens),
        replace(
            recovered,
            claim="Loss recovered against raw zero, special tokens skipped (SAELens' ce_loss_score)",
            definition="(CE_zero - CE_sae) / (CE_zero - CE_clean)",
            differs="not in the post",
        ).with_estimate(q.ce_loss_score, q.n_tokens),
        replace(
            recovered,
            claim="Loss recovered against mean ablation",
            definition="(CE_mean - CE_sae) / (CE_mean - CE_clean)",
            null=0.0,
            differs="not in the post",
        ).with_estimate(q.loss_recovered_mean_ablation, q.n_tokens),
        Claim(
            "M3",
            "Loss of the model as it is",
            "mean next-token loss in nats, special tokens skipped",
            ours=q.ce["clean"],
            n=q.n_tokens,
            null=q.ce["zero"],
            unit="nats",
            differs="null: with z set to zero",
        ),
        Claim(
            "M3",
            "Loss with z replaced by its reconstruction",
            "the same",
            ours=q.ce["sae"],
            n=q.n_tokens,
            null=q.ce["mean"],
            unit="nats",
            differs="null: with z set to its mean",
        ),
    ]
    return tuple(claims)


def densities(subject: Subject) -> tuple[Finding, ...]:
    """M4, M5: dead latents and densities over all text of the index."""
    density = subject.index.table()["density"].to_numpy()
    return (*_density_claims(subject, density), _density_figure(density))


def _density_claims(subject: Subject, density: np.ndarray) -> list[Claim]:
    live = density[density > 0]
    tokens = f"{subject.index.manifest['corpus']['n_tokens']:,} text tokens"
    dead = Claim(
        "M4",
        "Dead latents",
        f"latents that never fire on {tokens}; Wilson",
        post=0.24,
        unit="share",
        missing="",
        differs="the post: over 327,680 positions",
    ).with_estimate(wilson(len(density) - len(live), len(density)), len(density))
    rare = Claim(
        "M5",
        "Live latents of ultra-low density",
        f"share of live latents active on less than {_DENSE:g} of {tokens}; Wilson",
        unit="share",
        missing="no latent is alive",
        differs="the post shows a histogram and gives no number",
    )
    median = replace(
        rare, claim="Density of the median live latent", definition=f"share of {tokens}; over live latents"
    )
    if not len(live):
        return [dead, rare, median]
    return [
        dead,
        rare.with_estimate(wilson(int((live < _DENSE).sum()), len(live)), len(live)),
        replace(median, ours=float(np.median(live)), n=len(live), missing=None),
    ]


def _density_figure(density: np.ndarray) -> Figure:
    logs = np.log10(density[density > 0])
    edges = np.arange(-28, 1) / 4
    counts, _ = np.histogram(logs, edges)
    first = int(counts.nonzero()[0][0]) if counts.any() else 0
    return Figure(
        title="Feature density",
        drawn="bars",
        labels=tuple(f"{edge:.2f}" for edge in edges[first:-1]),
        series={"live latents": tuple(counts[first:].tolist())},
        definition="live latents by log10 of the share of tokens on which they are active; lower ends of bins",
        x="log10 density",
        y="latents",
    )


def corpus_of(index: FeatureIndex, most: int | None) -> Corpus:
    """Return the corpus of an index, or its first blocks with about `most` tokens."""
    size = index.block_size
    n = index.n_blocks if most is None else max(1, min(index.n_blocks, most // size))
    blocks = np.stack([index.tokens_of(block) for block in range(n)]).astype(np.int32)
    document = np.stack([index.documents_of(block) for block in range(n)]).astype(np.int32)
    query = 'SELECT "offset" FROM tokens WHERE position < ? ORDER BY position'
    offsets = index.sql(query, [n * size])["offset"]
    manifest, bos = index.manifest["corpus"], index.manifest.get("bos")
    return Corpus(
        name=manifest["name"],
        split=manifest["split"],
        blocks=blocks,
        documents=tuple(index.documents),
        document=document,
        offset=offsets.to_numpy().reshape(blocks.shape).astype(np.int32),
        bos=int(bos["id"] if isinstance(bos, dict) else blocks[0, 0]),  # older indexes always started with it
        special=frozenset(index.vocabulary[1]),
        reading=manifest.get("reading", {}),
    )


def interpretable(subject: Subject) -> tuple[Finding, ...]:
    """M6: of the first 50 features, the alive ones, and those that people found interpretable."""
    n = min(_SURVEYED, subject.index.n_latents)
    found = survey(subject.index, LabelStore(subject.index).read(), Sample("first", n))
    alive = Claim(
        "M6",
        f"Alive among the first {n} latents",
        DEFINITIONS["alive"],
        post=0.76,
        unit="share",
        missing="",
        differs="the post: 38 of 50, Wilson 62.6 % to 85.7 %",
    )
    judged = Claim(
        "M6",
        "Interpretable among the live ones of these",
        DEFINITIONS["interpretable"],
        post=0.82,
        unit="share",
        missing="unlabelled: no person has rated these features (headscope serve, the tab of labels)",
        differs="the post: 31 of 38, one rater, Wilson 66.6 % to 90.8 %",
    )
    rows = [alive.with_estimate(found.alive or Estimate(float("nan"), 0, 1), n)]
    rated = [
        replace(judged, claim=f"{judged.claim}, by {tally.annotator}").with_estimate(tally.interpretable, tally.n)
        for tally in found.tallies
        if tally.n
    ]
    agreed = [
        Claim(
            "M6",
            f"Agreement of {' and '.join(pair.annotators)}",
            DEFINITIONS["agreement"],
            null=pair.chance,
            unit="share",
            missing="",
            differs="the post: one rater",
        ).with_estimate(pair.agreement, pair.n)
        for pair in found.agreements
    ]
    return (*rows, *(rated or [judged]), *agreed)


SECTIONS = (
    Section("training", ("M1",), "The dictionary and its training", training),
    Section("quality", ("M2", "M3"), "The quality of the SAE on held-out text", quality),
    Section("densities", ("M4", "M5"), "Dead latents, and how often the others fire", densities),
    Section("survey", ("M6",), "How many features are alive, and how many interpretable", interpretable, kept=False),
)
