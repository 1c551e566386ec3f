/** The index: what was read, how good the SAE is, and every feature as a row; only rows in sight are in the page. */
import { button, el, term, unit } from "./dom.js";
import { int, num, pct } from "./format.js";
import { cellText, Rows } from "./rows.js";
import { NO_FILTER } from "./state.js";

const HINT = 'Searches the tokens of top logits, top source and examples. "def": exactly that token. id:, logit:, source: or example: in front: only there.';

/** Facts and quality numbers. @param {import("./types").About} about */
export function drawAbout(about) {
  const { model, sae, corpus, definitions } = about;
  const fact = (name, ...value) => [el("dt", {}, term(name, definitions[name])), el("dd", {}, value)];
  return el("aside", { class: "about", "data-about": "" }, el("h2", {}, "What is shown"), el("dl", {},
    fact("model", el("b", { title: model.hash }, model.name), ` ${model.n_layers} layers, ${model.n_heads} heads, d_model ${int(model.d_model)}`), fact("site", about.site),
    fact("SAE", el("b", {}, sae.name), ` ${sae.kind}, ${int(sae.d_in)} → ${int(sae.d_sae)} latents`),
    fact("alive", `${int(about.n_alive)} of ${int(about.n_alive + about.n_dead)} (${int(about.n_dead)} dead)`), fact("L0", num(about.l0, 2)),
    fact("corpus", el("b", {}, corpus.name), ` ${corpus.split}: ${int(corpus.n_tokens)} tokens of ${int(corpus.n_documents)} documents, in blocks of ${int(corpus.block_size)}`)),
  about.quality.length > 0 && [el("h2", {}, "How good it is"), el("table", { class: "quality", "data-quality": "" },
    el("tr", {}, el("th"), el("th", {}, "here"), el("th", {}, term("post", "The number in the post (Kissane et al., 2024), for another model and corpus."))),
    about.quality.map(({ name, value, post, definition }) => el("tr", {}, el("th", { scope: "row" }, term(name, definition)), el("td", {}, value), el("td", {}, post))))],
  el("p", { class: "hint" }, `headscope ${about.version} · ${String(about.created).slice(0, 10)}`, el("br"), String(sae.hash ?? "").slice(0, 19)));
}

export class TableView {
  #list = null;
  #inputs = {};

  /**
   * @param {import("./list.js").FeatureList} features
   * @param {{change: (patch: object) => void, open: (latent: number) => void, link: (latent: number) => string}} on
   */
  constructor(features, about, on) {
    Object.assign(this, { features, on, columns: features.columns.filter(({ listed }) => listed) });
    this.count = el("output", { class: "count", "data-count": "" });
    this.table = new Rows("features", this.columns, { sort: (sort) => on.change({ sort }), open: on.open, link: on.link, id: (row) => features.rows.latent[row], cell: (row, column) => this.#cell(row, column) });
    this.element = el("main", { class: "index" }, drawAbout(about), el("section", { class: "features" },
      el("header", {}, el("h1", {}, about.title), el("a", { class: "button", href: on.dashboard(), "data-page": "dashboard" }, "dashboard ", el("kbd", {}, "o")), this.count), this.#drawControls(), this.table.element));
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
    if (step) this.table.move(step);
    else if (event.key === "Enter") this.table.openCursor();
    else return;
    event.preventDefault();
  }

  /** Show a listing, with the cursor on `latent` where it is listed. @param {import("./types").Listing} list */
  update(list, latent) {
    const fresh = JSON.stringify(list) !== JSON.stringify(this.#list);
    const { order, hits, hidden } = this.features.find(list);
    this.#list = list;
    for (const [key, input] of Object.entries(this.#inputs)) {
      if (input.type === "checkbox") input.checked = list[key] === "1";
      else if (input.value !== list[key]) input.value = list[key];
    }
    this.box.hidden = !list.box;
    this.box.title = list.box;
    this.reset.hidden = Object.entries(NO_FILTER).every(([key, none]) => none === undefined || list[key] === none);
    const by = Object.entries(hits).filter(([name]) => name).map(([name, n]) => `${int(n)} by ${name}`).join(", ");
    this.count.replaceChildren(el("b", { "data-n": order.length }, int(order.length)), ` of ${int(this.features.size)}`, by && ` (${by})`, hidden > 0 ? ` · ${int(hidden)} dead hidden` : "");
    const at = order.indexOf(this.features.rowOf.get(latent));
    this.table.update({ order, sort: this.features.sortOf(list), at: at >= 0 ? at : fresh ? 0 : null });
  }

  #cell(row, { name, kind }) {
    const { rows, vocab } = this.features;
    const [value, dead] = [rows[name][row], !rows.alive[row]];
    const text = value === null && name === "maximum" && dead ? "dead" : name === "latent" ? String(value) : cellText(value, kind);
    const differs = name === "decoder_head" && value !== rows.top_head[row];
    return { dead, class: differs && "differs", vars: /share$/.test(name) && value !== null ? { "--r": unit(value) } : {}, content: kind === "token" ? vocab.label(value) : text };
  }

}
