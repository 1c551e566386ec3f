"""M7 to M13b: each exemplar in the index: its examples, logit effects, heads, and specificity."""

from dataclasses import replace

import numpy as np
import torch

from headscope.proxies import evaluate
from headscope.report.records import KINDS, Claim, Exemplar, Figure, Finding, Listing, Section
from headscope.report.rows import Row, share_that
from headscope.report.subject import Subject
from headscope.stats import Measure, wilson
from headscope.studies.support.active import Text
from headscope.studies.what.downstream import LogitEffect, logit_effect
from headscope.studies.when.records import Specificity
from headscope.studies.when.specificity import SpecificityPlan, expected_value, specificity
from headscope.tokens import visible

OWN_RULE = "the post: a proxy written by hand; here one found by search, of the kind of the post's"
_NO_NUMBER = "the post gives no number"
_SHOWN = 5  # examples
_WINDOW = 12  # tokens of an example before its active token
_N_RANDOM = 64  # null directions for logit effects and shares


def exemplars(subject: Subject) -> tuple[Finding, ...]:
    """M7 and M10: examples of the exemplars, and the kinds that have none."""
    missing = [
        Claim(
            "M10",
            f"A {kind} feature to look at",
            "the best proxy of a feature is of this family, correlates at 0.3 or more, and above all rotations",
            missing="none was found: no claim of the post about it can be tested here",
            kind=kind,
        )
        for kind in KINDS
        if kind not in {e.kind for e in subject.exemplars}
    ]
    return (*missing, *(found for e in subject.exemplars for found in (_shown(subject, e), _examples(subject, e))))


def _shown(subject: Subject, exemplar: Exemplar) -> Claim:
    """Return the strongest examples of a card at which the exemplar's proxy is true."""
    groups = subject.index.examples(exemplar.latent)
    positions = [e.position for group in groups if group.kind == "top" for e in group.examples]
    holds = evaluate(exemplar.proxy, subject.index)
    text = Text.of(subject.index).is_text.reshape(-1)
    base = wilson(int(holds[text].sum()), int(text.sum()))
    row = Row(
        "M7",
        "Strongest examples on the card at which its proxy is true",
        "share of the examples of the card's first group, Wilson",
        null="all text tokens",
        differs="the post: examples are shown and read by eye",
    )
    claim = row.of(share_that(holds[positions], base))
    return replace(claim, feature=exemplar.latent, kind=exemplar.kind)


def _examples(subject: Subject, exemplar: Exemplar) -> Listing:
    groups = subject.index.examples(exemplar.latent)
    top = next((group.examples for group in groups if group.kind == "top"), ())
    vocabulary, size = subject.index.vocabulary[0], subject.index.block_size
    rows = []
    for example in top[:_SHOWN]:
        block, query = divmod(example.position, size)
        tokens = subject.index.tokens_of(block)
        before, after = tokens[max(1, query - _WINDOW) : query], tokens[query + 1 : query + 3]
        parts = (_written([vocabulary[t] for t in part]) for part in (before, [tokens[query]], after))
        rows.append((f"{example.activation:.2f}", *parts))
    return Listing(
        "Strongest examples",
        ("activation", "before", "active token", "after"),
        tuple(rows),
        "the most active tokens of the corpus, those with the same text around them once",
        exemplar.latent,
        exemplar.kind,
    )


def _written(tokens: list[bytes]) -> str:
    """Format on one line, with line breaks visible."""
    return visible(b"".join(tokens).decode(errors="replace").replace("\n", "\u21b5").replace("\t", "\u2192"))


# --------------------------------------------------------------------------------------------------------------- logits
def logits(subject: Subject) -> tuple[Finding, ...]:
    """M8: the direct logit effect of each exemplar, vs. random directions of z."""
    null = _random_prominence(subject)
    return tuple(f for e in subject.some_exemplars() for f in _logit_findings(subject, e, null))


def _random_prominence(subject: Subject) -> float:
    """Return the mean prominence of the top token of random directions of z."""
    rng = np.random.default_rng(subject.settings.seed)
    z = torch.from_numpy(rng.standard_normal((_N_RANDOM, subject.sae.d_in))).to(subject.sae.W_dec)
    effects = z @ subject.model.output_directions(subject.sae.site.layer) @ subject.model.logit_directions
    return float(((effects.max(1).values - effects.mean(1)) / effects.std(1, correction=0)).mean())


