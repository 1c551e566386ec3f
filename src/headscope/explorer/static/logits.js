/** What a feature writes to the logits: the tokens it raises and lowers most. */
import { el, more, unit } from "./dom.js";
import { signed } from "./format.js";

const FEW = 10;

/** The list, and the button that lengthens it. @param {import("./types").Feature["logits"]} logits @param {import("./vocab.js").Vocab} vocab */
export function drawLogits({ top, bottom }, vocab) {
  const most = Math.max(...[...top, ...bottom].map(([, value]) => Math.abs(value)), 1e-9);
  const side = (name, rows) => el("ol", { class: `bars ${name}`, "data-logits": name }, rows.map(([id, value], i) =>
    el("li", { class: i < FEW ? null : "more", vars: { "--r": unit(Math.abs(value) / most) } }, vocab.label(id), el("span", { class: "value" }, signed(value, 2)))));
  const columns = el("div", { class: "columns" }, side("positive", top), side("negative", bottom));
  return [columns, more(columns, "logits", FEW, top.length)];
}
