/** The pages of families: which there are, and of one every feature that was judged, with a rule held against the verdict. */
import { drawCurve } from "./charts.js";
import { button, choice, el, setVars, term, unit } from "./dom.js";
import { int, num, pct } from "./format.js";
import { sortRows } from "./list.js";
import { ratesAt, rocOf } from "./rates.js";
import { cellText, Rows } from "./rows.js";
import { measureTable } from "./study.js";

const RULE_PAUSE = 150; // milliseconds of rest before a threshold that is moved goes into the link
const SHOWN_ROWS = {
  all: ["all judged", () => true], members: ["members", ({ verdict }) => verdict], chosen: ["chosen", ({ chosen }) => chosen], both: ["both", ({ verdict, chosen }) => verdict && chosen],
  extra: ["chosen, no members", ({ verdict, chosen }) => chosen && !verdict], missed: ["members missed", ({ verdict, chosen }) => verdict && !chosen],
};
const GROWING = ["score", "source_share", "rate", "precision", "recall", "off"]; // shares drawn as bars, longer is more of the family

/** "high-level-context" -> "High-level context" */
export function familyTitle(name) {
  const text = name === "high-level-context" ? "high-level context" : name.replaceAll("-", " ");
  return text[0].toUpperCase() + text.slice(1);
}

/** What is missing, and the command that adds it. */
export function drawMissing({ missing, command }) {
  return el("div", { class: "missing-study", "data-missing": "" }, el("p", {}, missing), command && el("p", {}, "Run ", el("code", { "data-command": "" }, command), " and reload."));
}

/** The styles of these pages; an exported folder has them in its page. */
export function loadPageStyle(data) {
  if (!data.embedded && !document.querySelector("link[data-pages]")) document.head.append(el("link", { rel: "stylesheet", href: "/static/pages.css", "data-pages": "" }));
}

export class FamilyPages {
  #shown = null;
  #one = null;

  /**
   * @param {{about: import("./types").About, vocab: import("./vocab.js").Vocab, tip: import("./tip.js").Tip, data: import("./types").Data,
   *   feature: (latent: number) => string|null, open: (latent: number) => void, page: (page: string, name?: string) => string}} needs
   * @param {(patch: object) => void} change asks for another view of the family
   */
  constructor(needs, change) {
    Object.assign(this, { needs, change });
    loadPageStyle(needs.data);
    this.element = el("div", { class: "pages-of" });
  }

  /** @param {import("./types").View} view @param {() => boolean} late whether another view was asked for meanwhile */
  async update(view, late) {
    this.title = view.page === "families" ? "families" : familyTitle(view.name);
    if (view.page === "families") {
      const found = await this.needs.data.page("families");
      if (late()) return;
      this.#show("families", () => this.#list(found));
      this.#one = null;
      return;
    }
    const path = ["family", view.name, view.family.head].filter(Boolean).map(encodeURIComponent).join("/");
    const found = await this.needs.data.page(path);
    if (late()) return;
    this.#show(path, () => {
      this.#one = found.missing ? null : new Family(found, this.needs, this.change);
      return this.#one?.element ?? el("main", { class: "missing-page" }, el("h1", {}, this.title), drawMissing(found), this.#back());
    });
    this.#one?.update(view.family);
  }

  #show(key, make) {
    if (this.#shown === key) return;
    this.#shown = key;
    this.element.replaceChildren(make());
  }

  #back() {
    return el("p", {}, el("a", { href: this.needs.page("families"), "data-page": "families" }, "All families"));
  }

  #list({ families }) {
    return el("main", { class: "family-list", "data-families": "" }, el("h1", {}, "Families of features"),
      el("ol", {}, families.map((family) => el("li", { "data-family": family.name }, el("h2", {}, el("a", { href: this.needs.page("family", family.name), "data-page": "family", "data-name": family.name }, familyTitle(family.name))),
        family.missing ? drawMissing(family) : [
          el("p", { class: "family-share", vars: { "--r": unit(family.share?.[0] ?? 0) } }, el("b", {}, int(family.members)), ` of ${int(family.n)} judged`, family.share && ` · ${pct(family.share[0])} [${pct(family.share[1])}, ${pct(family.share[2])}]`),
          el("p", { class: "definition" }, family.definition)]))));
  }

  move(step) {
    this.#one?.table.move(step);
  }

  openCursor() {
    this.#one?.table.openCursor();
  }
}

class Family {
  #timer = 0;
  #view = null;
  #order = "";

