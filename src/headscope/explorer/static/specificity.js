/** The tabs "Specificity" and "Expected value": of the tokens on which the feature fires, which ones are the proxy's? */
import { drawCurve, drawParts } from "./charts.js";
import { CONTEXT_HEADINGS, contextCells, contextKey, contextList, drawContext } from "./contexts.js";
import { choice, el, term } from "./dom.js";
import { int, num, pct, short } from "./format.js";
import { between, empty, measureRows, measureTable, studyHead } from "./study.js";

/** "true on 12,345 of 1,000,000 tokens" */
export function countsLine({ counts }) {
  return `proxy true on ${int(counts.n_proxy)} of ${int(counts.n_tokens)} tokens (${pct(counts.base_rate)}), feature active on ${int(counts.n_active)}, both on ${int(counts.n_both)}`;
}

export function drawSpecificity(dive, view, needs) {
  const { histogram, by_threshold: along, counts } = dive;
  const scores = [["precision", "precision: P(proxy | f > 0)", dive.measures.precision], ["mass_share", "share of activation mass", dive.measures.mass_share]];
  const head = studyHead({
    definition: `${histogram.definition}; n = ${int(histogram.n)} active tokens of ${int(counts.n_tokens)} of ${dive.corpus}.`, python: dive.python.specificity, name: `specificity-${dive.latent}`,
    rows: () => [["bin_low", "bin_high", "proxy_true", "proxy_false", "true_mass", "false_mass"],
      ...histogram.true.map((n, i) => [histogram.edges[i], histogram.edges[i + 1], n, histogram.false[i], histogram.true_mass[i], histogram.false_mass[i]]),
      [], ["threshold", "n_above", "n_above_with_proxy", "precision", "low", "high"], ...along.threshold.map((t, i) => [t, along.n[i], along.n_both[i], along.value[i], along.low[i], along.high[i]]),
      [], ...measureRows(scores), [], ["range_low", "range_high", ...CONTEXT_HEADINGS], ...dive.ranges.flatMap((range) => range.rows.map((row) => [range.low, range.high, ...contextCells(dive.contexts[row], needs)]))],
  });
  if (counts.n_active === 0) return [head, measureTable(scores)];
  const byMass = view.mass === "1";
  const [inside, outside] = byMass ? [histogram.true_mass, histogram.false_mass] : [histogram.true, histogram.false];
  const bars = drawParts({
    name: "specificity", title: "Activations, split by the proxy", xLabel: "activation", yLabel: byMass ? "activation mass a bin" : "active tokens a bin", inside, outside, high: dive.maximum, log: view.log === "1", yTick: short, tip: needs.tip,
    facts: (bin) => [`activation ${between(histogram.edges[bin], histogram.edges[bin + 1])}`, `${int(histogram.true[bin])} with the proxy true, ${int(histogram.false[bin])} false`],
  });
  const choices = el("span", { class: "choices" }, choice("weight", [["", "counts"], ["1", "mass"]], view.mass, (mass) => needs.change({ mass })),
    choice("scale", [["", "linear"], ["1", "log"]], view.log, (log) => needs.change({ log })));
  bars.prepend(choices);
  return [head, el("div", { class: "plots" }, bars, drawThreshold(dive, view, needs)), el("div", { class: "beside" }, measureTable(scores), drawTop(dive)), ...drawRanges(dive, needs)];
}

/** P(proxy | f > t), and a slider that reads it off. */
function drawThreshold({ by_threshold: along, counts, maximum }, view, { tip, change }) {
  if (along.threshold.length === 0) return empty("No threshold has an active token above it.");
  const said = el("output", { class: "reading", "data-reading": "" });
  const line = (i) => [`f > ${num(along.threshold[i], 2)}: ${int(along.n[i])} tokens`, `proxy true on ${pct(along.value[i])} [${pct(along.low[i])}, ${pct(along.high[i])}]`,
    counts.n_proxy > 0 ? `recall ${pct(along.n_both[i] / counts.n_proxy)}` : "the proxy is never true"];
  const read = (i) => {
    mark(along.threshold[i]);
    said.textContent = line(i).join(" · ");
  };
  const slider = el("input", { type: "range", min: 0, max: along.threshold.length - 1, step: 1, "aria-label": "threshold t", "data-threshold": "", oninput: () => read(Number(slider.value)), onchange: () => change({ at: slider.value === "0" ? "" : slider.value }) });
  const pick = (i) => { slider.value = String(i); read(i); change({ at: i === 0 ? "" : String(i) }); };
  const { figure, mark } = drawCurve({
    name: "threshold", title: "P(proxy | f > t)", xLabel: "threshold t", yLabel: "share of tokens with f > t", x: along.threshold, y: along.value, low: along.low, high: along.high, xRange: [0, maximum],
    yTick: pct, legend: "precision", reference: { x: [0, maximum], y: [along.base_rate, along.base_rate], label: `base rate ${pct(along.base_rate)}` }, tip, facts: line, pick,
  });
  const chosen = Math.min(along.threshold.length - 1, Math.max(0, Math.floor(Number(view.at)) || 0));
  slider.value = String(chosen);
  read(chosen);
  figure.append(el("label", { class: "slider" }, "t ", slider), said);
  return figure;
}

