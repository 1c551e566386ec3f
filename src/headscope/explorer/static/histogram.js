/** How strongly a feature fires when it fires: non-zero activations in bins, counts or mass, linear or log. */
import { el, svg, unit } from "./dom.js";
import { int, num, pct, short, ticks } from "./format.js";

const [WIDTH, LEFT, RIGHT, TOP, BASE] = [312, 34, 306, 8, 96];

/**
 * Draw the histogram; `mark(value)` of the result shows a line at an activation, `mark(null)` removes it.
 * @param {import("./types").Feature["histogram"]} histogram
 */
export function drawHistogram({ counts, mass }, { max, log, byMass, tip }) {
  const edges = Array.from({ length: counts.length + 1 }, (_, i) => (max * i) / counts.length);
  const values = byMass ? mass : counts;
  const total = values.reduce((sum, value) => sum + value, 0);
  const [low, high, most] = [edges[0], edges.at(-1), Math.max(...values)];
  const floor = log ? logFloor(values) : 0;
  const x = (value) => LEFT + ((value - low) / (high - low)) * (RIGHT - LEFT);
  const level = (value) => (log ? Math.log(value / floor) / Math.log(most / floor) : value / most);
  const y = (value) => BASE - (value > floor ? Math.max(level(value), 0.008) : 0) * (BASE - TOP);
  const bars = values.map((value, bin) => value > 0 && svg("rect", {
    class: "bar", "data-bin": bin, x: x(edges[bin]) + 0.4, width: x(edges[bin + 1]) - x(edges[bin]) - 0.8,
    y: y(value), height: BASE - y(value), vars: { "--a": unit(bin / values.length) },
  }));
  const marker = svg("line", { class: "marker", y1: TOP - 4, y2: BASE, visibility: "hidden" });
  const chart = svg("svg", {
    class: "histogram", viewBox: `0 0 ${WIDTH} 116`, role: "img", "data-scale": log ? "log" : "linear", "data-weight": byMass ? "mass" : "counts",
    "aria-label": `activations up to ${num(high)}`,
  }, levels(most, floor).map((value) => svg("g", { class: "level" }, svg("line", { x1: LEFT, x2: RIGHT, y1: y(value), y2: y(value) }),
    svg("text", { x: LEFT - 5, y: y(value) + 3.5, "text-anchor": "end" }, short(value)))),
  bars, svg("line", { class: "axis", x1: LEFT, x2: RIGHT, y1: BASE, y2: BASE }),
  ticks(high, 5).filter((value) => value >= low).map((value) => svg("text", { x: x(value), y: 110, "text-anchor": "middle" }, short(value))), marker);
  chart.addEventListener("pointermove", ({ clientX }) => {
    const box = chart.getBoundingClientRect();
    const bin = Math.floor(((clientX - box.left) / box.width * WIDTH - LEFT) / (RIGHT - LEFT) * values.length);
    if (!(bin in values)) return tip.leave();
    const share = pct(values[bin] / total);
    tip.show({ getBoundingClientRect: () => new DOMRect(clientX, box.top, 0, box.height) }, [
      el("div", {}, `activation ${num(edges[bin])} to ${num(edges[bin + 1])}`),
      el("div", {}, byMass ? `${share} of activation mass` : `${int(counts[bin])} tokens, ${share} of active`)]);
  });
  chart.addEventListener("pointerleave", () => tip.leave());
  const mark = (value) => {
    marker.setAttribute("visibility", value === null ? "hidden" : "visible");
    for (const end of ["x1", "x2"]) marker.setAttribute(end, x(value ?? low));
  };
  return { chart, mark };
}

/** Where a log axis starts: half a token, or the decade below the smallest mass. */
function logFloor(values) {
  const least = Math.min(...values.filter((value) => value > 0));
  return least >= 1 ? 0.5 : 10 ** (Math.ceil(Math.log10(least)) - 1);
}

/** Round levels of the vertical axis; on a log axis, decades, every other one where there are many. */
function levels(most, floor) {
  if (!floor) return ticks(most, 3);
  const [first, last] = [Math.ceil(Math.log10(floor)), Math.floor(Math.log10(most))];
  const step = last - first > 4 ? 2 : 1;
  return Array.from({ length: Math.floor((last - first) / step) + 1 }, (_, i) => Number(`1e${first + i * step}`));
}
