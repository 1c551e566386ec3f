/** The tab "Ablation": what the loss does without the feature, by path; where it rises and falls most. */
import { drawSteps } from "./charts.js";
import { CONTEXT_HEADINGS, contextCells, contextList, drawContext } from "./contexts.js";
import { choice, el, term, unit } from "./dom.js";
import { drawLossEffect } from "./effects.js";
import { int, num, short, signed } from "./format.js";
import { empty, measureText, quoted, studyHead } from "./study.js";

const FEW_CONTEXTS = 8; // contexts shown first

export function drawAblation(effects, start, view, needs) {
  return effects === null ? drawKept(start, needs) : [...drawEffects(effects, view, needs), ...drawLossEffect(start.columns, needs.vocab)];
}

/** Without a model: what the index holds, and how to get the rest. */
function drawKept({ columns, python, advice }, { feature, vocab, about: { corpus } }) {
  const own = columns.effects;
  const head = own?.values && studyHead({
    definition: `Exact loss change by the direct path when the feature is removed, as the study of effects wrote it into the index. n = ${int(own.values.sampled)} of ${int(own.values.n)} active tokens of ${corpus.name}, ${corpus.split}.`, python: python.columns, name: `ablation-${feature.latent}`,
    rows: () => [["column", "value", "definition"], ...Object.entries(own.values).map(([name, value]) => [name, value, own.definitions[name]])],
  });
  const kept = drawLossEffect(columns, vocab);
  return [head, ...(kept.length > 0 ? kept : [empty("This index has no loss effects yet.")]), el("p", { class: "definition", "data-advice": "" }, advice)];
}

function drawEffects(effects, view, needs) {
  const { paths, worst, best, contexts, histogram } = effects;
  const names = paths.map(({ path }) => path);
  const list = (found, side) => found.rows.map((row, i) => [side, ...names.map((name) => found.change[name][i]), found.loss[i], quoted(needs.vocab.text(found.next[i])), ...contextCells(contexts[row], needs)]);
  const head = studyHead({
    definition: `Loss of the next token with the feature removed, less without (nats); ${effects.definition}. n = ${int(effects.n)} of ${int(effects.n_active)} active tokens of ${effects.corpus}.`, python: effects.python.ablation, name: `ablation-${effects.latent}`,
    rows: () => [["path", "what", "of", "value", "low", "high", "null", "null_low", "null_high", "n", "definition"], ...paths.flatMap((path) => [[path.path, "mean change", "all", ...numbers(path.mean)],
      ...Object.entries(path.shares).flatMap(([of, { positive, net }]) => [[path.path, "share of increase", of, ...numbers(positive)], [path.path, "share of net", of, ...numbers(net)]])]),
    [], ["bin_low", "bin_high", ...names], ...histogram.edges.slice(1).map((edge, i) => [histogram.edges[i], edge, ...names.map((name) => histogram.counts[name][i])]),
    [], ["side", ...names, "loss", "next_token", ...CONTEXT_HEADINGS], ...list(worst, "worst"), ...list(best, "best")],
  });
  const notes = effects.notes.map((note) => el("p", { class: "definition", "data-note": "" }, note));
  if (effects.n === 0) return [head, ...notes, empty("The feature is active on no token with a next one in its block: nothing to remove.")];
  return [head, ...notes, drawPaths(effects, needs), drawChanges(effects, view, needs), ...drawExtremes("Where the loss rises most", worst, effects, needs), ...drawExtremes("Where it falls most", best, effects, needs)];
}

const numbers = ({ value, low, high, null: chance, n, definition }) => [value, low, high, chance?.value, chance?.low, chance?.high, n, definition];

/** A row a path: mean change, and how much of it is on the top token and on the proxy. */
function drawPaths({ paths, token, n, n_of: counts, interaction }, { vocab }) {
  const share = ({ positive, net }) => el("td", { title: `${positive.definition}; n = ${int(positive.n)}` }, el("b", {}, measureText(positive)), el("small", { title: net.definition }, ` net ${measureText(net)}`));
  return el("div", { class: "wide-table" }, el("table", { class: "measures", "data-paths": "" }, el("tr", {}, el("th", { scope: "col" }, "path"), el("th", { scope: "col" }, "mean change"), el("th", { scope: "col" }, "null"),
    el("th", { scope: "col" }, "of the increase, next is ", vocab.label(token), ` (${int(counts.top)} of ${int(n)})`), el("th", { scope: "col" }, `of the increase, proxy true (${int(counts.proxy)} of ${int(n)})`)),
  paths.map(({ path, definition, mean, shares }) => el("tr", { "data-path": path }, el("th", { scope: "row" }, term(path.replace("mlp.", "MLP "), definition)), el("td", { title: mean.definition }, el("b", {}, measureText(mean, "change"))),
    el("td", {}, mean.null ? `${signed(mean.null.value, 4)} [${signed(mean.null.low, 4)}, ${signed(mean.null.high, 4)}]` : "–"), share(shares.top), share(shares.proxy)))),
  el("p", { class: "definition", "data-interaction": "" }, `Interaction: ${signed(interaction, 4)} nats a token, total less the sum of the other paths. Losses are not additive.`));
}

function drawChanges({ histogram: { edges, counts } }, { log }, { tip, change }) {
  const series = Object.entries(counts).map(([name, own]) => ({ name, counts: own }));
  const figure = drawSteps({
    name: "changes", title: "Tokens by loss change", xLabel: "change of the loss, nats", yLabel: "tokens a bin", edges, series, log: log === "1", yTick: short, tip,
    facts: (bin) => [`${signed(edges[bin])} to ${signed(edges[bin + 1])}`, ...series.map(({ name, counts: own }) => `${name}: ${int(own[bin])} tokens`)],
  });
  figure.prepend(el("span", { class: "choices" }, choice("scale", [["", "linear"], ["1", "log"]], log, (value) => change({ log: value }))));
  return el("div", { class: "plots" }, figure);
}

/** Contexts in which a token is red where its loss rises without the feature, blue and overlined where it falls. */
function drawExtremes(title, { rows, next, loss, change }, { contexts, maximum }, needs) {
  if (rows.length === 0) return [el("h3", {}, title), empty("Nowhere.")];
  const most = Math.max(...rows.flatMap((row) => contexts[row].change.map(([, value]) => Math.abs(value))), 1e-9);
  const key = (kind, label) => el("span", {}, el("i", { class: kind }), label);
  return [el("h3", {}, title), el("p", { class: "legend key" }, key("worse", "predicted worse without the feature"), key("better", "predicted better"), key("proxied", "proxy true"), key("dst", "active token")),
    contextList(rows.map((row, i) => {
      const changes = new Map(contexts[row].change.map(([pos, value]) => [pos + 1, value])); // of the token that is predicted
      const marks = (pos) => {
        const value = changes.get(pos);
        return value ? { class: value > 0 ? "worse" : "better", vars: { "--c": unit(Math.abs(value) / most) }, title: `loss ${signed(value)} without the feature` } : null;
      };
      const paths = Object.entries(change).map(([name, own]) => `${name} ${signed(own[i])}`).join(" · ");
      return drawContext(contexts[row], { ...needs, maximum }, { marks, lead: signed(change.total[i], 2), aside: el("small", { class: "paths" }, `${paths} · next `, needs.vocab.label(next[i]), ` at loss ${num(loss[i], 2)}`) });
    }), FEW_CONTEXTS)];
}
