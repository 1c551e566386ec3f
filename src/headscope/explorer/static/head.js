/** The pages of heads: the grid of all, and of one its scores, its features, what it shares and what its ablation does. */
import { drawCurve } from "./charts.js";
import { choice, el, term, unit } from "./dom.js";
import { drawMissing, familyTitle, loadPageStyle } from "./family.js";
import { int, num, pct } from "./format.js";
import { HeadGrid, ROLE_NAMES } from "./grid.js";
import { measureTable } from "./study.js";

const WEIGHT_NAMES = { dfa: "by DFA", decoder: "by decoder weight" };
const SHARE_WORDS = { dfa: "share of squared DFA over the feature's active tokens", decoder: "share of the norms of the feature's decoder row" };
const READING_NAMES = { firing: "firing most often under ablation", lost: "losing most active tokens", by_dfa: "with most DFA of this head" };
const CLUSTER_MEASURES = [["effective_features", "effective features"], ["effective_families", "effective families"], ["largest", "largest family"]];

export class HeadPages {
  #grid = null;
  #name = null;
  #head = null;

  /** @param {object} needs as of `FamilyPages` @param {(grid: object) => void} change @param {(name: string) => void} open another head */
  constructor(needs, change, open) {
    Object.assign(this, { needs, change, open });
    loadPageStyle(needs.data);
    this.element = el("div", { class: "pages-of" });
  }

