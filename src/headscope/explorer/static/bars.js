/** Bars of shares, one a row, with their interval and with what there is by chance. */
import { el, svg, term } from "./dom.js";

const [BARS_WIDE, BARS_RIGHT, BAR_ROW, BAR_LETTER] = [300, 52, 18, 5.6];

/**
 * @param {{name: string, title: string, definition?: string, write: (value: number) => string, tip: import("./tip.js").Tip, legend?: any, range?: [number, number],
 *   rows: {label: string, value: number|null, low?: number|null, high?: number|null, chance?: {value: number, low: number, high: number}|null, series?: number, missing?: string|null, facts: () => any[]}[]}} data
 *   chance: where there is nothing to find, mean and range; series: which of several kinds of bar.
 */
export function drawBars({ name, title, definition = "", rows, write, tip, legend, range }) {
  const known = rows.flatMap(({ value, low, high, chance }) => [value, low, high, chance?.low, chance?.high]).filter((value) => typeof value === "number");
  const [bottom, top] = range ?? [Math.min(0, ...known), Math.max(1e-9, ...known)];
  const left = Math.max(36, ...rows.map(({ label }) => label.length * BAR_LETTER + 10));
  const wide = BARS_WIDE - left - BARS_RIGHT;
  const x = (value) => left + ((Math.max(bottom, Math.min(value, top)) - bottom) / (top - bottom)) * wide;
  const chart = svg("svg", { class: "chart share-bars", viewBox: `0 0 ${BARS_WIDE} ${rows.length * BAR_ROW + 4}`, role: "group", "aria-label": title, "data-bars": name },
    rows.map(({ label, value, low, high, chance, series = 0, missing, facts }, i) => {
      const y = i * BAR_ROW + 2;
      const bar = value !== null && svg("rect", { class: `bar-${series}${value < 0 ? " minus" : ""}`, x: Math.min(x(0), x(value)), y: y + 4, width: Math.max(Math.abs(x(value) - x(0)), 0.8), height: BAR_ROW - 8 });
      const interval = typeof low === "number" && svg("path", { class: "whisker", d: `M${x(low)} ${y + 5}v${BAR_ROW - 10}M${x(low)} ${y + BAR_ROW / 2}H${x(high)}M${x(high)} ${y + 5}v${BAR_ROW - 10}` });
      const by = chance && [svg("rect", { class: "chance", x: x(chance.low), y: y + 1, width: Math.max(x(chance.high) - x(chance.low), 1), height: BAR_ROW - 2 }), svg("line", { class: "chance-mean", x1: x(chance.value), x2: x(chance.value), y1: y + 1, y2: y + BAR_ROW - 1 })];
      return svg("g", { class: "share-row", tabindex: 0, role: "img", "aria-label": `${label || "same head"}: ${value === null ? missing : write(value)}`, "data-row": label, "data-value": value, ...tip.on(facts) },
        svg("rect", { class: "hit", y, width: BARS_WIDE, height: BAR_ROW }), by, bar, interval, svg("text", { x: left - 6, y: y + BAR_ROW / 2 + 4, "text-anchor": "end" }, label),
        svg("text", { class: "value", x: BARS_WIDE - 2, y: y + BAR_ROW / 2 + 4, "text-anchor": "end" }, value === null ? "–" : write(value)));
    }), svg("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: rows.length * BAR_ROW + 2 }));
  return el("figure", { class: "plot shares", "data-plot": name }, el("figcaption", {}, term(title, definition)), chart, legend);
}

/** What the marks of bars mean. */
export function barsKey(chance = true) {
  return el("p", { class: "legend", "data-bars-key": "" }, el("i", { class: "bar-0" }), "share ", el("i", { class: "whisker" }), "95 % interval ", chance && [el("i", { class: "chance" }), "null: mean and range"]);
}
