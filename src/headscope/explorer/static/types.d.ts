/** The JSON that the page is given (see `CardSource` in server.py) and the state it keeps. For editors; never served. */

export interface About {
  format: number; title: string; site: string; created: string; version: string;
  model: { name: string; n_layers: number; n_heads: number; d_model: number; hash: string };
  sae: { name: string; architecture: string; kind: string; d_sae: number; d_in: number; hash: string };
  corpus: { name: string; n_tokens: number; n_blocks: number; block_size: number; n_documents: number; split: string };
  /** Names of the heads, "layer.head", by index. */
  heads: string[];
  n_alive: number; n_dead: number; l0: number;
  /** As printed, with intervals. */
  quality: { name: string; value: string; post: string; definition: string }[];
  /** Directions that mean nothing, by kind: their top heads' shares of DFA, sorted, and their 5 %, 50 % and 95 % quantiles. */
  nulls: { kind: string; top_head_share: number[]; range: [number, number, number] }[];
  definitions: Record<string, string>;
  /** The studies of one feature, in order, and the tabs that show each; none without an index behind the page. */
  studies: { name: string; group: string; question: string; needs_model: boolean; options: string[]; tabs: { name: string; label: string }[] }[];
  /** Whether a model answers prompts. */
  prompts: boolean;
  /** Whether there are pages of families and heads. */
  pages: boolean;
  /** How many features an export holds. */
  exported?: number;
}

export interface Table {
  /** Those not `listed` are for the dashboard's axes. */
  columns: { name: string; label: string; kind: "int" | "float" | "percent" | "token" | "text" | "head" | "bool"; definition: string; listed: boolean }[];
  /** Values by column, null where a dead latent has none; besides the columns, `logit_tokens` and `example_tokens`. */
  rows: Record<string, any[]>;
  /** How the list is sorted at first: a column, with a minus from the largest down. */
  sort: string;
}

/**
 * The examples of a card by column, integers all. One value an example: `block`, `dst`, `unit` (activations and DFA count
 * 10^unit), `act`, `pre` (null where it is the activation), `brief` (1: no attention, few sources), and how many follow in
 * the columns below: `n_src`, `n_on`. One value a source: `offset` (destination minus source), `other` (its DFA through heads
 * not listed), `n_dfa`, `n_att`. Then the lists `dfa_head`, `dfa`; `att_head`, `att` (percent); `on_offset`, `on`: where else
 * the feature is active near the example. `rest`, n_heads values an example: DFA from all that is not listed.
 */
export type Examples = Record<string, number[]> & { pre: number[] | null };

/** One place where a feature is active, unpacked. For each head, the sum over sources of `heads[h]` + `rest[h]` = `heads[h]`. */
export interface Example {
  block: number; dst: number; activation: number; pre: number; bias: number;
  /** The unit that DFA was rounded to. */
  size: number;
  sources: { pos: number; heads: number[]; dfa: number; other: number; attention: number[] }[];
  rest: number[]; heads: number[];
  /** The feature's activations by position, as far as known. */
  acts: Map<number, number>; brief: boolean;
}

export interface Group {
  kind: "top" | "random" | "quantile" | "interval" | "threshold"; index: number; label: string; lo: number; hi: number;
  n: number; share_active: number; share_mass: number;
  /** Indices into the card's examples, and how many identical contexts each hides. */
  examples: number[]; same: number[];
}

/** Text of the corpus: runs of token ids as [block, start, ids]; where documents start in a block, [position, number]. */
export interface Text { text: [number, number, number[]][]; document_at: Record<number, [number, number][]>; documents: Record<number, string> }

/** Source tokens over the active tokens above a threshold, by column; by head in thousandths. */
export interface Sources {
  threshold: number; n_active: number; kept: number; bos: number;
  token: number[]; n: number[]; share: number[]; linear: number[]; frequency: number[];
  kept_by_head: (number | null)[]; by_head: number[][]; attention: number[][]; elsewhere: number[][];
}

