/** The text of the corpus, as far as the page was given it: by block, in runs. */

export class Corpus {
  #runs = new Map();
  #starts = {};
  #documents = {};

  /** Take in what came with a card. */
  add({ text, document_at: starts, documents }) {
    for (const [block, start, ids] of text) this.put(block, start, ids);
    Object.assign(this.#starts, starts);
    Object.assign(this.#documents, documents);
  }

  put(block, start, ids) {
    const runs = this.#runs.get(block) ?? [];
    if (!runs.some(([at, own]) => at === start && own.length === ids.length)) runs.push([start, ids]);
    this.#runs.set(block, runs);
  }

  /** What is known of a block, in order: runs of [start, ids], with no two that touch. */
  runs(block) {
    const ids = [];
    for (const [start, own] of this.#runs.get(block) ?? []) own.forEach((id, i) => { ids[start + i] = id; });
    const runs = [];
    ids.forEach((id, pos) => {
      if (pos === 0 || !(pos - 1 in ids)) runs.push([pos, []]);
      runs.at(-1)[1].push(id);
    });
    return runs;
  }

  /** The name of the document that a position is from. */
  documentAt(block, pos) {
    const found = (this.#starts[block] ?? []).findLast(([start]) => start <= pos);
    return found ? this.#documents[found[1]] : "";
  }
}
