/** One example: its tokens with activation (orange), DFA sources (blue; purple hatch where negative), destination, next token. */
import { button, el, setVars, unit } from "./dom.js";
import { checkDfa } from "./examples.js";
import { int, num, pct, sci, signed } from "./format.js";
import { facts, headGrid, headStrip, paintStrip } from "./heads.js";
import { drawMap } from "./heatmap.js";
import { show } from "./vocab.js";

const plural = (n) => `${n} token${n > 1 ? "s" : ""}`;
const [NEAR, SHORT] = [3, 5]; // tokens on each side of the source and of the destination in the short window

export class ExampleRow {
  #pieces = new Map();

  /** @param {import("./types").Example} example @param {string} key as in links: "top.3" @param {number} same hidden copies */
  constructor(example, key, same, { vocab, corpus, feature, names, context, explore }) {
    Object.assign(this, { example, key, vocab, corpus, context, names, explore, max: feature.stats.max, worst: feature.residual });
    const { block, dst, sources, activation } = example;
    this.sources = new Map(sources.map((source) => [source.pos, source]));
    this.largest = Math.max(...sources.map(({ dfa }) => Math.abs(dfa)), 1e-12);
    this.#decode();
    this.line = el("div", { class: "line" });
    this.where = el("div", { class: "where" }, `${corpus.documentAt(block, dst)} · block ${int(block)}, position ${dst}`, same > 0 && ` · +${same} identical`, this.#opens(" · "));
    this.strip = headStrip();
    this.element = el("li", { class: "example", "data-ex": key },
      button({ class: "act", "data-check": key, "aria-label": `activation ${num(activation)}: does its DFA add up?`, vars: { "--r": unit(activation / this.max) } }, num(activation)),
      button({ class: "open-map", "data-map": key, "aria-label": "heads by sources", title: "DFA by head; press for heads × sources" }, this.strip), this.line, this.where);
  }

  /** A link to the prompt explorer, where there is a model. */
  #opens(before) {
    const href = this.explore?.(this.example);
    return href ? [before, el("a", { href, "data-explore": "" }, "open in prompt explorer")] : null;
  }

  #decode() {
    for (const [start, ids] of this.corpus.runs(this.example.block)) this.vocab.decode(ids).forEach((piece, i) => this.#pieces.set(start + i, piece));
  }