def _logit_findings(subject: Subject, exemplar: Exemplar, null: float) -> list[Finding]:
    effect = logit_effect(subject.index, exemplar.latent)
    claim = Claim(
        "M8",
        "Standard deviations by which the top logit stands above the vocabulary",
        f"(max - mean) / sd over the vocabulary of {effect.definition}; null: mean of {_N_RANDOM} random directions",
        ours=effect.prominence,
        n=subject.model.spec.d_vocab,
        null=null,
        differs=_NO_NUMBER,
        feature=exemplar.latent,
        kind=exemplar.kind,
    )
    figure = Figure(
        "Direct logit effect",
        "bars",
        tuple(subject.text(t) for t, _ in effect.top[:12]),
        {"logits at activation 1": tuple(value for _, value in effect.top[:12])},
        effect.definition,
        y="logits",
        feature=exemplar.latent,
        kind=exemplar.kind,
    )
    return [claim, *([_names_top(subject, exemplar, effect)] if exemplar.kind == "induction" else []), figure]


def _names_top(subject: Subject, exemplar: Exemplar, effect: LogitEffect) -> Claim:
    """Whether the token that an induction feature copies is the one whose logit it raises most."""
    copied = effect.top[0][0] in exemplar.sources
    return Claim(
        "M8",
        "The token that the proxy names has the largest direct logit effect",
        "1 if so, 0 if not; null: a token at random",
        post=1,
        ours=float(copied),
        n=1,
        null=1 / subject.model.spec.d_vocab,
        differs="the post: by eye, of one feature",
        feature=exemplar.latent,
        kind=exemplar.kind,
    )


# ---------------------------------------------------------------------------------------------------------------- heads
def weights(subject: Subject) -> tuple[Finding, ...]:
    """M9: the share of each head in each exemplar's decoder, by the post's definition and basis-independent ones."""
    nulls = _random_top_shares(subject)
    return tuple(f for e in subject.some_exemplars() for f in _share_findings(subject, e, nulls))


