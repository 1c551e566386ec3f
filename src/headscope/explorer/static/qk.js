/** QK attribution: why a head attends to one key rather than to the others, by parts of the query and of the key. */
import { button, choice, el, svg, unit } from "./dom.js";
import { int, num, pct, sci, signed } from "./format.js";

const [PAIR_WIDE, PAIR_TALL, PAIR_LEFT, PAIR_ABOVE] = [46, 20, 112, 76];
const FEW_KEYS = 8; // keys shown first

/**
 * @param {import("./types").Scores} scores
 * @param {{token: (position: number) => Node, tip: import("./tip.js").Tip, pick?: (key: number) => void, mode?: string, change?: (mode: string) => void}} on
 *   token: what to show of a position; pick: another key is asked; mode: "attention" for the first-order part of each pair.
 */
export function drawQk(scores, { token, tip, pick, mode = "", change }) {
  const { layer, head, query, key, score, mean, residual, pattern, keys } = scores;
  const attention = pattern[keys.indexOf(key)];
  const matrix = mode === "attention" ? scores.attention : scores.contrast;
  const total = matrix.flat().reduce((sum, value) => sum + value, 0);
  const body = el("section", { class: "qk", "data-qk": `${layer}.${head}`, "data-key": key },
    el("h3", {}, `Why head ${layer}.${head} attends from `, token(query), el("small", {}, ` ${query}`), " to ", token(key), el("small", {}, ` ${key}`)),
    el("p", { class: "definition", "data-qk-definition": "" }, mode === "attention"
      ? `First-order part of each pair in the attention of ${pct(attention)}: how fast it would fall if the pair were taken out of all scores. Sum ${signed(total)}; near 0 where attention is nearly all on one key.`
      : `Score of this key ${num(score)}, above the mean ${num(mean)} over its ${int(keys.length)} keys by ${num(score - mean)}: what the pairs below sum to (off by ${sci(residual)}). Softmax does not see what all keys share.`),
    change && choice("qk", [["", "contrast over keys"], ["attention", "part in attention"]], mode, change),
    el("div", { class: "wide-table" }, drawPairs(matrix, scores, tip, mode)), drawRead(scores, token), drawKeys(scores, token, pick));
  return body;
}

/** Rows are parts of the query, columns of the key; hatched where a pair speaks against the key. */
function drawPairs(matrix, { query_parts: rows, key_parts: columns }, tip, mode) {
  const most = Math.max(...matrix.flat().map(Math.abs), 1e-12);
  const name = ({ name: own }) => (own.length > 17 ? `…${own.slice(-16)}` : own);
  const sum = (values) => values.reduce((all, value) => all + value, 0);
  const [wide, tall] = [PAIR_LEFT + (columns.length + 1) * PAIR_WIDE + 4, PAIR_ABOVE + (rows.length + 1) * PAIR_TALL + 4];
  const write = (value) => (Math.abs(value) < 0.005 ? "" : num(value, 2));
  const chart = svg("svg", { class: "grid-map pairs", width: wide, height: tall, role: "img", "aria-label": "pairs of parts of the query and of the key", "data-pairs": mode || "contrast" },
    svg("defs", {}, svg("pattern", { id: "pair-hatch", width: 4, height: 4, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, svg("rect", { class: "hatch", width: 2, height: 4 }))),
    svg("text", { class: "name", x: 0, y: PAIR_ABOVE - 8 }, "query ↓  key →"),
    [...columns, { name: "sum" }].map((part, j) => svg("text", { transform: `translate(${PAIR_LEFT + (j + 0.5) * PAIR_WIDE - 4} ${PAIR_ABOVE - 6}) rotate(-32)` }, name(part))));
  const line = (label, values, i, isSum) => {
    const y = PAIR_ABOVE + i * PAIR_TALL;
    chart.append(svg("text", { x: PAIR_LEFT - 6, y: y + 14, "text-anchor": "end" }, name({ name: label })));
    [...values, sum(values)].forEach((value, j) => {
      const summed = isSum || j === values.length;
      const place = { x: PAIR_LEFT + j * PAIR_WIDE + 0.5, y: y + 0.5, width: PAIR_WIDE - 1, height: PAIR_TALL - 1, rx: 2 };
      const facts = () => [el("div", {}, `query ${label}`), el("div", {}, `key ${columns[j]?.name ?? "sum"}`), el("b", {}, signed(value, 4))];
      chart.append(svg("g", { class: `map-cell${summed ? " sum" : value < 0 ? " minus" : ""}`, "data-value": value, vars: { "--r": unit(Math.abs(value) / most) }, ...tip.on(facts) },
        svg("rect", place), value < 0 && !summed && svg("rect", { class: "pair-lines", ...place }), svg("text", { x: PAIR_LEFT + (j + 0.5) * PAIR_WIDE, y: y + 14, "text-anchor": "middle" }, write(value))));
    });
  };
  matrix.forEach((values, i) => line(rows[i].name, values, i, false));
  line("sum", columns.map((_, j) => sum(matrix.map((row) => row[j]))), rows.length, true);
  return chart;
}

/** Where earlier heads got what they put at the key: for an induction head, the token before it. */
function drawRead({ read, key }, token) {
  if (read.length === 0) return null;
  return el("ul", { class: "qk-read", "data-read": "" }, read.map(({ part, value, sources }) => el("li", { "data-read-part": part }, `head ${part} adds ${signed(value)} to the score at `, token(key), ", read from ",
    sources.map(([position, own], i) => [i > 0 && ", ", token(position), el("small", {}, ` ${position}`), ` ${signed(own)}`]))));
}

/** The keys, the most attended first; each can be asked about. */
function drawKeys({ keys, scores, pattern, key, mean }, token, pick) {
  const order = [...keys.keys()].sort((a, b) => pattern[b] - pattern[a]);
  const few = order.slice(0, FEW_KEYS);
  const own = keys.indexOf(key);
  if (!few.includes(own)) few.push(own);
  return el("div", { class: "wide-table" }, el("table", { class: "measures", "data-keys": "" }, el("tr", {}, ["key", "attention", "score", "above the mean"].map((label) => el("th", { scope: "col" }, label))),
    few.map((i) => el("tr", { "data-key-row": keys[i], "aria-current": i === own ? "true" : null }, el("th", { scope: "row" }, pick && i !== own ? button({ class: "quiet", onclick: () => pick(keys[i]) }, token(keys[i]), ` ${keys[i]}`) : [token(keys[i]), ` ${keys[i]}`]),
      el("td", {}, el("b", {}, pct(pattern[i]))), el("td", {}, num(scores[i])), el("td", {}, signed(scores[i] - mean))))),
  keys.length > few.length && el("p", { class: "hint" }, `the ${int(few.length)} most attended of ${int(keys.length)} keys`));
}
