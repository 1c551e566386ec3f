/** The tabs "DFA by source" and "Attention": what comes from a set of source tokens, and how much they are attended to. */
import { drawBars } from "./bars.js";
import { drawCurve } from "./charts.js";
import { button, el } from "./dom.js";
import { int, num, pct, signed } from "./format.js";
import { facts } from "./heads.js";
import { empty, measureRows, measureTable, measureText, quoted, studyHead } from "./study.js";

const SHARES_OF_SET = [["summed", "squares, heads summed first"], ["separate", "squares, head by head"], ["linear", "linear mass"], ["bos", "BOS apart: squares"], ["frequency", "of all sources (frequency)"]];
const ATTENDED = [["active", "active tokens"], ["visible", "active, a source in sight"], ["inactive", "inactive, same blocks"], ["elsewhere", "other blocks"]];

/** Ids of a link. @param {string} text "12,407" */
export function idsOf(text) {
  return text.split(",").filter((part) => /^\d{1,9}$/.test(part)).map(Number);
}

/** Which tokens are the set: chips to take away, a field to add to, and sets to take over. */
export function drawSet(ids, sets, { vocab, change, embedded }) {
  const put = (own) => change({ src: own.join(",") });
  const said = el("span", { class: "hint", "data-set-said": "", "aria-live": "polite" });
  const add = (input) => {
    const typed = input.value.replace(/\\n/g, "\n").replace(/\\t/g, "\t");
    const id = vocab.find(typed) ?? vocab.find(` ${typed}`);
    input.setAttribute("aria-invalid", String(id === undefined));
    if (id === undefined) said.textContent = "No token is exactly this text: a word may be several tokens.";
    else if (!ids.includes(id)) put([...ids, id]);
  };
  const input = el("input", { type: "text", class: "proxy", placeholder: "add a token, Enter", "aria-label": "add a source token", "data-set-add": "", spellcheck: "false", autocomplete: "off", maxlength: 100, readonly: embedded, onkeydown: (event) => event.key === "Enter" && (event.preventDefault(), add(event.target)) });
  return el("div", { class: "workbench", "data-set": "" }, el("label", {}, "source tokens"),
    el("div", { class: "set" }, ids.map((id) => button({ class: "chip", "data-set-token": id, title: "leave it out", onclick: () => put(ids.filter((own) => own !== id)) }, vocab.label(id), " ×")), input),
    el("div", { class: "suggested" }, sets.map(({ name, tokens }) => button({ class: "chip", "data-set-name": name, "aria-pressed": String([...tokens].sort().join() === [...ids].sort().join()), onclick: () => put(tokens) }, `${name} (${int(tokens.length)})`)), said));
}

/** The share of a set over all active tokens, as the card has it; null where one of its tokens is not on the card. */
export function shareOnCard(ids, sources) {
  const rows = ids.map((id) => sources?.token.indexOf(id) ?? -1);
  return rows.length > 0 && rows.every((row) => row >= 0) ? rows.reduce((sum, row) => sum + sources.share[row], 0) : null;
}

/** Which sample each number is of: the card's are of all active tokens, the tab's of those in the blocks that were read. */
function drawSamples(found, onCard, vocab) {
  const [{ n, n_active: all, summed }] = found.thresholds;
  const share = shareOnCard(found.tokens, onCard);
  const sample = n < all ? `a sample of ${int(n)} of them, those in ${int(found.n_blocks)} blocks drawn evenly` : `the same ${int(n)}`;
  return el("p", { "data-samples": "" }, ["Share of ", ...setText(found, vocab), ": "],
    share !== null && [el("b", { "data-whole": "" }, pct(share)), ` over all ${int(all)} active tokens, from the sources that the index keeps, which hold ${pct(onCard.kept)} of the squared DFA (the card's number). Here ${sample}, with all their sources: `],
    share === null && `the card does not list all of these tokens. Here, of ${int(all)} active tokens, ${n < all ? sample : "all"}, with all their sources: `,
    measureText(summed), share !== null && n < all && ". The two differ by the draw of the sample; quote the first.");
}

const setText = (found, vocab) => ["{", ...found.tokens.flatMap((id, i) => [i > 0 && ", ", vocab.label(id)]), "}"];

