/** The prompt explorer: a prompt, its features token by token, why each is active, and what ablations change. */
import { CircuitTree, pathsOf, pathsText } from "./circuit.js";
import { button, choice, download, el } from "./dom.js";
import { int, num, sci, signed } from "./format.js";
import { drawMap } from "./heatmap.js";
import { packed, pageOf, unpacked } from "./promptsave.js";
import { activeByToken, drawFeatures, drawNext, drawPins, drawStrip, PAINTS } from "./promptviews.js";
import { drawQk } from "./qk.js";

const EXAMPLE = "def add(first, second):\n    return first + second\n\ndef subtract(first, second):\n    return first";
const PLACE = { token: "", feature: "", target: "", edits: "", tree: "", scores: "", pairs: "" }; // what does not outlive a prompt

export class PromptPage {
  #turn = 0;
  #prompt = null;
  #source = null;
  #run = null;
  #active = [];
  #pieces = [];
  #tree = null;
  #treeOf = "";
  #shown = {};

  /**
   * @param {{about: import("./types").About, vocab: import("./vocab.js").Vocab, tip: import("./tip.js").Tip, data: import("./types").Data,
   *   list: import("./list.js").FeatureList, link: (latent: number) => string, copy: () => void}} needs
   * @param {(patch: object) => Promise<void>} change asks for another view
   */
  constructor(needs, change) {
    Object.assign(this, needs, { change, names: needs.about.heads });
    document.head.append(el("link", { rel: "stylesheet", href: "/static/prompt.css" }));
    this.text = el("textarea", { "data-prompt": "", rows: 3, spellcheck: "false", autocapitalize: "off", placeholder: "Type or paste a prompt", "aria-label": "prompt", onkeydown: (event) => this.#typed(event) });
    this.said = el("span", { class: "hint live", "data-said": "" });
    this.wrong = el("div", { class: "wrong", role: "alert", "data-wrong": "", hidden: true });
    this.ablations = el("section", { class: "prompt-ablations", "aria-label": "ablations" });
    this.legend = el("p", { class: "legend key" });
    this.strip = el("div");
    this.features = el("section", { "data-part": "features" });
    this.next = el("section", { "data-part": "next" });
    this.one = el("section", { class: "prompt-one", "data-part": "one", hidden: true });
    this.body = el("div", { class: "prompt-body" }, this.legend, this.strip, this.ablations, el("div", { class: "prompt-columns" }, this.features, this.next), this.one);
    this.code = el("pre", { class: "python live", "data-python-text": "", hidden: true, tabindex: 0 });
    const tool = (label, name, title, run) => button({ class: "button", "data-tool": name, title, onclick: run }, label);
    this.tools = el("span", { class: "tools" }, tool("copy link", "link", "everything on this page is in its link", needs.copy), tool("HTML", "html", "one file with what is shown: no script, no server", () => this.#saveHtml()),
      tool("JSON", "json", "all numbers of what is shown", () => this.#saveJson()), tool("Python", "python", "the calls that make these numbers", () => { this.code.hidden = !this.code.hidden; }));
    this.element = el("main", { class: "prompting", "data-prompting": "" }, el("header", { class: "prompt-head" }, el("h1", {}, "Prompt explorer"), this.said, this.tools), this.code,
      el("form", { class: "prompt-form", onsubmit: (event) => { event.preventDefault(); this.#read(); } }, this.text, el("button", { class: "button", "data-run": "" }, "read ", el("kbd", {}, "Ctrl ↵"))), this.wrong, this.body);
    this.element.addEventListener("keydown", (event) => this.#rove(event));
  }

  /** Show a view. What is asked and has not come back when another is shown is dropped. @param {import("./types").View} view */
  async update(view) {
    const turn = ++this.#turn;
    const late = () => turn !== this.#turn;
    this.view = view;
    this.body.setAttribute("aria-busy", "true");
    try {
      await this.#resolve(view);
      if (late()) return;
      if (this.#prompt === null) return this.#start();
      this.#run = await this.data.prompt("run", { prompt: this.#prompt, ablations: this.#edits() });
      if (late()) return;
      this.#pieces = this.vocab.decode(this.#run.tokens);
      this.#active = activeByToken(this.#run);
      const asked = { prompt: this.#prompt, ablations: this.#edits(), query: this.#query(), target: view.target === "" ? null : Number(view.target) };
      const [token, dfa] = await Promise.all([this.data.prompt("token", asked), this.#latent() === null ? null : this.data.prompt("dfa", { prompt: this.#prompt, latent: this.#latent(), query: this.#query() })]);
      if (late()) return;
      this.#shown = { run: this.#run, token, dfa, levels: {}, scores: null };
      this.#draw();
      await this.#drawOne(late);
      if (!late()) this.#refuse(null);
    } catch (error) {
      if (!late()) this.#refuse(error);
    } finally {
      if (!late()) this.body.removeAttribute("aria-busy");
    }
  }

  /** What the keys do here. */
  act(name) {
    if (!this.#run) return;
    const list = this.#shown.token?.features.latent ?? [];
    const at = list.indexOf(this.#latent());
    const [query, last] = [this.#query(), this.#run.tokens.length - 1];
    const does = {
      left: () => query > 0 && this.#pick(query - 1), right: () => query < last && this.#pick(query + 1),
      down: () => list.length > 0 && this.change({ feature: String(list[Math.min(at + 1, list.length - 1)]), tree: "", scores: "" }),
      up: () => list.length > 0 && this.change({ feature: String(list[Math.max(at - 1, 0)]), tree: "", scores: "" }),
      open: () => (this.#latent() === null ? does.down() : this.one.scrollIntoView({ block: "start" })),
      here: () => this.#latent() !== null && this.#toggle(`f${this.#latent()}@${query}`), everywhere: () => this.#latent() !== null && this.#toggle(`f${this.#latent()}`),
      undo: () => this.#edits().length > 0 && this.#ablate(this.#edits().slice(0, -1)), write: () => this.text.focus(),
    };
    does[name]();
  }

  // ------------------------------------------------------------------------------------------------------------- prompt
  /** Find the prompt of a view: as text, packed, or a context of the corpus. */
  async #resolve({ prompt, packed: pack, block, upto }) {
    const source = JSON.stringify([prompt, pack, block, upto]);
    if (source === this.#source) return;
    const found = pack ? await unpacked(pack) : prompt ? { text: prompt } : /^\d{1,9}$/.test(block) ? { ids: await this.#context(Number(block), Number(upto)) } : null;
    this.#source = source;
    this.#prompt = found;
    this.text.value = found === null ? "" : found.text ?? this.#written(found.ids);
    this.typed = this.text.value;
  }

  /** Tokens as a text to edit: without what the tokenizer puts before a text, which it does again. */
  #written(ids) {
    const bits = this.vocab.decode(ids).flatMap((piece) => piece.bits);
    const text = bits.map((bit) => bit.text ?? bit.raw ?? "\ufffd").join("");
    return text.startsWith(this.vocab.prefix) ? text.slice(this.vocab.prefix.length) : text;
  }

  /** The tokens of a block of the corpus after its BOS, up to a position. */
  async #context(block, upto) {
    const { text } = await this.data.context(block);
    const ids = text.find(([, start]) => start === 0)?.[2] ?? [];
    return ids.slice(1, Number.isInteger(upto) && upto > 0 ? upto + 1 : ids.length);
  }

  /** Read what is typed; a context of the corpus that was not changed stays the tokens it is. */
  async #read() {
    const text = this.text.value;
    if (text === "") return this.#refuse(new Error("The prompt is empty: type some text."));
    if (text === this.typed && this.#prompt !== null) return this.update(this.view);
    await this.change({ ...PLACE, block: "", upto: "", ...(await packed({ text })) });
  }

  #typed(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this.#read();
    }
  }

  #query() {
    const last = this.#run.tokens.length - 1;
    return /^\d{1,9}$/.test(this.view.token) ? Math.min(Number(this.view.token), last) : last;
  }

  #latent() {
    return /^\d{1,9}$/.test(this.view.feature) ? Number(this.view.feature) : null;
  }

  #edits() {
    return this.view.edits.split(",").filter(Boolean);
  }

  #pick(position) {
    return this.change({ token: String(position), target: "", tree: "", scores: "" });
  }

  #ablate(names) {
    return this.change({ edits: [...new Set(names)].join(",") });
  }

  #toggle(name) {
    const now = this.#edits();
    return this.#ablate(now.includes(name) ? now.filter((other) => other !== name) : [...now, name]);
  }

  // --------------------------------------------------------------------------------------------------------------- draw
  #start() {
    this.#refuse(null);
    this.#run = null;
    for (const part of [this.legend, this.strip, this.features, this.next]) part.replaceChildren();
    this.one.hidden = true;
    this.said.textContent = "";
    this.ablations.replaceChildren(el("span", {}, button({ class: "quiet", "data-example": "", onclick: () => this.change({ ...PLACE, block: "", upto: "", packed: "", prompt: EXAMPLE }) }, "read an example"), el("span", { class: "hint" }, "The examples on a feature's card open here too.")));
  }

  #refuse(error) {
    this.wrong.hidden = error === null;
    if (error) this.wrong.replaceChildren(el("p", {}, el("b", {}, error.message)), error.expected ? el("p", {}, `expected: ${error.expected}`) : "", error.do ? el("p", {}, error.do) : "", this.#edits().length > 0 && this.#prompt !== null ? button({ class: "quiet", "data-clear-wrong": "", onclick: () => this.#ablate([]) }, "remove all ablations") : "");
  }

  #token = (position) => (this.#run.tokens[position] === undefined ? String(position) : this.vocab.label(this.#run.tokens[position]));

  #draw() {
    const { run, token } = this.#shown;
    const focused = this.strip.contains(document.activeElement);
    const rowFocused = this.features.contains(document.activeElement);
    const scrolled = [this.strip.firstChild?.scrollTop ?? 0, this.features.querySelector(".prompt-scroll")?.scrollTop ?? 0];
    const on = { run, active: this.#active, query: this.#query(), latent: this.#latent(), names: this.names, vocab: this.vocab, tip: this.tip, token: this.#token, link: this.link };
    this.tip.hide();
    this.said.replaceChildren(`${int(run.tokens.length)} tokens; `, this.vocab.label(run.tokens[0]), " was put in front, as in the index");
    this.code.textContent = run.python;
    this.strip.replaceChildren(drawStrip(run, { ...on, pieces: this.#pieces, sources: this.#sources(), paint: this.#paint(), pick: (position) => this.#pick(position) }));
    this.#drawLegend();
    this.features.replaceChildren(el("h2", {}, "Features at ", this.#token(this.#query()), el("small", {}, `position ${this.#query()} · ${int(run.active[this.#query()])} active`)),
      el("div", { class: "prompt-scroll" }, ...drawFeatures(token.features, { ...on, chip: (latent) => this.#chip(latent), pick: (latent) => this.change({ feature: String(latent), tree: "", scores: "" }), ablate: (name) => this.#ablate([...this.#edits(), name]) }).filter(Boolean)));
    this.next.replaceChildren(el("h2", {}, "Next token after ", this.#token(this.#query())), ...drawNext(token.next, { ...on, target: token.features.target, aim: (id) => this.change({ target: String(id) }) }));
    this.#drawAblations();
    [this.strip.firstChild.scrollTop, this.features.querySelector(".prompt-scroll").scrollTop] = scrolled;
    const current = this.strip.querySelector(".tok.dst");
    if (focused) current.focus();
    current?.scrollIntoView({ block: "nearest", inline: "nearest" });
    if (rowFocused) this.features.querySelector("tr[tabindex='0']")?.focus({ preventScroll: true });
  }

  /** What the index says of a feature in a word: the logit it raises most. */
  #chip(latent) {
    const row = this.list.rowOf.get(latent);
    return row === undefined ? "" : this.vocab.label(this.list.rows.top_logit[row]);
  }

  #sources() {
    return new Map((this.#shown.dfa?.sources ?? []).map(({ pos, dfa }) => [pos, dfa]));
  }

  #paint() {
    const usual = this.#run.ablated_loss ? "change" : this.#latent() === null ? "loss" : "feature";
    const { paint } = this.view;
    return paint in PAINTS && (paint !== "change" || this.#run.ablated_loss) && (paint !== "feature" || this.#latent() !== null) ? paint : usual;
  }

  #drawLegend() {
    const paint = this.#paint();
    const key = (kind, label) => el("span", {}, el("i", { class: kind }), label);
    const possible = Object.entries(PAINTS).filter(([name]) => (name !== "change" || this.#run.ablated_loss) && (name !== "feature" || this.#latent() !== null));
    const said = { feature: [key("ramp", `activation of feature ${this.#latent()}`)], loss: [key("costs", "loss of the token")], change: [key("worse", "predicted worse with the ablations"), key("better", "predicted better")] }[paint];
    this.legend.replaceChildren(el("span", { class: "live" }, choice("paint", possible.map(([name, [label, title]]) => [name, label, title]), paint, (value) => this.change({ paint: value }))), ...said,
      ...(this.#latent() === null ? [] : [key("src", `where feature ${this.#latent()} reads from`), key("minus", "negative")]), key("dst", "selected"), ...(this.#edits().length > 0 ? [key("taken", "ablated there")] : []));
  }

  #drawAblations() {
    const run = this.#run;
    const edits = this.#edits();
    const change = run.ablated_loss?.map((loss, i) => loss - run.loss[i]) ?? [];
    const mean = change.reduce((sum, value) => sum + value, 0) / change.length;
    const summary = change.length > 0 && el("span", { "data-mean-change": mean, title: "mean over the tokens of this prompt; one prompt is no sample" }, "loss ", el("b", {}, `${signed(mean, 4)} nats`), ` a token (n = ${int(change.length)})`);
    const where = () => el("select", { "aria-label": "where" }, el("option", { value: "all" }, "at all tokens"), el("option", { value: "one" }, "at the selected token"));
    const heads = el("select", { "aria-label": "head", "data-head-select": "" }, Array.from({ length: this.about.model.n_layers }, (_, layer) => el("optgroup", { label: `layer ${layer}` }, Array.from({ length: this.about.model.n_heads }, (__, head) => el("option", {}, `${layer}.${head}`)))));
    const top = this.#shown.dfa?.heads;
    if (top) heads.value = this.names[top.reduce((best, value, h) => (Math.abs(value) > Math.abs(top[best]) ? h : best), 0)];
    const by = el("select", { "aria-label": "by", "data-by": "" }, el("option", { value: "zero", title: "z is its constant part c, so that the head's DFA is 0" }, "zero (z = c)"), el("option", { value: "mean", title: "mean z over text tokens of 64 blocks of the corpus, drawn evenly" }, "mean of the corpus"));
    const [headWhere, featureWhere] = [where(), where()];
    const latent = el("input", { inputmode: "numeric", "aria-label": "number of a feature", placeholder: "number", value: this.#latent() ?? "", "data-feature-number": "" });
    const place = (select) => (select.value === "all" ? "" : `@${this.#query()}`);
    const addFeature = () => (/^\d{1,9}$/.test(latent.value.trim()) ? this.#ablate([...edits, `f${Number(latent.value)}${place(featureWhere)}`]) : this.#refuse(new Error(`“${latent.value}” is not the number of a feature: expected 0 to ${this.about.sae.d_sae - 1}.`)));
    latent.addEventListener("keydown", (event) => event.key === "Enter" && addFeature());
    this.ablations.replaceChildren(el("span", { class: "prompt-made" }, el("b", {}, "Ablated: "), drawPins(edits, { token: this.#token, remove: (name) => this.#ablate(edits.filter((other) => other !== name)), clear: () => this.#ablate([]), summary })),
      el("span", { class: "live" }, "head ", heads, by, headWhere, button({ class: "button", "data-add-head": "", onclick: () => this.#ablate([...edits, `h${heads.value}=${by.value}${place(headWhere)}`]) }, "ablate")),
      el("span", { class: "live" }, "feature ", latent, featureWhere, button({ class: "button", "data-add-feature": "", onclick: addFeature }, "ablate")));
  }

  // --------------------------------------------------------------------------------------------- the selected feature
  async #drawOne(late) {
    const { dfa } = this.#shown;
    this.one.hidden = dfa === null;
    if (dfa === null) return this.one.replaceChildren();
    const { latent, dst, pre, bias, activation, residual, heads } = dfa;
    const total = heads.reduce((sum, value) => sum + value, 0);
    const closes = Math.abs(pre - total - bias) <= 1e-4 * (1 + Math.abs(pre));
    const name = `f${latent}@${dst}`;
    const example = { ...dfa, acts: new Map(), brief: false };
    const header = el("header", {}, el("h2", {}, "Feature ", el("a", { href: this.link(latent), "data-nav": latent }, String(latent)), " at ", this.#token(dst), el("small", {}, `position ${dst} · activation ${num(activation)}`)),
      el("span", { class: "live" }, button({ class: "button", "data-ablate-here": "", onclick: () => this.#toggle(name) }, this.#edits().includes(name) ? "keep it here " : "ablate here ", el("kbd", {}, "a")), " ", button({ class: "button", onclick: () => this.#toggle(`f${latent}`) }, this.#edits().includes(`f${latent}`) ? "keep it " : "ablate everywhere ", el("kbd", {}, "A"))),
      el("p", { class: closes ? "definition" : "wrong", "data-closes": String(closes) }, `sum of DFA ${num(total)} + bias ${num(bias)} ${closes ? "=" : "≠"} pre-activation ${num(pre)}, off by ${sci(residual)}. DFA is of the model as it is, patterns and norms held.`));
    const map = el("section", {}, el("h3", {}, "Heads by sources", el("small", { class: "hint" }, dfa.n_rest > 0 ? ` the ${dfa.sources.length} largest sources; ${int(dfa.n_rest)} others summed` : "")), el("div", { class: "map" }, drawMap(example, { names: this.names, tip: this.tip, label: this.#token })));
    const tree = await this.#openTree(late);
    const why = await this.#why(late);
    if (late()) return;
    const focused = tree.contains(document.activeElement) ? document.activeElement : null;
    this.one.replaceChildren(header, map, el("div", { class: "prompt-feature-parts" }, el("section", { "data-tree": "" }, el("h3", {}, "Recursive DFA"), el("p", { class: "definition" }, "Open a node to see what it is the sum of: heads, sources, parts of the stream there, and so on."), tree), why));
    focused?.focus({ preventScroll: true });
  }

  /** The tree stays as it is while it is of the same feature. */
  async #openTree(late) {
    const [prompt, latent, query] = [this.#prompt, this.#latent(), this.#query()];
    const of = JSON.stringify([prompt, latent, query]);
    const levels = this.#treeOf === of ? this.#tree.levels : {};
    this.#shown.levels = levels;
    if (this.#treeOf === of && pathsText([...this.#tree.open]) === this.view.tree) return this.#tree.element;
    const tree = new CircuitTree({
      token: this.#token, open: pathsOf(this.view.tree), opened: (paths) => this.change({ tree: pathsText(paths) }),
      attended: (at) => this.change({ scores: `${at.layer}.${at.head},${at.query},${at.key}` }),
      ask: async (path) => {
        levels[path] = await this.data.prompt("level", { prompt, latent, query, path });
        return levels[path];
      },
    });
    tree.levels = levels;
    await tree.start();
    if (!late()) [this.#tree, this.#treeOf] = [tree, of];
    return tree.element;
  }

  /** Why a head attends to a key: the one asked for, else the top head here to its most attended key. */
  async #why(late) {
    const [, layer, head, from, to] = /^(\d{1,4})\.(\d{1,4}),(\d{1,9})(?:,(\d{1,9}))?$/.exec(this.view.scores) ?? [];
    if (layer === undefined) return el("section", { "data-why-part": "" }, el("h3", {}, "QK attribution"), el("p", { class: "definition" }, "“why attended?” beside a source in the tree splits that head's score over parts of query and key."));
    const asked = { prompt: this.#prompt, layer: Number(layer), head: Number(head), query: Number(from), key: to === undefined ? null : Number(to) };
    const scores = await this.data.prompt("scores", asked).catch((error) => error);
    if (late()) return null;
    if (scores instanceof Error) return el("section", { "data-why-part": "" }, el("p", { class: "wrong" }, scores.message, scores.do ? ` ${scores.do}` : ""));
    this.#shown.scores = scores;
    return el("section", { "data-why-part": "" }, drawQk(scores, { token: this.#token, tip: this.tip, mode: this.view.pairs, change: (mode) => this.change({ pairs: mode }), pick: (key) => this.change({ scores: `${layer}.${head},${from},${key}` }) }));
  }

  // ----------------------------------------------------------------------------------------------------- keys and files
  /** Arrows move within the strip and the list when they have the focus; Enter selects. */
  #rove(event) {
    const row = event.target.closest(".prompt-feature");
    if (event.key === "Enter" && row === event.target) {
      event.preventDefault();
      this.change({ feature: row.dataset.feature, tree: "", scores: "" });
    }
  }

  #facts() {
    const { model, sae, site, corpus } = this.about;
    return `${model.name}, ${site}, SAE ${sae.name} of ${int(sae.d_sae)} latents (${sae.kind}), index of ${corpus.name}. Ablated: ${this.#edits().join(", ") || "nothing"}. Saved ${new Date().toISOString().slice(0, 16)}Z. To go on from here: headscope serve --index INDEX --with-model, then ${location.pathname}${location.search}`;
  }

  async #saveHtml() {
    if (!this.#run) return;
    const title = `prompt · ${this.about.title}`;
    download("headscope-prompt.html", "text/html", await pageOf(this.body, { title, facts: this.#facts(), prompt: this.text.value }));
  }

  #saveJson() {
    if (!this.#run) return;
    const { title, version, model, sae, site, corpus } = this.about;
    const { vocab } = this;
    const names = Object.fromEntries(Object.keys(PLACE).concat("prompt", "packed", "block", "upto", "paint").map((name) => [name, this.view[name]]));
    const tokens = this.#run.tokens.map((id) => ({ id, bytes: vocab.tokens[id], special: vocab.special.has(id) }));
    const content = { format: "headscope prompt 1", title, headscope: version, created: new Date().toISOString(), model, sae, site, corpus, view: names, link: `${location.pathname}${location.search}`, prompt: this.#prompt, tokens, ...this.#shown };
    download("headscope-prompt.json", "application/json", JSON.stringify(content));
  }
}
