/** All heads of all layers in a grid: a number and a shade for what each scores, links to their pages. */
import { choice, el, unit } from "./dom.js";
import { int, num } from "./format.js";
import { measureTable } from "./study.js";

export const ROLE_NAMES = { previous_token: "previous token", induction: "induction", duplicate_token: "duplicate token", copying: "copying" };
const ROLE_MARKS = { previous_token: "P", induction: "I", duplicate_token: "D", copying: "C" };
const MADE_NAMES = { dfa: "features made, by DFA", decoder: "features made, by decoder" };

export class HeadGrid {
  /** @param {object} found see `Heads` in types.d.ts @param {object} needs @param {(grid: object) => void} change */
  constructor(found, needs, change, missing) {
    Object.assign(this, { found, needs, change });
    this.choices = el("span", { class: "choices" });
    this.definition = el("p", { class: "definition", "data-definition": "" });
    this.grid = el("div", { class: "head-grid", role: "grid", "aria-label": "heads by layer", "data-grid": "", onkeydown: (event) => this.#key(event) });
    this.element = el("main", { class: "head-grid-page", "data-heads": "" }, el("h1", {}, "Heads"),
      missing && el("div", { "data-scores-missing": "" }, missing), el("p", { class: "of-grid" }, this.choices), this.definition, el("div", { class: "wide-table" }, this.grid),
      el("p", { class: "legend grid-key" }, !missing && [Object.entries(ROLE_MARKS).map(([name, mark]) => el("span", {}, el("b", { class: "role-mark" }, mark), ` ${ROLE_NAMES[name]}`)), el("span", {}, "roles that a test against shuffled weights gives a head; darker is more")]),
      this.#superposition() ?? "");
  }

  /** On how many heads the features rest. */
  #superposition() {
    const { superposition: found, layer } = this.found;
    if (found.missing) return null;
    return el("section", { class: "head-section", "data-superposition": "" }, el("header", {}, el("h2", {}, `Features that several heads of layer ${layer} make`), el("span", { class: "hint" }, found.n.replace(/\d{4,}/g, (digits) => int(Number(digits))))),
      el("div", { class: "wide-table" }, measureTable(Object.entries(found.measures).map(([name, measure]) => [name, name, measure, (value) => num(value)]))));
  }

  /** The names of all heads, in reading order. */
  get names() {
    return this.found.layers.flat().map(({ name }) => name);
  }

  /** @param {import("./types").View["grid"]} view */
  update(view) {
    const { scores, layers, layer, n_features: n } = this.found;
    const measured = scores.missing ? [] : scores.roles.map(({ name, definition }) => [name, ROLE_NAMES[name] ?? name, definition]);
    const made = Object.entries(MADE_NAMES).map(([name, label]) => [`made-${name}`, label, `of ${int(n)} live features of the SAE at layer ${layer}, those of which this head has the largest share`]);
    const all = [...measured, ...made];
    const current = all.find(([name]) => name === view.score) ?? all.find(([name]) => name === "induction") ?? all[0];
    this.choices.replaceChildren(choice("score", all, current[0], (score) => this.change({ score })));
    this.definition.replaceChildren(current[2]);
    const value = (head) => (current[0].startsWith("made-") ? head.made?.[current[0].slice(5)] : head.scores?.[current[0]]?.value) ?? null;
    const counts = current[0].startsWith("made-");
    const most = counts ? Math.max(...layers.flat().map(value), 1) : 1;
    const at = document.activeElement?.dataset?.cell;
    this.grid.replaceChildren(el("div", { class: "grid-row heads-of", role: "row" }, el("span", { role: "columnheader" }, "layer"), layers[0].map((_, h) => el("span", { role: "columnheader" }, String(h)))),
      ...layers.map((heads, l) => el("div", { class: `grid-row${l === layer ? " of-sae" : ""}`, role: "row" }, el("span", { role: "rowheader", title: l === layer ? "the layer of the SAE" : null }, l === layer ? `${l} · SAE` : String(l)),
        heads.map((head, h) => this.#cell(head, value(head), { counts, most, label: current[1], first: l === 0 && h === 0 })))));
    this.grid.querySelector(`[data-cell="${CSS.escape(at ?? "")}"]`)?.focus();
  }

  #cell(head, value, { counts, most, label, first }) {
    const text = value === null ? "–" : counts ? int(value) : num(value, 2);
    const p = !counts && head.scores ? Object.entries(head.scores).map(([name, { value: own, p: chance }]) => `${ROLE_NAMES[name] ?? name} ${num(own)}${chance === null ? "" : ` (p ${num(chance)})`}`).join("; ") : "";
    return el("span", { role: "gridcell" }, el("a", {
      class: "grid-cell", href: this.needs.page("head", head.name), "data-page": "head", "data-name": head.name, "data-cell": head.name, "data-value": value, tabindex: first ? 0 : -1, vars: { "--r": unit((value ?? 0) / most) },
      "aria-label": `head ${head.name}: ${label} ${text}`, title: `head ${head.name}${p && `: ${p}`}${head.roles.length ? `; roles: ${head.roles.map((name) => ROLE_NAMES[name] ?? name).join(", ")}` : ""}`,
    }, el("span", {}, text), el("small", {}, head.roles.map((name) => ROLE_MARKS[name] ?? "?").join(""))));
  }

  /** Arrow keys move between the cells. */
  #key(event) {
    const wide = this.found.layers[0].length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide }[event.key];
    if (!step) return;
    this.move(step);
    event.preventDefault();
  }

  /** Move the focus by so many heads. */
  move(step) {
    const cells = [...this.grid.querySelectorAll("[data-cell]")];
    const at = cells.indexOf(document.activeElement);
    const next = cells[at < 0 ? 0 : at + step];
    if (!next) return;
    for (const cell of cells) cell.tabIndex = cell === next ? 0 : -1;
    next.focus();
  }
}
