/** The labelling queue: the features of a sample one after another, their cards, and what an annotator says of them. */
import { Card } from "./card.js";
import { fetchPatiently, posted } from "./data.js";
import { button, el } from "./dom.js";
import { int } from "./format.js";

const HIDDEN = "Blind: heads and DFA, logits, source tokens, correlated features and the labels of others are hidden.";
const DESIGNS = [
  ["first", "the first", "latents 0, 1, 2, ... dead ones too, as in the post"], ["random", "random", "live features, drawn evenly"],
  ["stratified", "stratified", "live features, alike from each range of density"],
];
const KEYS = { verdict: ["1", "2", "3"], confidence: ["q", "w", "e"] };
const FRESH = { verdict: "", confidence: 2, family: "", text: "", notes: "" };
const VIEW = { tab: "top", ex: "", dst: "", w: "5", head: "", d: "", t: "", log: "", mass: "" };
const REMEMBERED = "headscope-annotator";

export class Labelling {
  #turn = 0;
  #waits = 0;
  #asked = null;
  #session = null;
  #queue = null;
  #labels = new Map();
  #drafts = new Map();
  #given = [];
  #latent = null;
  #card = null;

  /**
   * @param {{about: import("./types").About, vocab: import("./vocab.js").Vocab, corpus: import("./corpus.js").Corpus, tip: import("./tip.js").Tip,
   *   data: import("./types").Data, link: (latent: number) => string}} needs
   * @param {(patch: object) => void} change asks for another view
   */
  constructor(needs, change) {
    Object.assign(this, needs, { change });
    document.head.append(el("link", { rel: "stylesheet", href: "/static/labels.css" }));
    this.place = el("div", { class: "labelled-card" });
    this.panel = el("form", { class: "label-panel", "data-label-panel": "", onsubmit: (event) => this.#submit(event) });
    this.element = el("div", { class: "labelling" }, this.place, this.panel);
    document.addEventListener("keydown", (event) => this.#key(event), true);
  }

  /** Show a view: the form that starts a queue, or a feature of one. */
  async update(view) {
    const turn = ++this.#turn;
    this.view = view;
    await this.#while(() => this.#update(view, turn));
  }

  /** Do something during which nothing can be said: it would be said of another feature than the annotator thinks. */
  async #while(work) {
    this.#waits += 1;
    this.panel.inert = true;
    try {
      return await work();
    } finally {
      this.#waits -= 1;
      this.panel.inert = this.#waits > 0;
    }
  }

  async #update(view, turn) {
    this.element.classList.toggle("blind", view.blind === "1");
    const { s, n, who } = view;
    if (!who || !(s || n)) return this.#drawStart();
    const asked = JSON.stringify([s, s ? "" : n, who]);
    if (asked !== this.#asked) {
      const queue = await ask(`/api/queue?${new URLSearchParams({ annotator: who, ...(s ? { sample: s } : { latent: n }) })}`).catch((error) => error);
      if (turn !== this.#turn) return;
      if (queue instanceof Error) return this.#drawStart(queue.message);
      this.#take(queue, asked);
    }
    const live = this.#live();
    const latent = live.includes(Number(n)) && n !== "" ? Number(n) : live.find((one) => !this.#labels.has(one)) ?? live[0];
    if (latent === undefined) return this.#drawStart(`${this.#queue.definition}: none of them is alive on this corpus.`);
    await this.#show(latent, turn);
  }

  #take(queue, asked) {
    if (asked !== this.#session) [this.#given, this.#drafts] = [[], new Map()];
    [this.#queue, this.#asked, this.#session] = [queue, asked, asked];
    this.#labels = new Map(queue.labels.map((label) => [label.latent, label]));
  }

  #live() {
    return this.#queue.latents.filter((_, i) => this.#queue.alive[i]);
  }

  // ---------------------------------------------------------------------------------------------------------- the start
  #drawStart(wrong) {
    this.#card = null;
    const { s, n, who, blind } = this.view;
    const [design, size = "50", seed = "0"] = (s || "first").split(":");
    const field = (name, props, ...children) => el(children.length ? "select" : "input", { name, id: `label-${name}`, ...props }, children);
    const label = (name, text, input) => el("p", {}, el("label", { for: `label-${name}` }, text), input);
    this.place.replaceChildren(el("div", { class: "label-start" }, el("h1", {}, n && !s ? `Label feature ${n}` : "Label features"),
      el("p", { class: "hint" }, "What is said here is kept in labels.jsonl in the index folder, with your name and the time; nothing is ever overwritten. ", el("code", {}, "headscope survey"), " tallies it."),
      wrong && el("p", { class: "label-wrong", role: "alert", "data-error": "" }, wrong)));
    this.panel.replaceChildren(el("div", { class: "label-form" }, label("who", "your name", field("who", { value: who || remembered(), required: true, maxlength: 80, autocomplete: "off" })),
      (!n || s) && [
        label("design", "features", field("design", {}, DESIGNS.map(([value, text, why]) => el("option", { value, selected: value === design, title: why }, text)))),
        label("size", "how many", field("size", { value: size, inputmode: "numeric", pattern: "[1-9][0-9]{0,8}", required: true })),
        label("seed", "seed", field("seed", { value: seed, inputmode: "numeric", pattern: "[0-9]{1,9}", title: "of random and stratified samples" })),
      ],
      el("p", {}, el("label", { title: HIDDEN }, field("blind", { type: "checkbox", checked: blind === "1" }), " blind")),
      button({ class: "button strong", type: "submit", "data-start": "" }, "start")), el("p", { class: "hint" }, HIDDEN));
    this.panel.querySelector("[name=who]").focus();
  }

  #start() {
    const { who, design, size, seed, blind } = Object.fromEntries([...this.panel.elements].filter(({ name }) => name).map((input) => [input.name, input]));
    remember(who.value.trim());
    const sample = design && (design.value === "first" ? `first:${size.value}` : `${design.value}:${size.value}:${seed.value || 0}`);
    this.#asked = null;
    this.change({ who: who.value.trim(), blind: blind.checked ? "1" : "", ...(sample ? { s: sample, n: "" } : {}) });
  }

  // -------------------------------------------------------------------------------------------------------- one feature
  async #show(latent, turn) {
    const blind = this.view.blind === "1";
    if (this.#card?.feature.latent !== latent || this.#card.blind !== blind) {
      const feature = await this.data.feature(latent);
      if (turn !== this.#turn) return;
      this.#drawCard(feature, blind);
      scrollTo(0, 0);
    }
    this.#latent = latent;
    this.#drawPanel();
    if (!blind) this.#drawOthers(latent, turn);
  }

  #drawCard(feature, blind) {
    const { about, vocab, corpus, tip, data, link } = this;
    let view = blind ? { ...VIEW, w: "16" } : VIEW; // without its sources, a short window says little
    const shown = blind ? blinded(feature) : feature;
    const needs = { about: { ...about, studies: [], nulls: blind ? [] : about.nulls }, vocab, corpus, tip: blind ? MUTE : tip, data, context: data.context, link };
    const card = new Card(shown, needs, (patch) => card.update(view = { ...view, ...patch, ...(blind ? { head: "", d: "" } : {}) }));
    if (blind) for (const part of [card.element.querySelector("[data-stat=top_head]"), card.heads.closest("section"), card.element.querySelector("[data-logits]").closest("section")]) part.remove();
    card.update(view);
    card.blind = blind;
    this.#card = card;
    this.place.replaceChildren(card.element);
  }

