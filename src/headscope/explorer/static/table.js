/** The index: what was read, how good the SAE is, and every feature as a row; only rows in sight are in the page. */
import { button, el, setVars, term, unit } from "./dom.js";
import { int, num, pct } from "./format.js";
import { NO_FILTER } from "./state.js";

const ROW = 27;
const WIDTHS = { int: "minmax(52px, .8fr)", float: "minmax(52px, .8fr)", percent: "minmax(76px, 1fr)", token: "minmax(92px, 1.5fr)", head: "minmax(56px, .7fr)", text: "minmax(110px, 2fr)", bool: "52px" };
const WRITE = { int, percent: pct, float: num, bool: (flag) => (flag ? "yes" : "no"), head: String, text: String };
const HINT = 'Searches the tokens of top logits, top source and examples. "def": exactly that token. id:, logit:, source: or example: in front: only there.';

/** Facts and quality numbers. @param {import("./types").About} about */
export function drawAbout(about) {
  const { model, sae, corpus, definitions } = about;
  const fact = (name, ...value) => [el("dt", {}, term(name, definitions[name])), el("dd", {}, value)];
  return el("aside", { class: "about", "data-about": "" }, el("h2", {}, "What is shown"), el("dl", {},
    fact("model", el("b", { title: model.hash }, model.name), ` ${model.n_layers} layers, ${model.n_heads} heads, d_model ${int(model.d_model)}`), fact("site", about.site),
    fact("SAE", el("b", {}, sae.name), ` ${sae.architecture}, ${int(sae.d_in)} → ${int(sae.d_sae)} latents`),
    fact("alive", `${int(about.n_alive)} of ${int(about.n_alive + about.n_dead)} (${int(about.n_dead)} dead)`), fact("L0", num(about.l0, 2)),
    fact("corpus", el("b", {}, corpus.name), ` ${corpus.split}: ${int(corpus.n_tokens)} tokens of ${int(corpus.n_documents)} documents, in blocks of ${int(corpus.block_size)}`)),
  about.quality.length > 0 && [el("h2", {}, "How good it is"), el("table", { class: "quality", "data-quality": "" },
    el("tr", {}, el("th"), el("th", {}, "here"), el("th", {}, term("post", "The number in the post (Kissane et al., 2024), for another model and corpus."))),
    about.quality.map(({ name, value, post, definition }) => el("tr", {}, el("th", { scope: "row" }, term(name, definition)), el("td", {}, value), el("td", {}, post))))],
  el("p", { class: "hint" }, `headscope ${about.version} · ${String(about.created).slice(0, 10)}`, el("br"), String(sae.hash ?? "").slice(0, 19)));
}

export class TableView {
  #order = [];
  #cursor = 0;
  #list = null;
  #inputs = {};

