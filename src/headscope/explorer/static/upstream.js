/** The tabs that say how a feature is computed: which is shown, for which example, and what is missing without a model. */
import { button, choice, el } from "./dom.js";
import { int, num } from "./format.js";
import { empty, studyHead } from "./study.js";

const EXAMPLE_KINDS = ["top", "random", "quantile"];

export class Upstream {
  #asked = null;
  #drawn = "";
  #view = {};

  /** As the deep-dive tabs: a card's feature, what it needs, where to draw. */
  constructor(feature, needs, element) {
    const { about, vocab, corpus, tip, data, names, change } = needs;
    this.needs = { about, vocab, corpus, tip, data, names, change, feature, embedded: data.embedded };
    Object.assign(this, { feature, data, change, about, vocab, corpus });
    this.controls = el("div", { class: "up-controls", "data-controls": "" });
    this.body = el("div", { class: "study-body", "data-up-body": "" });
    element.replaceChildren(this.controls, this.body);
  }

  /** Show a view: its tab, for its example and tokens or the first ones. @param {import("./types").View} view */
  async update(view) {
    this.#view = view;
    if (this.body.dataset.tabShown !== view.tab) this.#clear();
    try {
      this.start ??= await this.#begin(view);
      if (this.#view === view) await this[`_${view.tab}`](view);
    } catch (error) {
      if (this.#view === view && error.name !== "AbortError") this.#fail(error);
    }
  }

  /** What there is: a model or not, SAEs of earlier components, sets of source tokens. */
  async #begin({ p }) {
    const { latent } = this.feature;
    const [start, { sets, corpus }] = await Promise.all([this.data.start(latent), this.data.study("source_sets", latent, p ? { proxy: p } : {})]);
    return { ...start, sets, corpus };
  }

  async _heads(view) {
    const { drawHeadShares } = await import("./headshares.js");
    await this.#draw(view, "", async () => drawHeadShares(await this.#ask("head_shares", {}), view, this.needs));
  }

  async _source(view) {
    const { drawSourceShares } = await import("./upsources.js");
    await this.#ofSet(view, (found) => drawSourceShares(found, view, this.needs));
  }

  async _attention(view) {
    const { drawAttention, drawComparison } = await import("./upsources.js");
    const example = this.#example(view);
    await this.#ofSet(view, async (found) => [...drawAttention(found, this.needs), this.#picker(example), await this.#strip(example), ...drawComparison(await this.#ask("compare_heads", { at: example.at }), this.needs)], example.key);
  }

  /** A tab about a set of source tokens: those of the link, else the first of what is suggested. */
  async #ofSet(view, make, more = "") {
    const { idsOf, drawSet } = await import("./upsources.js");
    const ids = idsOf(view.src || (this.start.sets[0]?.tokens ?? []).join(","));
    if (!this.start.live) return this.#missing(view);
    await this.#draw(view, [ids.join(), more].join("|"), async () => make(await this.#ask("sources", { tokens: ids.join(",") })), () => [drawSet(ids, this.start.sets, this.needs)]);
  }

