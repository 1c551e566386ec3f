/** The tab "DFA by head": how much of a feature each head makes, by every definition, above a threshold. */
import { barsKey, drawBars } from "./bars.js";
import { el } from "./dom.js";
import { int, num, pct } from "./format.js";
import { disagreement, facts } from "./heads.js";
import { empty, measureRows, measureText, studyHead } from "./study.js";

const BY_DFA = [["squared", "Sum of squares"], ["covariance", "Covariance"], ["linear", "Mean"]];
const BY_WEIGHTS = [["decoder", "Decoder norm, z"], ["decoder_out", "Decoder norm, residual"], ["encoder", "Encoder norm, z"], ["encoder_in", "Encoder norm, residual"]];

export function drawHeadShares(found, view, { names, tip, change, feature }) {
  const { thresholds, weights, latent, corpus } = found;
  const measured = (at) => BY_DFA.flatMap(([name, label]) => at.heads.map((head, h) => [`${name} ${names[h]}`, `${label} ${names[h]}`, head[name]]));
  const head = studyHead({
    definition: `Share of each head in the pre-activation's DFA, C_h, over n = ${int(thresholds[0].n)} active tokens of ${corpus}, or those above a threshold; and of the weights alone.`, python: found.python, name: `dfa-by-head-${latent}`,
    rows: () => [...thresholds.flatMap((at) => [[`threshold ${at.threshold}`, `n ${at.n}`], ...measureRows(measured(at))]), [], ["weights", ...names], ...Object.entries(weights).map(([name, { shares }]) => [name, ...shares])],
  });
  const panels = el("div", { class: "share-panels", "data-panels": "" });
  const said = el("output", { class: "reading", "data-reading": "" });
  const draw = (i) => {
    const at = thresholds[i];
    said.textContent = `f > ${at.threshold === 0 ? 0 : num(at.threshold)}: ${int(at.n)} active tokens`;
    panels.replaceChildren(...BY_DFA.map(([name, label]) => drawMeasured(name, label, at, names, tip)), ...BY_WEIGHTS.map(([name, label]) => drawWeights(name, label, weights[name], names, tip)));
  };
  const slider = el("input", { type: "range", min: 0, max: thresholds.length - 1, step: 1, "aria-label": "threshold of the activation", "data-threshold": "", oninput: () => draw(Number(slider.value)), onchange: () => change({ at: slider.value === "0" ? "" : slider.value }) });
  const chosen = Math.min(thresholds.length - 1, Math.max(0, Math.floor(Number(view.at)) || 0));
  slider.value = String(chosen);
  draw(chosen);
  const differ = disagreement(feature.heads, names);
  return [head, thresholds[0].n === 0 ? empty("Never active: there is only what its weights say.") : el("label", { class: "slider" }, "activation above ", slider, said), barsKey(), panels, differ && el("p", { class: "flag" }, differ),
    el("p", { class: "definition" }, "Null: random directions of z, as often active as real features. Shares by weight norms have no interval, since they are of the weights alone; by chance each would be ", el("b", {}, pct(1 / names.length)), ".")];
}

function drawMeasured(name, title, { heads }, names, tip) {
  return drawBars({
    name, title, definition: heads[0][name].definition, write: pct, tip, rows: heads.map(({ [name]: measure }, h) => ({
      label: names[h], ...measure, chance: measure.null, facts: () => [el("div", { class: "tip-title" }, `head ${names[h]}`), facts([[title, measureText(measure)], ["null", measure.null ? `${pct(measure.null.value)} [${pct(measure.null.low)}, ${pct(measure.null.high)}]` : "none"], ["n", int(measure.n)]]), measure.missing && el("div", { class: "hint" }, measure.missing)].filter(Boolean),
    })),
  });
}

function drawWeights(name, title, { definition, shares }, names, tip) {
  const even = 1 / names.length;
  return drawBars({ name, title, definition, write: pct, tip, rows: shares.map((value, h) => ({ label: names[h], value, chance: { value: even, low: even, high: even }, facts: () => [el("div", { class: "tip-title" }, `head ${names[h]}`), facts([[title, pct(value)], ["by chance", pct(even)]])] })) });
}
