/** The page: routes between the table and the cards, keys, history. */
import { Card, TAB_NAMES, tabsOf, WINDOW_NAMES } from "./card.js";
import { Corpus } from "./corpus.js";
import { openData } from "./data.js";
import { button, el } from "./dom.js";
import { int } from "./format.js";
import { askLatent, bindKeys, helpDialog } from "./keys.js";
import { FeatureList } from "./list.js";
import { FRESH_FAMILY, linkOf, NO_PROMPT, readView } from "./state.js";
import { TableView } from "./table.js";
import { Tip } from "./tip.js";
import { Vocab } from "./vocab.js";

const TABLE = { page: "table", latent: null };
const NAV = [["table", "features", "/"], ["families", "families", "f"], ["heads", "heads", "H"], ["prompt", "prompt", "e"]];
const PARENT = { card: "table", dashboard: "table", family: "families", head: "heads" }; // under which entry a page is
const UNMARKED = { ex: "", dst: "", d: "" };
const FRESH = { ...UNMARKED, head: "", p: "", at: "", src: "", how: "", path: "", why: "" }; // what does not outlive a card

class App {
  #turn = 0;
  #table = null;
  #card = null;
  #dashboard = null;
  #labelling = null;
  #families = null;
  #heads = null;
  #prompting = null;
  #list = null;
  #timer = 0;

