"""The studies "patching" and "feature_patching": which components, and which earlier features, turn a feature on?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from headscope.limits import Text
from headscope.studies.study import FeatureStudy, Tab
from headscope.studies.support.on_page import AtToken, open_live

if TYPE_CHECKING:
    from headscope.encode import Json
    from headscope.studies.how.corruptions import PromptPair
    from headscope.studies.how.example_patching import ExamplePatching
    from headscope.studies.how.feature_patching import FeaturePatching
    from headscope.studies.how.patching import Interaction, Patching, Scores
    from headscope.studies.subject import Subject

_SCORES = ("pre_score", "activation_score")
_TOP_LATENTS = 20


@dataclass(frozen=True, kw_only=True)
class PatchingOptions(AtToken):
    """An example, its corruption and the patched nodes."""

    how: Annotated[str, Text(40)] = "sources"
    """The corruption: `sources` replaces the largest source tokens, `swap` earlier copies of the token, `shuffle`
    permutes the tokens; a number after a dot is the seed: `shuffle.1`."""
    nodes: Annotated[str, Text(20)] = "components"
    """`components`, `heads`, or `qkv` (queries, keys, values and patterns of the SAE's layer)."""


@dataclass(frozen=True, kw_only=True)
class FeaturePatchingOptions(AtToken):
    """An example, its corruption and the SAE whose features are patched."""

    features_of: Annotated[str, Text(400)]
    """The SAE of an earlier component, one of those given with --upstream-sae."""
    how: Annotated[str, Text(40)] = "sources"
    """The corruption, as in `patching`."""


# ----------------------------------------------------------------------------------------------------------- components
def _run(subject: "Subject", latent: int, options: PatchingOptions) -> "ExamplePatching":
    from headscope.studies.how.example_patching import patch_example

    return patch_example(subject, latent, options.at, options.how, options.nodes)


def _show(_subject: "Subject", _latent: int, options: PatchingOptions, record: "ExamplePatching") -> "Json":
    """Return components (rows) patched at all positions (the first column) and at single ones."""
    found = record.found
    number = {nodes[0]: i for i, nodes in enumerate(found.patches)}
    whole = list(dict.fromkeys(replace(node, position=None) for node in number))
    places = [None, *record.columns]
    at = [[number.get(replace(node, position=place)) for place in places] for node in whole]
    return {
        **_prompts(found.pair),
        "at": options.at,
        "how": options.how,
        "n": found.n,
        "definition": found.definition,
        "rows": [{"name": str(node), "kind": node.kind, "layer": node.layer, "head": node.head} for node in whole],
        "columns": list(record.columns),
        "noising": _matrices(found.noising, at),
        "denoising": _matrices(found.denoising, at),
        "roles": [_role(found, number[node]) for node in whole],
        "joint": None if record.joint is None else _joint(record.joint),
    }


def _python(subject: "Subject", _latent: int, _options: PatchingOptions, record: "ExamplePatching") -> str:
    kinds = tuple(dict.fromkeys(node.kind for node in record.nodes))
    layers = tuple(sorted({node.layer for node in record.nodes if node.kind not in ("token", "position")}))
    imports = "from headscope.studies.how.patching import nodes_of, patch"
    return _python_of_pair(subject, record.found.pair, imports) + (
        f"nodes = [*nodes_of(pair, {kinds}, layers={layers}),\n"
        f"         *nodes_of(pair, {kinds}, layers={layers}, by_position=True)]\n"
        "patch(pair, nodes)"
    )


PATCHING = FeatureStudy(
    name="patching",
    group="how",
    question="which components, patched between an example and its corruption, turn the feature on or off?",
    run=_run,
    options=PatchingOptions,
    needs_model=True,
    tabs=(Tab("upstream", "Upstream"),),
    show=_show,
    python=_python,
)


# ------------------------------------------------------------------------------------------------------------- features
def _run_features(subject: "Subject", latent: int, options: FeaturePatchingOptions) -> "FeaturePatching":
    from headscope.studies.how.example_patching import patch_example_features

    return patch_example_features(subject, latent, options.at, options.how, options.features_of)


def _show_features(
    _subject: "Subject", _latent: int, options: FeaturePatchingOptions, found: "FeaturePatching"
) -> "Json":
    """Return features of an earlier SAE: scores of all, of the error alone, and of the few that matter."""
    from headscope.encode import encode
    from headscope.studies.how.feature_patching import BARS

    k = min(len(found.latents), _TOP_LATENTS)
    n_together = len(found.together_noising.pre_score)
    return {
        **_prompts(found.pair),
        "at": options.at,
        "how": options.how,
        "sae": options.features_of,
        "definition": found.definition,
        "site": found.site.hook_name,
        "n_latents": len(found.latents),
        "positions": list(found.positions),
        "few": found.few,
        "bars": [
            {"name": name, "noising": _at(found.bars_noising, i), "denoising": _at(found.bars_denoising, i)}
            for i, name in enumerate(BARS)
        ],
        "latents": [
            {
                "latent": int(found.latents[i]),
                "change": encode(float(found.change[i])),
                "noising": _at(found.noising, i),
                "denoising": _at(found.denoising, i),
                "noising_together": _at(found.together_noising, i) if i < n_together else None,
                "denoising_together": _at(found.together_denoising, i) if i < n_together else None,
            }
            for i in range(k)
        ],
    }


def _python_features(
    subject: "Subject", _latent: int, options: FeaturePatchingOptions, found: "FeaturePatching"
) -> str:
    imports = (
        "from headscope.sae.formats import load_sae\nfrom headscope.studies.how.feature_patching import patch_features"
    )
    return _python_of_pair(subject, found.pair, imports) + f"patch_features(pair, load_sae({options.features_of!r}))"


FEATURE_PATCHING = FeatureStudy(
    name="feature_patching",
    group="how",
    question="which features of an earlier SAE, patched between an example and its corruption, turn the feature on?",
    run=_run_features,
    options=FeaturePatchingOptions,
    needs_model=True,
    show=_show_features,
    python=_python_features,
)


# ---------------------------------------------------------------------------------------------------------------- parts
def _prompts(pair: "PromptPair") -> "Json":
    from headscope.encode import encode

    changed = (pair.clean != pair.corrupted).nonzero()[:, 0]
    return {
        "clean": pair.clean.tolist(),
        "corrupted": pair.corrupted.tolist(),
        "changed": changed.tolist(),
        "query": pair.query,
        "on": encode({"pre": pair.on.pre, "activation": pair.on.activation}),
        "off": encode({"pre": pair.off.pre, "activation": pair.off.activation}),
    }


def _matrices(scores: "Scores", at: Sequence[Sequence[int | None]]) -> "Json":
    """Return scores by component and position; None where nothing was patched."""
    from headscope.encode import DIGITS, significant

    picked = {name: getattr(scores, name) for name in _SCORES}
    return {
        name: significant([[float("nan") if i is None else values[i] for i in row] for row in at], DIGITS)
        for name, values in picked.items()
    }


def _at(scores: "Scores", i: int) -> "Json":
    from headscope.encode import encode

    return encode({name: float(getattr(scores, name)[i]) for name in _SCORES})


def _role(found: "Patching", i: int) -> "Json":
    from headscope.encode import encode
    from headscope.studies.how.patching import role

    loss, gain = float(1 - found.noising.activation_score[i]), float(found.denoising.activation_score[i])
    return encode({"role": role(loss, gain), "loss": loss, "gain": gain})


def _joint(found: "Interaction") -> "Json":
    from headscope.encode import encode

    first, second = (" + ".join(map(str, patch)) for patch in (found.first, found.second))
    numbers = {name: getattr(found, name) for name in ("kind", "excess", "on_without", "on_with")}
    return {"first": first, "second": second} | encode(numbers)


def _python_of_pair(subject: "Subject", prompts: "PromptPair", imports: str) -> str:
    opened = open_live(subject, f"from headscope.studies.how.corruptions import FeatureMetric, pair\n{imports}")
    return (
        f"import torch\n{opened}metric = FeatureMetric(live.model, live.sae, {prompts.metric.latent})\n"
        f"clean = torch.tensor({prompts.clean.tolist()})\n"
        f"corrupted = torch.tensor({prompts.corrupted.tolist()})\n"
        "pair = pair(metric, clean, corrupted)\n"
    )