export function drawSourceShares(found, view, needs) {
  const { thresholds, latent, corpus, n_blocks: blocks } = found;
  const { names, tip, change, vocab, feature } = needs;
  const byHead = [...names.keys()].sort((a, b) => feature.heads.dfa[b] - feature.heads.dfa[a]);
  const measures = (at) => [...SHARES_OF_SET.map(([name, label]) => [name, label, at[name]]), ...byHead.flatMap((h) => [[`squared ${names[h]}`, `squared ${names[h]}`, at.heads[h].squared], [`linear ${names[h]}`, `linear ${names[h]}`, at.heads[h].linear]])];
  const head = studyHead({
    definition: ["Share of ", ...setText(found, vocab), ` in the squared DFA by source, sum over s in the set of (sum_h C[h, s])² / over all s; n = ${int(thresholds[0].n)} of ${int(thresholds[0].n_active)} active tokens, in ${int(blocks)} blocks of ${corpus} drawn evenly. All sources count.`], python: found.python, name: `dfa-by-source-${latent}`,
    rows: () => thresholds.flatMap((at) => [[`threshold ${at.threshold}`, `n ${at.n}`], ...measureRows(measures(at)), [], ["token_id", "token", "summed", "separate", "linear"], ...at.top.map(([id, ...shares]) => [id, quoted(vocab.text(id)), ...shares]), []]),
  });
  if (thresholds[0].n === 0) return [head, empty("The feature is active on no token: nothing comes from anywhere.")];
  const whole = el("div", { class: "wide-table" });
  const place = el("div", { class: "beside", "data-source-tables": "" });
  const said = el("output", { class: "reading", "data-reading": "" });
  const x = thresholds.map(({ threshold }) => threshold);
  const series = (part) => thresholds.map(({ summed }) => summed[part]);
  const line = (i) => [`f > ${x[i] === 0 ? 0 : num(x[i])}: ${int(thresholds[i].n)} active tokens`, `share ${measureText(thresholds[i].summed)}`, `by frequency ${pct(thresholds[i].frequency.value)}`];
  const chance = thresholds.map(({ summed }) => summed.null?.value ?? null);
  const show = (i) => {
    mark(x[i]);
    slider.value = String(i);
    said.textContent = line(i).join(" · ");
    whole.replaceChildren(measureTable(SHARES_OF_SET.map(([name, label]) => [name, label, thresholds[i][name]])));
    place.replaceChildren(...drawAt(thresholds[i], byHead, needs));
  };
  const pick = (i) => { show(i); change({ at: i === 0 ? "" : String(i) }); };
  const slider = el("input", { type: "range", min: 0, max: x.length - 1, step: 1, "aria-label": "threshold of the activation", "data-threshold": "", oninput: () => show(Number(slider.value)), onchange: () => pick(Number(slider.value)) });
  const known = chance.some((value) => value !== null);
  const { figure, mark } = drawCurve({
    name: "sources", title: "Share of the squared DFA from the set", xLabel: "activation above", yLabel: "share", x, y: series("value"), low: series("low"), high: series("high"), xRange: [0, Math.max(x.at(-1), 1e-9)], yTick: pct, legend: "share ", tip, facts: line, pick,
    reference: known ? { x, y: chance, label: "null: random directions, same tokens" } : undefined,
  });
  figure.append(el("label", { class: "slider" }, "above ", slider), said);
  show(Math.min(x.length - 1, Math.max(0, Math.floor(Number(view.at)) || 0)));
  return [head, drawSamples(found, feature.sources[0], vocab), el("div", { class: "plots" }, figure, whole), place];
}

function drawAt(at, byHead, { names, vocab }) {
  const top = el("table", { class: "measures", "data-top-sources": "" }, el("tr", {}, ["source token", "heads summed", "head by head", "linear"].map((label) => el("th", { scope: "col" }, label))),
    at.top.slice(0, 8).map(([id, ...shares]) => el("tr", {}, el("th", { scope: "row" }, vocab.label(id)), shares.map((share) => el("td", {}, pct(share))))));
  const rows = (kind) => byHead.map((h, i) => [`${kind} ${names[h]}`, `head ${names[h]}${i === 0 ? ", the top head" : ""}`, at.heads[h][kind]]);
  const titled = (title, table) => el("section", {}, el("h3", {}, title), el("div", { class: "wide-table" }, table));
  return [titled("Of each head's squared DFA", measureTable(rows("squared"))), titled("Of each head's linear mass", measureTable(rows("linear"))), titled("Largest sources of all", top)];
}

