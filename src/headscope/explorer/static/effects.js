/** The tab "Logits", and what studies added to the index of this feature. */
import { el, term, unit } from "./dom.js";
import { int, num, pct, signed } from "./format.js";
import { empty, quoted, studyHead } from "./study.js";

const MOMENTS = [["mean", "mean over the vocabulary"], ["std", "standard deviation"], ["skew", "skewness"], ["kurtosis", "kurtosis (normal: 3)"]];

export function drawLogitsTab({ latent, logits }, { prominence, copied, top_source: source, copy_rank: rank, python }, { columns }, { vocab, about, names }) {
  const [[top]] = logits.top;
  const { definitions, sae, model } = about;
  const head = studyHead({
    definition: `Direct logit effect per unit of activation: decoder row × W_O × final norm's gain × W_U, the norm's scale left out; of ${int(model.d_vocab ?? vocab.tokens.length)} tokens. From the weights of ${sae.name} alone: no corpus.`, python, name: `logits-${latent}`,
    rows: () => [["side", "token_id", "token", "logit"], ...["top", "bottom"].flatMap((side) => logits[side].map(([token, value]) => [side, token, quoted(vocab.text(token)), value])), [], ["moment", "value"], ...MOMENTS.map(([name]) => [name, logits[name]]), [], ["copying", "value", "token"], ["prominence", prominence], ["copied", copied], ["top_source", source, source === null ? null : quoted(vocab.text(source))], ["copy_rank", rank]],
  });
  const most = Math.max(...[...logits.top, ...logits.bottom].map(([, value]) => Math.abs(value)), 1e-9);
  const list = (title, pairs, side) => el("section", {}, el("h3", {}, title), el("ol", { class: `bars ${side}`, "data-logit-list": side },
    pairs.map(([token, value]) => el("li", { vars: { "--r": unit(Math.abs(value) / most) } }, vocab.label(token), el("span", { class: "value" }, signed(value))))));
  return [head, el("div", { class: "thirds" }, list("Raised most", logits.top, "positive"), list("Lowered most", logits.bottom, "negative"),
    el("section", {}, el("h3", {}, term("Distribution", definitions.logits ?? "")), el("table", { class: "measures", "data-moments": "" }, MOMENTS.map(([name, label]) => el("tr", {}, el("th", { scope: "row" }, label), el("td", {}, num(logits[name])))),
        el("tr", {}, el("th", { scope: "row" }, term("prominence", "standard deviations by which the top token stands above the mean")), el("td", { "data-prominence": "" }, num(prominence)))),
      el("p", { "data-copied-source": String(copied) }, ...copySentence(copied, vocab.label(top), source === null ? null : vocab.label(source))),
      rank !== null && el("p", { class: "definition", title: definitions.copy_rank ?? "" }, `Copying: ${pct(rank)} of the vocabulary, attended to alone, would excite this feature more than its top logit token.`))),
  ...drawColumns(columns, "effects", vocab, names)];
}

/** Whether what the feature raises most is what it reads most. */
function copySentence(copied, top, source) {
  if (copied === null) return ["No source tokens are known: whether the top logit token is copied cannot be said."];
  return copied ? ["Copied: the top logit token ", top, " is the top source token too."] : ["Not copied: the top logit token is ", top, ", the top source token ", source, "."];
}

/** Columns of one study for this feature, with their definitions and where they are from. */
export function drawColumns(columns, study, vocab) {
  const own = columns[study];
  if (!own) return [];
  if (own.refused) return [el("h3", {}, `${study} of the index`), empty(own.refused)];
  return [el("h3", {}, `From the index: ${study}`), el("p", { class: "definition", "data-provenance": study }, `n over all features = ${/^\d+$/.test(own.n) ? int(Number(own.n)) : own.n}; ${own.created.slice(0, 10)}, headscope ${own.headscope}.`),
    el("table", { class: "measures wide", "data-columns": study }, Object.entries(own.values).map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name),
      el("td", {}, value === null ? "–" : /token$/.test(name) && Number.isInteger(value) ? vocab.label(value) : typeof value === "number" ? (Number.isInteger(value) ? int(value) : num(value, 5)) : String(value)), el("td", { class: "definition" }, own.definitions[name] ?? ""))))];
}
