/** Recursive DFA as a tree that is opened node by node: what each is the sum of, and that the sum closes. */
import { button, el, svg } from "./dom.js";
import { int, num, pct, sci, signed } from "./format.js";

const [TREE_WIDE, TREE_TALL] = [90, 12];
const PATH_SEPARATOR = "~"; // between paths in a link; names have none

/** Nodes that are open, for a link: those whose ancestors it implies are left out. @param {string[]} paths */
export function pathsText(paths) {
  return paths.filter((path) => !paths.some((other) => other.startsWith(path ? `${path}/` : "") && other !== path)).join(PATH_SEPARATOR);
}

/** The opposite: all open nodes, ancestors first. */
export function pathsOf(text) {
  const all = text ? text.split(PATH_SEPARATOR).flatMap((path) => path.split("/").map((_, i, names) => names.slice(0, i + 1).join("/"))) : [];
  return [...new Set(all)].sort((a, b) => a.split("/").length - b.split("/").length);
}

export class CircuitTree {
  #root = null;
  #scale = 1;

  /**
   * @param {{ask: (path: string) => Promise<import("./types").Level>, token: (position: number) => Node, open?: string[],
   *   opened?: (paths: string[]) => void, attended?: (at: {layer: number, head: number, query: number, key: number}) => void}} on
   *   ask: one level below the node of a path, "" for the feature; token: what to show of a position; opened: the nodes that
   *   are open have changed; attended: why a head attended to a source is asked.
   */
  constructor(on) {
    this.on = on;
    this.open = new Set(on.open ?? []);
    this.element = el("div", { class: "circuit", "data-circuit": "" }, el("ul", { class: "circuit-level", role: "tree", "aria-label": "recursive DFA", onkeydown: (event) => this.#key(event) }));
  }

  /** Draw the feature, its heads, and whatever else is open. */
  async start() {
    const level = await this.on.ask("");
    this.#scale = Math.max(Math.abs(level.node.value), ...level.children.map(({ value }) => Math.abs(value)), 1e-12);
    this.#root = this.#row(level.node, "", level.node.value, 1);
    this.element.firstChild.replaceChildren(this.#root);
    this.#fill(this.#root, level, "");
    const open = [...this.open];
    this.open.clear();
    await this.show(open);
    return level;
  }

  /** Open some nodes, ancestors first; a path that there is not is left out. @param {string[]} paths */
  async show(paths) {
    for (const path of paths) {
      const row = this.#at(path);
      if (row?.getAttribute("aria-expanded") === "false") await this.#expand(row, path);
    }
  }

  #at(path) {
    return [...this.element.querySelectorAll("[data-path]")].find((row) => row.dataset.path === path);
  }

  #row(node, path, whole, depth) {
    const { value, kind, expands, attended } = node;
    const size = (Math.abs(value) / this.#scale) * (TREE_WIDE / 2 - 1);
    const head = el(expands ? "button" : "span", { class: "circuit-node", type: expands ? "button" : null, "data-node": node.name, onclick: expands ? () => this.#toggle(row, path) : null, tabindex: expands ? null : 0 },
      el("span", { class: "circuit-sign", "aria-hidden": "true" }, expands ? "" : "·"), el("span", { class: "circuit-name" }, this.#label(node)),
      svg("svg", { class: "circuit-bar", viewBox: `0 0 ${TREE_WIDE} ${TREE_TALL}`, "aria-hidden": "true" }, svg("rect", { class: value < 0 ? "minus" : "plus", x: value < 0 ? TREE_WIDE / 2 - size : TREE_WIDE / 2, y: 2, width: Math.max(size, 0.6), height: TREE_TALL - 4 }), svg("line", { class: "zero", x1: TREE_WIDE / 2, x2: TREE_WIDE / 2, y1: 0, y2: TREE_TALL })),
      el("b", { class: "circuit-value", "data-value": value }, signed(value)), el("small", {}, path && whole ? pct(value / whole) : ""));
    const row = el("li", { class: "circuit-row", role: "treeitem", "aria-level": depth, "aria-expanded": expands ? "false" : null, "data-path": path, "data-kind": kind, "data-depth": depth },
      el("div", { class: "circuit-line" }, head, attended && this.on.attended && button({ class: "quiet", "data-why": path, title: `why head ${attended.layer}.${attended.head} attends here: QK attribution`, "aria-label": `why does head ${attended.layer}.${attended.head} attend to source ${attended.key}?`, onclick: () => this.on.attended(attended) }, "why?")));
    return row;
  }

  /** What a node is called: a head, a token, a part of the stream. */
  #label({ kind, name, position, part }) {
    if (kind === "feature") return [name, " at ", this.on.token(position), el("small", {}, ` ${position}`)];
    if (kind === "source") return [this.on.token(position), el("small", {}, ` source ${position}`)];
    if (kind === "head" || part?.kind === "head") return ["head ", name];
    return kind === "constant" ? [name, el("small", {}, " of no head")] : [name.replace("mlp_out", "MLP")];
  }

  #fill(row, { node, children, rest, sum, residual }, path) {
    const depth = Number(row.dataset.depth) + 1;
    const below = children.map((child) => this.#row(child, path ? `${path}/${child.name}` : child.name, node.value, depth));
    const closes = Math.abs(residual) <= 1e-4 * (1 + Math.abs(node.value));
    row.append(el("ul", { class: "circuit-level", role: "group" }, below,
      rest.n > 0 && el("li", { class: "circuit-rest", role: "none", "data-rest": rest.value }, `${int(rest.n)} smaller `, el("b", {}, signed(rest.value))),
      el("li", { class: "circuit-sum", role: "none", "data-sum": sum, "data-closes": String(closes) }, `all ${int(children.length + rest.n)} sum to ${num(sum)} ${closes ? "=" : "≠"} ${num(node.value)}, off by ${sci(residual)}`)));
    row.setAttribute("aria-expanded", "true");
  }

  async #expand(row, path) {
    const line = row.querySelector(".circuit-line");
    line.setAttribute("aria-busy", "true");
    try {
      this.#fill(row, await this.on.ask(path), path);
      this.open.add(path);
    } catch (error) {
      row.append(el("p", { class: "nothing", "data-failed": "" }, error.message));
    } finally {
      line.removeAttribute("aria-busy");
    }
  }

  async #toggle(row, path) {
    const shown = row.querySelector(":scope > .circuit-level, :scope > .nothing");
    if (shown) {
      shown.remove();
      row.setAttribute("aria-expanded", "false");
      for (const open of this.open) if (open === path || open.startsWith(path ? `${path}/` : "")) this.open.delete(open);
    } else await this.#expand(row, path);
    this.on.opened?.([...this.open]);
  }

  /** Arrow keys as in any tree: up and down over what shows, right to open, left to close or to the parent. */
  #key(event) {
    const all = [...this.element.querySelectorAll(".circuit-node")];
    const at = all.indexOf(event.target);
    const row = event.target.closest(".circuit-row");
    if (at < 0 || !["ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"].includes(event.key)) return;
    event.preventDefault();
    const open = row.getAttribute("aria-expanded");
    if (event.key === "ArrowUp") all[at - 1]?.focus();
    else if (event.key === "ArrowDown") all[at + 1]?.focus();
    else if (open === (event.key === "ArrowRight" ? "false" : "true")) this.#toggle(row, row.dataset.path);
    else if (event.key === "ArrowLeft") row.parentElement.closest(".circuit-row")?.querySelector(".circuit-node").focus();
    else all[at + 1]?.focus();
  }
}
