/** The tab "Upstream": components, and features of earlier SAEs, moved between an example and a corruption of it. */
import { drawBars } from "./bars.js";
import { choice, el, svg, unit } from "./dom.js";
import { int, num, pct, signed } from "./format.js";
import { facts } from "./heads.js";
import { empty, quoted, studyHead } from "./study.js";

const [PATCH_CELL, PATCH_WHOLE, PATCH_ROW, PATCH_LEFT, PATCH_ABOVE] = [21, 44, 19, 84, 84];
const FEW_EFFECTS = 10;

export const CORRUPTIONS = [["sources", "replace its sources", "the fewest of its largest source tokens, up to five, whose replacement turns it off"], ["swap", "swap the first A", "each earlier copy of the token at the feature is replaced by a token that is not in the prompt"], ["shuffle", "shuffle", "the tokens before it in another order, drawn at random"]];
export const NODE_SETS = [["", "components", "token, residual stream, attention and MLP outputs"], ["heads", "heads", "z of every head up to the feature's layer"], ["qkv", "q k v", "queries, keys, values and patterns of the feature's layer"]];
const DIRECTIONS = [["", "noising", "the clean prompt with one component from the corrupted run: what is lost without it"], ["denoising", "denoising", "the corrupted prompt with one component from the clean run: what it alone brings back"]];
const METRICS = [["", "pre-ReLU", "the pre-activation: graded, also while the feature is off"], ["post", "post-ReLU", "the activation: what happens while the feature is off does not show"]];

/** How much a patch does: what is lost by noising, what is brought back by denoising. */
const effectOf = (score, direction) => (score === null ? null : direction === "denoising" ? score : 1 - score);

/** Direction and metric of a link: "denoising-post". */
const readBy = (by) => [by.startsWith("denoising") ? "denoising" : "noising", by.endsWith("post") ? "activation_score" : "pre_score"];

export function drawPatching(found, view, { vocab, tip, change }) {
  const [direction, metric] = readBy(view.by);
  const { rows, columns, latent, clean, corrupted } = found;
  const scores = found[direction][metric];
  const head = studyHead({
    definition: `Score of a patch: ${found.definition}; corrupted 0, clean 1. n = 1 pair of prompts: no interval. Feature ${num(found.on.activation, 2)} in the clean prompt, ${num(found.off.activation, 2)} in the corrupted one (pre-activations ${num(found.on.pre, 2)}, ${num(found.off.pre, 2)}).`, python: found.python, name: `patching-${latent}`,
    rows: () => [["direction", "metric", "component", "all", ...columns.map((p) => `${p}`)], ...["noising", "denoising"].flatMap((d) => ["pre_score", "activation_score"].flatMap((m) => found[d][m].map((row, i) => [d, m, rows[i].name, ...row]))),
      [], ["position", "clean_token", "corrupted_token"], ...clean.map((id, p) => [p, quoted(vocab.text(id)), quoted(vocab.text(corrupted[p]))]), [], ["component", "role", "loss", "gain"], ...found.roles.map(({ role, loss, gain }, i) => [rows[i].name, role, loss, gain])],
  });
  const put = (d, post) => change({ by: [d, post].filter(Boolean).join("-") });
  const d = direction === "denoising" ? direction : "";
  const post = metric === "activation_score" ? "post" : "";
  return [head, drawPrompts(found, vocab), el("p", { class: "patch-choices" }, choice("direction", DIRECTIONS, d, (value) => put(value, post)), choice("metric", METRICS, post, (value) => put(d, value))),
    el("p", { class: "legend key" }, el("span", {}, el("i", { class: "effect" }), direction === "noising" ? "1 − score: lost with the corrupted value" : "score: brought back with the clean value"), el("span", {}, el("i", { class: "effect minus" }), "the other way"), el("span", {}, el("i", { class: "dst" }), "changed token")),
    el("div", { class: "wide-table", tabindex: 0, role: "group", "aria-label": "patches by position" }, drawMatrix(scores, direction, found, { vocab, tip })),
    el("div", { class: "beside" }, drawLargest(scores, direction, found, vocab), drawRoles(found))];
}