  constructor(root, data, corpus) {
    Object.assign(this, { data, corpus, tip: new Tip(document.body), view: readView(location, data.embedded) });
    this.top = el("div", { class: "top" });
    this.page = el("div", { class: "page" });
    this.toast = el("output", { class: "toast", "data-toast": "", hidden: true });
    root.append(this.top, this.page, this.toast);
    addEventListener("popstate", () => this.#arrive());
    addEventListener("hashchange", () => this.#arrive());
    document.addEventListener("click", (event) => this.#click(event));
  }

  async start() {
    try {
      const [about, vocab] = await Promise.all([this.data.about(), this.data.vocab()]);
      Object.assign(this, { about, vocab: new Vocab(vocab) });
    } catch (error) {
      return this.#fail(error);
    }
    this.help = helpDialog(this.#keys());
    this.page.after(this.help);
    bindKeys(this.#keys());
    this.#drawTop();
    return this.#show();
  }

  #drawTop() {
    const { model, sae, site, corpus, exported } = this.about;
    const part = exported < sae.d_sae ? ` · ${int(exported)} of its features in this file` : "";
    const pages = NAV.filter(([page]) => this.about.pages || !["families", "heads"].includes(page));
    this.nav = el("nav", { class: "pages", "aria-label": "pages" }, pages.map(([page, label, key]) => el("a", { href: this.#link({ page, latent: null }), "data-page": page, title: `key ${key}` }, label)));
    this.top.append(el("a", { class: "brand", href: this.#link(TABLE), "data-page": "table" }, "headscope"), this.nav,
      el("span", { class: "facts" }, el("b", {}, model.name), ` · ${site} · SAE of ${int(sae.d_sae)} latents, ${sae.kind}${part} · ${corpus.name}, ${int(corpus.n_tokens)} tokens`),
      ...(this.about.labels ? [button({ class: "button", "data-label": "", onclick: () => this.#label() }, "label ", el("kbd", {}, "n"))] : []),
      button({ class: "button", onclick: () => this.#search() }, "search ", el("kbd", {}, "/")),
      button({ class: "button", onclick: () => this.help.showModal() }, "keys ", el("kbd", {}, "?")));
  }

  /** The features, and which of them the list holds. */
  async #listed() {
    this.#list ??= new FeatureList(await this.data.table(), this.vocab);
    return { features: this.#list, latents: this.#list.rows.latent, order: this.#list.find(this.view.list).order };
  }

  #link(patch) {
    return linkOf({ ...this.view, ...patch }, this.data.embedded);
  }

  /** Change the view. A new page is a step in the history; a change within a page is not. */
  #go(patch, push = false) {
    this.view = { ...this.view, ...patch };
    history[push ? "pushState" : "replaceState"](null, "", this.#link({}));
    return this.#show();
  }

  #open(latent) {
    if (latent !== this.view.latent) return this.#go({ page: "card", latent, ...FRESH }, true);
  }

  /** The address changed: by back, forward, or by hand. */
  #arrive() {
    const view = readView(location, this.data.embedded);
    if (!this.about || linkOf(view, this.data.embedded) === this.#link({})) return;
    this.view = view;
    this.#show();
  }

  async #show() {
    const turn = ++this.#turn;
    const late = () => turn !== this.#turn;
    try {
      for (const link of this.nav.children) link.setAttribute("aria-current", link.dataset.page === (PARENT[this.view.page] ?? this.view.page) ? "page" : "false");
      await { families: this.#showFamily, family: this.#showFamily, heads: this.#showHead, head: this.#showHead, table: this.#showTable, dashboard: this.#showDashboard, card: this.#showCard, label: this.#showLabelling, prompt: this.#showPrompt }[this.view.page].call(this, late);
      if (this.view.page !== "card") this.#card = null;
    } catch (error) {
      if (!late()) this.#fail(error);
    }
  }

  async #showTable(late) {
    const { features } = await this.#listed();
    if (late()) return;
    this.#table ??= new TableView(features, this.about, {
      change: (patch) => this.#go({ list: { ...this.view.list, ...patch } }), open: (latent) => this.#open(latent), link: (latent) => this.#cardLink(latent),
      dashboard: () => this.#link({ page: "dashboard", latent: null }),
    });
    this.#put(this.#table.element, this.about.title);
    this.#table.update(this.view.list, this.#card?.feature.latent);
  }

  async #showDashboard(late) {
    const { features } = await this.#listed();
    const { Dashboard } = await import("./dashboard.js");
    if (late()) return;
    this.#dashboard ??= new Dashboard(features, this.about, {
      change: (patch) => this.#go(patch), open: (latent) => this.#open(latent), link: (patch) => this.#link({ latent: null, ...FRESH, ...patch }), tip: this.tip,
    });
    this.#put(this.#dashboard.element, `dashboard · ${this.about.title}`);
    this.#dashboard.update(this.view);
  }

  async #showLabelling(late) {
    const { Labelling } = await import("./labels.js");
    if (late()) return;
    const { about, vocab, corpus, tip, data } = this;
    this.#labelling ??= new Labelling({ about, vocab, corpus, tip, data, link: (other) => this.#cardLink(other) }, (patch) => this.#go(patch));
    this.#put(this.#labelling.element, `labelling · ${about.title}`);
    await this.#labelling.update(this.view);
  }

  async #showFamily(late) {
    await this.#checkPages();
    const { FamilyPages } = await import("./family.js");
    this.#families ??= new FamilyPages(await this.#needs(), (family) => this.#go({ family: { ...this.view.family, ...family } }));
    await this.#showPages(this.#families, late);
  }

  async #showHead(late) {
    await this.#checkPages();
    const { HeadPages } = await import("./head.js");
    this.#heads ??= new HeadPages(await this.#needs(), (grid) => this.#go({ grid: { ...this.view.grid, ...grid } }), (name) => this.#go({ page: "head", latent: null, name }, true));
    await this.#showPages(this.#heads, late);
  }

  /** An export without these pages says so. */
  #checkPages() {
    return this.about.pages || this.data.page(this.view.page);
  }

  async #showPages(pages, late) {
    await pages.update(this.view, late);
    if (!late()) this.#put(pages.element, `${pages.title} · ${this.about.title}`);
  }

  /** What the pages of families and heads need; `feature` links only to what the page has. */
  async #needs() {
    const { features } = await this.#listed();
    const { about, vocab, tip, data } = this;
    return {
      about, vocab, tip, data, open: (latent) => features.rowOf.has(latent) && this.#open(latent), feature: (latent) => (features.rowOf.has(latent) ? this.#cardLink(latent) : null),
      page: (page, name) => this.#pageLink(page, name),
    };
  }

  #pageLink(page, name = "") {
    return this.#link({ page, latent: null, name, family: FRESH_FAMILY });
  }

  async #showPrompt(late) {
    if (!this.about.prompts) return this.#put(drawNoModel(this.data.embedded), `prompt · ${this.about.title}`);
    const { features } = await this.#listed();
    const { PromptPage } = await import("./prompt.js");
    if (late()) return;
    const { about, vocab, tip, data } = this;
    this.#prompting ??= new PromptPage({ about, vocab, tip, data, list: features, link: (other) => this.#cardLink(other), copy: () => this.#copy() }, (patch) => this.#go(patch));
    this.#put(this.#prompting.element, `prompt · ${about.title}`);
    await this.#prompting.update(this.view);
  }