/** Mean attention to the set, by head: where the feature is active, and the baselines. */
export function drawAttention(found, { names, tip, vocab, feature }) {
  const [{ heads, n }] = found.thresholds;
  const order = [...names.keys()].sort((a, b) => feature.heads.dfa[b] - feature.heads.dfa[a]);
  const head = studyHead({
    definition: ["Mean attention from a token to all sources in ", ...setText(found, vocab), ` at or before it, over n = ${int(n)} active tokens of ${found.corpus}; beside it, the same head where the feature is inactive, and the other heads.`], python: found.python, name: `attention-${found.latent}`,
    rows: () => measureRows(order.flatMap((h) => ATTENDED.map(([name]) => [`${names[h]} ${name}`, "", heads[h].attention[name]]))),
  });
  const rows = order.flatMap((h) => ATTENDED.map(([name, label], i) => {
    const measure = heads[h].attention[name];
    return { label: i === 0 ? names[h] : "", ...measure, series: i, facts: () => [el("div", { class: "tip-title" }, `head ${names[h]}, ${label}`), facts([["mean attention", measureText(measure)], ["n", int(measure.n)]]), el("div", { class: "hint" }, measure.definition)] };
  }));
  return [head, el("p", { class: "legend" }, ATTENDED.map(([, label], i) => [el("i", { class: `bar-${i}` }), `${label} `]), el("i", { class: "whisker" }), "95 % interval"),
    el("div", { class: "plots" }, drawBars({ name: "attention", title: "Mean attention to the set, heads by share of DFA", rows, write: pct, tip }), drawAttended(order, heads, names))];
}

function drawAttended(order, heads, names) {
  return el("div", { class: "wide-table" }, el("table", { class: "measures", "data-attended": "" }, el("tr", {}, ["head", ...ATTENDED.map(([, label]) => label)].map((label) => el("th", { scope: "col" }, label))),
    order.map((h) => el("tr", { "data-attended-head": names[h] }, el("th", { scope: "row" }, names[h]), ATTENDED.map(([name]) => el("td", { title: heads[h].attention[name].definition }, measureText(heads[h].attention[name])))))));
}

/** Heads beside each other at one example: what each adds, from which sources, and how far they agree on them. */
export function drawComparison(found, { names, vocab }) {
  const token = (position) => [vocab.label(found.tokens[position]), el("small", {}, ` ${position}`)];
  const head = studyHead({
    definition: `Heads at one token: contribution C_h to the pre-activation ${num(found.pre)} (with the constant ${num(found.bias)}, off by ${found.residual}), its largest sources with C[h, s] and the attention to them. n = 1 token.`, python: found.python, name: `heads-at-${found.latent}-${found.at}`,
    rows: () => [["head", "contribution", "share", "source", "token", "dfa", "attention"], ...found.heads.flatMap(({ head: h, contribution, share, sources }) => sources.map(([s, dfa, attention]) => [names[h], contribution, share, s, quoted(vocab.text(found.tokens[s])), dfa, attention])), [], ["agreement", ...found.heads.map(({ head: h }) => names[h])], ...found.agreement.map((row, i) => [names[found.heads[i].head], ...row])],
  });
  const [first, second] = found.heads;
  return [el("h3", {}, "Heads at this example"), head, second && el("p", { "data-compared": "" }, `Head ${names[first.head]} adds ${signed(first.contribution, 2)}, head ${names[second.head]} ${signed(second.contribution, 2)}; their sources agree by `, el("b", {}, num(found.agreement[0][1], 2)), " (1: the same, 0: none in common)."),
    el("div", { class: "wide-table" }, el("table", { class: "measures", "data-comparison": "" }, el("tr", {}, ["head", "adds", "share", "agrees with the first", "sources: DFA, attention"].map((label) => el("th", { scope: "col" }, label))),
      found.heads.map(({ head: h, contribution, share, sources }, i) => el("tr", { "data-head-row": names[h] }, el("th", { scope: "row" }, names[h]), el("td", {}, el("b", {}, signed(contribution))), el("td", {}, pct(share)), el("td", {}, i === 0 ? "" : num(found.agreement[0][i], 2)),
        el("td", { class: "listed" }, sources.slice(0, 4).map(([s, dfa, attention], j) => [j > 0 && " · ", token(s), ` ${signed(dfa, 2)}, ${pct(attention)}`]))))))];
}
