/** One example: its tokens with activation (orange), DFA sources (blue; purple hatch where negative), destination, next token. */
import { button, el, setVars, unit } from "./dom.js";
import { int, num, pct, sci, signed } from "./format.js";
import { facts, headGrid, headStrip, paintStrip } from "./heads.js";
import { show } from "./vocab.js";

const sum = (values) => values.reduce((total, value) => total + value, 0);
const plural = (n) => `${n} token${n > 1 ? "s" : ""}`;

/** The sum of all DFA, and how far it and the bias are from the stored pre-activation. @param {import("./types").Example} example */
export function checkDfa({ sources, rest, bias, pre }) {
  const shown = sum(sources.map(({ heads }) => sum(heads)));
  const dfa = shown + sum(rest);
  const residual = pre - (dfa + bias);
  return { shown, dfa, residual, holds: Math.abs(residual) <= 1e-3 * Math.max(1, Math.abs(pre)) };
}

export class ExampleRow {
  #pieces = new Map();

  /** @param {import("./types").Example} example @param {string} key as in links: "top.3" */
  constructor(example, key, { vocab, feature, context }) {
    Object.assign(this, { example, key, vocab, context, max: feature.stats.max, names: feature.heads.names });
    this.acts = new Map(example.acts);
    this.sources = new Map(example.sources.map(({ pos, heads }) => [pos, heads]));
    this.largest = Math.max(...example.sources.map(({ heads }) => Math.abs(sum(heads))), 1e-12);
    for (const [start, ids] of example.segments) this.#decode(start, ids);
    this.stored = new Set(this.#pieces.keys());
    this.line = el("div", { class: "line" });
    this.where = el("div", { class: "where" }, `${example.document} · block ${int(example.block)}, position ${example.dst}`,
      example.duplicates > 0 && ` · +${example.duplicates} identical`);
    this.strip = headStrip();
    this.element = el("li", { class: "example", "data-ex": key },
      button({ class: "act", "data-check": key, "aria-label": `activation ${num(example.activation)}: does its DFA add up?`, vars: { "--r": unit(example.activation / this.max) } }, num(example.activation)),
      this.strip, this.line, this.where);
  }

  #decode(start, ids) {
    this.vocab.decode(ids).forEach((piece, i) => this.#pieces.set(start + i, piece));
  }

  /** Fill in the tokens of a window: "5" (with the few largest sources), "16" (with all stored) or "full". */
  draw(w, head) {
    const nodes = [];
    let last = null;
    for (const pos of this.#positions(w)) {
      const gap = pos - last - 1;
      if (last !== null && gap > 0) nodes.push(el("span", { class: "gap", "data-gap": gap, title: `${plural(gap)} left out` }, w === "5" ? `…${gap}…` : `… ${plural(gap)} …`));
      nodes.push(this.#token(pos, w));
      last = pos;
    }
    const at = nodes.findIndex((node) => node.classList.contains("dst"));
    this.line.replaceChildren(...(w === "5" ? [el("span", { class: "before" }, nodes.slice(0, at)), el("span", {}, nodes.slice(at))] : nodes));
    this.element.dataset.window = w;
    this.paint(head);
  }

  /** Fill in the whole block, from the server. */
  async drawBlock(head) {
    this.#decode(0, (await this.context(this.example.block)).ids);
    this.draw("full", head());
  }

  /** Take the tokens out again, keeping the height. */
  clear() {
    if (this.line.firstChild) setVars(this.line, { "min-height": `${this.line.offsetHeight}px` });
    this.line.replaceChildren();
  }

  #positions(w) {
    const { dst, sources } = this.example;
    const all = [...this.#pieces.keys()].sort((a, b) => a - b);
    if (w === "full") return all;
    const near = [[dst, Number(w)], ...sources.map(({ pos, heads }, i) => [pos, i === 0 ? 5 : w === "16" ? 1 : i < 4 && Math.abs(sum(heads)) >= 0.1 * this.largest ? 0 : -1])];
    return all.filter((pos) => near.some(([centre, reach]) => Math.abs(pos - centre) <= reach));
  }

  #token(pos, w) {
    const { dst } = this.example;
    const piece = this.#pieces.get(pos);
    const act = this.acts.get(pos);
    const body = show(piece, w === "full");
    const alone = body.length === 1 && body[0].className; // one mark or chip: the token's element is it
    const marks = [piece.kind, alone, act > 0 && "on", pos === dst && "dst", pos === dst + 1 && "next", !this.stored.has(pos) && "unstored"];
    return el("span", {
      class: `tok ${marks.filter(Boolean).join(" ")}`, "data-pos": pos, "data-act": act, vars: act > 0 ? { "--a": unit(act / this.max) } : {},
    }, alone ? body[0].textContent : body);
  }

  /** Show the DFA of the sources: of all heads, or of one. @param {number|null} head */
  paint(head) {
    for (const token of this.line.querySelectorAll(".tok")) {
      const heads = this.sources.get(Number(token.dataset.pos));
      if (!heads) continue;
      const dfa = head === null ? sum(heads) : heads[head];
      const size = Math.abs(dfa) / this.largest;
      token.dataset.dfa = dfa;
      token.classList.toggle("src", size >= 0.02);
      token.classList.toggle("minus", size >= 0.02 && dfa < 0);
      setVars(token, { "--s": unit(size) });
    }
    paintStrip(this.strip, this.example.heads, head);
  }

  /** Tooltip of a token: its numbers, exact. */
  tokenFacts(pos) {
    const { dst, pre, sources } = this.example;
    const { id } = this.#pieces.get(pos);
    const act = this.acts.get(pos) ?? 0;
    const heads = this.sources.get(pos);
    const role = { 0: "destination", 1: "next token" }[pos - dst] ?? `${Math.abs(pos - dst)} ${pos < dst ? "before" : "after"} the destination`;
    return [el("div", { class: "tip-title" }, this.vocab.label(id)), facts([
      ["token id", int(id)], ["position", `${pos}, ${role}`],
      ["activation", !this.stored.has(pos) ? "not stored here" : act > 0 ? `${num(act)}, ${pct(act / this.max)} of max` : "0"],
      ...(heads ? [["DFA from here", `${signed(sum(heads))}, ${pct(sum(heads) / pre)} of pre-activation`]] : []),
    ]), ...(heads ? [headGrid(this.names, heads)] : []),
    ...(heads || pos > dst ? [] : [el("div", { class: "hint" }, `DFA: not one of the ${sources.length} largest sources`)]),
    ...(pos === dst ? [this.#equation()] : [])];
  }

  /** Tooltip of the activation: the DFA adds up to it. */
  checkFacts() {
    const { sources, n_rest: others, activation, residual, heads } = this.example;
    const { shown, dfa } = checkDfa(this.example);
    return [el("div", { class: "tip-title" }, "Does the DFA add up?"), this.#equation(), facts([
      [`${sources.length} largest sources`, signed(shown)], [`${int(others)} other sources`, signed(dfa - shown)],
      ["activation", num(activation)], ["residual when stored", sci(residual)],
    ]), headGrid(this.names, heads), el("div", { class: "hint" }, this.where.textContent)];
  }

  #equation() {
    const { bias, pre } = this.example;
    const { dfa, residual, holds } = checkDfa(this.example);
    return el("div", { class: holds ? "equation" : "equation wrong", "data-equation": holds ? "holds" : "fails" },
      `sum of DFA ${num(dfa)} + bias ${num(bias)} = ${num(dfa + bias)} `, el("b", {}, `${holds ? "=" : "≠"} pre-activation ${num(pre)}`), ` (residual ${sci(residual)})`);
  }
}
