/** An example head by head (rows) and source by source (columns): attention, and DFA with its sums. */
import { el, svg, unit } from "./dom.js";
import { total } from "./examples.js";
import { num, pct } from "./format.js";
import { facts } from "./heads.js";

const [CELL, CELL_ROW, LABEL, ABOVE] = [46, 17, 58, 34];
const MOST_ROWS = 16;

/**
 * @param {import("./types").Example} example
 * @param {{names: string[], tip: import("./tip.js").Tip, label: (pos: number) => Node}} on
 */
export function drawMap(example, { names, tip, label }) {
  const sources = [...example.sources].sort((a, b) => a.pos - b.pos);
  const mass = (h) => Math.max(...sources.map(({ heads, attention }) => Math.abs(heads[h]) + 1e-3 * attention[h]), Math.abs(example.rest[h]));
  const rows = [...names.keys()].sort((a, b) => mass(b) - mass(a)).slice(0, MOST_ROWS).sort((a, b) => a - b);
  const titles = [...sources.map(({ pos }) => [label(pos).textContent, pos === example.dst ? "here" : `−${example.dst - pos}`]), ["others", ""]];
  const attention = rows.map((h) => [...sources.map((source) => source.attention[h]), Math.max(0, 1 - total(sources.map((source) => source.attention[h])))]);
  const dfa = rows.map((h) => [...sources.map(({ heads }) => heads[h]), example.rest[h]]);
  const sums = (matrix) => matrix.map((row) => [...row, total(row)]);
  const columns = dfa[0].map((_, i) => total(dfa.map((row) => row[i])));
  const dfaRows = sums([...dfa, columns]);
  const panel = (name, matrix, heads, marks, write) => drawGrid(name, matrix, { heads, titles: marks, write,
    hover: (i, j, value) => tip.on(() => [facts([["head", heads[i]], ["source", `${marks[j][0]} ${marks[j][1]}`], [name, write(value, 3)]])]) });
  const known = !example.brief;
  return el("div", { class: "panels" },
    known ? panel("attention", attention, rows.map((h) => names[h]), titles, (value) => (value < 0.005 ? "" : pct(value).replace(/\.\d(?=\s)/, "")))
      : el("p", { class: "hint" }, "This file keeps attention for the top and random examples."),
    panel("DFA", dfaRows, [...rows.map((h) => names[h]), "sum"], [...titles, ["sum", ""]], (value, digits = 2) => (Math.abs(value) < 0.005 ? "" : num(value, digits))));
}

function drawGrid(name, matrix, { heads, titles, write, hover }) {
  const n = titles.length;
  const inner = name === "DFA" ? matrix.slice(0, -1).map((row) => row.slice(0, -1)) : matrix;
  const most = Math.max(...inner.flat().map(Math.abs), 1e-12);
  const chart = svg("svg", { class: `grid-map ${name}`, width: LABEL + n * CELL, height: ABOVE + matrix.length * CELL_ROW + 2, role: "img", "aria-label": `${name} by head and source` },
    svg("defs", {}, svg("pattern", { id: "hatch", width: 4, height: 4, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, svg("rect", { class: "hatch", width: 2, height: 4 }))),
    svg("text", { class: "name", x: 0, y: 27 }, name),
    titles.map(([text, back], j) => svg("text", { x: LABEL + (j + 0.5) * CELL, y: 12, "text-anchor": "middle", class: "token" }, text.length > 6 ? `${text.slice(0, 5)}…` : text,
      svg("tspan", { x: LABEL + (j + 0.5) * CELL, y: 27 }, back))));
  matrix.forEach((row, i) => {
    const y = ABOVE + i * CELL_ROW;
    chart.append(svg("text", { x: LABEL - 6, y: y + 12, "text-anchor": "end" }, heads[i]));
    row.forEach((value, j) => {
      const sum = name === "DFA" && (i === matrix.length - 1 || j === row.length - 1);
      const place = { x: LABEL + j * CELL + 0.5, y: y + 0.5, width: CELL - 1, height: CELL_ROW - 1, rx: 2 };
      chart.append(svg("g", { class: `map-cell${sum ? " sum" : value < 0 ? " minus" : ""}`, "data-value": value, vars: { "--r": unit(Math.abs(value) / most) }, ...hover(i, j, value) },
      svg("rect", place), value < 0 && !sum && svg("rect", { class: "lines", ...place }),
      svg("text", { x: LABEL + (j + 0.5) * CELL, y: y + 12, "text-anchor": "middle" }, write(value))));
    });
  });
  return chart;
}