  /**
   * @param {import("./list.js").FeatureList} features
   * @param {{change: (patch: object) => void, open: (latent: number) => void, link: (latent: number) => string}} on
   */
  constructor(features, about, on) {
    Object.assign(this, { features, on, columns: features.columns.filter(({ listed }) => listed) });
    this.count = el("output", { class: "count", "data-count": "" });
    this.head = el("div", { class: "row header", role: "row" });
    this.space = el("div", { class: "space", role: "rowgroup" });
    this.view = el("div", {
      class: "rows", role: "table", "aria-label": "features", "data-table": "", onscroll: () => requestAnimationFrame(() => this.#drawRows()),
      vars: { "--cols": this.columns.map(({ kind }) => WIDTHS[kind]).join(" "), "--row": `${ROW}px` },
    }, this.head, this.space);
    new ResizeObserver(() => this.#drawRows()).observe(this.view);
    this.element = el("main", { class: "index" }, drawAbout(about), el("section", { class: "features" },
      el("header", {}, el("h1", {}, about.title), el("a", { class: "button", href: on.dashboard(), "data-page": "dashboard" }, "dashboard ", el("kbd", {}, "o")), this.count), this.#drawControls(), this.view));
  }

  #drawControls() {
    let timer = 0;
    const change = ({ target }) => {
      clearTimeout(timer);
      const value = target.type === "checkbox" ? (target.checked ? "1" : "") : target.value;
      timer = setTimeout(() => this.on.change({ [target.dataset.filter]: value }), target.type === "search" ? 120 : 0);
    };
    const input = (key, props, ...children) => (this.#inputs[key] = el(children.length ? "select" : "input", { "data-filter": key, oninput: change, ...props }, ...children));
    const percent = (key, label) => input(key, { inputmode: "decimal", size: 4, "aria-label": label });
    this.reset = button({ class: "quiet", "data-reset": "", onclick: () => this.on.change({ ...NO_FILTER, sort: this.#list.sort }) }, "clear");
    this.box = button({ class: "filter", "data-box": "", onclick: () => this.on.change({ box: "" }) }, "in the rectangle ×");
    return el("form", { class: "filters", onsubmit: (event) => event.preventDefault() },
      input("q", { type: "search", placeholder: "Search an id or a token   /", "data-search": "", title: HINT, spellcheck: "false", onkeydown: (event) => this.#searchKey(event) }),
      el("label", {}, "top head ", input("in", {}, el("option", { value: "" }, "any"), this.features.heads.map((name) => el("option", {}, name)))),
      el("label", {}, "with ≥ ", percent("share", "least DFA share of the top head"), " % of DFA"),
      el("label", {}, "density ", percent("dmin", "least density"), " to ", percent("dmax", "largest density"), " %"),
      el("label", {}, input("dead", { type: "checkbox" }), " dead too"), this.box, this.reset);
  }

  /** Arrow keys and Enter work while typing. */
  #searchKey(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) this.move(step);
    else if (event.key === "Enter") this.openCursor();
    else return;
    event.preventDefault();
  }

  /** Show a listing, with the cursor on `latent` where it is listed. @param {import("./types").Listing} list */
  update(list, latent) {
    const fresh = JSON.stringify(list) !== JSON.stringify(this.#list);
    const { order, hits, hidden } = this.features.find(list);
    [this.#list, this.#order] = [list, order];
    for (const [key, input] of Object.entries(this.#inputs)) {
      if (input.type === "checkbox") input.checked = list[key] === "1";
      else if (input.value !== list[key]) input.value = list[key];
    }
    this.box.hidden = !list.box;
    this.box.title = list.box;
    this.reset.hidden = Object.entries(NO_FILTER).every(([key, none]) => none === undefined || list[key] === none);
    const by = Object.entries(hits).filter(([name]) => name).map(([name, n]) => `${int(n)} by ${name}`).join(", ");
    this.count.replaceChildren(el("b", { "data-n": order.length }, int(order.length)), ` of ${int(this.features.size)}`, by && ` (${by})`, hidden > 0 ? ` · ${int(hidden)} dead hidden` : "");
    this.#drawHead(list.sort);
    setVars(this.space, { "--height": `${order.length * ROW}px` });
    const at = order.indexOf(this.features.rowOf.get(latent));
    if (at >= 0) this.#cursor = at;
    else if (fresh) this.#cursor = 0;
    this.move(0);
  }

  #drawHead(sort) {
    this.head.replaceChildren(...this.columns.map(({ name, kind, label, definition }) => {
      const state = name !== sort.replace("-", "") ? "none" : sort.startsWith("-") ? "descending" : "ascending";
      // Sizes sort from the largest first, names and ids from the first; a second press turns the order.
      const down = state === "none" ? kind === "float" || kind === "percent" || name === "n_active" : state === "ascending";
      return el("span", { role: "columnheader", "aria-sort": state, class: `cell ${kind}` },
        button({ "data-sort": name, title: definition, onclick: () => this.on.change({ sort: (down ? "-" : "") + name }) }, label));
    }));
  }

  #drawRows() {
    const first = Math.max(0, Math.floor(this.view.scrollTop / ROW) - 8);
    const last = Math.ceil((this.view.scrollTop + this.view.clientHeight) / ROW) + 8;
    const rows = this.#order.slice(first, last).map((row, i) => this.#drawRow(row, first + i));
    this.space.replaceChildren(...(this.#order.length ? rows : [el("p", { class: "empty", "data-empty": "" }, "No feature matches.")]));
  }

  #drawRow(row, i) {
    const { rows, vocab } = this.features;
    const latent = rows.latent[row];
    return el("a", {
      class: `row${i === this.#cursor ? " cursor" : ""}${rows.alive[row] ? "" : " dead"}`, role: "row", "data-latent": latent, "data-nav": latent,
      href: this.on.link(latent), tabindex: i === this.#cursor ? 0 : -1, vars: { "--top": `${i * ROW}px` },
    }, this.columns.map(({ name, kind }) => {
      const value = rows[name][row];
      const text = value !== null ? WRITE[kind]?.(value) : name === "maximum" && !rows.alive[row] ? "dead" : "";
      const differs = name === "decoder_head" && value !== rows.top_head[row];
      return el("span", { class: `cell ${kind}${differs ? " differs" : ""}`, role: "cell", "data-col": name, vars: /share$/.test(name) && value !== null ? { "--r": unit(value) } : {} },
        kind === "token" ? vocab.label(value) : name === "latent" ? String(value) : text);
    }));
  }

  /** Move the cursor, and bring it into sight. */
  move(step) {
    this.#cursor = Math.max(0, Math.min(this.#order.length - 1, this.#cursor + step));
    const [top, room] = [this.#cursor * ROW, this.view.clientHeight - 2 * ROW];
    if (room > 0) this.view.scrollTop = Math.min(top, Math.max(this.view.scrollTop, top + ROW - room));
    this.#drawRows();
  }

  /** Open the row under the cursor. */
  openCursor() {
    if (this.#order.length > 0) this.on.open(this.features.rows.latent[this.#order[this.#cursor]]);
  }
}
