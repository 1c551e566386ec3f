/** The JSON that the page is given (see `CardSource` in server.py) and the state it keeps. For editors; never served. */

export interface About {
  format: 1; title: string; site: string; created: string; version: string;
  model: { name: string; n_layers: number; n_heads: number; d_model: number };
  sae: { name: string; architecture: string; d_sae: number; d_in: number; hash: string };
  corpus: { name: string; n_tokens: number; n_blocks: number; block_size: number; n_documents: number; split: string };
  n_alive: number; n_dead: number; l0: number;
  /** As printed, with intervals. */
  quality: { name: string; value: string; post: string; definition: string }[];
  definitions: Record<string, string>;
  /** How many features an exported file holds. */
  exported?: number;
}

export interface Table {
  columns: { name: string; label: string; kind: "int" | "float" | "percent" | "token" | "text" | "head" | "bool"; definition: string }[];
  /** Values by column, null where a dead latent has none; besides the columns, `logit_tokens` and `example_tokens`. */
  rows: Record<string, any[]>;
}

/** One place where a feature is active. For each head, the sum over sources of `heads[h]` + `rest[h]` = `heads[h]`. */
export interface Example {
  position: number; block: number; dst: number; document: string;
  activation: number; pre: number; bias: number; residual: number;
  /** Id of the token after the destination. */
  next: number | null;
  /** Sorted, disjoint runs of the block: where each starts, its token ids. */
  segments: [number, number[]][];
  /** The feature's activations at positions inside the segments. */
  acts: [number, number][];
  /** DFA by head. */
  heads: number[];
  /** The sources with the largest DFA, largest first, and all others together. */
  sources: { pos: number; heads: number[] }[]; rest: number[]; n_rest: number;
  /** How many identical contexts are hidden. */
  duplicates: number;
}

export interface Group {
  kind: "top" | "random" | "quantile" | "interval"; index: number; label: string; lo: number | null; hi: number | null;
  n: number; share_active: number | null; share_mass: number | null; examples: Example[];
}

export interface Feature {
  latent: number; alive: boolean; bias: number; groups: Group[];
  stats: { n_tokens: number; n_active: number; density: number; density_upper95: number; mean: number; max: number; std: number; quantiles: [number, number][] };
  histogram: { edges: number[]; counts: number[]; mass: number[] } | null;
  heads: { names: string[]; decoder: number[]; encoder: number[]; decoder_out: number[]; dfa: number[]; dfa_cov: number[] };
  logits: { top: [number, number][]; bottom: [number, number][]; mean: number; std: number };
  /** Source tokens that carry the DFA of the shown examples: id, share, in how many. */
  sources: [number, number, number][];
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
}

export interface View {
  /** The card, or null for the table. */
  latent: number | null;
  tab: string; w: "5" | "16" | "full"; log: string; mass: string;
  /** The marked example, as "top.3". */
  ex: string;
  /** The head that sources are filtered to. */
  head: string;
  list: Listing;
}

/** What a token shows: text, marks for what cannot be seen ("↵"), chips for bytes that are no character; a `part` shows
 * nothing of its own, because its bytes finish a character that began on an earlier token. */
export interface Piece { id: number; kind: "text" | "special" | "part"; bits: { text?: string; mark?: string; byte?: string }[] }
