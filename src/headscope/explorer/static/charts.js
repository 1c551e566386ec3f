/** Charts of the deep-dive tabs: bars in two parts, curves with a band; numbers under the pointer, a mark that can be moved. */
import { el, svg } from "./dom.js";
import { ticks } from "./format.js";

const [PLOT_WIDTH, PLOT_HEIGHT, PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_FOOT] = [460, 230, 44, 12, 14, 38];

/**
 * A pair of axes. `x` and `y` of the result turn values into places, `at` turns a pointer event into a value of x.
 * @param {{name: string, title: string, x: [number, number], y: [number, number], xLabel: string, yLabel: string, log?: boolean,
 *   xTick?: (value: number) => string, yTick?: (value: number) => string}} axes log: the vertical axis, whose y[0] is above 0
 */
function frame({ name, title, x: [low, high], y: [floor, most], xLabel, yLabel, log = false, xTick = String, yTick = String }) {
  const [wide, tall] = [PLOT_WIDTH - PLOT_LEFT - PLOT_RIGHT, PLOT_HEIGHT - PLOT_TOP - PLOT_FOOT];
  const x = (value) => PLOT_LEFT + ((value - low) / (high - low || 1)) * wide;
  const level = (value) => (log ? Math.log(Math.max(value, floor) / floor) / (Math.log(most / floor) || 1) : (value - floor) / (most - floor || 1));
  const y = (value) => PLOT_TOP + (1 - Math.max(0, Math.min(level(value), 1))) * tall;
  const base = PLOT_TOP + tall;
  const body = svg("g");
  const chart = svg("svg", { class: "chart", viewBox: `0 0 ${PLOT_WIDTH} ${PLOT_HEIGHT}`, role: "img", "data-chart": name, "aria-label": title },
    marks(floor, most, log).map((value) => svg("g", { class: "level" }, svg("line", { x1: PLOT_LEFT, x2: PLOT_WIDTH - PLOT_RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: PLOT_LEFT - 5, y: y(value) + 3.5, "text-anchor": "end" }, yTick(value)))),
    body, svg("line", { class: "axis", x1: PLOT_LEFT, x2: PLOT_WIDTH - PLOT_RIGHT, y1: base, y2: base }),
    across(low, high).map((value) => svg("text", { x: x(value), y: base + 14, "text-anchor": "middle" }, xTick(value))),
    svg("text", { class: "axis-label", x: PLOT_LEFT + wide / 2, y: PLOT_HEIGHT - 5, "text-anchor": "middle" }, xLabel));
  const at = ({ clientX }) => {
    const box = chart.getBoundingClientRect();
    const place = ((clientX - box.left) / box.width) * PLOT_WIDTH;
    return place < PLOT_LEFT - 4 || place > PLOT_WIDTH - PLOT_RIGHT + 4 ? null : low + Math.max(0, Math.min((place - PLOT_LEFT) / wide, 1)) * (high - low);
  };
  return { chart, body, x, y, base, at, figure: (legend) => el("figure", { class: "plot" }, el("figcaption", {}, title), el("p", { class: "unit" }, yLabel), chart, legend) };
}

function across(low, high) {
  if (low >= 0) return ticks(high, 5).filter((value) => value >= low);
  return [...ticks(-low, 2).slice(1).map((value) => -value), ...ticks(high, 3)];
}

/** Levels of the vertical axis: round numbers, or decades, every other one where there are many. */
function marks(floor, most, log) {
  if (!log) return floor < 0 ? across(floor, most) : ticks(most, 4);
  const [first, last] = [Math.ceil(Math.log10(floor) - 1e-9), Math.floor(Math.log10(most) + 1e-9)];
  const step = Math.max(1, Math.ceil((last - first) / 4));
  return Array.from({ length: Math.floor((last - first) / step) + 1 }, (_, i) => Number(`1e${first + i * step}`));
}

/** Show `facts(value)` beside the pointer. */
function hover({ chart, at }, tip, facts) {
  chart.addEventListener("pointermove", (event) => {
    const value = at(event);
    const content = value === null ? null : facts(value);
    if (!content) return tip.leave();
    const box = chart.getBoundingClientRect();
    tip.show({ getBoundingClientRect: () => new DOMRect(event.clientX, box.top, 0, box.height) }, content.map((line) => el("div", {}, line)));
  });
  chart.addEventListener("pointerleave", () => tip.leave());
}

/**
 * Bars of which the lower part is the proxy's: both parts are read against the axis, also a logarithmic one, since the
 * lower part is drawn over the whole.
 * @param {{inside: number[], outside: number[], low?: number, high: number, log?: boolean, facts: (bin: number) => string[], tip: object}} data
 */
