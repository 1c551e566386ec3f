/** Tokens are bytes; this turns runs of them into text that shows every character once and every byte somewhere. */
import { el } from "./dom.js";

const SHOWN = { "\n": "↵", "\t": "⇥", "\r": "␍" };
// What is invisible, looks like a space or reorders its neighbours.
const HIDDEN = /([\p{Cc}\p{Zl}\p{Zp}\p{DI}\ufff9-\ufffb\u2800\xa0\u1680\u2000-\u200a\u202f\u205f\u3000])/u;
const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const hex = (code, digits) => code.toString(16).toUpperCase().padStart(digits, "0");

export class Vocab {
  #lower = null;

  /** @param {{tokens: string[], special: number[], byte_tokens: number[], prefix: string}} data each token's bytes as char codes; ids of special tokens, and of those for one byte that no other token has; what the tokenizer puts before a text */
  constructor({ tokens, special, byte_tokens: byteTokens = [], prefix = "" }) {
    this.tokens = tokens;
    this.special = new Set(special);
    this.byteTokens = new Set(byteTokens);
    this.prefix = prefix;
  }

  /** The token with exactly this text. @param {string} text @returns {number | undefined} */
  find(text) {
    const bytes = Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte)).join("");
    const named = this.tokens.flatMap((token, id) => (token === bytes && !this.special.has(id) ? [id] : []));
    return named.find((id) => !this.byteTokens.has(id)) ?? named[0];
  }

  /** Decode consecutive tokens together. @param {number[]} ids @returns {import("./types").Piece[]} */
  decode(ids) {
    const pieces = ids.map((id) => ({ id, kind: this.special.has(id) ? "special" : "text", bits: [] }));
    let run = [];
    for (const piece of pieces) {
      if (piece.kind === "text") {
        run.push(piece);
        continue;
      }
      this.#decodeRun(run);
      run = [];
      piece.bits.push({ text: this.tokens[piece.id] });
    }
    this.#decodeRun(run);
    return pieces;
  }

  #decodeRun(pieces) {
    const owner = pieces.flatMap((piece) => Array(this.#bytes(piece.id).length).fill(piece));
    const bytes = Uint8Array.from(pieces.flatMap((piece) => this.#bytes(piece.id)));
    const texts = new Map(pieces.map((piece) => [piece, ""]));
    for (let i = 0; i < bytes.length;) {
      const character = characterAt(bytes, i);
      // A byte that is no character travels as a lone surrogate, which no valid text holds.
      texts.set(owner[i], texts.get(owner[i]) + (character?.text ?? String.fromCharCode(0xdc00 + bytes[i])));
      i += character?.size ?? 1;
    }
    for (const [piece, text] of texts) {
      if (text) piece.bits = text.split(/([\udc80-\udcff])/u).flatMap(visible);
      else piece.kind = "part";
    }
  }

  #bytes(id) {
    return Array.from(this.tokens[id] ?? "", (char) => char.charCodeAt(0));
  }

  /** A token alone, for a table: spaces at its ends as faint marks. */
  label(id) {
    if (id === null || id === undefined) return el("span", { class: "none" }, "–");
    const [piece] = this.decode([id]);
    if (piece.kind === "text") piece.bits = piece.bits.flatMap((bit) => marked(bit, /(^ +| +$)/, ({ length }) => (length > 3 ? `␣${raised(length)}` : "·".repeat(length))));
    return el("span", { class: `label ${piece.kind}`, "data-token": id }, show(piece));
  }

  /** A token alone as plain text. */
  text(id) {
    return this.decode([id])[0].bits.map((bit) => bit.text ?? bit.mark ?? bit.byte).join("");
  }

  /** Which tokens a search term means: those that contain it, or equal it when it is quoted. @returns {boolean[]} */
  matching(query) {
    this.#lower ??= this.tokens.map((_, id) => utf8.decode(Uint8Array.from(this.#bytes(id))).toLowerCase());
    const exact = /^"(.+)"$/s.exec(query.toLowerCase());
    return this.#lower.map((token) => (exact ? token === exact[1] : token.includes(query.toLowerCase())));
  }
}

/** The nodes of a piece: of one line with long runs of spaces shortened, or whole, with the line breaks of the text. */
export function show(piece, whole = false) {
  if (piece.kind === "part") return [el("span", { class: "part", title: "the rest of a character" }, "·")];
  const bits = whole ? piece.bits : piece.bits.flatMap((bit) => marked(bit, /( {3,})/, ({ length }) => `␣${raised(length)}`));
  const nodes = bits.flatMap(({ text, mark, byte }) => text ?? [el("span", { class: mark ? "mark" : "byte" }, mark ?? byte), whole && mark === "↵" && "\n"]);
  return nodes.filter(Boolean);
}

const raised = (n) => String(n).replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]);

/** Split a bit of text and turn what `pattern` captures into marks. */
function marked(bit, pattern, mark) {
  if (bit.text === undefined) return [bit];
  return bit.text.split(pattern).map((text, i) => (i % 2 ? { mark: mark(text) } : { text })).filter(({ text }) => text !== "");
}

function visible(text, i) {
  if (i % 2) return [{ byte: `\\x${hex(text.charCodeAt(0) - 0xdc00, 2)}` }];
  return text.split(HIDDEN).filter(Boolean).map((part) => {
    if (!HIDDEN.test(part)) return { text: part };
    const code = part.codePointAt(0);
    return { raw: part, ...(SHOWN[part] ? { mark: SHOWN[part] } : { byte: code < 32 ? `\\x${hex(code, 2)}` : `U+${hex(code, 4)}` }) };
  });
}

/** The UTF-8 character at `i`, or null when the byte there begins none. */
function characterAt(bytes, i) {
  const size = bytes[i] < 0x80 ? 1 : bytes[i] < 0xe0 ? 2 : bytes[i] < 0xf0 ? 3 : 4;
  try {
    return { size, text: strict.decode(bytes.subarray(i, i + size)) };
  } catch {
    return null;
  }
}
