/** The tab "Logits", and the loss effect that a study added to the index of this feature. */
import { el, term, unit } from "./dom.js";
import { int, num, pct, signed } from "./format.js";
import { empty, quoted, studyHead } from "./study.js";

const MOMENTS = [["mean", "mean over the vocabulary"], ["std", "standard deviation"], ["skew", "skewness"], ["kurtosis", "kurtosis (normal: 3)"]];

export function drawLogitsTab({ latent, logits }, { prominence, copied, top_source: source, copy_rank: rank, python }, { vocab, about }) {
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
      rank !== null && el("p", { class: "definition", title: definitions.copy_rank ?? "" }, `Copying: ${pct(rank)} of the vocabulary, attended to alone, would excite this feature more than its top logit token.`)))];
}

/** Whether what the feature raises most is what it reads most. */
function copySentence(copied, top, source) {
  if (copied === null) return ["No source tokens are known: whether the top logit token is copied cannot be said."];
  return copied ? ["Copied: the top logit token ", top, " is the top source token too."] : ["Not copied: the top logit token is ", top, ", the top source token ", source, "."];
}

const EFFECTS = {
  n: "active tokens with a next one", sampled: "of these, looked at", mean: "mean loss change", total: "summed loss change", importance: "loss change a token of the corpus", increase: "summed loss increase",
  top_token: "top logit token", top_rate: "next token is that one", top_share: "its share of the loss increase", top_share_net: "its share of the summed change", null_mean: "mean loss change, random directions",
};

/** The loss effect by the direct path that the index has of this feature: values with their intervals, and definitions. */
export function drawLossEffect({ effects: own }, vocab) {
  if (!own) return [];
  const title = el("h3", {}, "Loss effect by the direct path");
  if (own.refused) return [title, empty(own.refused)];
  const shown = (name, value) => (value === null ? "–" : name === "top_token" ? vocab.label(value) : Number.isInteger(value) ? int(value) : num(value, 5));
  const interval = (name) => typeof own.values[`${name}_low`] === "number" && ` [${num(own.values[`${name}_low`])}, ${num(own.values[`${name}_high`])}]`;
  return [title, el("p", { class: "definition", "data-provenance": "effects" }, `n over all features = ${int(Number(own.n))}; ${own.created.slice(0, 10)}, headscope ${own.headscope}.`),
    el("table", { class: "measures wide", "data-columns": "effects" }, Object.entries(own.values).filter(([name]) => name in EFFECTS).map(([name, value]) =>
      el("tr", { "data-column": name }, el("th", { scope: "row" }, EFFECTS[name]), el("td", {}, shown(name, value), interval(name)), el("td", { class: "definition" }, own.definitions[name] ?? ""))))];
}
