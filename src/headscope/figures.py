"""Plotly figures of results, for notebooks and papers; they only draw.

Plotly is an extra: `pip install 'headscope[plots]'`. Colours are those of Okabe & Ito (2008), distinguishable with any
colour vision: orange where the proxy is true, blue where it is false.
"""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from headscope.errors import FigureError
from headscope.names import short
from headscope.sae.pareto import MEASURES, Pareto
from headscope.sae.runs import Run
from headscope.studies.what.downstream import Downstream, LogitEffect
from headscope.studies.when.records import Curve, ExpectedValue, Histogram, Predictions, Specificity

if TYPE_CHECKING:
    import plotly.graph_objects as go

Values = Float[np.ndarray, " point"]

TRUE, FALSE, OTHER = "#E69F00", "#0072B2", "#767676"
_BAND = "rgba(230, 159, 0, 0.25)"
_LEGEND = {"orientation": "h", "y": 1.0, "yanchor": "bottom"}
_PATHS = ("#000000", FALSE, "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
NAMES = {TRUE: "proxy true", FALSE: "proxy false"}


def specificity(study: Specificity, *, log: bool = False) -> "go.Figure":
    """Plot active tokens by activation, stacked by whether the proxy is true: the post's "Specificity" plot.

    Args:
        study: study of a feature and a proxy.
        log: use a logarithmic axis for counts; the classes then overlap instead of being stacked.

    Raises:
        FigureError: plotly is not installed.
    """
    histogram = study.histogram
    title = f"Feature {study.latent}: {histogram.n:,} active tokens by activation"
    figure = _figure(_of(title, study, histogram.definition), "activation", "tokens")
    _add_classes(figure, histogram, histogram.true, histogram.false)
    if log:
        figure.update_yaxes(type="log")
    return figure.update_layout(barmode="overlay" if log else "stack")


def expected_value(study: Specificity, values: ExpectedValue) -> "go.Figure":
    """Plot bin centre times count over N by whether the proxy is true; stacked only where N is the same for both.

    Args:
        study: study of a feature and a proxy.
        values: `studies.when.specificity.expected_value` of its histogram.

    Raises:
        FigureError: plotly is not installed.
    """
    title = f"Feature {study.latent}: what each range of activations adds to the mean"
    figure = _figure(_of(title, study, values.definition), "activation", "bin centre * count / N")
    _add_classes(figure, values, values.true, values.false)
    return figure.update_layout(barmode="stack" if values.normalisation == "joint" else "overlay")


def precision_by_threshold(study: Specificity) -> "go.Figure":
    """Plot P(proxy | f > t) with its Wilson band, and P(proxy) as a dashed line.

    Raises:
        FigureError: plotly is not installed.
    """
    found = study.precision_by_threshold
    title = f"Feature {study.latent}: P(proxy | f > t)"
    figure = _figure(_of(title, study, found.definition), "threshold t", "P(proxy | f > t)")
    _add_band(figure, found.threshold, found.low, found.high)
    shown = "t = %{x:.3g}<br>P = %{y:.3f}<br>%{customdata:,} tokens<extra></extra>"
    figure.add_scatter(
        x=found.threshold,
        y=found.value,
        mode="lines",
        line={"color": TRUE},
        customdata=found.n,
        hovertemplate=shown,
        name="P(proxy | f > t)",
    )
    _add_level(figure, found.base_rate, f"P(proxy) = {found.base_rate:.3g}")
    return figure.update_yaxes(range=[0, 1.02])


def precision_recall(study: Specificity) -> "go.Figure":
    """Plot the precision-recall curve, and the precision of a feature that fires at random.

    Raises:
        FigureError: plotly is not installed.
    """
    area = study.average_precision.value
    title = f"Feature {study.latent}: precision and recall" + ("" if area is None else f", area {area:.3f}")
    curve = study.curve
    figure = _figure(_of(title, study, _definition(curve)), "recall", "precision")
    if curve is not None:
        _add_curve(figure, curve, curve.recall, curve.precision)
        _add_level(figure, curve.base_rate, f"P(proxy) = {curve.base_rate:.3g}")
    return figure.update_xaxes(range=[0, 1.02]).update_yaxes(range=[0, 1.02])


def roc(study: Specificity) -> "go.Figure":
    """Plot the ROC curve, and the diagonal of a feature that fires at random.

    Raises:
        FigureError: plotly is not installed.
    """
    area = study.auc.value
    title = f"Feature {study.latent}: ROC" + ("" if area is None else f", area {area:.3f}")
    curve = study.curve
    figure = _figure(_of(title, study, _definition(curve)), "false positive rate", "recall")
    if curve is not None:
        _add_curve(figure, curve, np.append(0, curve.false_positive_rate), np.append(0, curve.recall))
        figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": OTHER, "dash": "dash"}, name="at random")
    return figure.update_xaxes(range=[0, 1.02]).update_yaxes(range=[0, 1.02])


def recall_by_subtype(study: Specificity) -> "go.Figure":
    """Plot the recall of each part of the proxy as bars with intervals, without those with too few tokens.

    Raises:
        FigureError: plotly is not installed.
    """
    found = study.sensitivity
    rows = [("all", found.recall), *((part.name, part.recall) for part in found.subtypes)]
    rows = [(name, recall) for name, recall in rows if recall.value is not None]
    title = f"Feature {study.latent}: recall"
    figure = _figure(_of(title, study, found.recall.definition), "recall", "")
    value = np.array([recall.value for _, recall in rows], dtype=float)
    low, high = (np.array([getattr(recall, end) for _, recall in rows], dtype=float) for end in ("low", "high"))
    figure.add_bar(
        x=value,
        y=[f"{name} ({recall.n:,})" for name, recall in rows],
        orientation="h",
        marker={"color": TRUE},
        error_x={"array": high - value, "arrayminus": value - low},
        hovertemplate="%{y}<br>%{x:.3f}<extra></extra>",
    )
    return figure.update_xaxes(range=[0, 1.02]).update_yaxes(autorange="reversed")


def next_token_probabilities(found: Predictions) -> "go.Figure":
    """Plot the model's p(X) at false negatives, true positives and elsewhere, as shares per kind in 20 equal bins.

    Raises:
        FigureError: plotly is not installed.
    """
    title = f"Feature {found.latent}: the model's p(X)<br><sup>{_plain(found.proxy)}</sup>"
    figure = _figure(title, "p(X)", "share of the tokens of the kind")
    kinds = ((found.false_negatives, FALSE), (found.true_positives, TRUE), (found.elsewhere, OTHER))
    for group, colour in kinds:
        figure.add_histogram(
            x=group.probability,
            name=f"{group.name} ({len(group.position):,})",
            xbins={"start": 0, "end": 1, "size": 0.05},
            histnorm="probability",
            marker={"color": colour},
        )
    return figure.update_layout(barmode="group").update_xaxes(range=[0, 1])


def loss_changes(found: Downstream, *, bins: int = 100) -> "go.Figure":
    """Plot the distribution of loss changes when the feature is ablated, one outline per path.

    Args:
        found: `studies.what.ablation.downstream` of a feature.
        bins: number of bins of equal width, over the changes of all paths.

    Raises:
        FigureError: plotly is not installed.
    """
    lines = (f"{found.n:,} tokens of {found.n_active:,} active ones", found.definition, *found.notes)
    title = f"Feature {found.latent}: loss change by path" + "".join(f"<br><sup>{_plain(t)}</sup>" for t in lines)
    figure = _figure(title, "change of the loss, nats", "tokens")
    edges, counts = found.histogram(bins) if found.n else (np.zeros(1), {})
    for (path, of_path), colour in zip(counts.items(), cycle(_PATHS)):
        line = {"color": colour, "shape": "hv"}
        figure.add_scatter(x=edges, y=np.append(of_path, 0), mode="lines", line=line, name=path)
    return figure


def logit_effect(found: LogitEffect, names: Mapping[int, str]) -> "go.Figure":
    """Plot the tokens that a feature raises and lowers most by the direct path, as bars.

    Args:
        found: `studies.what.downstream.logit_effect` of a feature.
        names: labels of its tokens.

    Raises:
        FigureError: plotly is not installed.
    """
    title = f"Feature {found.latent}: direct logit effect<br><sup>{_plain(found.definition)}</sup>"
    figure = _figure(title, "logits at activation 1", "")
    for pairs, colour, name in ((found.top, TRUE, "raised most"), (found.bottom[::-1], FALSE, "lowered most")):
        figure.add_bar(
            x=[value for _, value in pairs],
            y=[f"{_plain(names[token])} (#{token})" for token, _ in pairs],  # two tokens may have the same label
            orientation="h",
            marker={"color": colour},
            name=name,
        )
    return figure.update_yaxes(autorange="reversed", type="category")


def training_curves(runs: Sequence[Run]) -> "go.Figure":
    """Plot metrics of training runs by activations: error, L0, explained variance, dead latents.

    Raises:
        FigureError: plotly is not installed.
    """
    panels = {
        "squared_error": "squared error, scaled units",
        "l0": "L0",
        "explained_variance": "explained variance",
        "dead": "dead latents",
    }
    figure = _panels("Training", "activations", list(panels.values()))
    for run, line in zip(runs, _lines(), strict=False):
        for i, name in enumerate(panels):
            figure.add_scatter(
                x=[point["tokens"] for point in run.points],
                y=[point[name] for point in run.points],
                mode="lines",
                line=line,
                name=f"{_plain(run.name)} ({run.state})",
                legendgroup=run.name,
                showlegend=i == 0,
                row=i // 2 + 1,
                col=i % 2 + 1,
            )
    return figure


def pareto(found: Pareto) -> "go.Figure":
    """Plot the quality of the SAEs of a sweep by L0 on a logarithmic axis, one line per variant.

    Raises:
        FigureError: plotly is not installed.
    """
    names = [f"{name}<br><sup>{_plain(said)}</sup>" for name, said in MEASURES.items()]
    figure = _panels(f"{_plain(short(found.model))}, {_plain(found.site)}, held-out text", "L0", names)
    for (variant, points), line in zip(found.curves().items(), _lines(), strict=False):
        for i, name in enumerate(MEASURES):
            estimates = [getattr(point, name) for point in points]
            figure.add_scatter(
                x=[point.l0.value for point in points],
                y=[e.value for e in estimates],
                error_y={
                    "array": [e.high - e.value for e in estimates],
                    "arrayminus": [e.value - e.low for e in estimates],
                },
                mode="lines+markers",
                line=line,
                text=[point.name for point in points],
                hovertemplate="%{text}<br>L0 %{x:.2f}<br>%{y:.4f}<extra></extra>",
                name=variant,
                legendgroup=variant,
                showlegend=i == 0,
                row=i // 2 + 1,
                col=i % 2 + 1,
            )
    return figure.update_xaxes(type="log", dtick=math.log10(2), tickformat=".4~g")


# --------------------------------------------------------------------------------------------------------------- parts
def _panels(title: str, x: str, names: list[str]) -> "go.Figure":
    """Make four panels with a common x."""
    figure = _figure(title, x, "")
    from plotly.subplots import make_subplots

    made = make_subplots(2, 2, subplot_titles=names, figure=figure)
    beside = {"orientation": "v", "x": 1.02, "y": 1.0, "yanchor": "top"}
    return made.update_xaxes(title={"text": x}).update_layout(height=800, legend=beside)


def _lines() -> Iterator[dict[str, str]]:
    """Yield line styles that are distinguishable without colour, once colours repeat."""
    return ({"color": colour, "dash": dash} for dash in cycle(("solid", "dash", "dot")) for colour in _PATHS)


def _figure(title: str, x: str, y: str) -> "go.Figure":
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise FigureError(
            "plotly is not installed", expected="it, to make figures", do="pip install 'headscope[plots]'"
        ) from error
    figure = go.Figure()
    figure.update_layout(title={"text": title}, template="simple_white", legend=_LEGEND, margin={"t": 130})
    return figure.update_xaxes(title={"text": x}).update_yaxes(title={"text": y})


def _of(title: str, study: Specificity, definition: str) -> str:
    """Make a title with, in smaller type, the proxy, the corpus and the definition; and notes on missing data."""
    said = [f"{study.proxy}; {study.counts.n_tokens:,} tokens of {study.corpus}", definition, *study.notes]
    return title + "".join(f"<br><sup>{_plain(line)}</sup>" for line in said if line)


def _plain(text: str) -> str:
    """Escape text for Plotly, which interprets some HTML."""
    return html.escape(text, quote=False)


def _definition(curve: Curve | None) -> str:
    return "" if curve is None else curve.definition


def _add_classes(figure: "go.Figure", bins: Histogram | ExpectedValue, true: np.ndarray, false: np.ndarray) -> None:
    centre, width = (bins.edges[:-1] + bins.edges[1:]) / 2, np.diff(bins.edges)
    for values, colour in ((true, TRUE), (false, FALSE)):
        figure.add_bar(x=centre, y=values, width=width, marker={"color": colour}, name=NAMES[colour], opacity=0.85)
    figure.update_layout(bargap=0)


def _add_band(figure: "go.Figure", x: Values, low: Values, high: Values) -> None:
    figure.add_scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        fill="toself",
        fillcolor=_BAND,
        line={"width": 0},
        hoverinfo="skip",
        name="95 %",
    )


def _add_curve(figure: "go.Figure", curve: Curve, x: Values, y: Values) -> None:
    at = [""] * (len(x) - len(curve.threshold)) + [f"f >= {t:.3g}" for t in curve.threshold]
    shown = "%{text}<br>%{x:.3f}, %{y:.3f}<extra></extra>"
    figure.add_scatter(x=x, y=y, mode="lines", line={"color": TRUE}, text=at, hovertemplate=shown, name="feature")


def _add_level(figure: "go.Figure", level: float, text: str) -> None:
    """Add a dashed line at the level of a feature that fires at random."""
    figure.add_hline(y=level, line={"color": OTHER, "dash": "dash"}, annotation={"text": text, "showarrow": False})
