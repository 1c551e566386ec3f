/** The card of one feature, drawn from its JSON alone: when it fires, what it writes, which heads and sources compute it. */
import { button, choice, el, term } from "./dom.js";
import { unpackExamples } from "./examples.js";
import { int, num, pct, sci } from "./format.js";
import { disagreement, drawHeads, largest, pressHead } from "./heads.js";
import { drawHistogram } from "./histogram.js";
import { drawLogits } from "./logits.js";
import { chipsOf, drawCopying, drawCorrelated, drawSources } from "./sources.js";
import { ExampleRow } from "./tokens.js";

const TABS = {
  top: ["Top and random", ["top", "random"]], quantile: ["Quantiles", ["quantile"]], interval: ["Intervals", ["interval"]], threshold: ["Near threshold", ["threshold"]],
};
/** Which script draws a tab of a study; a tab that is not here is drawn from the study's record alone. */
const SCRIPT = { specificity: "dive", expected: "dive", sensitivity: "dive", logits: "dive", ablation: "dive", heads: "upstream", source: "upstream", attention: "upstream", upstream: "upstream", circuit: "upstream" };
const WINDOWS = [["5", "short", "5 tokens on each side"], ["16", "medium", "16 tokens on each side"], ["full", "full", "the whole block"]];

/** Names of the tabs of examples and of the windows, in order. */
export const TAB_NAMES = Object.keys(TABS);
export const WINDOW_NAMES = WINDOWS.map(([name]) => name);

/** The tabs of studies that a page has, as { name, label, study }. @param {import("./types").About} about */
const studyTabs = (about) => about.studies.flatMap((study) => study.tabs.map((tab) => ({ ...tab, study })));

/** Names of those that a script draws. @param {import("./types").About} about */
export const tabsOf = (about, script) => studyTabs(about).filter(({ name }) => SCRIPT[name] === script).map(({ name }) => name);

export class Card {
  #rows = [];
  #view = {};
  #hovered = null;
  #mark = () => {};
  #watcher = null;
  #dive = null;
  #upstream = null;

