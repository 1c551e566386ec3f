/** What the page shows, and its link: every view has a URL that brings it back. */

const CARD = { tab: "top", ex: "", w: "5", head: "", log: "", mass: "" };
const LIST = { q: "", sort: "latent", dead: "", share: "", in: "", dmin: "", dmax: "" };

/** The filters of a list that hides nothing but the dead. */
export const NO_FILTER = { ...LIST, sort: undefined };

/**
 * Read a link. Served, the path says which card and the hash holds the list (`/f/18?w=16#q=def`); in a file, all is in
 * the hash (`#/f/18?w=16&q=def`).
 * @returns {import("./types").View}
 */
export function readView(location, embedded) {
  const hash = location.hash.slice(1);
  const [path, query = ""] = embedded ? hash.split(/\?(.*)/s) : [location.pathname, location.search];
  const latent = /^\/f\/(\d{1,9})\/?$/.exec(path);
  const list = chosen(LIST, embedded ? query : hash);
  return { latent: latent && Number(latent[1]), ...chosen(CARD, query), list };
}

/** The link of a view. @param {import("./types").View} view */
export function linkOf(view, embedded) {
  const path = view.latent === null ? "/" : `/f/${view.latent}`;
  const card = view.latent === null ? "" : changed(CARD, view);
  const list = changed(LIST, view.list);
  if (embedded) return `#${path}?${card}&${list}`.replace(/\?&/, "?").replace(/[?&]$/, "");
  return path + (card && `?${card}`) + (list && `#${list}`);
}

function chosen(defaults, query) {
  const params = new URLSearchParams(query);
  return Object.fromEntries(Object.entries(defaults).map(([key, value]) => [key, params.get(key) ?? value]));
}

function changed(defaults, values) {
  return String(new URLSearchParams(Object.entries(values).filter(([key, value]) => key in defaults && value !== defaults[key])));
}
