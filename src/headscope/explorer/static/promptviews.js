/** What the prompt explorer draws: the strip of tokens, the features of one, what comes next, and what is ablated. */
import { button, el, svg, unit } from "./dom.js";
import { int, num, pct, sci, signed } from "./format.js";
import { facts, headGrid } from "./heads.js";
import { show } from "./vocab.js";

/** How the strip is coloured: label and what it means. */
export const PAINTS = { feature: ["feature", "activation of the selected feature"], loss: ["loss", "loss of each token, given those before it"], change: ["change", "change of that loss by the ablations"] };

const BAR_WIDE = 54;

/** Read "f7@12" and "h1.3=zero": of which feature or head, where. */
export function ablationOf(name) {
  const [, latent, layerHead, by, position] = /^(?:f(\d+)|h(\d+\.\d+)=(\w+))(?:@(\d+))?$/.exec(name) ?? [];
  return { name, latent: latent === undefined ? null : Number(latent), head: layerHead ?? null, by: by ?? null, position: position === undefined ? null : Number(position) };
}

/** The features of each token, by position: {latent, activation, ablated}, the largest first. @param {import("./types").PromptRun} run */
export function activeByToken({ shown, latent, activation, ablated }) {
  let at = 0;
  return shown.map((n) => Array.from({ length: n }, () => {
    const i = at++;
    return { latent: latent[i], activation: activation[i], ablated: ablated?.[i] ?? null };
  }));
}

/**
 * The tokens of a prompt. The colour is of the selected feature, of the loss or of its change; blue underneath are sources.
 * @param {import("./types").PromptRun} run
 */
export function drawStrip(run, { pieces, vocab, active, query, latent, sources, paint, tip, pick }) {
  const change = run.ablated_loss?.map((loss, i) => loss - run.loss[i]);
  const at = (position) => active[position].find((feature) => feature.latent === latent);
  const most = { feature: Math.max(...active.map((_, p) => at(p)?.activation ?? 0), 1e-9), loss: Math.max(...run.loss, 1e-9), change: Math.max(...(change ?? []).map(Math.abs), 1e-3) };
  const largest = Math.max(...[...sources.values()].map(Math.abs), 1e-9);
  const marks = (position) => {
    if (paint === "feature") return { kind: at(position)?.activation > 0 ? "on" : "", vars: { "--a": unit((at(position)?.activation ?? 0) / most.feature) } };
    if (position === 0) return { kind: "", vars: {} };
    const value = paint === "loss" ? run.loss[position - 1] : change?.[position - 1] ?? 0;
    const kind = paint === "loss" ? "costs" : Math.abs(value) < 1e-6 ? "" : value > 0 ? "worse" : "better";
    return { kind, vars: { "--c": unit(Math.abs(value) / most[paint]) } };
  };
  const taken = (position) => run.ablations.map(ablationOf).some((one) => one.position === position || (one.position === null && active[position].some((feature) => feature.latent === one.latent && feature.activation > 0)));
  const said = (position) => [el("div", { class: "tip-title" }, vocab.label(run.tokens[position])), facts([
    ["position", position === 0 ? "0, put in front" : int(position)], ["token id", int(run.tokens[position])], ["active features", int(run.active[position])],
    ...(latent === null ? [] : [[`feature ${latent}`, num(at(position)?.activation ?? 0)], ...(run.ablated && at(position) ? [["with the ablations", num(at(position).ablated)]] : [])]),
    ...(sources.has(position) ? [["DFA from here", signed(sources.get(position))]] : []),
    ...(position > 0 ? [["loss", num(run.loss[position - 1])], ...(change ? [["with the ablations", `${num(run.ablated_loss[position - 1])} (${signed(change[position - 1])})`]] : [])] : []),
  ])];
  return el("div", { class: "prompt-strip", role: "listbox", "aria-label": "tokens", "aria-orientation": "horizontal", "data-strip": paint }, pieces.map((piece, position) => {
    const { kind, vars } = marks(position);
    const dfa = sources.get(position) ?? 0;
    const source = Math.abs(dfa) / largest >= 0.02 && latent !== null;
    const body = show(piece, true);
    const alone = body.length === 1 && body[0].className;
    return el("span", {
      class: ["tok", piece.kind, alone, kind, source && "src", source && dfa < 0 && "minus", position === query && "dst", taken(position) && "taken"].filter(Boolean).join(" "),
      role: "option", "aria-selected": String(position === query), tabindex: position === query ? 0 : -1, "data-pos": position, "data-act": at(position)?.activation ?? null, "data-change": position > 0 && change ? change[position - 1] : null,
      vars: { ...vars, ...(source ? { "--s": unit(Math.abs(dfa) / largest) } : {}) }, onclick: () => pick(position), ...tip.on(() => said(position)),
    }, alone ? body[0].textContent : body);
  }));
}

