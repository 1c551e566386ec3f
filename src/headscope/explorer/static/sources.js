/** What a feature reads: its source tokens with DFA and attention, what its top head copies, and which features go with it. */
import { el, more, unit } from "./dom.js";
import { int, num, pct, signed } from "./format.js";
import { facts } from "./heads.js";

const SHOWN_SOURCES = 6;

/** The source tokens; attention is that of one head. @param {import("./types").Sources} sources */
export function drawSources(sources, head, { names, vocab, tip, term }) {
  const { token, share, linear, by_head: byHead, kept_by_head: kept, attention, elsewhere, frequency, n } = sources;
  const ofHead = (i, h) => (kept[h] < 0.5 ? "–" : pct(byHead[i][h])); // most of that head's is at sources not kept
  const most = Math.max(...share, 1e-9);
  const detail = (i) => [el("div", { class: "tip-title" }, vocab.label(token[i])),
    facts([["of squared DFA", pct(share[i])], ["of DFA as it is", pct(linear[i])], ["kept sources", int(n[i])], ["of all tokens", pct(frequency[i])]]), el("table", { class: "by-head", "data-by-head": "" }, el("tr", {}, ["head", "DFA", "attention, kept", "elsewhere"].map((title) => el("th", {}, title))),
    [...names.keys()].sort((a, b) => byHead[i][b] - byHead[i][a]).slice(0, 12).map((h) => el("tr", {}, el("th", {}, names[h]),
      [ofHead(i, h), pct(attention[i][h]), pct(elsewhere[i][h])].map((value) => el("td", {}, value)))))];
  const rows = token.map((id, i) => el("tr", { class: i < SHOWN_SOURCES ? null : "more", "data-source": id, tabindex: 0, ...tip.on(() => detail(i)) },
    el("th", { scope: "row", vars: { "--r": unit(share[i] / most) } }, vocab.label(id)), el("td", {}, pct(share[i])),
    el("td", {}, el("b", {}, pct(attention[i][head])), ` / ${pct(elsewhere[i][head])}`), el("td", {}, pct(frequency[i]))));
  const table = el("table", { class: "sources", "data-sources": "" }, el("tr", {}, el("th", {}, "token"), el("th", {}, "DFA²"),
    el("th", {}, term(`att. ${names[head]} kept / else`, "attention")), el("th", {}, term("base", "base rate"))), rows);
  return [table, el("p", { class: "note" }, el("span", { "data-kept": "" }, term(`${pct(sources.kept)} kept`, "kept"), ` · BOS apart: ${pct(sources.bos)} · ${int(sources.n_active)} active`), more(table, "sources", SHOWN_SOURCES, token.length))];
}

/** What the top head would copy, and how the top logit token ranks in that. @param {import("./types").Feature["copying"]} copying */
export function drawCopying({ top, rank }, name, { vocab, term }) {
  return [term("Copying", "copying table", "h2"), ` ${name}: `, top.slice(0, 2).map(([id, value]) => [vocab.label(id), `\u00a0${signed(value, 2)} `]),
    rank !== null && term(`top logit at ${pct(rank)}`, "copy_rank")];
}

/** Links to the features that are active on the same tokens. @param {[number, number, number][]} correlated */
export function drawCorrelated(correlated, { link, term }) {
  return [term("Correlated", "correlated", "h2"), correlated.slice(0, 4).map(([latent, pearson, cosine]) => el("a", {
    href: link(latent), "data-nav": latent, "data-correlated": latent, title: `correlation ${num(pearson, 2)}, decoder cosine ${num(cosine, 2)}`,
  }, String(latent), el("small", {}, ` ${num(pearson, 2)}`)))];
}

/** Short names from the data: what the feature copies or reads. @param {import("./types").Feature} feature */
export function chipsOf({ logits, copying, sources, examples, groups }, vocab) {
  const [[topLogit]] = logits.top;
  const read = sources[0];
  const chips = [];
  if (copying.rank !== null && copying.rank <= 0.001 && read?.token[0] === topLogit) {
    chips.push([["copies ", vocab.label(topLogit)], `reads and writes the same token, and the top head would copy only ${pct(copying.rank)} of tokens more`]);
  } else if (read?.share[0] >= 0.5) chips.push([["reads ", vocab.label(read.token[0])], `${pct(read.share[0])} of squared DFA is from this token`]);
  const drawn = groups.find(({ kind }) => kind === "random")?.examples ?? [];
  const before = drawn.filter((i) => examples[i].sources[0]?.pos === examples[i].dst - 1).length;
  if (drawn.length > 3 && before >= 0.8 * drawn.length) chips.push([["previous token"], `the largest source is one token back in ${before} of ${drawn.length} random examples`]);
  return chips.map(([content, why]) => el("span", { class: "chip", "data-chip": "", title: why }, content));
}
