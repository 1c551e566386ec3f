/** A table of which only the rows in sight are in the page: heads that sort, a cursor, a link a row. */
import { button, el, setVars } from "./dom.js";
import { int, num, pct, signed } from "./format.js";

const ROW = 27;
const GAP = 8;
/** Of a kind of column: least pixels, part of what is left. */
const WIDTHS = { int: [50, 0.8], float: [50, 0.8], signed: [50, 0.8], percent: [62, 1], token: [76, 1.5], head: [46, 0.7], text: [108, 2], bool: [52, 0], tests: [76, 0] };
const WRITE = { int, percent: pct, float: num, signed: (value) => signed(value, 2), bool: (flag) => (flag ? "yes" : "no"), head: String, text: String };

/** A value as its column writes it; nothing where there is none. */
export function cellText(value, kind) {
  return value === null || value === undefined ? "" : (WRITE[kind]?.(value) ?? "");
}

export class Rows {
  #order = [];
  #cursor = 0;

  /**
   * @param {string} label for a screen reader
   * @param {import("./types").Table["columns"]} columns
   * @param {{sort: (sort: string) => void, open: (id: number) => void, link: (id: number) => string|null, id: (row: number) => number,
   *   cell: (row: number, column: object) => {content: any, class?: string|false, vars?: object, dead?: boolean}}} on
   */
  constructor(label, columns, on) {
    Object.assign(this, { columns, on });
    this.head = el("div", { class: "row header", role: "row" });
    this.space = el("div", { class: "space", role: "rowgroup" });
    this.element = el("div", {
      class: "rows", role: "table", "aria-label": label, "data-table": "", onscroll: () => requestAnimationFrame(() => this.#draw()),
      vars: {
        "--cols": columns.map(({ kind }) => `minmax(${WIDTHS[kind][0]}px, ${WIDTHS[kind][1]}fr)`).join(" "), "--row": `${ROW}px`,
        "--least": `${columns.reduce((sum, { kind }) => sum + WIDTHS[kind][0] + GAP, GAP)}px`,
      },
    }, this.head, this.space);
    new ResizeObserver(() => this.#draw()).observe(this.element);
  }

  /** @param {{order: number[], sort: string, at: number|null}} shown rows in order, how they are sorted, where the cursor goes if it moves */
  update({ order, sort, at }) {
    this.#order = order;
    this.#drawHead(sort);
    setVars(this.space, { "--height": `${order.length * ROW}px` });
    if (at !== null) this.#cursor = at;
    this.move(0);
  }

  #drawHead(sort) {
    this.head.replaceChildren(...this.columns.map(({ name, kind, label, definition }) => {
      const state = name !== sort.replace("-", "") ? "none" : sort.startsWith("-") ? "descending" : "ascending";
      // Sizes sort from the largest first, names and ids from the first; a second press turns the order.
      const down = state === "none" ? ["int", "float", "percent", "signed", "bool"].includes(kind) && name !== "latent" : state === "ascending";
      return el("span", { role: "columnheader", "aria-sort": state, class: `cell ${kind}` },
        button({ "data-sort": name, title: definition, onclick: () => this.on.sort((down ? "-" : "") + name) }, label));
    }));
  }

  #draw() {
    const first = Math.max(0, Math.floor(this.element.scrollTop / ROW) - 8);
    const last = Math.ceil((this.element.scrollTop + this.element.clientHeight) / ROW) + 8;
    const rows = this.#order.slice(first, last).map((row, i) => this.#drawRow(row, first + i));
    this.space.replaceChildren(...(this.#order.length ? rows : [el("p", { class: "empty", "data-empty": "" }, "No feature matches.")]));
  }

  #drawRow(row, i) {
    const id = this.on.id(row);
    const link = this.on.link(id);
    const cells = this.columns.map((column) => ({ column, ...this.on.cell(row, column) }));
    return el(link === null ? "div" : "a", {
      class: `row${i === this.#cursor ? " cursor" : ""}${cells.some(({ dead }) => dead) ? " dead" : ""}`, role: "row", "data-latent": id, "data-nav": link === null ? null : id,
      href: link, tabindex: i === this.#cursor ? 0 : -1, vars: { "--top": `${i * ROW}px` },
    }, cells.map(({ column: { name, kind }, content, class: extra, vars = {} }) => el("span", { class: `cell ${kind}${extra ? ` ${extra}` : ""}`, role: "cell", "data-col": name, vars }, content)));
  }

  /** Move the cursor, and bring it into sight. */
  move(step) {
    this.#cursor = Math.max(0, Math.min(this.#order.length - 1, this.#cursor + step));
    const [top, room] = [this.#cursor * ROW, this.element.clientHeight - 2 * ROW];
    if (room > 0) this.element.scrollTop = Math.min(top, Math.max(this.element.scrollTop, top + ROW - room));
    this.#draw();
  }

  /** Open the row under the cursor. */
  openCursor() {
    if (this.#order.length > 0) this.on.open(this.on.id(this.#order[this.#cursor]));
  }
}
