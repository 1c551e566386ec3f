/** The deep-dive tabs of a card: a proxy to type, and what it says of the feature at once. */
import { drawAblation } from "./ablation.js";
import { button, el } from "./dom.js";
import { drawLogitsTab } from "./effects.js";
import { drawPredictions, drawSensitivity } from "./sensitivity.js";
import { countsLine, drawExpected, drawSpecificity } from "./specificity.js";

const TYPING = 350; // milliseconds of rest before what is typed is asked for
const DRAW = { specificity: drawSpecificity, expected: drawExpected, sensitivity: drawSensitivity };

export class Dive {
  #asked = null;
  #drawn = "";
  #timer = 0;
  #view = {};

  /**
   * @param {import("./types").Feature} feature
   * @param {{about: import("./types").About, vocab: object, corpus: object, tip: object, data: import("./types").Data, names: string[], change: (patch: object) => void}} needs
   * @param {HTMLElement} element where to draw
   */
  constructor(feature, needs, element) {
    const { about, vocab, corpus, tip, data, names, change } = needs;
    Object.assign(this, { feature, needs: { about, vocab, corpus, tip, data, names, change }, data, change, element });
    this.input = el("input", {
      type: "text", id: "proxy", class: "proxy", "data-proxy": "", spellcheck: "false", autocomplete: "off", autocapitalize: "off", maxlength: 2000, "aria-describedby": "proxy-said", oninput: () => this.#typed(TYPING),
      onkeydown: (event) => event.key === "Enter" && (event.preventDefault(), this.#typed(0)),
    });
    this.said = el("div", { id: "proxy-said", class: "proxy-said", "data-said": "", "aria-live": "polite" });
    this.suggested = el("div", { class: "suggested", "data-suggested": "" });
    this.bench = el("form", { class: "workbench", onsubmit: (event) => event.preventDefault() }, el("label", { for: "proxy" }, "proxy"), this.input, this.suggested, this.said);
    this.body = el("div", { class: "study-body", "data-study-body": "" });
    element.replaceChildren(this.bench, this.body);
  }

  /** Show a view: its tab, for its proxy or the first of the suggested ones. @param {import("./types").View} view */
  async update(view) {
    this.#view = view;
    this.bench.hidden = view.tab === "logits";
    if (this.body.dataset.tabShown !== view.tab) this.#clear(); // until it is computed, another tab's content is not this one's
    try {
      this.start ??= await this.data.start(this.feature.latent);
      if (this.#view === view) await this.#show(view);
    } catch (error) {
      if (this.#view === view && error.name !== "AbortError") this.#fail(error);
    }
  }

  /** Type here. */
  write() {
    this.input.focus();
    this.input.select();
  }

  #typed(rest) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.change({ p: this.input.value, at: "" }), rest);
  }

  #show(view) {
    const proxy = view.p || this.start.proxies[0]?.proxy || "";
    if (document.activeElement !== this.input) this.input.value = proxy;
    if (this.suggested.childElementCount === 0) this.#suggest();
    for (const one of this.suggested.children) one.setAttribute("aria-pressed", String(one.dataset.suggest === proxy));
    if (view.tab === "logits") return this.#logits(view);
    if (!proxy) return this.#draw(view, "", () => [el("p", { class: "nothing", "data-nothing": "" }, "Write a proxy: a rule that says of each token whether the feature should fire there.")]);
    return view.tab === "ablation" ? this.#ablation(view, proxy) : this.#study(view, proxy);
  }

  #suggest() {
    this.suggested.append(...this.start.proxies.map(({ proxy, why }) =>
      button({ class: "chip", "data-suggest": proxy, title: why, onclick: () => { this.input.value = proxy; this.change({ p: proxy, at: "" }); } }, proxy)));
    this.input.readOnly = this.needs.data.embedded;
    this.input.title = this.needs.data.embedded ? "This file holds these proxies; headscope serve computes others." : "";
  }

  async #logits(view) {
    const found = await this.data.study("logits", this.feature.latent);
    if (this.#view === view) this.#draw(view, "", () => drawLogitsTab(this.feature, found, this.needs));
  }

  async #study(view, proxy) {
    const dive = await this.#ask("specificity", proxy);
    if (this.#view !== view) return;
    this.#say(el("span", {}, countsLine(dive)), dive.proxy !== proxy && el("span", { class: "canonical", "data-canonical": "" }, `read as ${dive.proxy}`), dive.notes.map((note) => el("span", { class: "note-text", "data-note": "" }, note)));
    this.#draw(view, dive.hash, () => DRAW[view.tab](dive, view, this.needs));
    const place = this.body.querySelector("[data-predictions]:empty");
    if (place && this.start.live) await this.#predictions(proxy, dive, place);
  }

  /** What the model says comes after the rest; that it cannot say it is no fault of the proxy. */
  async #predictions(proxy, dive, place) {
    try {
      const found = await this.#ask("predictions", proxy, place);
      place.replaceChildren(...drawPredictions(found, this.needs));
    } catch (error) {
      if (error.name !== "AbortError") place.replaceChildren(el("p", { class: "nothing", "data-failed": "" }, error.message));
    }
  }

  async #ablation(view, proxy) {
    const effects = this.start.live ? await this.#ask("ablation", proxy) : null;
    if (this.#view !== view) return;
    this.bench.hidden = effects === null;
    this.#say(effects && effects.proxy !== proxy && el("span", { class: "canonical", "data-canonical": "" }, `read as ${effects.proxy}`));
    this.#draw(view, effects?.hash ?? "", () => drawAblation(effects, this.start, view, { ...this.needs, feature: this.feature }));
  }

  /** Ask for a study; what was asked before and has not come is given up. */
  async #ask(name, proxy, place = this.body) {
    this.#asked?.abort();
    const asked = this.#asked = new AbortController();
    place.setAttribute("aria-busy", "true");
    try {
      return await this.data.study(name, this.feature.latent, { proxy }, asked.signal);
    } finally {
      if (this.#asked === asked || place !== this.body) place.removeAttribute("aria-busy");
    }
  }

  #say(...content) {
    this.input.removeAttribute("aria-invalid");
    this.said.replaceChildren(...content.flat().filter(Boolean));
  }

  /** Draw a tab; one that stands there already is left, so that a slider being moved is not drawn anew under the hand. */
  #draw({ tab, log, mass, norm }, proxy, make) {
    const key = [tab, proxy, log, mass, norm].join("|");
    if (key === this.#drawn) return;
    this.#drawn = key;
    this.needs.tip.hide();
    this.body.replaceChildren(...make().filter(Boolean));
    this.body.dataset.tabShown = tab;
  }

  #clear() {
    this.#drawn = "";
    this.body.replaceChildren();
    delete this.body.dataset.tabShown;
  }

  /** Say what is wrong with a proxy: where, what was expected, what to do. */
  #fail({ message, expected, do: advice, column }) {
    this.#clear();
    const text = this.#view.p;
    const at = Number.isInteger(column) ? Math.max(0, column - 1) : null;
    if (expected) this.input.setAttribute("aria-invalid", "true");
    this.said.replaceChildren(el("div", { class: "wrong", role: "alert", "data-wrong": "" },
      at !== null && el("pre", { class: "caret" }, text.slice(0, at), el("mark", {}, text.slice(at, at + 1) || " "), text.slice(at + 1)),
      el("p", {}, el("b", {}, message)), expected && el("p", {}, `expected: ${expected}`), advice && el("p", {}, advice)));
  }
}
