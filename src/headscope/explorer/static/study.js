/** What the deep-dive tabs share: a line that says what is shown, its data, its Python call, and tables of measures. */
import { button, download, el, term } from "./dom.js";
import { int, num, pct, signed } from "./format.js";

/** A number as it is in a file: all of its digits, nothing where there is none. */
const cell = (value) => (value === null || value === undefined ? "" : typeof value === "number" ? String(value) : `"${String(value).replace(/"/g, '""')}"`);

/** Text of a corpus in a table cell: quoted as JSON, so that it is exact, of one line, and no formula to a spreadsheet. */
export const quoted = (text) => JSON.stringify(text);

/** The head of a tab: definition, n and corpus in one line; its data as CSV; the call that makes it again. */
export function studyHead({ definition, python, name, rows }) {
  const copied = el("output", { class: "copied", "data-copied": "" });
  const copy = async () => {
    const done = await navigator.clipboard?.writeText(python).then(() => true, () => false);
    code.hidden = done ? code.hidden : false;
    copied.textContent = done ? "copied" : "copy it from here:";
  };
  const code = el("pre", { class: "python", "data-python-text": "", hidden: true, tabindex: 0 }, python);
  const show = button({ class: "quiet", "data-show-python": "", "aria-expanded": "false", onclick: () => { code.hidden = !code.hidden; show.setAttribute("aria-expanded", String(!code.hidden)); } }, "Python");
  return el("header", { class: "study-head" }, el("p", { class: "definition", "data-definition": "" }, definition),
    el("span", { class: "tools" }, copied, show, button({ class: "button", "data-python": "", onclick: copy }, "copy Python"), button({ class: "button", "data-csv": name, onclick: () => download(`${name}.csv`, "text/csv", csv(rows())) }, "CSV")), code);
}

const csv = (rows) => rows.map((row) => `${row.map(cell).join(",")}\r\n`).join("");

const SIGNED = new Set(["pearson", "phi", "pearson_above", "change"]);
const writer = (name) => (SIGNED.has(name) ? signed : pct);

/** A measure as text: its value and interval, or why there is none. */
export function measureText(measure, name = "") {
  const write = writer(name);
  if (measure.value === null) return measure.missing ?? "none";
  return `${write(measure.value)}${measure.low === null ? "" : ` [${write(measure.low)}, ${write(measure.high)}]`}`;
}

/**
 * Measures, one a row: value, interval, null, n; the definition on hover.
 * @param {[string, string, import("./types").Measure, ((value: number) => string)?][]} rows name, label, measure, how its numbers are written
 */
export function measureTable(rows) {
  return el("table", { class: "measures", "data-measures": "" }, el("tr", {}, ["", "value", "95 % interval", "null", "n"].map((label) => el("th", { scope: "col" }, label))),
    rows.map(([name, label, m, write = writer(name)]) => {
      const documents = m.by_document && `by document ${write(m.by_document[0])} to ${write(m.by_document[1])}`;
      return el("tr", { "data-measure": name }, el("th", { scope: "row" }, term(label, m.definition)),
        m.value === null ? el("td", { colspan: 3, class: "missing", "data-missing": "" }, m.missing ?? "none")
          : [el("td", {}, el("b", {}, write(m.value))), el("td", { title: [m.interval, documents].filter(Boolean).join("; ") }, m.low === null ? el("span", { class: "missing" }, m.missing ?? "none") : [`${write(m.low)} to ${write(m.high)}`, documents && el("small", {}, ` (${documents})`)]),
            el("td", { title: "where there is nothing to find: mean and range" }, m.null ? `${write(m.null.value)} [${write(m.null.low)}, ${write(m.null.high)}]` : "–")], el("td", {}, int(m.n)));
    }));
}

/** The same as rows of a file. */
export function measureRows(rows) {
  return [["measure", "value", "low", "high", "interval", "document_low", "document_high", "null", "null_low", "null_high", "n", "missing", "definition"],
    ...rows.map(([name, , m]) => [name, m.value, m.low, m.high, m.interval, m.by_document?.[0], m.by_document?.[1], m.null?.value, m.null?.low, m.null?.high, m.n, m.missing, m.definition])];
}

/** Nothing to draw: says why. */
export function empty(...text) {
  return el("p", { class: "nothing", "data-nothing": "" }, text);
}

/** "3.2 to 4.1" */
export function between(low, high) {
  return `${num(low, 2)} to ${num(high, 2)}`;
}