/** Both prompts, one under the other: what was changed is marked in both. */
function drawPrompts({ clean, corrupted, changed, query }, vocab) {
  const own = new Set(changed);
  const line = (name, ids) => el("div", { class: "prompt-line", "data-prompt": name }, el("small", {}, name), el("div", { class: "line" }, vocab.decode(ids).map((piece, p) => el("span", { class: `tok ${piece.kind}${own.has(p) ? " changed" : ""}${p === query ? " dst" : ""}`, "data-pos": p, title: `position ${p}` }, vocab.label(piece.id)))));
  return el("div", { class: "prompts" }, line("clean", clean), line("corrupted", corrupted));
}

function drawMatrix(scores, direction, { rows, columns, clean, corrupted, changed, query }, { vocab, tip }) {
  const own = new Set(changed);
  const [wide, tall] = [PATCH_LEFT + PATCH_WHOLE + 8 + columns.length * PATCH_CELL + 60, PATCH_ABOVE + rows.length * PATCH_ROW + 4];
  const x = (j) => (j === 0 ? PATCH_LEFT : PATCH_LEFT + PATCH_WHOLE + 8 + (j - 1) * PATCH_CELL);
  const short = (id) => { const text = vocab.label(id).textContent; return text.length > 9 ? `${text.slice(0, 8)}…` : text; };
  const chart = svg("svg", { class: "grid-map patches", width: wide, height: tall, role: "img", "aria-label": `${direction} by component and position`, "data-matrix": direction },
    svg("defs", {}, svg("pattern", { id: "patch-hatch", width: 4, height: 4, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, svg("rect", { class: "hatch", width: 2, height: 4 }))),
    svg("text", { class: "name", x: PATCH_LEFT + PATCH_WHOLE / 2, y: PATCH_ABOVE - 6, "text-anchor": "middle" }, "all"),
    columns.map((p, j) => svg("text", { class: `token${own.has(p) ? " changed" : ""}${p === query ? " at-query" : ""}`, transform: `translate(${x(j + 1) + PATCH_CELL / 2 + 3} ${PATCH_ABOVE - 5}) rotate(-58)` }, short(clean[p]))));
  scores.forEach((row, i) => {
    const y = PATCH_ABOVE + i * PATCH_ROW;
    chart.append(svg("text", { x: PATCH_LEFT - 6, y: y + 13, "text-anchor": "end" }, rows[i].name));
    row.forEach((score, j) => {
      const effect = effectOf(score, direction);
      if (effect === null) return;
      const p = columns[j - 1];
      const place = { x: x(j) + 0.5, y: y + 0.5, width: (j === 0 ? PATCH_WHOLE : PATCH_CELL) - 1, height: PATCH_ROW - 1, rx: 2 };
      const where = j === 0 ? ["all positions"] : [`position ${p} `, vocab.label(clean[p]), ...(own.has(p) ? [" corrupted to ", vocab.label(corrupted[p])] : [])];
      chart.append(svg("g", { class: `map-cell${effect < 0 ? " minus" : ""}`, "data-score": score, "data-at": j === 0 ? "all" : p, "data-component": rows[i].name, vars: { "--r": unit(Math.abs(effect)) }, ...tip.on(() => [el("div", { class: "tip-title" }, rows[i].name), el("div", {}, where), facts([["score", num(score)], [direction === "noising" ? "lost" : "brought back", pct(effect)]])]) },
        svg("rect", place), effect < -0.02 && svg("rect", { class: "patch-lines", ...place }), (j === 0 || Math.abs(effect) >= 0.3) && svg("text", { class: Math.abs(effect) > 0.6 ? "on-dark" : null, x: place.x + place.width / 2, y: y + 13, "text-anchor": "middle" }, j === 0 ? num(effect, 2) : num(effect, 1).replace("0.", "."))));
    });
  });
  return chart;
}

/** The largest cells in words: what the colours say, for who cannot see them. */
function drawLargest(scores, direction, { rows, columns, clean }, vocab) {
  const cells = scores.flatMap((row, i) => row.slice(1).map((score, j) => [effectOf(score, direction), i, columns[j]])).filter(([effect]) => effect !== null && Math.abs(effect) >= 0.01).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, FEW_EFFECTS);
  return el("div", {}, el("h3", {}, "Largest at one position"), cells.length === 0 ? empty("Nothing at a single position does as much as 1 %.") : el("table", { class: "measures", "data-effects": "" }, el("tr", {}, ["component", "position", direction === "noising" ? "lost" : "brought back"].map((label) => el("th", { scope: "col" }, label))),
    cells.map(([effect, i, p]) => el("tr", {}, el("th", { scope: "row" }, rows[i].name), el("td", {}, vocab.label(clean[p]), ` ${p}`), el("td", {}, el("b", {}, pct(effect)))))));
}