export interface Feature extends Text {
  latent: number; alive: boolean; bias: number;
  /** Largest |pre-activation - sum of DFA - bias| of the examples, before rounding. */
  residual: number | null;
  stats: {
    n_tokens: number; n_active: number; density: number; density_interval: [number, number]; density_upper95: number | null;
    mean: number; max: number; std: number; skew: number; kurtosis: number; quantiles: [number, number][];
  };
  /** Equal bins from 0 to the maximum. */
  histogram: { counts: number[]; mass: number[] } | null;
  /** Shares by head; those of DFA are null for a dead feature. */
  heads: {
    dfa: number[]; dfa_cov: number[]; dfa_mean: number[]; decoder: number[]; decoder_out: number[]; encoder: number[]; encoder_in: number[];
    disagreement: number; participation: number;
  };
  /** Families that studies put it in, by their names in an address. */
  families: string[];
  logits: { top: [number, number][]; bottom: [number, number][]; mean: number; std: number; skew: number; kurtosis: number };
  copying: { top: [number, number][]; rank: number | null };
  sources: Sources[];
  /** latent, correlation, decoder cosine */
  correlated: [number, number, number][];
  examples: Examples; groups: Group[];
}

/** A number with its interval and its null, or why there is none. */
export interface Measure {
  definition: string; n: number; value: number | null; low: number | null; high: number | null; interval: string | null;
  by_document: [number, number] | null; null: { value: number; low: number; high: number } | null; missing: string | null;
}

/** A place in the corpus: where the feature is active around it, [position in the block, activation], and where the proxy is true. */
export interface Context { block: number; dst: number; act: number; on: [number, number][]; proxy: number[] }

/** What a dive begins with. */
export interface Start {
  /** In the order in which they are offered; the first is taken when none is typed. */
  proxies: { proxy: string; why: string }[];
  /** By study: the row of this feature with definitions, or why it is refused. */
  columns: Record<string, { values: Record<string, any>; definitions: Record<string, string>; n: string; created: string; headscope: string } | { refused: string }>;
  /** Whether there is a model, which SAEs of earlier components, and the command that starts a server with them. */
  live: boolean; saes: string[]; command: string;
  advice: string; python: Record<string, string>;
}

/** Whether the top logit token is the top source token; null where no source is known. */
export interface LogitsStudy { prominence: number; copied: boolean | null; top_source: number | null; copy_rank: number | null; python: string }

/** What a proxy says of a feature; numbers `rows` are indices into `contexts`. */
export interface DiveStudy extends Text {
  latent: number; proxy: string; hash: string; identity: string; corpus: string; notes: string[]; maximum: number; tau: number;
  counts: { n_tokens: number; n_documents: number; n_active: number; n_proxy: number; n_both: number; base_rate: number };
  histogram: { edges: number[]; true: number[]; false: number[]; true_mass: number[]; false_mass: number[]; n: number; definition: string };
  expected: Record<"joint" | "class", { edges: number[]; true: number[]; false: number[]; n_true: number; n_false: number; normalisation: string; definition: string }>;
  by_threshold: { threshold: number[]; n: number[]; n_both: number[]; value: number[]; low: number[]; high: number[]; base_rate: number; definition: string };
  top: { k: number; n: number; n_both: number; value: number; low: number; high: number }[];
  ranges: { low: number; high: number; n: number; n_false: number; share: { value: number; low: number; high: number } | null; rows: number[] }[];
  measures: Record<string, Measure>;
  subtypes: { name: string; n: number; n_both: number; recall: Measure }[];
  curve: { threshold: number[]; n: number[]; n_both: number[]; precision: number[]; recall: number[]; false_positive_rate: number[]; base_rate: number; definition: string } | null;
  misses: { n: number; rows: number[] };
  contexts: Context[];
  python: Record<string, string>;
}

/** What removing a feature does to the loss, by path; numbers `rows` are indices into `contexts`. */
export interface Effects extends Text {
  latent: number; proxy: string; hash: string; corpus: string; definition: string; notes: string[]; maximum: number; n: number; n_active: number;
  /** The top logit token, and on how many tokens it comes next ("top") or the proxy is true ("proxy"). */
  token: number; n_of: Record<"top" | "proxy", number>;
  paths: { path: string; definition: string; mean: Measure; later: number | null; shares: Record<"top" | "proxy", { positive: Measure; net: Measure }> }[];
  interaction: number | null;
  histogram: { edges: number[]; counts: Record<string, number[]> };
  worst: Extremes; best: Extremes;
  /** `change`: [position, change of the loss of the token after it] around. */
  contexts: (Context & { change: [number, number][] })[];
  python: { ablation: string };
}