  /** @param {import("./types").View} view @param {() => boolean} late */
  async update(view, late) {
    const { data } = this.needs;
    const [all, one] = await Promise.all([data.page("heads"), view.page === "head" ? data.page(`head/${encodeURIComponent(view.name)}`) : null]);
    if (late()) return;
    this.#grid ??= new HeadGrid(all, this.needs, this.change, all.scores.missing && drawMissing(all.scores));
    this.title = one ? `head ${one.name}` : "heads";
    if (!one) {
      this.#name = null;
      this.element.replaceChildren(this.#grid.element);
      return this.#grid.update(view.grid);
    }
    if (this.#name !== one.name) {
      this.#name = one.name;
      this.#head = new HeadPage(one, this.needs, this.change, this.#near(one.name));
      this.element.replaceChildren(this.#head.element);
      scrollTo(0, 0);
    }
    this.#head.update(view.grid);
  }

  /** The heads before and after one. */
  #near(name) {
    const { names } = this.#grid;
    const at = names.indexOf(name);
    return { previous: names[at - 1] ?? null, next: names[at + 1] ?? null, position: `${int(at + 1)} of ${int(names.length)}` };
  }

  /** Through the grid, or through the pages. */
  move(step) {
    if (this.#name === null) return this.#grid?.move(step);
    const { previous, next } = this.#near(this.#name);
    const name = step < 0 ? previous : next;
    if (name !== null) this.open(name);
  }

  openCursor() {}
}

class HeadPage {
  #kind = null;

  constructor(head, needs, change, near) {
    Object.assign(this, { head, needs, change });
    const { name, features } = head;
    this.ablated = el("div", { "data-ablation": "" });
    this.kinds = el("span");
    this.element = el("main", { class: "head-page", "data-head-page": name }, this.#header(near), this.#section("Scores on text without meaning", head.scores, () => this.#scores(), "scores"),
      features === null && el("p", { class: "definition", "data-other-layer": "" }, `The SAE reads layer ${head.of_layer}: of heads of layer ${head.layer} there are scores only.`),
      features && [this.#features(), this.#section("Families of its features", head.catalogue, () => this.#catalogue(), "catalogue"), this.#shared(), this.#section("Ablated", head.ablation, () => this.#ablation(), "ablation", this.kinds)]);
  }

  update(view) {
    const { ablation } = this.head;
    if (!ablation || ablation.missing) return;
    const kinds = Object.keys(ablation.lost);
    const kind = kinds.includes(view.by) ? view.by : kinds[0];
    if (kind === undefined || kind === this.#kind) return;
    this.#kind = kind;
    this.kinds.replaceChildren(choice("ablation", kinds.map((one) => [one, one, `${ablation.definitions.kind}: ${one}`]), kind, (by) => this.change({ by })));
    this.ablated.replaceChildren(...this.#ablatedBy(kind));
  }

  #header({ previous, next, position }) {
    const step = (name, sign, label) => (name === null ? el("span", { class: "button off", "data-step": label }, sign)
      : el("a", { class: "button", href: this.needs.page("head", name), "data-page": "head", "data-name": name, "data-step": label, title: `${label} head` }, sign));
    const { scores, families } = this.head;
    const link = (name, text) => el("a", { class: "chip", href: this.needs.page("family", name), "data-page": "family", "data-name": name, title: `of the ${int(families.n)} features whose largest share of DFA is this head's` }, text);
    return el("header", { class: "card-head" }, el("h1", {}, el("small", {}, "head"), this.head.name),
      el("span", { class: "chips" }, (scores.roles ?? []).map((role) => el("span", { class: "chip", "data-role": role, title: "role by a test against shuffled weights" }, `${ROLE_NAMES[role] ?? role} head`)),
        families && Object.entries(families.verdicts).map(([family, n]) => n > 0 && link(family, `${int(n)} ${family} features`))),
      el("nav", { class: "place", "aria-label": "heads" }, step(previous, "‹", "previous"), el("span", { class: "position", "data-position": "" }, position), step(next, "›", "next"), el("a", { class: "button", href: this.needs.page("heads"), "data-page": "heads" }, "all heads")));
  }

  #section(title, found, draw, name, extra) {
    return el("section", { class: "head-section", "data-section": name }, el("header", {}, el("h2", {}, title), extra, !found.missing && name !== "scores" && el("span", { class: "hint" }, found.n.replace(/\d{4,}/g, (digits) => int(Number(digits))))), found.missing ? drawMissing(found) : draw());
  }

  // ---------------------------------------------------------------------------------------------------------- scores
  #scores() {
    const { rows, prefix, roles } = this.head.scores;
    const number = (value) => (value === null ? "–" : num(value));
    const table = el("table", { class: "measures", "data-scores": "" }, el("tr", {}, [["", ""], ["score", ""], ["95 % interval", "sequences resampled"], ["by chance", "of a head that attends evenly, or a table without meaning"], ["shuffled weights", "the same head with all weights of the model shuffled: mean, and the largest of the shuffles"], ["p", "share of shuffled models, the model itself included, with as much or more"], ["role", "p and size of the score pass"]].map(([label, title]) => el("th", { scope: "col", title: title || null }, label))),
      rows.map((row) => el("tr", { "data-score": row.role }, el("th", { scope: "row" }, term(ROLE_NAMES[row.role] ?? row.role, row.definition)), el("td", {}, el("b", {}, number(row.value))), el("td", {}, row.low === null ? "–" : `${number(row.low)} to ${number(row.high)}`),
        el("td", {}, number(row.even)), el("td", {}, row.null === null ? "–" : `${number(row.null)}, at most ${number(row.null_high)}`), el("td", {}, number(row.p)), el("td", {}, roles.includes(row.role) ? "✓ yes" : "no"))));
    return el("div", { class: "beside" }, el("div", { class: "wide-table" }, table, roles.length === 0 && el("p", { class: "hint", "data-no-role": "" }, "The tests give this head no role.")), prefix.attention.length > 1 && el("div", { class: "prefix-plot" }, this.#prefix(prefix)));
  }

  #prefix({ attention, low, high, null: chance }) {
    const lengths = attention.map((_, i) => i + 1);
    const facts = (i) => [`prefix of ${int(i + 1)}`, `attention ${num(attention[i])}${low.length ? ` [${num(low[i])}, ${num(high[i])}]` : ""}`, `before anything is copied ${num(chance[i])}`];
    return drawCurve({
      name: "prefix", title: "Attention to what followed, by copied tokens", xLabel: "copied tokens before", yLabel: "mean attention", x: lengths, y: attention, low: low.length ? low : undefined, high, xRange: [1, lengths.length],
      yRange: [0, Math.max(...attention, ...high, ...chance, 0.05)], reference: { x: lengths, y: chance, label: "nothing copied" }, legend: "this head", facts, tip: this.needs.tip,
    }).figure;
  }

  // -------------------------------------------------------------------------------------------------------- features
  #link(latent) {
    const href = this.needs.feature(latent);
    return href === null ? el("span", {}, String(latent)) : el("a", { href, "data-nav": latent }, String(latent));
  }

  #features() {
    const { features: { n, n_both: both, lists }, families: { n: own, kinds } } = this.head;
    const words = Object.entries(kinds).map(([kind, count]) => `${kind} ${int(count)}`).join(" · ");
    return el("section", { class: "head-section", "data-section": "features" }, el("header", {}, el("h2", {}, "Features it makes"),
      el("span", { class: "hint" }, `of ${int(n)} live ones it has the largest share of ${int(lists.dfa.n)} by DFA, of ${int(lists.decoder.n)} by decoder weight; ${int(both)} in both`)),
    words && el("p", { class: "definition", "data-kinds": "" }, `Best proxies of the ${int(own)}: ${words}`),
    el("div", { class: "side-by-side" }, Object.entries(lists).map(([by, list]) => el("div", { "data-list": by }, el("h3", {}, term(WEIGHT_NAMES[by], SHARE_WORDS[by])), drawShares(list.histogram, `live features by this head's ${SHARE_WORDS[by]}`), this.#table(list, [by, by === "dfa" ? "decoder" : "dfa"])))));
  }

  /** Features, one a row: what they predict and read, and some of their numbers as bars. */
  #table(list, columns, few = 12) {
    const label = { dfa: "DFA", decoder: "decoder", retained: "left", off: "off", n_active: "tokens" };
    const { vocab } = this.needs;
    return el("div", { class: "wide-table" }, el("table", { class: "feature-table" }, el("tr", {}, ["feature", "predicts", "reads"].map((name) => el("th", { scope: "col" }, name)), columns.map((name) => el("th", { scope: "col", class: "number", title: SHARE_WORDS[name] ?? this.head.ablation?.definitions?.[name] ?? null }, label[name]))),
      list.latent.slice(0, few).map((latent, i) => el("tr", { "data-feature": latent }, el("th", { scope: "row" }, this.#link(latent), list.families[i].map((family) => el("small", { class: "family-mark", title: `member of the family ${familyTitle(family)}` }, ` ${familyTitle(family)}`))),
        el("td", { class: "token" }, vocab.label(list.token[i])), el("td", { class: "token" }, vocab.label(list.source[i])), columns.map((name) => (name === "n_active" ? el("td", { class: "number" }, int(list[name][i])) : el("td", { class: "number bar-cell", vars: { "--r": unit(list[name][i] ?? 0) } }, pct(list[name][i]))))))));
  }

  #catalogue() {
    const { by } = this.head.catalogue;
    const measure = { ...Object.fromEntries(CLUSTER_MEASURES.map(([name]) => [name, (value) => num(value, 2)])), largest: pct };
    return el("div", { class: "side-by-side" }, Object.entries(by).map(([weights, card]) => el("div", { "data-catalogue": weights }, el("h3", {}, term(WEIGHT_NAMES[weights], "what the features are weighed by")),
      el("div", { class: "wide-table" }, measureTable(CLUSTER_MEASURES.map(([name, label]) => [name, label, card.measures[name], measure[name]]))),
      el("p", { class: "definition" }, `${int(card.n_features)} features, ${int(card.n_families)} families of (source > output); of the ${int(card.top.length)} heaviest features ${int(card.top_in_one)} are of one family`),
      el("ol", { class: "clusters" }, card.clusters.map(({ family, n, share, latents }) => el("li", { "data-cluster": family }, el("p", { class: "bar-cell", vars: { "--r": unit(share) } }, el("b", {}, family), el("span", { class: "value" }, `${pct(share)} · ${int(n)} features`)),
        el("p", { class: "members" }, latents.slice(0, 8).map((latent) => [this.#link(latent), " "]), n > 8 && "…")))))));
  }

  #shared() {
    const { n, alone, least, others } = this.head.shared;
    return el("section", { class: "head-section", "data-section": "shared" }, el("header", {}, el("h2", {}, "Features shared with other heads"),
      el("span", { class: "hint" }, `a head makes a part of a feature from ${pct(least)} of its squared DFA on: this one of ${int(n)}, of ${int(alone)} alone`)),
    others.length === 0 ? el("p", { class: "nothing" }, "It shares none.") : el("ol", { class: "clusters side-by-side" }, others.map(({ head, n: count, latents }) => el("li", { "data-shared": head }, el("p", { class: "bar-cell", vars: { "--r": unit(count / Math.max(n, 1)) } },
      el("a", { href: this.needs.page("head", head), "data-page": "head", "data-name": head }, `head ${head}`), el("span", { class: "value" }, `${int(count)} features, ${pct(count / n)}`)),
    el("p", { class: "members" }, latents.map((latent) => [this.#link(latent), " "]), count > latents.length && "…")))));
  }

  // -------------------------------------------------------------------------------------------------------- ablation
  #ablation() {
    return this.ablated;
  }

  #ablatedBy(kind) {
    const { turned_off: all, lost, fires, definitions } = this.head.ablation;
    const rows = all.filter((row) => row.kind === kind);
    const list = lost[kind];
    return [
      el("div", { class: "side-by-side" }, el("div", {}, el("h3", {}, term("Share of features that turn off", definitions.family)),
        el("div", { class: "wide-table" }, measureTable(rows.map(({ rule, family, off }) => [`${family}-${rule}`, `${family}, ${rule}`, off]))), el("h3", {}, term("What is left of each feature", definitions.retained)),
        drawShares(list.histogram, `${int(list.n)} live features by the share of their activation that is left; what is above 1 counts as 1`)),
      el("div", { "data-lost": "" }, el("h3", {}, "Features of which least is left"), this.#table(list, ["n_active", "retained", "off"], 18))),
      fires.missing ? drawMissing(fires) : el("div", { "data-readings": "" }, el("h3", {}, `What fires then, outside of ${fires.family || "no family"}`), el("p", { class: "definition" }, `${fires.kind} ablation on ${int(fires.n_tokens)} tokens: of ${int(fires.n_clean)} activations ${int(fires.n_lost)} are lost, ${int(fires.n_gained)} appear`),
        el("div", { class: "side-by-side thirds" }, Object.entries(fires.readings).map(([name, own]) => el("div", { "data-reading": name }, el("h4", {}, term(READING_NAMES[name], fires.definitions[name])), own.latent.length ? this.#table(own, ["dfa"], 10) : el("p", { class: "nothing" }, "none"))))),
    ];
  }
}

/** Features by a share from 0 to 1, as bars whose height is the square root of their number: one feature can be seen beside a thousand. */
function drawShares(counts, label) {
  const most = Math.sqrt(Math.max(...counts, 1));
  return el("div", { class: "share-bars", role: "img", "aria-label": label, title: `${label}; heights by square root` }, counts.map((count, i) => el("i", { vars: { "--r": unit(Math.sqrt(count) / most) }, title: `${Math.round((100 * i) / counts.length)} to ${Math.round((100 * (i + 1)) / counts.length)} %: ${int(count)}` })),
    el("span", {}, "0 %"), el("span", {}, "100 %"));
}
