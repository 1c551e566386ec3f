/** Which heads write a feature: shares by DFA, decoder and encoder in one row a head, and the strip beside an example. */
import { el, svg, unit } from "./dom.js";
import { pct, signed } from "./format.js";

const [WIDE, FROM, TO] = [312, 34, 262];
const SHARES = {
  dfa: "DFA, squared", dfa_cov: "DFA, covariance", dfa_mean: "DFA, mean", decoder: "decoder norm", decoder_out: "decoder through W_O, basis-free",
  encoder: "encoder norm", encoder_in: "encoder through W_V, basis-free",
};

/** The index of the largest value. */
export function largest(values) {
  return values.indexOf(Math.max(...values));
}

/** How DFA and decoder disagree, in words; null where they do not. @param {import("./types").Feature["heads"]} heads */
export function disagreement({ dfa, decoder, disagreement: apart }, names) {
  const [byDfa, byDecoder] = [largest(dfa), largest(decoder)];
  if (byDfa === byDecoder && !(apart > 0.3)) return null;
  const heads = byDfa === byDecoder ? `share out differently, though both name ${names[byDfa]} first` : `disagree: DFA names ${names[byDfa]}, the decoder ${names[byDecoder]}`;
  return `⚑ DFA and decoder norms ${heads}; ${pct(apart)} of the shares apart`;
}

/**
 * Draw the rows: a bar for DFA, a ring for the decoder, a tick for the encoder.
 * @param {import("./types").Feature["heads"]} heads
 * @param {{tip: import("./tip.js").Tip, hover: (head: number|null) => void, press: (head: number) => void}} on
 */
export function drawHeads(heads, names, on) {
  const { dfa, decoder, encoder } = heads;
  const row = names.length > 12 ? 11 : names.length > 8 ? 13 : 15;
  const most = Math.max(...dfa, ...decoder, ...encoder, 1e-9);
  const x = (share) => FROM + (share / most) * (TO - FROM);
  const chart = svg("svg", { class: "heads", viewBox: `0 0 ${WIDE} ${row * names.length + 2}`, role: "group", "aria-label": "heads" });
  names.forEach((name, h) => {
    const y = row * (h + 0.5) + 1;
    const label = (at, text, kind) => svg("text", { class: kind, x: at, y: y + 3.5, "text-anchor": "end" }, text);
    const line = svg("g", {
      class: "head", "data-head": name, role: "button", tabindex: 0, "aria-label": `head ${name}: ${pct(dfa[h])} of DFA`,
      onpointerenter: () => { on.hover(h); on.tip.show(line, headFacts(heads, names, h)); },
      onpointerleave: () => { on.hover(null); on.tip.leave(); },
      onclick: () => on.press(h),
      onkeydown: (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        on.press(h);
      },
    }, svg("rect", { class: "hit", y: y - row / 2, width: WIDE, height: row, rx: 3 }), label(FROM - 8, name),
    svg("rect", { class: "dfa", x: FROM, y: y - row * 0.27, width: x(dfa[h]) - FROM + 0.5, height: row * 0.54 }),
    svg("line", { class: "encoder", x1: x(encoder[h]), x2: x(encoder[h]), y1: y - row * 0.4, y2: y + row * 0.4 }),
    svg("circle", { class: "decoder", cx: x(decoder[h]), cy: y, r: row * 0.2 }), label(WIDE - 4, pct(dfa[h]), "value"));
    chart.append(line);
  });
  return chart;
}

/** Mark the pressed head, or none. */
export function pressHead(chart, name) {
  for (const line of chart.children) line.setAttribute("aria-pressed", String(line.dataset.head === name));
}

function headFacts(heads, names, h) {
  return [el("div", { class: "tip-title" }, `head ${names[h]}`), facts(Object.entries(SHARES).map(([key, label]) => [label, pct(heads[key]?.[h])])),
    el("div", { class: "hint" }, "press: show this head's sources only")];
}

/** Rows of a tooltip. */
export function facts(rows, kind) {
  return el("table", { class: kind }, rows.map(([label, value]) => el("tr", {}, el("th", {}, label), el("td", {}, value))));
}

/** An example's DFA by head as small signed bars; `paintStrip` draws them. */
export function headStrip() {
  return svg("svg", { class: "strip", "aria-hidden": "true" }, ["off", "plus", "minus", "zero"].map((name) => svg("path", { class: name })));
}

/** Draw a strip; where a head is given, the others are faint. @param {number[]} values @param {number|null} head */
export function paintStrip(strip, values, head) {
  const [step, height] = [Math.min(7, 64 / values.length), 20];
  const [top, bottom] = [Math.max(...values, 0), Math.min(...values, 0)];
  const scale = (height - 2) / (top - bottom || 1);
  const zero = 1 + top * scale;
  const bars = { off: "", plus: "", minus: "", zero: `M0 ${zero}h${step * values.length}` };
  values.forEach((value, h) => {
    bars[head !== null && head !== h ? "off" : value < 0 ? "minus" : "plus"] += `M${step * h + 0.5} ${zero}h${step - 1.3}v${-value * scale}h${1.3 - step}z`;
  });
  for (const path of strip.children) path.setAttribute("d", bars[path.getAttribute("class")]);
  strip.setAttribute("width", step * values.length);
  strip.setAttribute("height", height);
}

/** DFA by head, with attention where it is known, the largest first; for tooltips. */
export function headGrid(names, { heads, attention, other }) {
  const most = Math.max(...heads.map(Math.abs), 1e-12);
  const order = [...heads.keys()].sort((a, b) => Math.abs(heads[b]) - Math.abs(heads[a])).slice(0, 12);
  const known = attention?.some((share) => share > 0);
  return el("table", { class: "by-head" }, el("tr", {}, ["head", "DFA", known && "attention"].filter(Boolean).map((title) => el("th", {}, title))),
    order.map((h) => el("tr", { "data-head-value": names[h] }, el("th", {}, names[h]),
      el("td", { class: heads[h] < 0 ? "cell minus" : "cell", vars: { "--r": unit(Math.abs(heads[h]) / most) } }, signed(heads[h])), known && el("td", {}, pct(attention[h])))),
    Math.abs(other ?? 0) > 1e-9 && el("tr", {}, el("th", {}, "small parts"), el("td", {}, signed(other))));
}
