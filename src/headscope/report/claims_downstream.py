"""M14 and M15: the model's loss increase without an exemplar, in total and by path."""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool

from headscope.report.records import Claim, Exemplar, Figure, Finding, Section
from headscope.report.subject import Subject
from headscope.stats import Measure, ratio
from headscope.studies.what.ablation import downstream
from headscope.studies.what.downstream import Downstream

N_TOKENS = 10
"""Tokens whose logit a context feature raises most: its loss increase is measured on these."""
_POST = {"total": 0.82, "direct": 0.84, "mlp": 0.55}
_BASELINE = "the error of the SAE is kept (the post does not say); tokens whose loss falls count as 0"
_BINS = 60


def ablated(subject: Subject) -> tuple[Finding, ...]:
    """M14, M15: each exemplar ablated where it is active."""
    exemplars = subject.some_exemplars()
    latents = [e.latent for e in exemplars]
    settings = subject.settings
    records = downstream(
        subject.live, latents, max_tokens=settings.tokens, seed=settings.seed, on_progress=subject.progress
    )
    return tuple(f for e, d in zip(exemplars, records, strict=True) for f in _findings(subject, e, d))


def _findings(subject: Subject, exemplar: Exemplar, record: Downstream) -> list[Finding]:
    chosen, which = _tokens(subject, exemplar, record)
    mlp = f"mlp.{record.layer}"
    paths = {"total": ("M14", "in all"), "direct": ("M15", "by the direct path"), mlp: ("M15", "through the MLP")}
    claims = []
    for path, (name, how) in paths.items():
        common = {"differs": f"{record.definition}", "feature": exemplar.latent, "kind": exemplar.kind}
        shared = Claim(name, f"Loss increase {how} that is on {which}", "", unit="share", missing="", **common)
        mean = Claim(name, f"Mean loss change {how}", "", unit="nats", missing="", **common)
        if path not in record.paths:
            why = f"the model has no path {path}: no MLP reads what attention of this layer writes"
            claims += [replace(c, definition="change of the loss", missing=why) for c in (shared, mean)]
            continue
        share = record.share(path, chosen)
        post = _POST["mlp" if path == mlp else path] if exemplar.kind == "induction" else None
        claims += [
            replace(shared.with_measure(share.positive), post=post, differs=_BASELINE),
            replace(
                shared.with_measure(share.net),
                claim=f"Net loss change {how} that is on {which}",
                differs="not in the post: falls are counted too",
            ),
            mean.with_measure(record.paths[path].mean),
        ]
    return [*claims, _interaction(exemplar, record), _figure(exemplar, record)]


def _tokens(subject: Subject, exemplar: Exemplar, record: Downstream) -> tuple[Bool[np.ndarray, " token"], str]:
    """Return where the next token is one that the feature should predict, with a description."""
    if exemplar.kind == "induction":
        return record.next_is(list(exemplar.sources)), "tokens whose next one is the token that the proxy names"
    top = [token for token, _ in subject.index.feature(exemplar.latent).logit_top[:N_TOKENS]]
    return record.next_is(top), f"tokens whose next one is among the {N_TOKENS} that the feature raises most"


def _interaction(exemplar: Exemplar, record: Downstream) -> Claim:
    found: Measure = ratio(
        record.document,
        record.interaction,
        np.ones(record.n),
        definition="mean over active tokens of (total - sum over paths) of the loss change: what paths do together",
    )
    claim = Claim(
        "M15",
        "Mean loss change that no single path makes",
        "",
        unit="nats",
        missing="",
        null=0.0,
        differs="not in the post: losses are not additive, and this is by how much",
        feature=exemplar.latent,
        kind=exemplar.kind,
    )
    return claim.with_measure(found)


def _figure(exemplar: Exemplar, record: Downstream) -> Figure:
    edges, counts = record.histogram(_BINS)
    middle = (edges[:-1] + edges[1:]) / 2
    return Figure(
        "Loss change by path",
        "lines",
        tuple(f"{m:.3f}" for m in middle),
        {path: tuple(own.tolist()) for path, own in counts.items()},
        f"active tokens by how much their loss rises without the feature; {record.definition}",
        x="change of the loss, nats",
        y="tokens",
        log=True,
        feature=exemplar.latent,
        kind=exemplar.kind,
    )


SECTIONS = (Section("ablated", ("M14", "M15"), "What the model loses without the exemplars", ablated),)