  /** The link that opens an example's context in the prompt explorer, or null without a model. */
  #promptLink(latent, { block, dst }) {
    const upto = Math.min(dst + 4, this.about.corpus.block_size - 1);
    return this.about.prompts ? this.#link({ page: "prompt", latent: null, ...NO_PROMPT, block: String(block), upto: String(upto), token: String(dst), feature: String(latent) }) : null;
  }

  #cardLink(latent) {
    return this.#link({ page: "card", latent, ...FRESH });
  }

  async #showCard(late) {
    const { latent } = this.view;
    if (this.#card?.feature.latent !== latent) {
      const feature = await this.data.feature(latent);
      if (late()) return;
      const { about, vocab, corpus, tip, data } = this;
      this.#card = new Card(feature, { about, vocab, corpus, tip, data, context: data.context, link: (other) => this.#cardLink(other), page: (page, name) => this.#pageLink(page, name), explore: (example) => this.#promptLink(latent, example) }, (patch) => this.#go(patch));
      this.#put(this.#card.element, `${latent} · ${about.title}`);
      scrollTo(0, 0);
    }
    this.#card.update(this.view);
    const [place, previous, next] = [await this.#listed(), await this.#near(-1), await this.#near(1)];
    if (late()) return;
    this.#card.setPlace({
      position: place.order.indexOf(place.features.rowOf.get(latent)), total: place.order.length, previous, next,
      copy: () => this.#copy(), link: (other) => this.#cardLink(other),
    });
    if (next !== null) this.data.feature(next).catch(() => {});
  }

  #put(element, title) {
    document.title = title;
    if (element.isConnected) return;
    this.tip.hide();
    this.page.replaceChildren(element);
  }

  #fail(error) {
    this.#card = null;
    this.#put(el("div", { class: "failure", role: "alert", "data-error": "" }, el("p", {}, error.message), el("p", {}, el("a", { href: this.#link(TABLE), "data-page": "table" }, "All features"))), "headscope");
  }

  /** The neighbour of the card in the list, or null; a card outside the list neighbours its ends. */
  async #near(step) {
    const { features, latents, order } = await this.#listed();
    const at = order.indexOf(features.rowOf.get(this.view.latent));
    return latents[order[at >= 0 ? at + step : step > 0 ? 0 : order.length - 1]] ?? null;
  }

  async #step(step) {
    const moving = this.#moving();
    if (moving) return moving.move(step);
    const latent = await this.#near(step);
    if (latent !== null) this.#open(latent);
  }

  /** What of the page the keys move through, if not the cards. */
  #moving() {
    return { table: this.#table?.table, families: this.#families, family: this.#families, heads: this.#heads, head: this.#heads }[this.view.page];
  }

  /** The next latent by number, among those the page has. */
  async #stepById(step) {
    const { latents } = await this.#listed();
    const beyond = latents.filter((latent) => (latent - this.view.latent) * step > 0);
    if (this.view.latent !== null && beyond.length > 0) this.#open(step * Math.min(...beyond.map((latent) => latent * step)));
  }

  async #random() {
    const { features: { rows }, latents, order } = await this.#listed();
    const alive = (order.length > 0 ? order : [...latents.keys()]).filter((row) => rows.alive[row]);
    if (alive.length > 0) this.#open(latents[alive[Math.floor(Math.random() * alive.length)]]);
  }

  /** Label the feature of the card, or a sample. */
  #label() {
    if (this.view.page !== "label") this.#go({ page: "label", latent: null, n: String(this.view.latent ?? ""), ...(this.view.latent !== null && { s: "" }) }, true);
  }

  async #search() {
    if (this.view.page !== "table") await this.#go(TABLE, true);
    this.page.querySelector("[data-search]")?.select();
  }

  async #copy() {
    const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
    this.toast.replaceChildren(copied ? "Link copied: " : "Copy this link: ", el("b", {}, location.href));
    this.toast.hidden = false;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => { this.toast.hidden = true; }, 3000);
  }

  /** Follow links inside the page without loading it anew. */
  #click(event) {
    if (!this.tip.contains(event.target)) this.tip.hide();
    const link = event.target.closest("[data-nav], [data-page], [data-explore]");
    const { nav, page, name = "", explore } = link?.dataset ?? {};
    if (!(nav || page || explore !== undefined) || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    if (nav) this.#open(Number(nav));
    else if (explore !== undefined) this.#explore(link.getAttribute("href"));
    else this.#go({ page, latent: null, name, family: FRESH_FAMILY }, true);
  }

  /** Open the prompt explorer by its link. */
  #explore(href) {
    this.view = readView(new URL(href, location.href), this.data.embedded);
    history.pushState(null, "", href);
    this.#show();
  }

  #escape({ target }) {
    if (this.tip.hide()) return;
    if (target.matches("[data-search]") && target.value) this.#go({ list: { ...this.view.list, q: "" } });
    else if (target.matches("input, select, textarea")) target.blur();
    else if (this.view.page === "prompt" && this.view.feature) this.#go({ feature: "", tree: "", scores: "" });
    else if (this.view.d) this.#go({ d: "" });
    else if (this.view.head) this.#go({ head: "" });
    else if (this.view.ex) this.#go({ ex: "", dst: "" });
  }

  /** Arrow keys move in the table and scroll a card. */
  #arrow(step) {
    if (["table", "family"].includes(this.view.page)) this.#moving()?.move(step);
    else if (this.#onPrompt()) this.#prompting.act(step > 0 ? "down" : "up");
    else scrollBy(0, 60 * step);
  }

  #onPrompt() {
    return this.view.page === "prompt" && this.#prompting !== null;
  }

  /** The prompt explorer, or the context of the card's current example in it. */
  #toPrompt() {
    const example = this.view.page === "card" && this.#card?.currentExample();
    if (this.#onPrompt()) this.#prompting.act("write");
    else if (example && this.about.prompts) this.#explore(this.#promptLink(this.view.latent, example));
    else this.#go({ page: "prompt", latent: null }, true);
  }

  #keys() {
    const onPrompt = (name) => () => this.#onPrompt() && this.#prompting.act(name);
    const onCard = (patch) => (event) => this.#card?.feature.alive && this.#go(patch(event));
    return [
      { keys: ["j"], help: "next in the list", run: () => this.#step(1) },
      { keys: ["k"], help: "previous in the list", run: () => this.#step(-1) },
      { keys: ["J"], help: "next by number", run: () => this.#stepById(1) },
      { keys: ["K"], help: "previous by number", run: () => this.#stepById(-1) },
      { keys: ["ArrowDown"], label: "↓", help: "next row", run: () => this.#arrow(1) },
      { keys: ["ArrowUp"], label: "↑", help: "previous row", run: () => this.#arrow(-1) },
      { keys: ["Enter"], help: "open the row", run: () => (this.#onPrompt() ? this.#prompting.act("open") : this.#moving()?.openCursor()) },
      { keys: ["/"], help: "search and list", run: () => this.#search() },
      { keys: ["g"], help: "go to a number", run: () => askLatent(this.about.sae.d_sae, (latent) => this.#open(latent)) },
      { keys: ["r"], help: "a random live feature of the list", run: () => this.#random() },
      { keys: ["o"], help: "dashboard of the whole SAE", run: () => this.#go({ page: "dashboard", latent: null }, true) },
      ...(this.about.pages ? [
        { keys: ["f"], help: "families of features", run: () => this.#go({ page: "families", latent: null }, true) },
        { keys: ["H"], help: "attention heads", run: () => this.#go({ page: "heads", latent: null }, true) },
      ] : []),
      ...(this.about.labels ? [{ keys: ["n"], help: "label this feature, or a sample", run: () => this.#label() }] : []),
      { keys: ["1", "2", "3", "4"], help: "top and random, quantiles, intervals, near threshold", run: onCard(({ key }) => ({ ...UNMARKED, tab: TAB_NAMES[key - 1] })) },
      ...(this.about.studies.length > 0 ? [
        { keys: ["5", "6", "7", "8", "9"], help: "specificity, expected value, sensitivity, logits, ablation", run: onCard(({ key }) => ({ ...UNMARKED, tab: tabsOf(this.about, "dive")[key - 5] })) },
        { keys: ["p"], help: "write a proxy", run: () => this.#card?.feature.alive && this.#card.writeProxy() },
      ] : []),
      { keys: ["e"], help: "prompt explorer, of a card with the marked example's context; write in it", run: () => this.#toPrompt() },
      ...(this.about.prompts ? [
        { keys: ["ArrowLeft"], label: "←", help: "prompt: the token before", run: onPrompt("left") },
        { keys: ["ArrowRight"], label: "→", help: "prompt: the token after", run: onPrompt("right") },
        { keys: ["a"], help: "prompt: ablate the feature at this token, or keep it", run: onPrompt("here") },
        { keys: ["A"], help: "prompt: ablate it at all tokens, or keep it", run: onPrompt("everywhere") },
        { keys: ["x"], help: "prompt: take back the last ablation", run: onPrompt("undo") },
      ] : []),
      ...(this.about.studies.length > 0 ? [{ keys: ["u"], help: "how it is computed, tab by tab", run: onCard(() => ({ ...UNMARKED, tab: nextOf(tabsOf(this.about, "upstream"), this.view.tab) })) }] : []),
      { keys: ["w"], help: "window: short, medium, full", run: onCard(() => ({ w: WINDOW_NAMES[(WINDOW_NAMES.indexOf(this.view.w) + 1) % 3] })) },
      { keys: ["h"], help: "sources of one head, the largest first", run: onCard(() => ({ head: this.#card.nextHead() })) },
      { keys: ["d"], help: "DFA and attention of an example, heads × sources", run: () => this.#card?.feature.alive && this.#card.toggleMap() },
      { keys: ["l"], help: "histogram: linear, log", run: onCard(() => ({ log: this.view.log ? "" : "1" })) },
      { keys: ["y"], help: "copy the link of this view", run: () => this.#copy() },
      { keys: ["?"], help: "these keys", run: () => this.help.showModal() },
      { keys: ["Escape"], label: "Esc", help: "close, unpin, clear", run: (event) => this.#escape(event) },
    ];
  }
}

/** What comes after a name in a list; the first after the last, and after a name that is not in it. */
const nextOf = (names, name) => names[(names.indexOf(name) + 1) % names.length];

/** The prompt explorer needs a model: says so, and how to get one. */
function drawNoModel(embedded) {
  return el("main", { class: "dead-page", "data-no-model": "" }, el("h1", {}, "The prompt explorer needs the model"),
    el("p", {}, embedded ? "This is an export, which holds no model. Serve the index that it was made from:" : "This server has none. Start it with the model of its index:"),
    el("pre", { class: "python" }, "headscope serve --index INDEX --with-model"));
}

const corpus = new Corpus();
new App(document.getElementById("app"), openData(corpus), corpus).start();