/** Tokens at which the loss changes most: the token that came next, its loss with the feature, the change by path. */
export interface Extremes { rows: number[]; next: number[]; loss: number[]; change: Record<string, number[]> }

/** What no study has found yet, and the command that does. */
export interface Missing { missing: string; command: string }

/** Every family: its members among the features that were judged, and their share with a Wilson interval. */
export interface Families { families: ({ name: string } & (Missing | { missing: null; n: number; members: number; share: [number, number, number] | null; definition: string }))[] }

/** One family. `rows` has one value a judged feature by column; `score` is what the rule holds against a threshold. */
export interface Family {
  name: string; missing: null; n: string; created: string; headscope: string; settings: Record<string, any>;
  rule: { label: string; definition: string; at: number; n: number; n_true: number; auc: Measure };
  /** Where the rule names a head: all heads, the one of `score`, and of how many members each brings most. */
  heads: string[] | null; head: string | null; by_head: number[] | null;
  tests: { name: string; definition: string }[];
  measures: Record<string, Measure>;
  columns: { name: string; label: string; kind: string; definition: string }[];
  /** `tests`: one value a test, null where it was not made. */
  rows: { latent: number[]; score: (number | null)[]; verdict: boolean[]; tests?: (boolean | null)[][] } & Record<string, any[]>;
}

/** Every head by layer; `made` is for heads of the SAE's layer: features of which it has the largest share. */
export interface Heads {
  layer: number; n_features: number; scores: (Missing | { missing: null }) & { roles: { name: string; definition: string }[] };
  superposition: Missing | { missing: null; measures: Record<string, Measure>; n: string; created: string };
  layers: { name: string; scores: Record<string, { value: number; p: number | null }> | null; roles: string[]; made: { dfa: number; decoder: number } | null }[][];
}

/** Features by column, with this head's shares. */
export interface HeadFeatures {
  latent: number[]; token: number[]; source: (number | null)[]; n_active: number[]; dfa: number[]; decoder: number[]; families: string[][];
}

/** One head; of one of another layer than the SAE's, scores only. */
export interface Head {
  name: string; layer: number; head: number; of_layer: number;
  scores: Missing | {
    missing: null; n: string; created: string; roles: string[]; rows: { role: string; value: number; low: number | null; high: number | null; even: number | null; null: number | null; null_high: number | null; p: number | null; definition: string }[];
    prefix: { attention: number[]; low: number[]; high: number[]; null: number[] };
  };
  features: { n: number; n_both: number; lists: Record<"dfa" | "decoder", HeadFeatures & { n: number; histogram: number[] }> } | null;
  shared?: { n: number; alone: number; least: number; others: { head: string; n: number; latents: number[] }[] };
  families?: { n: number; verdicts: Record<string, number>; kinds: Record<string, number> };
  catalogue?: Missing | { missing: null; n: string; created: string; by: Record<string, {
    n_features: number; n_families: number; measures: Record<string, Measure>; clusters: { family: string; n: number; share: number; latents: number[] }[]; top: number[]; top_in_one: number }> };
  ablation?: Missing | {
    missing: null; n: string; created: string; definitions: Record<string, string>; turned_off: { kind: string; rule: string; family: string; off: Measure }[];
    /** By kind of ablation: features of which least is left. */
    lost: Record<string, HeadFeatures & { n: number; histogram: number[]; retained: number[]; off: number[] }>;
    fires: Missing | { missing: null; kind: string; family: string; n_tokens: number; n_clean: number; n_lost: number; n_gained: number; readings: Record<string, HeadFeatures>; definitions: Record<string, string> };
  };
}

/** A part of the residual stream; `others` are all that are not told apart. */
export interface Part { name: string; kind: string; layer: number | null; head: number | null; latent: number | null }

