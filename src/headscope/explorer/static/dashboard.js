/** The whole SAE at a glance: densities, top heads beside the null, and any two columns against each other. */
import { button, el, svg } from "./dom.js";
import { int, short, ticks } from "./format.js";
import { Scatter } from "./scatter.js";
import { drawAbout } from "./table.js";

const [CHART_WIDTH, CHART_HEIGHT, LEFT_EDGE, FLOOR] = [440, 164, 40, 140];
const RIGHT_EDGE = 18;
const DASHES = ["none", "5 3", "1.5 3"]; // series differ by dash as well as by colour

export class Dashboard {
  /**
   * @param {import("./list.js").FeatureList} features @param {import("./types").About} about
   * @param {{change: (patch: object) => void, link: (patch: object) => string, tip: import("./tip.js").Tip}} on
   */
  constructor(features, about, on) {
    Object.assign(this, { features, on });
    this.numeric = features.columns.filter(({ kind }) => ["int", "float", "percent"].includes(kind));
    const { rows } = features;
    const alive = [...rows.latent.keys()].filter((row) => rows.alive[row]);
    const densities = alive.map((row) => Math.log10(rows.density[row]));
    const lowest = Math.floor(densities.reduce((least, value) => Math.min(least, value), -1));
    this.scatter = new Scatter(features, on);
    this.controls = el("div", { class: "axes" });
    this.found = el("div", { class: "found", "data-found": "" });
    const { definitions } = about;
    this.element = el("main", { class: "index" }, drawAbout(about), el("section", { class: "dashboard", "data-dashboard": "" },
      el("header", {}, el("h1", {}, about.title), el("a", { class: "button", href: on.link({ page: "table" }), "data-page": "table" }, "list of features ", el("kbd", {}, "/"))),
      el("div", { class: "figures" },
        figure("Density of live features", definitions["density histogram"], drawDistribution("density", [{ name: "features", values: densities }], { low: lowest, high: 0, bins: 40, tick: (value) => (value ? `1e${value}` : "1"), step: 1 })),
        figure("Top head's share of DFA", definitions["top head histogram"], drawDistribution("top-head", [
          { name: "features", values: alive.map((row) => rows.top_head_share[row]).filter((share) => share !== null) },
          ...about.nulls.map(({ kind, top_head_share: values }) => ({ name: `null: ${kind}`, values })),
        ], { low: 0, high: 1, bins: 40, tick: (value) => `${Math.round(100 * value)} %`, step: 0.2 }))),
      el("figure", { class: "plane" }, el("figcaption", {}, this.controls), this.scatter.element, this.found)));
  }

  /** @param {import("./types").View} view */
  update(view) {
    const { order } = this.features.find(view.list);
    const column = (name) => this.numeric.find((one) => one.name === name) ?? this.numeric[1];
    const axis = (key, log) => [
      el("select", { "data-axis": key, "aria-label": `${key} axis`, onchange: ({ target }) => this.on.change({ [key]: target.value }) },
        this.numeric.map(({ name, label }) => el("option", { value: name, selected: name === view[key] }, label))),
      el("label", {}, el("input", { type: "checkbox", "data-log": key, checked: view[log] === "1", onchange: ({ target }) => this.on.change({ [log]: target.checked ? "1" : "0" }) }), " log"),
    ];
    this.controls.replaceChildren(el("b", {}, "Features"), ...axis("y", "ly"), "against", ...axis("x", "lx"), el("span", { class: "hint" }, "drag a rectangle to list what is in it; click a point to open it"));
    this.scatter.draw({ x: column(view.x), y: column(view.y), logX: view.lx === "1", logY: view.ly === "1", order, list: view.list });
    const { latent } = this.features.rows;
    this.found.replaceChildren(el("b", { "data-n": order.length }, int(order.length)), " in the list ",
      el("a", { class: "button", href: this.on.link({ page: "table" }), "data-page": "table" }, "list them"),
      view.list.box ? button({ class: "button", "data-clear-box": "", onclick: () => this.on.change({ list: { ...view.list, box: "" } }) }, "clear the rectangle") : "",
      ...order.slice(0, 24).map((row) => el("a", { href: this.on.link({ page: "card", latent: latent[row] }), "data-nav": latent[row] }, String(latent[row]))), order.length > 24 ? "…" : "");
  }
}

function figure(title, definition, chart) {
  return el("figure", {}, el("figcaption", { class: "term", title: definition }, title), chart);
}

/** Shares of each series by bin: the first as bars, the others as lines. */
function drawDistribution(name, series, { low, high, bins, tick, step }) {
  const shares = series.map(({ values }) => {
    const counts = Array(bins).fill(0);
    for (const value of values) counts[Math.max(0, Math.min(bins - 1, Math.floor(((value - low) / (high - low)) * bins)))] += 1 / values.length;
    return counts;
  });
  const most = Math.max(...shares.flat(), 1e-9);
  const x = (value) => LEFT_EDGE + ((value - low) / (high - low)) * (CHART_WIDTH - LEFT_EDGE - RIGHT_EDGE);
  const y = (share) => FLOOR - (share / most) * (FLOOR - 10);
  const at = (bin) => x(low + ((high - low) * bin) / bins);
  const outline = (counts) => `M${at(0)} ${FLOOR}${counts.map((share, bin) => `V${y(share)}H${at(bin + 1)}`).join("")}V${FLOOR}`;
  const marks = Array.from({ length: Math.round((high - low) / step) + 1 }, (_, i) => low + i * step);
  return el("div", {}, svg("svg", { class: "distribution", viewBox: `0 0 ${CHART_WIDTH} ${CHART_HEIGHT}`, role: "img", "data-chart": name, "aria-label": name },
    ticks(most, 3).map((share) => svg("g", { class: "level" }, svg("line", { x1: LEFT_EDGE, x2: CHART_WIDTH - RIGHT_EDGE, y1: y(share), y2: y(share) }), svg("text", { x: LEFT_EDGE - 5, y: y(share) + 3.5, "text-anchor": "end" }, `${short(100 * share)} %`))),
    shares[0].map((share, bin) => share > 0 && svg("rect", { class: "bar", "data-share": share, x: at(bin) + 0.4, width: at(bin + 1) - at(bin) - 0.8, y: y(share), height: FLOOR - y(share) })),
    shares.slice(1).map((counts, i) => svg("path", { class: "null-line", "data-series": series[i + 1].name, d: outline(counts), "stroke-dasharray": DASHES[i % DASHES.length] })),
    svg("line", { class: "axis", x1: LEFT_EDGE, x2: CHART_WIDTH - RIGHT_EDGE, y1: FLOOR, y2: FLOOR }), marks.map((value) => svg("text", { x: x(value), y: FLOOR + 16, "text-anchor": "middle" }, tick(value)))),
  el("p", { class: "legend" }, series.map(({ name: label, values }, i) => [i === 0 ? el("i", { class: "dfa" }) : svg("svg", { width: 22, height: 8 }, svg("path", { class: "null-line", d: "M0 4H22", "stroke-dasharray": DASHES[(i - 1) % DASHES.length] })), `${label} (${int(values.length)}) `])));
}