  constructor(family, needs, change) {
    Object.assign(this, { family, needs, change, rows: family.rows });
    this.table = new Rows(`features judged for ${family.name}`, family.columns, {
      sort: (sort) => change({ sort }), open: needs.open, link: needs.feature, id: (row) => family.rows.latent[row], cell: (row, column) => this.#cell(row, column),
    });
    this.count = el("output", { class: "count", "data-count": "" });
    this.filters = el("span", { class: "choices" });
    this.search = el("input", { type: "search", "data-family-search": "", placeholder: "an id or a token", spellcheck: "false", "aria-label": "search an id or a token", oninput: ({ target }) => this.#later({ q: target.value }) });
    this.element = el("main", { class: "index family", "data-family-page": family.name }, this.#side(),
      el("section", { class: "features" }, el("header", {}, this.filters, this.count), el("form", { class: "filters", onsubmit: (event) => event.preventDefault() }, this.search,
        el("span", { class: "hint" }, family.tests.length > 0 && ["tests: ", family.tests.map(({ name, definition }) => [term(name, definition), " "]), "— ✓ passed, ✗ failed, · not made"])), this.table.element));
  }

  // -------------------------------------------------------------------------------------------------------- the rule
  #side() {
    const { rule, heads, head, n, created, definition } = { definition: this.family.columns.find(({ name }) => name === "verdict").definition, ...this.family };
    const slide = { min: 0, max: 1, step: 0.01, "aria-label": "threshold" };
    this.slider = el("input", { type: "range", ...slide, "data-threshold": "", oninput: ({ target }) => this.#move(target.value) });
    this.number = el("input", { type: "number", ...slide, "data-threshold-number": "", oninput: ({ target }) => target.validity.valid && target.value !== "" && this.#move(target.value) });
    this.reset = button({ class: "quiet", "data-threshold-reset": "", onclick: () => this.#move(String(rule.at)) }, `back to ${rule.at}`);
    this.reading = el("div", { class: "rates", "data-rates": "", "aria-live": "polite" });
    const roc = rocOf(this.rows);
    const { figure, mark } = drawCurve({
      name: "roc", title: "ROC: the rule against the verdict", x: roc.map(({ x }) => x), y: roc.map(({ y }) => y), step: true, reference: { x: [0, 1], y: [0, 1], label: "chance" }, legend: "rule",
      xLabel: "false rate: others chosen", yLabel: "true rate: members chosen", tip: this.needs.tip, pick: (i) => Number.isFinite(roc[i].threshold) && this.#move(String(Math.max(0, Math.round(100 * roc[i].threshold) / 100))),
      facts: (i) => [`threshold ${Number.isFinite(roc[i].threshold) ? num(roc[i].threshold, 3) : "above all"}`, `true rate ${pct(roc[i].y)}`, `false rate ${pct(roc[i].x)}`],
    });
    this.mark = mark;
    const { auc } = rule;
    return el("aside", { class: "about rule" }, el("h1", {}, familyTitle(this.family.name)), el("p", { class: "definition", title: `${n}; ${created}` }, `${int(this.rows.latent.length)} features judged. Member: ${definition}.`),
      rule.n_true === 0 && el("p", { class: "flag", "data-no-member": "" }, "No feature is a member of this family, so a rule has nothing to find."),
      heads && el("p", { class: "of-head" }, el("label", {}, "rule of head ", el("select", { "data-rule-head": "", onchange: ({ target }) => this.change({ head: target.value }) },
        heads.map((name, i) => el("option", { value: name, selected: name === head }, `${name} — brings most of ${int(this.family.by_head[i])} members`)))), el("a", { href: this.needs.page("head", head), "data-page": "head", "data-name": head }, `head ${head}`)),
      el("h2", {}, term(`${rule.label} ≥`, rule.definition)), el("p", { class: "slider" }, this.slider, this.number, this.reset), this.reading,
      el("p", { class: "auc", "data-auc": "" }, term("AUC", auc.definition), " ", auc.value === null ? auc.missing : [el("b", {}, num(auc.value)), auc.low === null ? ` ${auc.missing}` : el("span", { title: auc.interval }, ` [${num(auc.low)}, ${num(auc.high)}]`), " · null 0.5"], ` · n = ${int(auc.n)}`),
      rule.n_true > 0 && rule.n_true < rule.n && figure, Object.keys(this.family.measures).length > 0 && [el("h2", {}, "Of all live features"),
        el("div", { class: "wide-table", "data-family-measures": "" }, measureTable(Object.entries(this.family.measures).map(([name, measure]) => [name, name, measure])))]);
  }

  /** Another threshold: what depends on it is drawn at once, the link follows. */
  #move(text) {
    this.#later({ t: Number(text) === this.family.rule.at ? "" : String(Number(text)) });
  }

  #later(patch) {
    clearTimeout(this.#timer);
    this.pending = { ...this.pending, ...patch };
    this.update({ ...this.#view, ...patch });
    this.#timer = setTimeout(() => {
      const waiting = this.pending;
      this.pending = {};
      this.change(waiting);
    }, RULE_PAUSE);
  }

  #drawRates(at) {
    const found = (this.rates = ratesAt(this.rows, at));
    const line = (name, definition, k, n, measured, against) => el("tr", { "data-rate": name }, el("th", { scope: "row" }, term(name, definition)), el("td", {}, measured ? el("b", {}, pct(measured[0])) : "none"),
      el("td", {}, measured ? `${pct(measured[1])} to ${pct(measured[2])}` : "–"), el("td", {}, against ? pct(against[0]) : "–"), el("td", {}, `${int(k)} of ${int(n)}`));
    this.reading.replaceChildren(el("table", { class: "measures" }, el("tr", {}, ["", "value", "95 %", "null", "n"].map((label) => el("th", { scope: "col", title: label === "95 %" ? "Wilson" : label === "null" ? "precision: the share of members among all; recall: the share of all that is chosen" : null }, label))),
      line("precision", "of the features that the rule chooses, the share of members", found.both, found.chosen, found.precision, found.base),
      line("recall", "of the members, the share that the rule chooses", found.both, found.members, found.recall, found.selected)));
    if (found.falseRate !== null && found.members > 0) this.mark(found.falseRate);
  }

  // ------------------------------------------------------------------------------------------------------- the table
  /** Show a view; the part of it that did not change stays as it is. @param {import("./types").View["family"]} view */
  update(view) {
    this.#view = view;
    const typed = view.t === "" ? NaN : Number(view.t);
    const at = Number.isFinite(typed) ? Math.max(0, Math.min(typed, 1)) : this.family.rule.at;
    this.at = at;
    for (const input of [this.slider, this.number]) if (Number(input.value) !== at || input.value === "") input.value = String(at);
    setVars(this.slider, { "--at": unit(at) });
    this.reset.hidden = at === this.family.rule.at;
    this.#drawRates(at);
    if (this.search.value !== view.q) this.search.value = view.q;
    const groups = Object.entries(SHOWN_ROWS).map(([name, [label, keeps]]) => [name, label, this.#rowsWhere(keeps)]);
    const show = view.show in SHOWN_ROWS ? view.show : this.rows.verdict.some(Boolean) ? "members" : "all";
    this.filters.replaceChildren(choice("show", groups.map(([name, label, rows]) => [name, `${label} ${int(rows.length)}`]), show, (show) => this.change({ show })));
    const matches = this.#matcher(view.q);
    const order = groups.find(([name]) => name === show)[2].filter(matches);
    const column = this.family.columns.find(({ name }) => name === view.sort.replace("-", "")) ?? this.family.columns.find(({ name }) => name === "score");
    sortRows(order, this.#keys(column), column.kind, view.sort.startsWith("-"));
    this.count.replaceChildren(el("b", { "data-n": order.length }, int(order.length)), ` of ${int(this.rows.latent.length)}`);
    const key = JSON.stringify([view.sort, show, view.q]);
    this.table.update({ order, sort: view.sort, at: key === this.#order ? null : 0 });
    this.#order = key;
  }

  #rowsWhere(keeps) {
    const { score, verdict } = this.rows;
    return [...score.keys()].filter((row) => keeps({ verdict: verdict[row], chosen: score[row] !== null && score[row] >= this.at }));
  }

  /** What rows are sorted by: a difference by its size, tests by how many are passed. */
  #keys({ name, kind }) {
    const values = this.rows[name];
    if (kind === "signed") return values.map((value) => (value === null ? null : Math.abs(value)));
    if (kind === "tests") return values.map((tests) => tests.filter(Boolean).length);
    return kind === "token" ? values.map((id) => (id === null ? null : this.needs.vocab.text(id).trim())) : values;
  }

  #matcher(query) {
    if (!query.trim()) return () => true;
    const tokens = this.needs.vocab.matching(query);
    const { latent, token, top_logit: top } = this.rows;
    return (row) => String(latent[row]) === query.trim() || Boolean(tokens[(token ?? top)[row]]);
  }

  #cell(row, { name, kind }) {
    const value = this.rows[name][row];
    if (kind === "token") return { content: value === null ? "" : this.needs.vocab.label(value) };
    if (kind === "tests") return { content: value.map((passed, i) => el("span", { class: `test-mark ${passed === null ? "unmade" : passed ? "passed" : "failed"}`, title: `${this.family.tests[i].name}: ${passed === null ? "not made" : passed ? "passed" : "failed"}` }, passed === null ? "·" : passed ? "✓" : "✗")) };
    if (name === "verdict") return { class: value && "member", content: value ? "member" : "no" };
    const bar = GROWING.includes(name) && value !== null ? { "--r": unit(value) } : {};
    const chosen = name === "score" && value !== null && value >= this.at;
    return { class: `${name === "score" ? "scored" : ""}${chosen ? " chosen" : ""}`, vars: bar, content: name === "latent" ? String(value) : [chosen && el("span", { class: "chosen-mark", title: "the rule chooses it" }, "≥ "), cellText(value, kind)] };
  }
}