/** One term of a pre-activation (circuit_json.py). `attended`: of a source, by which head from where. */
export interface CircuitNode {
  name: string; kind: "feature" | "constant" | "head" | "source" | "part"; position: number; value: number; part: Part | null; expands: boolean;
  attended: { layer: number; head: number; query: number; key: number } | null;
}

/** A node of recursive DFA and what it is the sum of: `children` and `rest` add up to `sum`, the node less `residual`. */
export interface Level { node: CircuitNode; children: CircuitNode[]; rest: { n: number; value: number }; sum: number; residual: number }

/** The scores of a head at a token, over the keys it sees; of one key, pairs of parts: rows are of the query, columns of the key. */
export interface Scores {
  layer: number; head: number; query: number; key: number; keys: number[]; scores: number[]; pattern: number[]; score: number; mean: number; residual: number;
  query_parts: Part[]; key_parts: Part[]; contrast: number[][]; attention: number[][];
  /** What earlier heads, as parts of the key, add to its score: the largest of the tokens they read, [position, what it adds]. */
  read: { part: string; value: number; sources: [number, number][] }[];
}

/** A prompt, BOS in front, as the model is and with ablations (`ablated...`, null without any); prompt_json.py. */
export interface PromptRun {
  tokens: number[];
  /** "f7", "f7@12", "h1.3=zero", "h1.3=mean@12" */
  ablations: string[];
  /** By token: features that are active as the model is; how many follow of each in the columns below, the largest first. */
  active: number[]; shown: number[]; latent: number[]; activation: number[]; ablated: number[] | null;
  /** Of token p + 1 at p. */
  loss: number[]; ablated_loss: number[] | null;
  python: string;
}

/** The active features of one token: DFA by head, the largest source, the direct effect on the logit of `target`. */
export interface TokenFeatures {
  query: number; latent: number[]; activation: number[]; by_head: number[][]; source: number[]; source_dfa: number[]; target: number; effect: number[] | null; effect_missing: string | null;
}

/** The likeliest next tokens, as the model is and with the ablations. */
export interface NextTokens {
  query: number; actual: number | null; token: number[]; probability: number[]; logit: number[]; rank: number[];
  ablated_probability: number[]; ablated_logit: number[]; ablated_rank: number[]; divergence: number;
}

/** What the tabs upstream begin with; `command` starts a server with a model. */
export interface SourceSets { corpus: string; sets: { name: string; tokens: number[] }[] }

/** DFA by head above thresholds; shares of the weights alone. */
export interface HeadShares {
  latent: number; corpus: string; python: string; weights: Record<"decoder" | "decoder_out" | "encoder" | "encoder_in", { definition: string; shares: number[] }>;
  thresholds: { threshold: number; n: number; heads: Record<"squared" | "covariance" | "linear", Measure>[] }[];
}

/** Shares of a set of source tokens above thresholds, and the attention paid to them; top: [token, heads summed, head by head, linear]. */
export interface SourceShares {
  latent: number; corpus: string; python: string; tokens: number[]; n_blocks: number;
  thresholds: {
    threshold: number; n: number; n_active: number; summed: Measure; separate: Measure; linear: Measure; bos: Measure; frequency: Measure; top: [number, number, number, number][];
    heads: { squared: Measure; linear: Measure; attention: Record<"active" | "visible" | "inactive" | "elsewhere", Measure> }[];
  }[];
}

/** Heads beside each other at one token; sources: [position, DFA, attention]. */
export interface HeadComparison {
  latent: number; at: number; python: string; tokens: number[]; activation: number; pre: number; bias: number; residual: number; agreement: (number | null)[][];
  heads: { head: number; contribution: number; share: number; sources: [number, number, number][] }[];
}

/** Two prompts between which something is patched. */
interface Prompts { latent: number; at: number; how: string; python: string; clean: number[]; corrupted: number[]; changed: number[]; query: number; on: Reading; off: Reading; definition: string }
interface Reading { pre: number; activation: number }
type PatchScore = Record<"pre_score" | "activation_score", number>;
type PatchScores = Record<"pre_score" | "activation_score", (number | null)[][]>;

