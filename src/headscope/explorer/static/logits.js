/** What a feature writes to the logits, and which source tokens it reads: short lists of tokens with numbers. */
import { button, el, unit } from "./dom.js";
import { int, pct, signed } from "./format.js";

const FEW = 10;

/** @param {import("./types").Feature["logits"]} logits @param {import("./vocab.js").Vocab} vocab */
export function drawLogits({ top, bottom }, vocab) {
  const most = Math.max(...[...top, ...bottom].map(([, value]) => Math.abs(value)), 1e-9);
  const side = (name, rows) => el("ol", { class: `bars ${name}`, "data-logits": name }, rows.map(([id, value], i) =>
    el("li", { class: i < FEW ? null : "more", vars: { "--r": unit(Math.abs(value) / most) } }, vocab.label(id), el("span", { class: "value" }, signed(value, 2)))));
  const columns = el("div", { class: "columns" }, side("positive", top), side("negative", bottom));
  const toggle = button({
    class: "quiet", "data-more": "logits", "aria-expanded": "false",
    onclick: () => {
      const open = columns.classList.toggle("open");
      toggle.setAttribute("aria-expanded", String(open));
      toggle.textContent = `show ${open ? FEW : top.length}`;
    },
  }, `show ${top.length}`);
  return [columns, top.length > FEW && toggle];
}

/** Source tokens that carry the DFA of the shown examples. @param {import("./types").Feature["sources"]} sources */
export function drawSources(sources, vocab) {
  return el("ol", { class: "bars columns", "data-sources": "" }, sources.slice(0, 8).map(([id, share, n]) => el("li", {
    title: `a source in ${int(n)} of the examples shown`, vars: { "--r": unit(share) },
  }, vocab.label(id), el("span", { class: "value" }, pct(share)))));
}
