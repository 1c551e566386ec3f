/** What the page shows, and its link: every view has a URL that brings it back. */

const CARD = { tab: "top", ex: "", dst: "", w: "5", head: "", d: "", t: "", log: "", mass: "", p: "", at: "", norm: "", src: "", how: "", nodes: "", by: "", path: "", why: "" };
const PLANE = { x: "density", y: "top_head_share", lx: "1", ly: "0" };
const QUEUE = { s: "", n: "", who: "", blind: "" };
const FAMILY = { t: "", head: "", sort: "-score", show: "", q: "" };
const GRID = { score: "", by: "" };
const PROMPT = { prompt: "", packed: "", block: "", upto: "", token: "", feature: "", target: "", edits: "", tree: "", scores: "", pairs: "", paint: "" };
const LIST = { q: "", sort: "", dead: "", share: "", in: "", dmin: "", dmax: "", box: "" };

/** The prompt explorer with no prompt in it. */
export const NO_PROMPT = PROMPT;

/** The filters of a list that hides nothing but the dead. */
export const NO_FILTER = { ...LIST, sort: undefined };

/** A family page as it is first opened. */
export const FRESH_FAMILY = FAMILY;

const NAMED = /^\/(family|head)\/([\w.-]{1,40})\/?$/;
const PAGES = { "/dashboard": "dashboard", "/families": "families", "/heads": "heads", "/prompt": "prompt" };

/**
 * Read a link. Served, the path says which card and the hash holds the list (`/f/18?w=16#q=def`); in a file, all is in
 * the hash (`#/f/18?w=16&q=def`).
 * @returns {import("./types").View}
 */
export function readView(location, embedded) {
  const hash = location.hash.slice(1) || (document.querySelector("meta[name=headscope-start]")?.content ?? "");
  const [path, query = ""] = embedded ? hash.split(/\?(.*)/s) : [location.pathname, location.search];
  const latent = /^\/f\/([^/]+)\/?$/.exec(path)?.[1];
  const named = NAMED.exec(path);
  const page = latent ? "card" : named ? named[1] : { ...PAGES, ...(!embedded && { "/label": "label" }) }[path] ?? "table";
  const card = chosen(CARD, query);
  if (card.ex && !new URLSearchParams(query).has("tab")) card.tab = card.ex.split(/[-.]/)[0].replace("random", "top");
  return { page, latent: latent === undefined ? null : /^\d{1,9}$/.test(latent) ? Number(latent) : latent, name: named?.[2] ?? "", family: chosen(FAMILY, page === "family" ? query : ""), grid: chosen(GRID, /^head/.test(page) ? query : ""), ...card, ...chosen(PLANE, query), ...chosen(QUEUE, query), ...chosen(PROMPT, query), list: chosen(LIST, embedded ? query : hash) };
}

/** The link of a view. @param {import("./types").View} view */
export function linkOf(view, embedded) {
  const [path, own, values = view] = {
    card: [`/f/${view.latent}`, CARD], dashboard: ["/dashboard", PLANE], label: ["/label", QUEUE], prompt: ["/prompt", PROMPT], table: ["/", {}], families: ["/families", {}],
    family: [`/family/${view.name}`, FAMILY, view.family], heads: ["/heads", GRID, view.grid], head: [`/head/${view.name}`, GRID, view.grid],
  }[view.page];
  const [page, list] = [changed(own, values), changed(LIST, view.list)];
  if (embedded) return `#${path}?${page}&${list}`.replace(/\?&/, "?").replace(/[?&]$/, "");
  return path + (page && `?${page}`) + (list && `#${list}`);
}

function chosen(defaults, query) {
  const params = new URLSearchParams(query);
  return Object.fromEntries(Object.entries(defaults).map(([key, value]) => [key, params.get(key) ?? value]));
}

function changed(defaults, values) {
  return String(new URLSearchParams(Object.entries(values).filter(([key, value]) => key in defaults && value !== defaults[key])));
}
