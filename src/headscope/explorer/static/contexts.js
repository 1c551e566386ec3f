/** Places in the corpus, one a line: the tokens around it, where the feature is active and where the proxy is true. */
import { button, el, unit } from "./dom.js";
import { int, num } from "./format.js";
import { quoted } from "./study.js";
import { show } from "./vocab.js";

const REACH = 16; // tokens on each side

/** The tokens of a context, as far as the page has them: [position, piece]. */
function around({ block, dst }, { corpus, vocab }) {
  return corpus.runs(block).flatMap(([start, ids]) => {
    const [first, last] = [Math.max(0, dst - REACH - start), Math.max(0, dst + REACH + 1 - start)];
    return vocab.decode(ids).slice(first, last).map((piece, i) => [start + first + i, piece]);
  });
}

/**
 * @param {import("./types").Context} context
 * @param {{marks?: (pos: number) => {class: string, vars?: object, title?: string}|null, lead?: any, aside?: any}} extra
 */
export function drawContext(context, needs, { lead, aside, marks } = {}) {
  const { block, dst, act } = context;
  const [acts, proxied] = [new Map(context.on), new Set(context.proxy)];
  return el("li", { class: "example context", "data-window": "16", "data-context": `${block}.${dst}` },
    el("span", { class: "act", vars: { "--r": unit(act / (needs.maximum || 1)) } }, lead ?? num(act)),
    el("div", { class: "line" }, around(context, needs).map(([pos, piece]) => {
      const own = acts.get(pos);
      const body = show(piece);
      const alone = body.length === 1 && body[0].className;
      const more = marks?.(pos);
      const fires = own > 0 && !marks; // other marks than activations have the colours to themselves
      const names = [piece.kind, alone, fires && "on", pos === dst && "dst", pos === dst + 1 && "next", proxied.has(pos) && "proxied", more?.class];
      const facts = [own > 0 && `activation ${num(own)}`, proxied.has(pos) && "proxy true", more?.title];
      return el("span", {
        class: `tok ${names.filter(Boolean).join(" ")}`, "data-pos": pos, title: facts.filter(Boolean).join(", ") || null,
        vars: { ...(fires ? { "--a": unit(own / (needs.maximum || 1)) } : {}), ...more?.vars },
      }, alone ? body[0].textContent : body);
    })), aside, el("div", { class: "where" }, `${needs.corpus.documentAt(block, dst)} · block ${int(block)}, position ${dst}`));
}

/** A context in a file: document, block, position, and its text with the token itself apart. */
export function contextCells(context, needs) {
  const text = (pieces) => pieces.map(([, piece]) => piece.bits.map((bit) => bit.text ?? bit.mark ?? bit.byte).join("")).join("");
  const pieces = around(context, needs);
  const at = pieces.findIndex(([pos]) => pos === context.dst);
  return [quoted(needs.corpus.documentAt(context.block, context.dst)), context.block, context.dst, context.act, quoted(text(pieces.slice(0, at))), quoted(text(pieces.slice(at, at + 1))), quoted(text(pieces.slice(at + 1)))];
}

export const CONTEXT_HEADINGS = ["document", "block", "position", "activation", "before", "token", "after"];

/** What the marks on tokens mean. */
export function contextKey(maximum) {
  const key = (kind, label) => el("span", {}, el("i", { class: kind }), label);
  return el("p", { class: "legend key" }, key("ramp", `activation, 0 to ${num(maximum, 2)}`), key("proxied", "proxy true"), key("dst", "this token"), el("span", {}, el("b", {}, "next"), " token"));
}

/** A list that shows a few of its rows first. */
export function contextList(rows, few = 5) {
  const list = el("ol", { class: "contexts" }, rows.slice(0, few));
  if (rows.length <= few) return list;
  const all = button({ class: "quiet", "data-all": "", onclick: () => { list.append(...rows.slice(few)); all.remove(); } }, `show ${int(rows.length)}`);
  return el("div", {}, list, all);
}