  async _upstream(view) {
    if (!this.start.live) return this.#missing(view);
    const { CORRUPTIONS, NODE_SETS, drawPatching, drawFeaturePatching } = await import("./patchmap.js");
    const example = this.#example(view);
    const [name, draw = "0"] = (view.how || "sources").split(".");  // sources turn most features off
    const how = `${name}.${draw}`;
    const again = button({ class: "button", "data-again": "", onclick: () => this.change({ how: `${name}.${Number(draw) + 1}` }) }, "another draw");
    const controls = () => [this.#picker(example), choice("corruption", CORRUPTIONS, name, (value) => this.change({ how: value })), again, choice("nodes", NODE_SETS, view.nodes, (nodes) => this.change({ nodes }))];
    await this.#draw(view, [example.key, how, view.nodes, view.by].join("|"), async () => {
      const found = await this.#ask("patching", { at: example.at, how, nodes: view.nodes || "components" });
      const drawn = drawPatching(found, view, this.needs);
      if (this.start.saes.length === 0) return [...drawn, empty("Features of earlier SAEs as nodes: start the server with --upstream-sae as well, such as ", el("code", {}, `${this.start.command} --upstream-sae tiny-mlp0`), ".")];
      const all = await Promise.all(this.start.saes.map((sae) => this.data.study("feature_patching", this.feature.latent, { at: example.at, how, features_of: sae })));
      return [...drawn, ...all.flatMap((own) => drawFeaturePatching(own, view, this.needs))];
    }, controls);
  }

  async _circuit(view) {
    if (!this.start.live) return this.#missing(view);
    const { CircuitTree, pathsOf, pathsText } = await import("./circuit.js");
    const example = this.#example(view);
    await this.#draw(view, example.key, async () => {
      const ids = await this.#tokens(example);
      const token = (position) => this.vocab.label(ids[position]);
      const ask = (path) => this.data.study("circuit", this.feature.latent, { at: example.at, path });
      const tree = new CircuitTree({ ask, token, open: pathsOf(view.path), opened: (paths) => this.change({ path: pathsText(paths) }), attended: (at) => this.change({ why: [at.layer, at.head, at.query, at.key].join(".") }) });
      const first = await tree.start();
      this.why = { place: el("div", { "data-why-place": "" }), token, example, shown: "" };
      const attended = view.why ? null : await this.#openTop(tree, first, view, ask);
      this.why.first = attended && [attended.layer, attended.head, attended.query, attended.key].join(".");
      const head = studyHead({
        definition: `Recursive DFA of feature ${this.feature.latent} at one token, patterns and norms held: each node is the sum of what opens below it. n = 1 token of ${this.start.corpus}. Where the feature is only embeddings carried by its head, earlier heads show in why it attends there: beside it, QK attribution.`, python: first.python, name: `circuit-${this.feature.latent}-${example.at}`,
        rows: () => [["path", "kind", "position", "value"], ...[...tree.element.querySelectorAll("[data-path]")].map((row) => [row.dataset.path, row.dataset.kind, null, Number(row.querySelector("[data-value]").dataset.value)])],
      });
      return [head, await this.#strip(example), el("div", { class: "circuit-beside" }, el("section", {}, el("h3", {}, "What it is the sum of"), tree.element), this.why.place)];
    }, () => [this.#picker(example)]);
    if (this.#view === view) await this.#drawWhy(view);
  }

  /** Open the largest head and its largest source, unless the link says what is open. */
  async #openTop(tree, first, view, ask) {
    const top = first.children.find(({ kind }) => kind === "head");
    if (!top) return null;
    const below = await ask(top.name);
    const source = below.children[0];
    if (!view.path) await tree.show([top.name, `${top.name}/${source.name}`]);
    return source?.attended ?? null;
  }

  /** QK attribution of the source that was asked about. */
  async #drawWhy(view) {
    const asked = view.why || this.why.first;
    const [mode] = [view.by === "attention" ? "attention" : ""];
    if (!asked || this.why.shown === `${asked}|${mode}`) return;
    this.why.shown = `${asked}|${mode}`;
    const { drawQk } = await import("./qk.js");
    const [layer, head, query, key] = asked.split(".");
    this.why.place.setAttribute("aria-busy", "true");
    try {
      const found = await this.data.study("qk", this.feature.latent, { at: this.why.example.at, layer, head, query, key });
      this.why.place.replaceChildren(drawQk(found, { token: this.why.token, tip: this.needs.tip, mode, change: (by) => this.change({ by }), pick: (other) => this.change({ why: [layer, head, query, other].join(".") }) }));
    } catch (error) {
      this.why.place.replaceChildren(el("p", { class: "nothing", "data-failed": "" }, error.message, " ", error.do ?? ""));
    } finally {
      this.why.place.removeAttribute("aria-busy");
    }
  }

  // ---------------------------------------------------------------------------------------------------------- examples
  /** The example of the link, or the first one: its key, its place in the corpus. */
  #example({ ex }) {
    const all = this.#examples();
    const found = all.find(({ key }) => key === ex) ?? all[0];
    if (!found) throw new Error("The feature has no example.");
    return found;
  }

  #examples() {
    return this.feature.groups.filter(({ kind }) => EXAMPLE_KINDS.includes(kind)).flatMap(({ kind, index, examples }) => examples.map((number, i) => {
      const { block, dst, activation } = this.feature.examples[number];
      return { key: `${kind === "quantile" ? `${kind}-${index}` : kind}.${i}`, block, dst, activation, at: block * this.about.corpus.block_size + dst };
    }));
  }

  #picker(example) {
    const select = el("select", { "aria-label": "example", "data-example": "", onchange: () => this.change({ ex: select.value, path: "", why: "" }) }, this.#examples().map(({ key, block, dst, activation }) => el("option", { value: key, selected: key === example.key }, `${key.replace(".", " ")} · ${num(activation, 2)} · block ${int(block)}, position ${dst}`)));
    return el("label", { class: "up-example" }, "example ", select);
  }

  /** All tokens of an example's block, by position. */
  async #tokens({ block }) {
    await this.data.context(block);
    const ids = [];
    for (const [start, own] of this.corpus.runs(block)) own.forEach((id, i) => { ids[start + i] = id; });
    return ids;
  }

  /** The text around an example. */
  async #strip(example) {
    const { drawContext } = await import("./contexts.js");
    await this.#tokens(example);
    return el("ol", { class: "contexts" }, drawContext({ block: example.block, dst: example.dst, act: example.activation, on: [[example.dst, example.activation]], proxy: [] }, { ...this.needs, maximum: this.feature.stats.max }));
  }

  // -------------------------------------------------------------------------------------------------------------- draw
  /** Ask for a study; what was asked before and has not come is given up. */
  async #ask(study, parameters) {
    this.#asked?.abort();
    const asked = this.#asked = new AbortController();
    return this.data.study(study, this.feature.latent, parameters, asked.signal);
  }

  /** Draw a tab once for what it shows: a slider that is moved does not draw it anew. */
  async #draw(view, of, make, controls = () => []) {
    const key = `${view.tab}|${of}`;
    if (key === this.#drawn) return;
    this.#drawn = "";
    this.controls.replaceChildren(...controls());
    this.body.setAttribute("aria-busy", "true");
    try {
      const nodes = await make();
      if (this.#view.tab !== view.tab) return;
      this.needs.tip.hide();
      this.body.replaceChildren(...nodes.filter(Boolean));
      this.body.dataset.tabShown = view.tab;
      this.#drawn = key;
    } finally {
      this.body.removeAttribute("aria-busy");
    }
  }

  /** What there is to see only with a model, and how to start one. */
  #missing(view) {
    return this.#draw(view, "missing", async () => [el("div", { class: "nothing", "data-missing-model": "" }, el("p", {}, "This runs the model, and this page has none behind it. What needs none: DFA by head, and the source tokens beside the examples."),
      el("pre", { class: "python", tabindex: 0 }, this.start.command, " --upstream-sae SAE"), el("p", {}, "--upstream-sae names an SAE of an earlier component, whose features are then told apart; it may be left out."))]);
  }

  #clear() {
    this.#drawn = "";
    this.controls.replaceChildren();
    this.body.replaceChildren();
    delete this.body.dataset.tabShown;
  }

  /** Say what is wrong: what was got, what was expected, what to do. Nothing is plotted. */
  #fail({ message, expected, do: advice }) {
    this.#drawn = "";
    this.body.replaceChildren(el("div", { class: "wrong", role: "alert", "data-wrong": "" }, el("p", {}, el("b", {}, message)), expected && el("p", {}, `expected: ${expected}`), advice && el("p", {}, advice)));
    this.body.dataset.tabShown = this.#view.tab;
  }
}