/** A bar that goes left, hatched, where it is negative. */
function signedBar(value, most) {
  const size = (Math.abs(value) / most) * (BAR_WIDE / 2 - 1);
  return svg("svg", { class: "circuit-bar", width: BAR_WIDE, height: 12, "aria-hidden": "true" }, svg("rect", { class: value < 0 ? "minus" : "plus", x: value < 0 ? BAR_WIDE / 2 - size : BAR_WIDE / 2, y: 2, width: Math.max(size, 0.6), height: 8 }),
    svg("line", { class: "zero", x1: BAR_WIDE / 2, x2: BAR_WIDE / 2, y1: 0, y2: 12 }));
}

/**
 * The features of one token: who makes each, and what it does to one logit.
 * @param {import("./types").TokenFeatures} found
 */
export function drawFeatures(found, { run, active, latent: selected, names, vocab, tip, token, chip, pick, ablate, link }) {
  const { query, latent, activation, by_head: heads, source, source_dfa: dfa, target, effect, effect_missing: missing } = found;
  const now = new Map(active[query].map((feature) => [feature.latent, feature.ablated]));
  const edited = run.ablated !== null;
  const [most, push] = [Math.max(...activation, 1e-9), Math.max(...(effect ?? []).map(Math.abs), 1e-9)];
  const top = (row) => row.reduce((best, value, h) => (Math.abs(value) > Math.abs(row[best]) ? h : best), 0);
  const head = (label, title, kind) => el("th", { scope: "col", title, class: kind }, label);
  const rows = latent.map((own, i) => {
    const h = top(heads[i]);
    return el("tr", { class: "prompt-feature", "data-feature": own, "aria-current": own === selected ? "true" : null, tabindex: own === selected || (i === 0 && !latent.includes(selected)) ? 0 : -1, onclick: (event) => event.target.closest("a, button") ?? pick(own) },
      el("th", { scope: "row" }, el("a", { href: link(own), "data-nav": own, title: "its card" }, String(own))),
      el("td", { class: "amount", vars: { "--r": unit(activation[i] / most) } }, num(activation[i])),
      edited && el("td", { "data-now": now.get(own) ?? activation[i], class: now.get(own) === 0 ? "off" : null }, now.get(own) === undefined ? "" : num(now.get(own))),
      el("td", { class: "named" }, chip(own)),
      el("td", { ...tip.on(() => [el("div", { class: "tip-title" }, `feature ${own}`), headGrid(names, { heads: heads[i] })]) }, names[h], el("small", {}, ` ${signed(heads[i][h], 2)}`)),
      el("td", { class: "named" }, token(source[i]), el("small", {}, ` ${source[i]} ${signed(dfa[i], 2)}`)),
      effect === null ? el("td", { class: "effect", "data-missing": "effect", title: `none: ${missing}` }, "–")
        : el("td", { class: "effect", "data-effect": effect[i] }, signedBar(effect[i], push), signed(effect[i], 2)),
      el("td", { class: "live" }, button({ class: "quiet", "data-ablate": own, title: "ablate it at this token", onclick: () => ablate(`f${own}@${query}`) }, "here"), " · ",
        button({ class: "quiet", "data-ablate-all": own, title: "ablate it at all tokens", onclick: () => ablate(`f${own}`) }, "all")));
  });
  const appeared = active[query].filter(({ activation: before, ablated }) => before === 0 && ablated > 0);
  return [el("div", { class: "wide-table" }, el("table", { class: "measures prompt-features", "data-features": query }, el("tr", {}, head("feature"), head("activation"), edited && head("now", "with the ablations"), head("top logit", "the token whose logit it raises most", "named"), head("top head", "head with the largest DFA here; hover for all"),
    head("top source", "token with the largest DFA, summed over heads", "named"), el("th", { scope: "col", title: "what its direct path adds to this logit above the mean over the vocabulary, the final norm's scale held" }, "direct effect on ", vocab.label(target)), el("th", { scope: "col", class: "live" }, "ablate")), rows)),
  latent.length === 0 && el("p", { class: "nothing" }, "No feature is active here."),
  run.active[query] > latent.length && el("p", { class: "hint" }, `the ${int(latent.length)} most active of ${int(run.active[query])}`),
  appeared.length > 0 && el("p", { class: "definition", "data-appeared": "" }, "on only with the ablations: ", appeared.slice(0, 12).map((one, i) => [i > 0 && ", ", el("a", { href: link(one.latent), "data-nav": one.latent }, String(one.latent)), ` ${num(one.ablated, 2)}`]))];
}