function drawTop({ top }) {
  if (top.length === 0) return null;
  return el("table", { class: "measures", "data-top": "" }, el("tr", {}, ["most active", "proxy true", "precision", "95 % interval"].map((label) => el("th", { scope: "col" }, label))),
    top.map(({ k, n, n_both: both, value, low, high }) => el("tr", {}, el("th", { scope: "row" }, term(int(k), "ties with the last are all counted", "span"), n !== k && el("small", {}, ` (${int(n)})`)), el("td", {}, int(both)), el("td", {}, el("b", {}, pct(value))), el("td", {}, `${pct(low)} to ${pct(high)}`))));
}

function drawRanges({ ranges, contexts, maximum }, needs) {
  const title = el("h3", {}, "Fires where the proxy is false, by activation");
  const filled = ranges.filter(({ n }) => n > 0).toReversed();
  if (filled.every(({ n_false: n }) => n === 0)) return [title, empty("Nowhere: the proxy is true on every active token.")];
  return [title, contextKey(maximum), el("div", { class: "ranges" }, filled.map(({ low, high, n, n_false: wrong, share, rows }) => el("section", { class: "group", "data-range-of": "false-positives" },
    el("header", {}, el("b", {}, between(low, high)), el("span", {}, `${int(wrong)} of ${int(n)} active tokens`), share && el("span", {}, `${pct(share.value)} [${pct(share.low)}, ${pct(share.high)}]`)),
    rows.length > 0 && contextList(rows.map((row) => drawContext(contexts[row], { ...needs, maximum }))), wrong > rows.length && el("p", { class: "hint" }, `${int(rows.length)} of them, drawn at random`))))];
}

export function drawExpected(dive, view, needs) {
  const { expected, counts, maximum } = dive;
  const chosen = expected[view.norm === "1" ? "class" : "joint"];
  const scores = [["mass_share", "share of activation mass at proxy tokens", dive.measures.mass_share]];
  const head = studyHead({
    definition: `${chosen.definition}; N = ${int(chosen.n_true)}${chosen.n_true === chosen.n_false ? "" : ` (proxy true) and ${int(chosen.n_false)} (false)`}, ${dive.corpus}.`, python: dive.python[view.norm === "1" ? "expected_class" : "expected"], name: `expected-value-${dive.latent}`,
    rows: () => [["normalisation", "bin_low", "bin_high", "proxy_true", "proxy_false"], ...Object.values(expected).flatMap((one) => one.true.map((value, i) => [one.normalisation, one.edges[i], one.edges[i + 1], value, one.false[i]])), [], ...measureRows(scores)],
  });
  if (counts.n_active === 0) return [head, measureTable(scores)];
  const bars = drawParts({
    name: "expected", title: "Expected value: bin centre × count / N", xLabel: "activation", yLabel: "what a bin adds to the mean", inside: chosen.true, outside: chosen.false, high: maximum, log: view.log === "1", yTick: (value) => (value === 0 ? "0" : value < 0.001 ? value.toExponential(0) : String(value)),
    tip: needs.tip, facts: (bin) => [`activation ${between(chosen.edges[bin], chosen.edges[bin + 1])}`, `proxy true ${num(chosen.true[bin], 6)}`, `proxy false ${num(chosen.false[bin], 6)}`],
  });
  bars.prepend(el("span", { class: "choices" }, choice("norm", [["", "joint", "both classes over all tokens: the bars stack"], ["1", "per class", "each class over its own tokens, as in the post's code: a rare class looks large"]], view.norm, (norm) => needs.change({ norm })),
    choice("scale", [["", "linear"], ["1", "log"]], view.log, (log) => needs.change({ log }))));
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const [true_, false_] = [sum(chosen.true), sum(chosen.false)];
  return [head, el("div", { class: "plots" }, bars, el("div", {}, measureTable(scores),
    el("p", { class: "definition" }, `The bars sum to ${num(true_, 5)} where the proxy is true and ${num(false_, 5)} where it is false${view.norm === "1" ? ": each a mean over its own class." : `: ${num(true_ + false_, 5)} is the mean activation, to the width of a bin.`}`)))];
}