  /** Whether the page was told of activations here; other examples bring text too. */
  #known(pos) {
    const { dst, sources } = this.example;
    return Math.abs(pos - dst) <= 16 || sources.some((source, i) => Math.abs(pos - source.pos) <= (i === 0 ? 5 : 1));
  }

  /** The source with the most DFA, of all heads or one. */
  #topSource(head) {
    const size = ({ dfa, heads }) => Math.abs(head === null ? dfa : heads[head]);
    return this.example.sources.reduce((best, source) => (best && size(best) >= size(source) ? best : source), null);
  }

  /** Fill in the tokens of a window: "5" (and the largest source's), "16" (and all sources) or "full". */
  draw(w, head) {
    const { dst } = this.example;
    const source = this.#topSource(head)?.pos ?? dst;
    const nodes = this.#run(this.#positions(w, source), w);
    const position = (node) => Number(node.dataset.pos ?? -1);
    const split = nodes.findIndex((node) => node.matches(".gap"));
    const at = nodes.findIndex((node) => position(node) === dst);
    const parts = w !== "5" ? nodes : [
      split >= 0 && el("span", { class: "source" }, nodes.slice(0, split)), split >= 0 && nodes[split],
      el("span", { class: "before" }, nodes.slice(split + 1, at)), el("span", { class: "after" }, nodes.slice(at)),
    ];
    this.line.replaceChildren(...parts.filter(Boolean));
    this.line.classList.toggle("split", split >= 0);
    this.element.dataset.window = w;
    this.paint(head);
  }

  #run(positions, w) {
    const nodes = [];
    let last = null;
    for (const pos of positions) {
      const gap = pos - last - 1;
      if (last !== null && gap > 0) nodes.push(el("span", { class: "gap", "data-gap": gap, title: `${plural(gap)} left out` }, w === "5" ? `… ${gap} …` : `… ${plural(gap)} …`));
      nodes.push(this.#token(pos, w));
      last = pos;
    }
    return nodes;
  }

  /** Fill in the whole block, from the server. */
  async drawBlock(head) {
    await this.context(this.example.block);
    this.#decode();
    this.draw("full", head());
  }

  /** Take the tokens out again, keeping the height. */
  clear() {
    if (this.line.firstChild) setVars(this.line, { "min-height": `${this.line.offsetHeight}px` });
    this.line.replaceChildren();
  }

  #positions(w, source) {
    const { dst, sources } = this.example;
    const all = [...this.#pieces.keys()].sort((a, b) => a - b);
    if (w === "full") return all;
    if (w === "5" && dst - source <= NEAR + SHORT + 3) return all.filter((pos) => pos >= Math.min(source - NEAR, dst - SHORT) && pos <= dst + SHORT);
    const near = w === "5" ? [[source, NEAR], [dst, SHORT]] : [[dst, 16], ...sources.map(({ pos }, i) => [pos, i === 0 ? 5 : 1])];
    return all.filter((pos) => near.some(([centre, reach]) => Math.abs(pos - centre) <= reach));
  }

  #token(pos, w) {
    const { dst, acts } = this.example;
    const piece = this.#pieces.get(pos);
    const act = acts.get(pos);
    const body = show(piece, w === "full");
    const alone = body.length === 1 && body[0].className; // one mark or chip: the token's element is it
    const marks = [piece.kind, alone, act > 0 && "on", pos === dst && "dst", pos === dst + 1 && "next", !this.#known(pos) && "unstored"];
    return el("span", {
      class: `tok ${marks.filter(Boolean).join(" ")}`, "data-pos": pos, "data-act": act, vars: act > 0 ? { "--a": unit(act / this.max) } : {},
    }, alone ? body[0].textContent : body);
  }

  /** Show the DFA of the sources: of all heads, or of one. @param {number|null} head */
  paint(head) {
    for (const token of this.line.querySelectorAll(".tok")) {
      const source = this.sources.get(Number(token.dataset.pos));
      if (!source) continue;
      const dfa = head === null ? source.dfa : source.heads[head];
      const size = Math.abs(dfa) / this.largest;
      token.dataset.dfa = dfa;
      token.classList.toggle("src", size >= 0.02);
      token.classList.toggle("minus", size >= 0.02 && dfa < 0);
      setVars(token, { "--s": unit(size) });
    }
    paintStrip(this.strip, this.example.heads, head);
  }

  #label(pos) {
    const piece = this.#pieces.get(pos);
    return piece ? this.vocab.label(piece.id) : "–";
  }

  /** Open or close the map of heads by sources. */
  showMap(open, tip) {
    this.map?.remove();
    this.map = open ? el("div", { class: "map", "data-map-open": this.key },
      drawMap(this.example, { names: this.names, tip, label: (pos) => this.#label(pos) }), this.#equation(), this.#opens("")) : null;
    if (open) this.element.append(this.map);
  }

  /** Tooltip of a token: its numbers, exact. */
  tokenFacts(pos) {
    const { dst, pre, sources, acts } = this.example;
    const { id } = this.#pieces.get(pos);
    const act = acts.get(pos) ?? 0;
    const source = this.sources.get(pos);
    const role = { 0: "destination", 1: "next token" }[pos - dst] ?? `${Math.abs(pos - dst)} ${pos < dst ? "before" : "after"} the destination`;
    return [el("div", { class: "tip-title" }, this.vocab.label(id)), facts([
      ["token id", int(id)], ["position", `${pos}, ${role}`],
      ["activation", !this.#known(pos) ? "not stored here" : act > 0 ? `${num(act)}, ${pct(act / this.max)} of max` : "0"],
      ...(source ? [["DFA from here", `${signed(source.dfa)}, ${pct(source.dfa / pre)} of pre-activation`]] : []),
    ]), ...(source ? [headGrid(this.names, source)] : []),
    ...(source || pos > dst ? [] : [el("div", { class: "hint" }, `DFA: not one of the ${sources.length} sources kept`)]),
    ...(pos === dst ? [this.#sourceFacts(), this.#equation()] : [])];
  }

  /** The destination's DFA, source by source. */
  #sourceFacts() {
    const { dst, sources } = this.example;
    return facts(sources.map(({ pos, dfa }) => [el("span", {}, this.#label(pos), ` ${pos === dst ? "here" : `${dst - pos} back`}`), signed(dfa)]), "from-sources");
  }

  /** Tooltip of the activation: the DFA adds up to it. */
  checkFacts() {
    const { sources, dst, activation, heads } = this.example;
    const { shown, dfa } = checkDfa(this.example);
    return [el("div", { class: "tip-title" }, "Does the DFA add up?"), this.#equation(), facts([
      [`${sources.length} largest sources`, signed(shown)], [`${int(dst + 1 - sources.length)} other sources`, signed(dfa - shown)],
      ["activation", num(activation)], ["largest residual as stored", sci(this.worst)],
    ]), headGrid(this.names, { heads }), el("div", { class: "hint" }, this.where.cloneNode(true))];
  }

  #equation() {
    const { bias, pre } = this.example;
    const { dfa, residual, holds } = checkDfa(this.example);
    return el("div", { class: holds ? "equation" : "equation wrong", "data-equation": holds ? "holds" : "fails" },
      `sum of DFA ${num(dfa)} + bias ${num(bias)} = ${num(dfa + bias)} `, el("b", {}, `${holds ? "=" : "≠"} pre-activation ${num(pre)}`), ` (rounded here; off by ${sci(residual, 0)})`);
  }
}