/** What comes next, as the model is and with the ablations. @param {import("./types").NextTokens} next */
export function drawNext(next, { run, vocab, target, aim }) {
  const { query, actual, token, probability, logit, rank, divergence } = next;
  const edited = run.ablated !== null;
  const { ablated_probability: p, ablated_logit: l, ablated_rank: r } = next;
  const most = Math.max(...probability, ...p, 1e-9);
  const head = (label, title) => el("th", { scope: "col", title }, label);
  const cell = (value, kind = "") => el("td", { class: `amount ${kind}`, vars: { "--r": unit(value / most) } }, pct(value));
  const rows = token.map((id, i) => el("tr", { "data-next": id, "data-actual": id === actual ? "" : null, "aria-current": id === target ? "true" : null },
    el("th", { scope: "row" }, button({ class: "quiet", "data-aim": id, title: "show the features' direct effect on this token", onclick: () => aim(id) }, vocab.label(id)), id === actual && el("small", { title: "the token that comes next in the prompt" }, " next")),
    cell(probability[i]), edited && cell(p[i], "now"), edited && el("td", { "data-logit-change": l[i] - logit[i] }, signed(l[i] - logit[i], 2)), el("td", {}, num(logit[i], 2), edited && el("small", {}, ` → ${num(l[i], 2)}`)),
    el("td", {}, int(rank[i]), edited && r[i] !== rank[i] && el("small", {}, ` → ${int(r[i])}`))));
  const loss = query < run.loss.length && [`Loss of `, vocab.label(actual), `, which comes next: ${num(run.loss[query])}`, edited && [` → ${num(run.ablated_loss[query])} `, el("b", {}, `(${signed(run.ablated_loss[query] - run.loss[query])} nats)`)], ". "];
  return [el("p", { class: "definition", "data-next-loss": "" }, loss || "The prompt ends here. ", edited && `KL from the model as it is: ${divergence > 0 && divergence < 1e-3 ? sci(divergence, 1) : num(divergence)} nats.`),
    el("div", { class: "wide-table" }, el("table", { class: "measures prompt-next", "data-next-of": query }, el("tr", {}, head("token"), head(edited ? "p, as it is" : "p"), edited && head("p, ablated"), edited && head("Δ logit"), head("logit"), head("rank")), rows))];
}

/** What is ablated, each with its own way out. @param {string[]} ablations names */
export function drawPins(ablations, { token, remove, clear, summary }) {
  const words = ({ latent, head, by, position }) => [latent === null ? `head ${head} → ${by}` : `feature ${latent} → 0`, position === null ? " at all tokens" : [" at ", token(position), el("small", {}, ` ${position}`)]];
  return [el("ul", { class: "prompt-pins", "aria-label": "ablations" }, ablations.map((name) => el("li", { class: "prompt-pin", "data-pin": name }, el("span", {}, words(ablationOf(name))), button({ class: "live", "data-remove": name, "aria-label": `remove ${name}`, title: "remove", onclick: () => remove(name) }, "×")))),
    ablations.length === 0 && el("span", { class: "hint" }, "nothing is ablated"), ablations.length > 1 && button({ class: "quiet live", "data-clear": "", onclick: clear }, "remove all"), summary];
}
