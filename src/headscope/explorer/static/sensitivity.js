/** The tab "Sensitivity": where the proxy is true, does the feature fire? */
import { drawCurve } from "./charts.js";
import { CONTEXT_HEADINGS, contextCells, contextKey, contextList, drawContext } from "./contexts.js";
import { choice, el } from "./dom.js";
import { int, num, pct } from "./format.js";
import { empty, measureRows, measureTable, measureText, studyHead } from "./study.js";

const VERDICTS = [["miss", "miss", "the feature should have fired here"], ["proxy wrong", "proxy wrong", "the proxy is true where it should not be"], ["unclear", "unclear", "one cannot say"]]; // as studies.when.sensitivity.adjudicate takes them

export function drawSensitivity(dive, view, needs) {
  const { counts, curve, measures, misses, subtypes } = dive;
  const scores = ["recall", "auc", "average_precision", "pearson", "phi", "pearson_above"].map((name) => [name, { recall: "recall", auc: "AUC (ROC)", average_precision: "average precision", pearson: "Pearson, all tokens", phi: "phi, active or not", pearson_above: `Pearson, f > ${num(dive.tau, 2)}` }[name], measures[name]]);
  const verdicts = new Verdicts(dive, needs.about.corpus.block_size);
  const head = studyHead({
    definition: `Recall: share of the ${int(counts.n_proxy)} proxy tokens on which the feature is active; ${int(counts.n_proxy - counts.n_both)} are missed; ${int(counts.n_tokens)} tokens of ${dive.corpus}.`, python: dive.python.sensitivity, name: `sensitivity-${dive.latent}`,
    rows: () => [...measureRows([...scores, ...subtypes.map((part) => [part.name, part.name, part.recall])]), [], ["threshold", "n", "n_both", "precision", "recall", "false_positive_rate"],
      ...(curve?.threshold ?? []).map((t, i) => [t, curve.n[i], curve.n_both[i], curve.precision[i], curve.recall[i], curve.false_positive_rate[i]]),
      [], ["verdict", "corpus_position", ...CONTEXT_HEADINGS], ...misses.rows.map((row) => [verdicts.of(row), verdicts.places.get(row), ...contextCells(dive.contexts[row], needs)])],
  });
  return [head, curve ? el("div", { class: "plots" }, drawPR(curve, measures, needs), drawROC(curve, measures, needs)) : null, measureTable(scores), subtypes.length > 0 && drawSubtypes(subtypes), el("div", { "data-predictions": "" }), ...drawMisses(dive, needs, verdicts)].filter(Boolean);
}

function drawPR({ precision, recall, n, threshold, base_rate: base }, measures, { tip }) {
  return drawCurve({
    name: "pr", title: "Precision by recall", xLabel: "recall", yLabel: "precision", x: recall, y: precision, xTick: pct, yTick: pct, tip, legend: `average precision ${measureText(measures.average_precision)}`, reference: { x: [0, 1], y: [base, base], label: `base rate ${pct(base)}` },
    facts: (i) => [`f ≥ ${num(threshold[i], 2)}: ${int(n[i])} tokens`, `precision ${pct(precision[i])}, recall ${pct(recall[i])}`],
  }).figure;
}

function drawROC({ false_positive_rate: wrong, recall, threshold, n }, measures, { tip }) {
  return drawCurve({
    name: "roc", title: "ROC", xLabel: "false positive rate", yLabel: "recall", x: [0, ...wrong], y: [0, ...recall], xTick: pct, yTick: pct, tip, legend: `AUC ${measureText(measures.auc)}`, reference: { x: [0, 1], y: [0, 1], label: "chance" },
    facts: (i) => (i === 0 ? ["no token"] : [`f ≥ ${num(threshold[i - 1], 2)}: ${int(n[i - 1])} tokens`, `false positive rate ${pct(wrong[i - 1])}, recall ${pct(recall[i - 1])}`]),
  }).figure;
}

function drawSubtypes(subtypes) {
  return el("table", { class: "measures", "data-subtypes": "" }, el("tr", {}, ["part of the proxy", "tokens", "recall"].map((label) => el("th", { scope: "col" }, label))),
    subtypes.map(({ name, n, recall }) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, int(n)), el("td", {}, measureText(recall)))));
}

/** With a model: does it predict the feature's top token where the feature is silent? */
export function drawPredictions({ tokens, groups, auc, rows, latent, python }, { vocab }) {
  const measures = [...groups.map(({ name, n, mean }) => [name, `${name} (${int(n)})`, mean]), ["auc", "true positives above false negatives", auc]];
  return [studyHead({
    definition: ["p(next is ", tokens.map((token) => vocab.label(token)), "): the model's own probability where the feature misses the proxy, against where it fires and elsewhere."], python, name: `predictions-${latent}`,
    rows: () => [...measureRows(measures), [], ["group", "block", "position", "probability"], ...rows],
  }), measureTable(measures)];
}

function drawMisses({ misses, contexts, maximum, counts }, needs, verdicts) {
  const title = el("h3", {}, "Silent where the proxy is true");
  if (misses.n === 0) return [title, empty(counts.n_proxy === 0 ? "The proxy is true nowhere in this corpus: recall has no denominator." : "Nowhere: the feature is active on every proxy token.")];
  const summary = el("p", { class: "reading", "data-verdicts": "" });
  const rows = misses.rows.map((row) => {
    const buttons = el("span", { class: "verdict" });
    const draw = () => buttons.replaceChildren(choice(`verdict-${row}`, VERDICTS, verdicts.of(row), (verdict) => {
      verdicts.put(row, verdict === verdicts.of(row) ? "" : verdict);
      draw();
      summary.textContent = verdicts.summary();
    }));
    draw();
    return drawContext(contexts[row], { ...needs, maximum }, { aside: buttons });
  });
  summary.textContent = verdicts.summary();
  return [title, el("p", { class: "hint" }, `${int(misses.rows.length)} of ${int(misses.n)}, in random order. Judge them by eye: a miss of the feature, or a proxy that is wrong there? Verdicts stay in this browser and go into the CSV, by corpus position, as studies.when.sensitivity.adjudicate takes them.`), summary, contextKey(maximum), contextList(rows, 12)];
}

/** What a reader said of the misses, kept in the browser where it allows that. */
class Verdicts {
  #said = {};

  constructor({ latent, hash, identity, misses, contexts }, blockSize) {
    this.key = `headscope verdicts ${identity} ${latent} ${hash}`;
    this.places = new Map(misses.rows.map((row) => [row, contexts[row].block * blockSize + contexts[row].dst])); // positions in the corpus
    try {
      this.#said = JSON.parse(localStorage.getItem(this.key)) ?? {};
    } catch { /* what cannot be read was never said */ }
  }

  of(row) {
    return this.#said[this.places.get(row)] ?? "";
  }

  put(row, verdict) {
    this.#said[this.places.get(row)] = verdict;
    try {
      localStorage.setItem(this.key, JSON.stringify(this.#said));
    } catch { /* it stays until the page is left */ }
  }

  summary() {
    const said = [...this.places.keys()].map((row) => this.of(row)).filter(Boolean);
    const count = (name) => said.filter((verdict) => verdict === name).length;
    return said.length === 0 ? "none judged yet" : `${said.length} judged: ${VERDICTS.map(([name]) => `${count(name)} ${name}`).join(", ")}`;
  }
}