  /**
   * @param {import("./types").Feature} feature
   * @param {{about: import("./types").About, vocab: import("./vocab.js").Vocab, corpus: import("./corpus.js").Corpus, tip: import("./tip.js").Tip,
   *   data: import("./types").Data, context: ((block: number) => Promise<any>)|null, link: (latent: number) => string,
   *   page?: (page: string, name: string) => string}} needs page: links to heads and families
   * @param {(patch: object) => void} change asks for another view
   */
  constructor(feature, needs, change) {
    Object.assign(this, needs, { change, names: needs.about.heads, term: (text, name, tag) => this.#term(text, name, { tag }) });
    this.feature = { ...feature, examples: unpackExamples(feature.examples, this.names.length, feature.bias) };
    this.place = el("nav", { class: "place", "aria-label": "features" });
    this.element = el("article", { class: "card", "data-card": feature.latent, "data-alive": String(feature.alive) }, this.#header(),
      feature.alive ? el("div", { class: "body" }, this.#side(), this.#main()) : this.#deadPage());
  }

  /** A label with its definition, and the n behind its numbers. */
  #term(text, name, { n, tag } = {}) {
    const definition = this.about.definitions[name] ?? "";
    return term(text, n === undefined ? definition : `${definition} n = ${int(n)}`, tag);
  }

  #header() {
    const { stats, heads, alive, latent } = this.feature;
    const item = (name, label, value, ...note) => el("div", { "data-stat": name }, el("dt", {}, this.#term(label, name, { n: stats.n_active })), el("dd", {}, el("b", {}, value), note));
    const top = alive && largest(heads.dfa);
    const interval = () => el("span", { title: this.about.definitions.density_interval }, ` [${stats.density_interval.map(pct).join(", ")}]`);
    return el("header", { class: "card-head" }, el("h1", {}, el("small", {}, "feature"), String(latent)),
      el("span", { class: "chips" }, alive ? [chipsOf(this.feature, this.vocab), this.#families()] : el("span", { class: "chip" }, "dead")),
      alive && el("dl", {}, item("density", "density", pct(stats.density), interval(), ` ${int(stats.n_active)} of ${int(stats.n_tokens)} tokens`),
        item("max", "max", num(stats.max)), item("mean", "mean", num(stats.mean)),
        item("top_head", "top head", this.#page("head", this.names[top], {}, this.names[top]), ` ${pct(heads.dfa[top])} of DFA`, this.#null())), this.place);
  }

  /** A link to the page of a head or a family, where the page has such pages. */
  #page(page, name, props, text) {
    return this.about.pages && this.page ? el("a", { ...props, href: this.page(page, name), "data-page": page, "data-name": name }, text) : text;
  }

  /** The families that studies put it in; nothing where a label must not be led by them. */
  #families() {
    return this.page && (this.feature.families ?? []).map((name) => this.#page("family", name, { class: "chip", "data-family-chip": name }, name.replaceAll("-", " ")));
  }

  /** What share a top head has by chance: of the kinds of null, the one with the largest. */
  #null() {
    const [most] = this.about.nulls.toSorted((a, b) => b.range[2] - a.range[2]);
    const all = this.about.nulls.map(({ kind, range: [low, , high] }) => `${kind}: ${pct(low)} to ${pct(high)}`).join("; ");
    return most && el("span", { class: "null", "data-null": "", title: `${this.about.definitions.null} ${all}` }, ` · null ${pct(most.range[0])} to ${pct(most.range[2])}`);
  }

  #section(title, name, extra, ...body) {
    return el("section", {}, el("header", {}, this.#term(title, name, { tag: "h2" }), extra), ...body);
  }

  #side() {
    const { heads, stats, logits, sources, copying, correlated } = this.feature;
    this.histogram = el("div");
    this.scales = el("span", { class: "choices" });
    this.heads = drawHeads(heads, this.names, {
      tip: this.tip,
      hover: (head) => { this.#hovered = head; this.#paint(); },
      press: (head) => this.change({ head: this.#view.head === this.names[head] ? "" : this.names[head] }),
    });
    this.thresholds = el("span");
    this.sources = el("div");
    const [list, lengthen] = drawLogits(logits, this.vocab);
    const differ = disagreement(heads, this.names);
    const spread = [[0.5, "median"], [0.9, "p90"], [0.99, "p99"]].map(([p, label]) => [label, stats.quantiles.find(([at]) => at === p)?.[1], "quantiles"]);
    const key = (name) => [el("i", { class: name }), this.#term(name === "dfa" ? "DFA" : name, `${name}_share`)];
    return el("div", { class: "side" },
      this.#section("Activations", "histogram", this.scales, this.histogram, el("p", { class: "spread" }, [...spread, ["std", stats.std, "std"]].map(([label, value, name]) =>
        value !== undefined && el("span", {}, this.#term(label, name, { n: stats.n_active }), el("b", {}, num(value, 2)))))),
      this.#section("Heads", "heads", el("span", { class: "legend" }, key("dfa"), key("decoder"), key("encoder")), this.heads,
        differ && el("p", { class: "flag", "data-flag": "heads", title: this.about.definitions.disagreement }, differ)),
      this.#section("Logits", "logits", lengthen, list),
      sources.length > 0 && this.#section("Source tokens", "sources", this.thresholds, this.sources),
      copying.top.length > 0 && el("p", { class: "inline", "data-copying": "" }, drawCopying(copying, this.names[largest(heads.dfa)], this)),
      correlated.length > 0 && el("p", { class: "inline" }, drawCorrelated(correlated, this)));
  }

  #drawSources({ t }) {
    const { sources, heads } = this.feature;
    const at = sources[Number(t)] ? Number(t) : 0;
    if (!sources[at]) return;
    this.sources.replaceChildren(...drawSources(sources[at], this.#pressed() ?? largest(heads.dfa), this));
    this.thresholds.replaceChildren(sources.length < 2 ? "" : choice("threshold", sources.map(({ threshold }, i) => [i === 0 ? "" : String(i), `> ${num(threshold, 1)}`, "active tokens above this activation"]), t,
      (value) => this.change({ t: value })));
  }

  #main() {
    const { groups, stats } = this.feature;
    const count = (kinds) => groups.reduce((n, { kind, examples }) => n + (kinds.includes(kind) ? examples.length : 0), 0);
    const tab = (name, ...label) => button({ role: "tab", id: `tab-${name}`, "aria-controls": "tab-panel", "data-tab": name, onclick: () => this.change({ tab: name, dst: "", d: "", ...!(SCRIPT[name] === "upstream" && SCRIPT[this.#view.tab] === "upstream") && { ex: "" } }) }, label);
    this.tabs = el("div", { class: "tabs", role: "tablist", "aria-label": "examples and studies", onkeydown: (event) => this.#moveTab(event) },
      Object.entries(TABS).map(([name, [label, kinds]]) => tab(name, label, el("small", {}, int(count(kinds))))),
      studyTabs(this.about).map(({ name, label }) => tab(name, label)));
    this.windows = el("span");
    this.filter = button({ class: "filter", "data-head-filter": "", onclick: () => this.change({ head: "" }) });
    const hover = (event) => this.#hover(event.target);
    this.groups = el("div", { class: "groups", "data-groups": "", onpointerover: hover, onfocusin: hover, onpointerleave: () => this.#hover(null), onclick: (event) => this.#click(event) });
    const key = (kind, label) => el("span", {}, el("i", { class: kind }), label);
    this.study = el("div", { class: "study", "data-study": "" });
    this.upstream = el("div", { class: "study", "data-upstream": "" });
    this.record = el("div", { class: "study", "data-record": "" });
    this.panel = el("div", { id: "tab-panel", role: "tabpanel" }, el("p", { class: "legend key" }, key("ramp", `activation, 0 to ${num(stats.max, 2)}`), key("src", "DFA of a source"), key("src minus", "negative DFA"),
        key("dst", "destination"), el("span", {}, el("b", {}, "next"), " token"), el("span", {}, "…9… tokens left out")), this.groups, this.study, this.upstream, this.record);
    return el("div", { class: "main" }, el("header", { class: "bar" }, this.tabs, this.filter, this.windows), this.panel);
  }

  /** Left and right move through the tabs, as in any strip of tabs. */
  #moveTab({ key }) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[key];
    const all = [...this.tabs.children];
    const next = all[all.indexOf(document.activeElement) + step];
    next?.click();
    next?.focus();
  }

  #deadPage() {
    const { stats, logits } = this.feature;
    return el("div", { class: "dead-page", "data-dead": "" },
      el("p", {}, "Never active on ", el("b", {}, int(stats.n_tokens)), " tokens. ", this.#term("95 % upper bound on its density", "density_upper95"), `: 3/N = ${sci(stats.density_upper95, 1)}.`),
      el("p", { class: "hint" }, "So there are no examples, histogram or attribution."),
      logits && this.#section("Logits", "logits", el("span", { class: "hint" }, "what its weights would write"), drawLogits(logits, this.vocab)));
  }

  /** Show a view of the card; only what changed is drawn again. @param {import("./types").View} view */
  update(view) {
    if (!this.feature.alive) return;
    const changed = (...keys) => keys.some((key) => this.#view[key] !== view[key]);
    const [histogram, sources, groups, paint, map] = [changed("log", "mass"), changed("t", "head"), changed("tab", "w"), changed("head"), changed("ex", "d", "tab", "w")];
    const first = this.#view.w === undefined;
    this.#view = view;
    if (groups) this.#showTab(view.tab);
    if (this.#studies(view.tab)) this.#showStudy(view);
    if (histogram) this.#drawHistogram(view);
    if (sources) this.#drawSources(view);
    if (groups) this.#drawGroups(view);
    else if (paint) for (const row of this.#rows) if (row.line.firstChild) row.draw(view.w, this.#head());
    if (groups || paint) this.#paint();
    for (const row of this.#rows) row.element.classList.toggle("current", row.key === view.ex);
    if (map) for (const row of this.#rows) row.showMap(view.d === "1" && row.key === this.#current(), this.tip);
    if (first && view.ex) requestAnimationFrame(() => this.#restore(view));
  }

  /** Whether a tab is one of the deep dive. */
  #studies(tab) {
    return studyTabs(this.about).some(({ name }) => name === tab);
  }

  #showTab(tab) {
    const study = this.#studies(tab);
    for (const one of this.tabs.children) {
      const selected = one.dataset.tab === (study || tab in TABS ? tab : "top");
      one.setAttribute("aria-selected", String(selected));
      one.tabIndex = selected ? 0 : -1;
      if (selected) this.panel.setAttribute("aria-labelledby", one.id);
    }
    this.panel.classList.toggle("of-study", study);
    this.windows.hidden = study;
  }

  /** The deep-dive tabs: their scripts come when the first of them is opened. */
  async #showStudy(view) {
    const script = SCRIPT[view.tab];
    this.study.hidden = script !== "dive";
    this.upstream.hidden = script !== "upstream";
    this.record.hidden = Boolean(script);
    if (!script) return this.#showRecord(view);
    if (script === "upstream") return this.#showUpstream(view);
    const { Dive } = await import("./dive.js");
    this.#dive ??= new Dive(this.feature, this, this.study);
    if (this.#view === view) this.#dive.update(view);
  }

  async #showUpstream(view) {
    const { Upstream } = await import("./upstream.js");
    this.#upstream ??= new Upstream(this.feature, this, this.upstream);
    if (this.#view === view) this.#upstream.update(view);
  }

  async #showRecord(view) {
    const { drawRecord } = await import("./record.js");
    const drawn = await drawRecord(studyTabs(this.about).find(({ name }) => name === view.tab).study, this, view);
    if (this.#view === view) this.record.replaceChildren(...drawn);
  }

  /** Go to the proxy of the deep-dive tabs. */
  async writeProxy() {
    if (SCRIPT[this.#view.tab] !== "dive" || this.#view.tab === "logits") this.change({ tab: "specificity", ex: "", dst: "", d: "" });
    await this.#showStudy(this.#view);
    this.#dive.write();
  }

  /** The example that a map opens for: the marked one, else the first. */
  #current() {
    return this.#rows.find(({ key }) => key === this.#view.ex)?.key ?? this.#rows[0]?.key;
  }

  /** Bring the example of a link into sight, and its token's numbers. */
  async #restore({ ex, dst, w }) {
    const at = this.#rows.findIndex(({ key }) => key === ex);
    const row = this.#rows[at];
    if (!row) return;
    // What stands above it has its height first, or it would move away.
    for (const above of this.#rows.slice(0, at)) if (!above.line.firstChild) above.draw(w, this.#head());
    if (w === "full" && this.context) await row.drawBlock(() => this.#head());
    else row.draw(w, this.#head());
    row.element.scrollIntoView({ block: "center" });
    const token = dst && row.line.querySelector(`[data-pos="${CSS.escape(dst)}"]`);
    if (token) this.tip.show(token, row.tokenFacts(Number(dst)), true);
  }

  #drawHistogram({ log, mass }) {
    const { chart, mark } = drawHistogram(this.feature.histogram, { max: this.feature.stats.max, log: log === "1", byMass: mass === "1", tip: this.tip });
    this.#mark = mark;
    this.histogram.replaceChildren(chart);
    this.scales.replaceChildren(choice("weight", [["", "counts"], ["1", "mass"]], mass, (value) => this.change({ mass: value })),
      choice("scale", [["", "linear"], ["1", "log"]], log, (value) => this.change({ log: value })));
  }

  #drawGroups({ tab, w }) {
    const name = tab in TABS ? tab : "top";
    const groups = this.#studies(tab) ? [] : this.feature.groups.filter(({ kind }) => TABS[name][1].includes(kind));
    if (name !== "top") groups.sort((a, b) => b.hi - a.hi);
    this.tip.hide();
    this.#watcher?.disconnect();
    this.#rows = [];
    this.groups.replaceChildren(...groups.map((group) => this.#drawGroup(group)));
    this.windows.replaceChildren(choice("window", WINDOWS, w, (value) => this.change({ w: value })));
    const blocks = w === "full" && this.context !== null;
    this.groups.classList.toggle("blocks", blocks);
    if (w === "5") for (const row of this.#rows) row.draw(w, this.#head());
    else this.#watch(w, blocks);
    if (w === "full" && !blocks) this.groups.prepend(el("p", { class: "hint", "data-partial": "" }, "Whole blocks are not in this export: all tokens that it has are shown."));
  }

  /** Long windows: only those near the screen are in the page. */
  #watch(w, blocks) {
    const rows = new Map(this.#rows.map((row) => [row.element, row]));
    this.#watcher = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        const row = rows.get(target);
        if (!isIntersecting) row.clear();
        else if (blocks) row.drawBlock(() => this.#head()).catch(() => row.draw(w, this.#head()));
        else row.draw(w, this.#head());
      }
    }, { rootMargin: "300px 0px" });
    for (const element of rows.keys()) this.#watcher.observe(element);
  }

  #drawGroup({ kind, index, label, lo, hi, n, share_active: active, share_mass: mass, examples, same }) {
    const key = kind === "quantile" || kind === "interval" ? `${kind}-${index}` : kind;
    const rows = examples.map((number, i) => new ExampleRow(this.feature.examples[number], `${key}.${i}`, same[i], this));
    this.#rows.push(...rows);
    return el("section", { class: "group", "data-group": key }, el("header", {}, this.#term(label, kind, { n, tag: "h3" }),
      lo !== null && hi !== null && el("span", {}, `${num(lo, 2)} to ${num(hi, 2)}`),
      active !== null && el("span", { "data-shares": "" }, el("b", {}, pct(active)), " of active tokens · ", el("b", {}, pct(mass)), " of activation mass")),
    el("ol", {}, rows.map(({ element }) => element)));
  }

  /** The head that sources are filtered to, by index: the hovered one, else that of the link ("1.6", or its index). */
  #head() {
    return this.#hovered ?? this.#pressed();
  }

  #pressed() {
    const { head } = this.#view;
    if (!head) return null;
    const at = this.names.indexOf(head);
    return at >= 0 ? at : head in this.names ? Number(head) : null;
  }

  #paint() {
    const head = this.#head();
    const name = this.names[head] ?? "";
    for (const row of this.#rows) row.paint(head);
    pressHead(this.heads, name);
    this.filter.hidden = head === null;
    this.filter.replaceChildren("sources of head ", el("b", {}, name), " only ×");
    this.element.dataset.head = name;
  }

  /** After no head, the heads from the largest DFA share to the smallest. */
  nextHead() {
    const { dfa } = this.feature.heads;
    const order = [...dfa.keys()].sort((a, b) => dfa[b] - dfa[a]);
    return this.names[order[order.indexOf(this.#head()) + 1]] ?? "";
  }

  /** What the pointer is on: where a tooltip goes, what it says, its row and its activation. */
  #find(target) {
    const at = target?.closest(".tok, .act, .open-map");
    if (!at) return null;
    const row = this.#rows.find(({ element }) => element.contains(at));
    if (!at.matches(".tok")) return { at, row, act: row.example.activation, facts: row.checkFacts() };
    return { at, row, act: Number(at.dataset.act ?? 0), facts: row.tokenFacts(Number(at.dataset.pos)) };
  }

  /** Open the map of heads by sources of an example (the marked or first one when not said), or close it. */
  toggleMap(key = this.#current()) {
    const open = this.#view.d === "1" && key === this.#current();
    this.change({ d: open ? "" : "1", ex: key });
  }

  /** The marked example, or the first. */
  currentExample() {
    return this.#rows.find(({ key }) => key === this.#current())?.example ?? null;
  }

  #hover(target) {
    if (target?.closest(".map")) return;
    const found = this.#find(target);
    if (found) this.tip.show(found.at, found.facts);
    else this.tip.leave();
    this.#mark(found?.act || null);
  }

  #click(event) {
    const map = event.target.closest("[data-map]")?.dataset.map;
    if (map) return this.toggleMap(map);
    const found = this.#find(event.target);
    if (!found) return;
    event.stopPropagation();
    this.change({ ex: found.row.key, dst: found.at.dataset.pos ?? "" });
    this.tip.show(found.at, found.facts, true);
  }

  /** Say where the card stands in the list. */
  setPlace({ position, total, previous, next, link, copy }) {
    const step = (latent, sign, name) => (latent === null ? el("span", { class: "button off", "data-step": name }, sign)
      : el("a", { class: "button", href: link(latent), "data-nav": latent, "data-step": name, title: `${name} in the list` }, sign));
    this.place.replaceChildren(step(previous, "‹", "previous"),
      el("span", { class: "position", "data-position": "" }, position < 0 ? `not among the ${int(total)} listed` : `${int(position + 1)} of ${int(total)}`),
      step(next, "›", "next"), button({ class: "button", "data-copy": "", onclick: copy }, "copy link"));
  }
}