def _random_top_shares(subject: Subject) -> tuple[float, float]:
    """Return the mean largest share of a head in random directions of z: in z, and in their output to the stream."""
    n_heads, rng = subject.index.n_heads, np.random.default_rng(subject.settings.seed)
    z = torch.from_numpy(rng.standard_normal((_N_RANDOM, n_heads, subject.sae.d_in // n_heads))).to(subject.sae.W_dec)
    directions = subject.model.output_directions(subject.sae.site.layer)
    written = torch.einsum("nhe,hed->nhd", z, directions.reshape(n_heads, -1, directions.shape[-1]))
    norms = (z.norm(dim=-1), written.norm(dim=-1))
    in_z, in_stream = ((norm / norm.sum(1, keepdim=True)).amax(1).mean().item() for norm in norms)
    return in_z, in_stream


def _share_findings(subject: Subject, exemplar: Exemplar, nulls: tuple[float, float]) -> list[Finding]:
    shares, n_heads = subject.index.feature(exemplar.latent).shares, subject.index.n_heads
    own = {"feature": exemplar.latent, "kind": exemplar.kind}
    definitions = {
        "Largest share of a head in the decoder": (shares.decoder, "||W_dec[j, h]||, L1-normalised (the post's rule)"),
        "The same in the residual stream": (
            shares.decoder_out,
            "||W_dec[j, h] W_O[h]||, L1-normalised: free of the basis of z",
        ),
    }
    claims = [
        Claim(
            "M9",
            claim,
            f"{definition}; null: mean of {_N_RANDOM} random directions of z",
            ours=float(share.max()),
            n=n_heads,
            null=null,
            unit="share",
            differs=f"head {subject.head_name(int(share.argmax()))}; the post asks for 0.6 of an induction feature",
            **own,
        )
        for (claim, (share, definition)), null in zip(definitions.items(), nulls, strict=True)
    ]
    drawn = {
        "decoder (the post's)": shares.decoder,
        "decoder, residual stream": shares.decoder_out,
        "encoder": shares.encoder,
        "squared DFA": shares.dfa,
        "covariance of DFA": shares.dfa_covariance,
    }
    figure = Figure(
        "Shares by head",
        "grouped",
        tuple(subject.head_name(head) for head in range(n_heads)),
        {name: tuple(values.tolist()) for name, values in drawn.items() if values is not None},
        "each definition sums to 1 over heads; where they disagree, no one of them is the whole story",
        x="head",
        y="share",
        **own,
    )
    return [*claims, figure]


# ---------------------------------------------------------------------------------------------------------- specificity
def fires(subject: Subject) -> tuple[Finding, ...]:
    """M10 to M13b: each exemplar vs. its proxy, over all text tokens of the index."""
    plan = SpecificityPlan(n_samples=subject.settings.samples, seed=subject.settings.seed)
    found: list[Finding] = []
    for done, exemplar in enumerate(subject.some_exemplars()):
        subject.progress(done, len(subject.exemplars))
        study = specificity(subject.index, exemplar.latent, exemplar.proxy, plan=plan)
        found += [*_fires_claims(exemplar, study), *_fires_figures(exemplar, study)]
    return tuple(found)


def _fires_claims(exemplar: Exemplar, study: Specificity) -> list[Claim]:
    board = exemplar.kind == "induction"

    def claim(name: str, said: str, found: Measure, **more) -> Claim:
        measured = Claim(name, said, "", missing="", feature=exemplar.latent, kind=exemplar.kind, differs=OWN_RULE)
        return replace(measured.with_measure(found), **more)

    counts = study.counts
    rate = wilson(counts.n_proxy, counts.n_tokens)
    base = Measure("share of text tokens at which the proxy is true; Wilson", counts.n_tokens, *_ends(rate))
    missed = Measure("text tokens with the proxy true and f = 0", counts.n_proxy, value=float(counts.n_false_negatives))
    post = {"M13": 68, "M13b": 0.5} if board else {}
    return [
        claim("M10", "Share of tokens at which the proxy is true", base, unit="share", differs=OWN_RULE),
        claim("M11", "Precision: the proxy is true where the feature fires", study.precision, unit="share"),
        claim("M11", "Precision above half of the largest activation", _upper(study), unit="share"),
        claim("M12", "Share of the summed activation where the proxy is true", study.mass_share, unit="share"),
        claim(
            "M13",
            "False negatives",
            missed,
            post=post.get("M13"),
            differs="the post: on 983,040 tokens, without the number of tokens where the proxy is true (n)",
        ),
        claim("M13", "Recall: the feature fires where the proxy is true", study.sensitivity.recall, unit="share"),
        claim("M13b", "Pearson correlation of activation and proxy", study.pearson, post=post.get("M13b")),
        claim("M13b", "Area under the ROC curve", study.auc),
        claim("M13b", "Pearson correlation where the feature fires", study.pearson_above),
    ]


def _ends(rate) -> tuple[float, float, float]:
    return rate.value, rate.low, rate.high


def _upper(study: Specificity) -> Measure:
    """Return the precision in the upper half of the range of activations."""
    half = study.histogram.edges[:-1] >= study.maximum / 2 if study.maximum else np.zeros(0, bool)
    true, false = (int(counts[half].sum()) for counts in (study.histogram.true, study.histogram.false))
    definition = "share of tokens with f >= max / 2 at which the proxy is true; Wilson; null: of all active tokens"
    if true + false == 0:
        return Measure(definition, 0, missing="no active tokens")
    found = wilson(true, true + false)
    return Measure(definition, true + false, *_ends(found), null=study.precision.null)


def _fires_figures(exemplar: Exemplar, study: Specificity) -> list[Figure]:
    if not study.maximum:
        return []
    own = {"feature": exemplar.latent, "kind": exemplar.kind}
    labels = tuple(f"{edge:.2f}" for edge in study.histogram.edges[:-1])
    expected = expected_value(study.histogram, study.counts.n_tokens)
    by = study.precision_by_threshold
    return [
        Figure(
            "Specificity",
            "stacked",
            labels,
            {"proxy true": tuple(study.histogram.true.tolist()), "proxy false": tuple(study.histogram.false.tolist())},
            study.histogram.definition,
            x="activation",
            y="tokens",
            **own,
        ),
        Figure(
            "Expected value",
            "stacked",
            labels,
            {"proxy true": tuple(expected.true.tolist()), "proxy false": tuple(expected.false.tolist())},
            expected.definition,
            x="activation",
            y="part of the mean activation",
            **own,
        ),
        Figure(
            "Precision by threshold",
            "lines",
            tuple(f"{t:.2f}" for t in by.threshold),
            {"P(proxy | f > t)": tuple(by.value.tolist()), "base rate": (by.base_rate,) * len(by.threshold)},
            by.definition,
            x="threshold t",
            y="precision",
            low={"P(proxy | f > t)": tuple(by.low.tolist())},
            high={"P(proxy | f > t)": tuple(by.high.tolist())},
            **own,
        ),
    ]


SECTIONS = (
    Section("examples", ("M7",), "What the exemplars look like", exemplars),
    Section("logits", ("M8",), "The direct logit effect of the exemplars", logits),
    Section("weights", ("M9",), "Heads in the weights of the exemplars", weights),
    Section("fires", ("M10", "M11", "M12", "M13", "M13b"), "When the exemplars fire", fires),
)