/** What noising and denoising together say of a component, and two of them jointly. */
function drawRoles({ rows, roles, joint }) {
  const shown = roles.map((own, i) => ({ ...own, name: rows[i].name })).filter(({ role }) => role !== "no effect").sort((a, b) => Math.max(b.loss, b.gain) - Math.max(a.loss, a.gain)).slice(0, 12);
  const said = { AND: "lost without it, not brought back by it: it takes others too", OR: "brought back by it, not lost without it: others stand in for it", part: "some of each", "necessary and sufficient": "lost without it, and brought back by it" };
  return el("div", {}, el("h3", {}, "AND or OR, at all positions, post-ReLU"), shown.length === 0 ? empty("No component does as much as 10 % at all positions.") : el("table", { class: "measures", "data-roles": "" }, el("tr", {}, ["component", "lost without", "brought back", "role"].map((label) => el("th", { scope: "col" }, label))),
    shown.map(({ name, role, loss, gain }) => el("tr", { "data-role": role }, el("th", { scope: "row" }, name), el("td", {}, pct(loss)), el("td", {}, pct(gain)), el("td", { title: said[role] }, el("b", {}, role))))),
  joint && el("p", { class: "definition", "data-joint": joint.kind }, `${joint.first} and ${joint.second} together: `, el("b", {}, joint.kind), `. Without the first, the second, both the feature is ${joint.on_without.map((on) => (on ? "on" : "off")).join(", ")}; with only these from the clean run ${joint.on_with.map((on) => (on ? "on" : "off")).join(", ")}. Joint effect beyond the sum of the two: ${signed(joint.excess[0], 2)} noising, ${signed(joint.excess[1], 2)} denoising.`));
}

/** Features of an earlier SAE as nodes: all together, the error alone, the largest single ones. */
export function drawFeaturePatching(found, view, { tip }) {
  const [, metric] = readBy(view.by);
  const { bars, latents, few, sae, n_latents: n } = found;
  const head = studyHead({
    definition: `Features of ${sae} (${found.site}) moved one by one: ${found.definition}; ${int(n)} differ between the prompts, all others do exactly nothing. n = 1 pair.`, python: found.python, name: `upstream-features-${found.latent}`,
    rows: () => [["node", "change", "noising_pre", "noising_post", "denoising_pre", "denoising_post"], ...[...bars, ...latents].map(({ name, latent, change, noising, denoising }) => [name ?? `feature ${latent}`, change, noising.pre_score, noising.activation_score, denoising.pre_score, denoising.activation_score])],
  });
  const label = { site: "whole site", features: "all features", error: "error alone" };
  const rows = [...bars.map((bar) => ({ ...bar, label: label[bar.name] })), ...latents.slice(0, 10).map((own) => ({ ...own, label: `feature ${own.latent}` }))];
  const panel = (direction, title) => drawBars({
    name: `features-${direction}`, title, write: pct, tip, rows: rows.map(({ label: name, change, [direction]: own }) => ({ label: name, value: effectOf(own[metric], direction), facts: () => [el("div", { class: "tip-title" }, name), facts([["score, pre-ReLU", num(own.pre_score)], ["score, post-ReLU", num(own.activation_score)], ...(change === undefined ? [] : [["activation, clean less corrupted", signed(change)]])])] })),
  });
  return [el("h3", {}, `Features of ${sae} as nodes`), head, el("p", { "data-few": few ?? "" }, few === null ? "No few of them do it: all features together have too little effect in one of the two directions, or more than 32 are needed for 90 % of it." : `The first ${int(few)} together have 90 % of the effect of all features, in both directions.`),
    el("div", { class: "plots" }, panel("noising", "Lost by noising"), panel("denoising", "Brought back by denoising"))];
}