/** Components (rows) patched at all positions (the first column) and at `columns`. */
export interface Patching extends Prompts {
  n: number; rows: { name: string; kind: string; layer: number; head: number | null }[]; columns: number[]; noising: PatchScores; denoising: PatchScores;
  roles: { role: string; loss: number; gain: number }[];
  joint: { first: string; second: string; kind: string; excess: [number, number]; on_without: boolean[]; on_with: boolean[] } | null;
}

/** Features of an earlier SAE patched; `few`: how many of the first have 90 % of the effect of all. */
export interface FeaturePatching extends Prompts {
  sae: string; site: string; n_latents: number; positions: number[]; few: number | null; bars: { name: "site" | "features" | "error"; noising: PatchScore; denoising: PatchScore }[];
  latents: { latent: number; change: number; noising: PatchScore; denoising: PatchScore; noising_together: PatchScore | null; denoising_together: PatchScore | null }[];
}

/** Where the page's JSON comes from. */
export interface Data {
  embedded: boolean; context: ((block: number) => Promise<any>) | null;
  about(): Promise<About>; table(): Promise<Table>; feature(latent: number): Promise<Feature>;
  /** "families", "family/token", "heads", "head/1.6"; exported folders hold each as a file. */
  page(path: string): Promise<any>;
  start(latent: number): Promise<Start>;
  /** A study by its name, with its options. */
  study(name: string, latent: number, asked?: Record<string, any>, signal?: AbortSignal): Promise<any>;
}

/** What the table is filtered and sorted by; all text, as in the link. */
export interface Listing {
  q: string; in: string;
  /** A column's name, "-" before it for descending. */
  sort: string;
  /** "1": list dead latents too. */
  dead: string;
  /** Percent. */
  share: string; dmin: string; dmax: string;
  /** A rectangle of two columns: "density,1e-4,1e-2,top_head_share,0.5,1". */
  box: string;
}

export interface View {
  page: "table" | "card" | "dashboard" | "label" | "families" | "family" | "heads" | "head" | "prompt";
  /** Of a family or a head. */
  name: string;
  /** A family page: threshold of the rule (empty: its own), its head, what rows are sorted by, which are shown, what is searched. */
  family: { t: string; head: string; sort: string; show: string; q: string };
  /** Pages of heads: what the grid shows, and by which kind of ablation. */
  grid: { score: string; by: string };
  latent: number | null;
  tab: string; w: "5" | "16" | "full"; log: string; mass: string;
  /** The marked example, as "top.3", and the position in its block whose numbers are pinned. */
  ex: string; dst: string;
  /** The head that sources are filtered to, by name or index. */
  head: string;
  /** "1": the map of heads by sources is open. */
  d: string;
  /** Which threshold of the source tokens. */
  t: string;
  /** The proxy of the deep-dive tabs (empty: the first suggested one), the threshold read off by number, "1": one normalisation a class. */
  p: string; at: string; norm: string;
  /** The tabs upstream: source tokens by id, the corruption and its draw ("shuffle.2"), which components, how they are read
   * ("denoising-post"), the open nodes of recursive DFA, and the source asked about ("layer.head.query.key"). */
  src: string; how: string; nodes: string; by: string; path: string; why: string;
  /** The dashboard's axes, and "1" where one is logarithmic. */
  x: string; y: string; lx: string; ly: string;
  /** The labelling queue: its sample, the feature (of the sample, or alone), the annotator, and "1" where blind. */
  s: string; n: string; who: string; blind: string;
  /** The prompt explorer: the prompt as text, packed, or a block of the corpus up to a position; the token and the feature,
   * the token whose logit is looked at, ablations, open nodes of recursive DFA, "1.3,12,4": why head 1.3 attends from 12 to 4. */
  prompt: string; packed: string; block: string; upto: string; token: string; feature: string; target: string; edits: string; tree: string; scores: string;
  pairs: string; paint: string;
  list: Listing;
}

/** What a token shows: text, marks for what cannot be seen ("↵"), chips for bytes that are no character; a `part` shows
 * nothing of its own, because its bytes finish a character that began on an earlier token. */
export interface Piece { id: number; kind: "text" | "special" | "part"; bits: { text?: string; mark?: string; byte?: string; raw?: string }[] }