export function drawParts({ inside, outside, low = 0, high, log = false, facts, tip, ...labels }) {
  const whole = inside.map((value, bin) => value + outside[bin]);
  const most = Math.max(...whole, 1e-12);
  const least = Math.min(...[...inside, ...whole].filter((value) => value > 0));
  const floor = log ? (least >= 1 ? 0.5 : 10 ** Math.floor(Math.log10(least) - 1e-9)) : 0;
  const axes = frame({ ...labels, x: [low, high], y: [floor, most], log });
  const { x, y, base } = axes;
  const edge = (bin) => x(low + ((high - low) * bin) / whole.length);
  const bar = (part) => (value, bin) => value > 0 && svg("rect", {
    class: `part-${part}`, "data-bin": bin, x: edge(bin) + 0.2, width: Math.max(0.4, edge(bin + 1) - edge(bin) - 0.4), y: Math.min(y(value), base - 1), height: Math.max(base - y(value), 1),
  });
  axes.body.append(...whole.map(bar("outside")).filter(Boolean), ...inside.map(bar("inside")).filter(Boolean));
  hover(axes, tip, (value) => facts(Math.min(whole.length - 1, Math.floor(((value - low) / (high - low)) * whole.length))));
  return axes.figure(el("p", { class: "legend" }, el("i", { class: "part-inside" }), "proxy true ", el("i", { class: "part-outside" }), "proxy false"));
}

/**
 * A curve, with a band where it has one. `mark(value)` of the result puts the mark at a value of x.
 * @param {{x: number[], y: (number|null)[], low?: (number|null)[], high?: (number|null)[], reference?: {x: number[], y: number[], label: string},
 *   facts: (i: number) => string[], pick?: (i: number) => void, step?: boolean, tip: object}} data
 */
export function drawCurve({ x: along, y: values, low, high, reference, facts, pick, step = false, tip, xRange = [0, 1], yRange = [0, 1], legend, ...labels }) {
  const axes = frame({ ...labels, x: xRange, y: yRange });
  const { x, y } = axes;
  const line = (xs, ys, stepped = step) => xs.map((value, i) => [value, ys[i]]).filter(([, value]) => value !== null && value !== undefined)
    .map(([at, value], i) => `${i ? (stepped ? `H${x(at).toFixed(1)}V` : `L${x(at).toFixed(1)} `) : `M${x(at).toFixed(1)} `}${y(value).toFixed(1)}`).join("");
  const known = low ? along.map((at, i) => [at, low[i], high[i]]).filter(([, bottom]) => bottom !== null) : [];
  const band = known.length > 1 && svg("path", { class: "band", d: `${line(known.map(([at]) => at), known.map(([, bottom]) => bottom))}L${known.toReversed().map(([at, , top]) => `${x(at).toFixed(1)} ${y(top).toFixed(1)}`).join("L")}Z` });
  const marker = svg("line", { class: "marker", y1: y(yRange[1]), y2: y(yRange[0]), visibility: "hidden" });
  axes.body.append(...[band, reference && svg("path", { class: "reference", d: line(reference.x, reference.y, false) }), svg("path", { class: "curve", d: line(along, values) }), marker].filter(Boolean));
  const nearest = (value) => along.reduce((best, at, i) => (Math.abs(at - value) < Math.abs(along[best] - value) ? i : best), 0);
  hover(axes, tip, (value) => (along.length ? facts(nearest(value)) : null));
  if (pick) axes.chart.addEventListener("click", (event) => axes.at(event) !== null && pick(nearest(axes.at(event))));
  const mark = (value) => {
    marker.setAttribute("visibility", "visible");
    for (const end of ["x1", "x2"]) marker.setAttribute(end, x(value));
  };
  const key = el("p", { class: "legend" }, el("i", { class: "curve" }), legend ?? "", known.length > 1 && [" ", el("i", { class: "band" }), "95 % interval"], reference && [" ", el("i", { class: "reference" }), reference.label]);
  return { figure: axes.figure(key), mark };
}

/**
 * Outlines of several histograms over the same bins, told apart by dashes as well as colour.
 * @param {{edges: number[], series: {name: string, counts: number[]}[], log?: boolean, facts: (bin: number) => string[], tip: object}} data
 */
export function drawSteps({ edges, series, log = false, facts, tip, ...labels }) {
  const most = Math.max(...series.flatMap(({ counts }) => counts), 1);
  const axes = frame({ ...labels, x: [edges[0], edges.at(-1)], y: [log ? 0.5 : 0, most], log });
  const { x, y, base } = axes;
  const outline = (counts) => `M${x(edges[0]).toFixed(1)} ${base}${counts.map((n, bin) => `V${(n > 0 ? y(n) : base).toFixed(1)}H${x(edges[bin + 1]).toFixed(1)}`).join("")}V${base}`;
  if (edges[0] < 0 && edges.at(-1) > 0) axes.body.append(svg("line", { class: "zero", x1: x(0), x2: x(0), y1: y(most), y2: base }));
  axes.body.append(...series.map(({ name, counts }, i) => svg("path", { class: `series series-${i % 4}`, "data-series": name, d: outline(counts) })));
  const width = (edges.at(-1) - edges[0]) / (edges.length - 1);
  hover(axes, tip, (value) => facts(Math.min(edges.length - 2, Math.floor((value - edges[0]) / width))));
  return axes.figure(el("p", { class: "legend" }, series.map(({ name }, i) => [svg("svg", { width: 24, height: 8 }, svg("path", { class: `series series-${i % 4}`, d: "M0 4H24" })), `${name} `])));
}