  #draft() {
    if (!this.#drafts.has(this.#latent)) this.#drafts.set(this.#latent, judged(this.#labels.get(this.#latent) ?? FRESH));
    return this.#drafts.get(this.#latent);
  }

  #drawPanel() {
    const draft = this.#draft();
    const { verdicts, confidences, families, longest, sample, definition, torn } = this.#queue;
    const set = (name, value) => {
      draft[name] = value;
      this.#paint();
    };
    const options = (name, values) => el("span", { class: `options ${name}`, role: "group", "aria-label": name }, values.map(([value, text], i) =>
      button({ class: "option", [`data-${name}`]: value, onclick: () => set(name, value) }, el("kbd", {}, KEYS[name][i]), ` ${text}`)));
    const typed = (tag, name, hint) => el(tag, { name, maxlength: longest[name], placeholder: hint, "aria-label": name, rows: tag === "textarea" ? 1 : null, oninput: ({ target }) => { draft[name] = target.value; } });
    const family = el("select", { name: "family", "aria-label": "family", onchange: ({ target }) => set("family", target.value) }, families.map((value) => el("option", { value }, value || "family: not said")));
    this.said = el("p", { class: "label-said", "data-said": "", "aria-live": "polite" });
    this.wrong = el("p", { class: "label-wrong", role: "alert", "data-error": "", hidden: true });
    this.others = el("ul", { class: "label-others", "data-others": "" });
    const go = (step, sign, key) => button({ class: "button", "data-step": step < 0 ? "previous" : "next", onclick: () => this.#step(step) }, sign, " ", el("kbd", {}, key));
    this.panel.replaceChildren(el("header", {}, this.#progress(), el("span", { class: "label-go" }, go(-1, "‹", "k"), go(1, "›", "j"), button({ class: "button", "data-undo": "", onclick: () => this.#undo() }, "undo ", el("kbd", {}, "u")))),
      el("div", { class: "label-row" }, options("verdict", verdicts.map((value) => [value, value])), el("span", { class: "hint" }, "confidence"), options("confidence", confidences)),
      el("div", { class: "label-row" }, family, typed("input", "text", "what it is (t)"), typed("textarea", "notes", "notes (m)"), button({ class: "button strong", type: "submit", "data-save": "" }, "save ", el("kbd", {}, "Enter"))),
      this.said, this.wrong, this.view.blind === "1" ? el("p", { class: "hint", "data-blind": "" }, HIDDEN) : this.others,
      el("p", { class: "hint" }, sample ? [`${sample}: ${definition}; `, button({ class: "quiet", "data-results": "", onclick: () => this.#results() }, "results"), ", "] : "", button({ class: "quiet", "data-change": "", onclick: () => this.#leave() }, `${this.view.who}: change`), torn && ` · ${torn}`));
    family.value = draft.family;
    for (const name of ["text", "notes"]) this.panel.elements[name].value = draft[name];
    this.#paint();
  }

  #progress() {
    const { latents, alive } = this.#queue;
    const live = this.#live();
    const done = live.filter((latent) => this.#labels.has(latent)).length;
    const state = (latent, i) => (!alive[i] ? "dead" : this.#labels.get(latent)?.stale ? "stale" : this.#labels.has(latent) ? "done" : "open");
    const dot = (latent, i) => button({
      class: `dot ${state(latent, i)}`, "data-dot": latent, disabled: !alive[i], tabindex: -1, "aria-current": latent === this.#latent ? "true" : null,
      title: `feature ${latent}: ${state(latent, i)}`, onclick: () => this.change({ n: String(latent) }),
    });
    return el("div", { class: "label-progress" }, el("b", { "data-progress": "" }, `${int(done)} of ${int(live.length)} labelled`), live.length < latents.length && ` · ${int(latents.length - live.length)} dead`,
      ` · feature ${this.#latent}`, latents.length <= 200 && el("span", { class: "dots" }, latents.map(dot)));
  }

  #paint() {
    const draft = this.#draft();
    const label = this.#labels.get(this.#latent);
    for (const name of ["verdict", "confidence"]) {
      for (const one of this.panel.querySelectorAll(`[data-${name}]`)) one.setAttribute("aria-pressed", String(one.dataset[name] === String(draft[name])));
    }
    const confidence = label && this.#queue.confidences.find(([value]) => value === label.confidence)[1];
    this.said.replaceChildren(label ? `saved: ${label.verdict}, ${confidence} confidence${label.blind ? ", blind" : ""}${label.stale ? " · stale: the card has changed since, look again" : ""}` : "not labelled yet");
    this.said.classList.toggle("stale", Boolean(label?.stale));
  }

  async #drawOthers(latent, turn) {
    const { labels } = await ask(`/api/labels/${latent}`).catch(() => ({ labels: [] }));
    if (turn !== this.#turn) return;
    this.others.replaceChildren(...labels.filter(({ annotator }) => annotator !== this.view.who).map(({ annotator, verdict, family, text, notes, stale }) =>
      el("li", {}, el("b", {}, annotator), `: ${[verdict, family, stale && "stale"].filter(Boolean).join(", ")}`, text && ` · ${text}`, notes && el("span", { class: "hint" }, ` · ${notes}`))));
  }

  #complain(message) {
    this.wrong.textContent = message;
    this.wrong.hidden = !message;
  }

  #submit(event) {
    event.preventDefault();
    if (this.panel.elements.who) this.#start();
    else this.#save();
  }

  async #save() {
    const [latent, draft, { who, s, blind }] = [this.#latent, this.#draft(), this.view];
    if (!draft.verdict) return this.#complain("Choose a verdict first: 1, 2 or 3.");
    const label = await this.#while(() => ask("/api/labels", posted({ ...draft, latent, annotator: who, blind: blind === "1", queue: s })).catch((error) => error));
    if (label instanceof Error) return this.#complain(label.message);
    this.#labels.set(latent, label);
    this.#drafts.delete(latent);
    this.#given.push(label);
    if (latent !== this.#latent) return;
    const live = this.#live();
    const after = [...live.slice(live.indexOf(latent)), ...live].find((one) => !this.#labels.has(one));
    if (after !== undefined) return this.#while(() => this.change({ n: String(after) })); // until the next card is there
    this.#drawPanel();
    if (s) this.said.append(" · all are labelled: see the results below");
  }

  /** Take back the label given last, or else the one of this feature. */
  async #undo() {
    const label = this.#given.at(-1) ?? this.#labels.get(this.#latent);
    if (!label) return;
    const done = await this.#while(() => ask("/api/retractions", posted({ annotator: this.view.who, label: label.id })).catch((error) => error));
    if (done instanceof Error) return this.#complain(done.message);
    this.#given = this.#given.filter(({ id }) => id !== label.id);
    this.#drafts.set(label.latent, judged(label)); // to be mended and saved anew
    this.#asked = null; // the one before it counts again
    this.change({ n: String(label.latent) });
  }

  #step(step) {
    const live = this.#live();
    const next = live[live.indexOf(this.#latent) + step];
    if (next !== undefined) this.change({ n: String(next) });
  }

  #leave() {
    this.#asked = null;
    remember("");
    this.change({ who: "" });
  }

  async #results() {
    const open = this.view.blind === "1" && this.#live().some((latent) => !this.#labels.has(latent));
    if (open) return this.#complain("Blind: results show once all features of the sample are labelled.");
    const result = await ask(`/api/survey?${new URLSearchParams({ sample: this.view.s })}`).catch((error) => error);
    if (result instanceof Error) return this.#complain(result.message);
    const cell = (tag, text, title) => el(tag, { title }, text);
    const dialog = el("dialog", { class: "label-results", "data-survey": "", onclick: ({ target }) => target === dialog && dialog.close(), onclose: () => dialog.remove() },
      el("h2", {}, this.view.s), el("p", { class: "hint" }, result.definition),
      el("table", {}, el("tr", {}, ["figure [95 % interval]", "here", "post"].map((text) => cell("th", text))), result.rows.map(({ name, value, post, definition }) =>
        el("tr", {}, cell("th", name, definition), cell("td", value), cell("td", post)))),
      result.notes.map((note) => el("p", { class: "hint" }, note)), button({ class: "button", onclick: () => dialog.close() }, "close"));
    document.body.append(dialog);
    dialog.showModal();
  }

  // -------------------------------------------------------------------------------------------------------- the keyboard
  #key(event) {
    const { key, target } = event;
    if (!this.element.isConnected || document.querySelector("dialog[open]") || event.ctrlKey && key !== "Enter" || event.metaKey || event.altKey) return;
    if (target.closest("input:not([type=checkbox]), textarea, select")) return this.#keyInField(event);
    if (this.#waits > 0 && key !== "Escape") return swallow(event);
    if (!this.#card || target.closest(".labelled-card") && target.closest("button, a, [tabindex]") && key === "Enter") return;
    const run = {
      j: () => this.#step(1), k: () => this.#step(-1), u: () => this.#undo(), t: () => this.panel.elements.text.focus(), m: () => this.panel.elements.notes.focus(),
      f: () => this.panel.elements.family.focus(), Enter: () => !target.closest("button:not([data-verdict], [data-confidence])") && this.#save(),
      ...Object.fromEntries(Object.entries(KEYS).flatMap(([name, keys]) => keys.map((one, i) => [one, () => this.panel.querySelectorAll(`[data-${name}]`)[i].click()]))),
    }[key];
    if (run && run() !== false) swallow(event);
  }

  /** What is typed is nobody's command: Escape leaves the field; Enter saves, in the notes with Ctrl. */
  #keyInField(event) {
    event.stopPropagation();
    if (event.key === "Escape") event.target.blur();
    if (event.key !== "Enter" || !event.target.matches("textarea") || !event.ctrlKey) return;
    event.preventDefault();
    this.panel.requestSubmit();
  }
}

/** Let an event have no effect, here or elsewhere. */
function swallow(event) {
  event.preventDefault();
  event.stopPropagation();
}

/** A tooltip that says nothing. */
const MUTE = { show() {}, leave() {}, hide: () => false, contains: () => false, on: () => ({}) };

/** A feature without what a blind annotator is not to see: the data itself, so that nothing on the page can show it. */
function blinded(feature) {
  const none = (values) => values.map(() => 0);
  const { heads, logits, examples } = feature;
  return {
    ...feature, sources: [], correlated: [], copying: { top: [], rank: null }, residual: 0, bias: 0,
    logits: { ...logits, top: [[0, 0]], bottom: [] },
    heads: Object.fromEntries(Object.entries(heads).map(([name, values]) => [name, Array.isArray(values) ? none(values) : 0])),
    examples: { ...examples, n_src: none(examples.n_src), rest: none(examples.rest) },
  };
}

/** What is said in a label. */
function judged({ verdict, confidence, family, text, notes }) {
  return { verdict, confidence, family, text, notes };
}

async function ask(path, options) {
  const answer = await fetchPatiently(path, options).catch(() => {
    throw new Error("The server does not answer. Start it again; what is typed here is kept meanwhile.");
  });
  const body = await answer.json().catch(() => ({ error: `The server refused (${answer.status}). If it was started again, reload the page.` }));
  if (!answer.ok) throw new Error([body.error, body.expected && `expected: ${body.expected}`, body.do].filter(Boolean).join(" · "));
  return body;
}

/** The annotator's name outlives the page, where the browser lets it. */
function remembered() {
  try {
    return localStorage.getItem(REMEMBERED) ?? "";
  } catch {
    return "";
  }
}

function remember(name) {
  try {
    localStorage.setItem(REMEMBERED, name);
  } catch {
    // then it is asked for again
  }
}
