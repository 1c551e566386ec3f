/** A state of the prompt explorer to keep: a prompt packed into a link, one HTML file without scripts, JSON. */
import { el } from "./dom.js";

const LONG = 400; // characters of a prompt that a link holds as they are
const MOST = 400_000; // characters of a prompt that a link may unpack to
const SHEETS = ["style.css", "prompt.css"];
const POLICY = `<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">`;
const VIEW = '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">';

/** The part of a link that holds a prompt. @param {{text: string}|{ids: number[]}} prompt */
export async function packed(prompt) {
  if ("text" in prompt && prompt.text.length <= LONG) return { prompt: prompt.text, packed: "" };
  const stream = new Blob([JSON.stringify(prompt)]).stream().pipeThrough(new CompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const text = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
  return { prompt: "", packed: text.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "") };
}

/** The prompt that was packed. */
export async function unpacked(text) {
  try {
    const bytes = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (char) => char.charCodeAt(0));
    const prompt = JSON.parse(await textOf(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))));
    if (typeof prompt.text === "string" || (Array.isArray(prompt.ids) && prompt.ids.every(Number.isInteger))) return prompt;
  } catch {
    // said below
  }
  throw new Error("The link holds a prompt that cannot be unpacked: it is damaged or cut off. Ask for it again, or type the prompt.");
}

async function textOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    text += part.value;
    if (text.length > MOST) throw new Error("too long");
  }
  return text;
}

/** What is on the page as one HTML file: no script, nothing that needs a server; tooltips that are titles stay. */
export async function pageOf(element, { title, facts, prompt }) {
  const styles = await Promise.all(SHEETS.map(async (name) => (await fetch(`/static/${name}`)).text()));
  const copy = element.cloneNode(true);
  for (const node of copy.querySelectorAll(".live, form, .choice, [data-why], [hidden]")) node.remove();
  for (const node of copy.querySelectorAll("a, button")) node.replaceWith(inert(node));
  for (const node of copy.querySelectorAll("[tabindex]")) node.removeAttribute("tabindex");
  const head = el("header", { class: "saved-head" }, el("h1", {}, title), el("p", { class: "definition" }, facts), el("pre", { class: "saved-prompt" }, prompt));
  const body = el("body", {}, el("div", { class: "page saved" }, head, copy));
  const named = el("title", {}, title);
  // the styles are text of this project; all else is serialised from nodes, which escapes what a prompt holds
  return `<!doctype html>\n<html lang="en"><head><meta charset="utf-8">${POLICY}${VIEW}${named.outerHTML}<style>${styles.join("\n")}</style></head>${body.outerHTML}</html>\n`;
}

/** A link or button as it looks. */
function inert(node) {
  const still = el("span", { class: node.className, title: node.title || null }, ...node.childNodes);
  for (const name of ["data-node", "aria-pressed"]) if (node.hasAttribute(name)) still.setAttribute(name, node.getAttribute(name));
  return still;
}
