/** The features that the table lists and `j`/`k` walk through: filtered, searched, sorted. */

const natural = new Intl.Collator("en", { numeric: true });

/** Sort rows in place by a key each; those without one come last. @param {number[]} order @param {any[]} keys by row */
export function sortRows(order, keys, kind, down) {
  const compare = ["text", "head", "token"].includes(kind) ? natural.compare : (a, b) => a - b;
  order.sort((a, b) => {
    const missing = (keys[a] === null) - (keys[b] === null);
    return missing || (keys[a] !== null && (down ? -1 : 1) * compare(keys[a], keys[b])) || a - b;
  });
}

export class FeatureList {
  #key = "";
  #found = null;
  #sortKeys = {};

  /** @param {import("./types").Table} table @param {import("./vocab.js").Vocab} vocab */
  constructor({ columns, rows, sort }, vocab) {
    Object.assign(this, { columns, rows, vocab, defaultSort: sort, size: rows.latent.length });
    this.rowOf = new Map(rows.latent.map((latent, row) => [latent, row]));
    this.heads = [...new Set(rows.top_head.filter(Boolean))].sort(natural.compare);
  }

  /**
   * The rows that a listing selects, in its order; kept until the listing changes.
   * @param {import("./types").Listing} list
   * @returns {{order: number[], hits: Object<string, number>, hidden: number}} rows, matches by kind, dead ones left out
   */
  find(list) {
    const key = JSON.stringify(list);
    if (key !== this.#key) [this.#key, this.#found] = [key, this.#search(list)];
    return this.#found;
  }

  #search(list) {
    const [keeps, matches] = [this.#filter(list), this.#matcher(list.q)];
    const [order, hits] = [[], {}];
    let hidden = 0;
    for (let row = 0; row < this.size; row++) {
      const by = keeps(row) ? matches(row) : [];
      if (by.length === 0) continue;
      if (!this.rows.alive[row] && !list.dead) {
        hidden += 1;
        continue;
      }
      order.push(row);
      for (const name of by) hits[name] = (hits[name] ?? 0) + 1;
    }
    this.#sort(order, this.sortOf(list));
    return { order, hits, hidden };
  }

  #filter(list) {
    const { density, top_head: head, top_head_share: share } = this.rows;
    const bound = (text, none) => (text.trim() === "" || Number.isNaN(Number(text)) ? none : Number(text) / 100);
    const [low, high, least] = [bound(list.dmin, 0), bound(list.dmax, Infinity), bound(list.share, 0)];
    const boxed = this.#box(list.box);
    return (row) => boxed(row) && (!list.in || head[row] === list.in) && (share[row] ?? 0) >= least && (density[row] ?? 0) >= low && (density[row] ?? 0) <= high;
  }

  /** A rectangle of two columns: "density,1e-4,1e-2,top_head_share,0.5,1". */
  #box(text) {
    const [x, x0, x1, y, y0, y1] = text.split(",");
    const within = (name, low, high) => (row) => this.rows[name][row] !== null && this.rows[name][row] >= Number(low) && this.rows[name][row] <= Number(high);
    if (!(x in this.rows && y in this.rows)) return () => true;
    const [across, up] = [within(x, x0, x1), within(y, y0, y1)];
    return (row) => across(row) && up(row);
  }

  /** By which of id, logits, source and examples a row matches a query. */
  #matcher(query) {
    const [, field, rest] = /^\s*(?:(id|logit|source|example):)?(.*)$/s.exec(query);
    if (!rest.trim()) return () => [""];
    const tokens = this.vocab.matching(rest);
    const { latent, logit_tokens: logits, top_source: source, example_tokens: examples } = this.rows;
    const tests = {
      id: (row) => String(latent[row]) === rest.trim(),
      logit: (row) => logits[row]?.some((id) => tokens[id]),
      source: (row) => tokens[source[row]],
      example: (row) => examples[row]?.some((id) => tokens[id]),
    };
    const names = field ? [field] : Object.keys(tests);
    return (row) => names.filter((name) => tests[name](row));
  }

  /** How a listing is sorted: as it says, or as the table is at first. @param {import("./types").Listing} list */
  sortOf(list) {
    return list.sort || this.defaultSort;
  }

  #sort(order, sort) {
    const column = this.columns.find(({ name }) => name === sort.replace("-", "")) ?? this.columns[0];
    sortRows(order, this.#keysOf(column), column.kind, sort.startsWith("-"));
  }

  #keysOf({ name, kind }) {
    const text = (id) => (id === null ? null : this.vocab.text(id).trim());
    this.#sortKeys[name] ??= kind === "token" ? this.rows[name].map(text) : this.rows[name];
    return this.#sortKeys[name];
  }
}
