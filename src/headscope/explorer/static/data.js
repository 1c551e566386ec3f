/** Where the page's JSON comes from: the server, packs beside the page, or this file itself; types.d.ts says what it is. */

const KEPT = 64; // answers kept in memory
const TRIES = 5; // of a request that a busy server puts off

/** Remembers the last answers, but no failures. */
class Answers {
  #kept = new Map();

  get(key, ask) {
    const answer = this.#kept.get(key) ?? ask();
    this.#kept.delete(key);
    this.#kept.set(key, answer);
    answer.catch(() => this.#kept.delete(key));
    if (this.#kept.size > KEPT) this.#kept.delete(this.#kept.keys().next().value);
    return answer;
  }
}

/** JSON from the server that serves the page. */
class ServerData {
  embedded = false;
  #answers = new Answers();

  constructor(corpus) {
    this.corpus = corpus;
  }

  about = () => this.#get("/api/about");
  vocab = () => this.#get("/api/vocab");
  table = () => this.#get("/api/table");
  feature = async (latent) => this.#kept(await this.#get(`/api/feature/${latent}`));
  context = async (block) => this.#kept(await this.#get(`/api/context/${block}`));
  start = (latent) => this.#get(`/api/start/${latent}`);
  /** What a study says of a feature, with its options. */
  study = async (name, latent, asked = {}, signal) => this.#kept(await this.#get(`/api/study/${name}/${latent}?${new URLSearchParams(asked)}`, signal));

  /** What a page of families or heads shows: "families", "family/token", "head/1.6". */
  page = (path) => this.#get(`/api/${path}`);
  /** What the prompt explorer asks: `run`, `token`, `dfa`, `level`, `scores`. */
  prompt = (name, content) => this.#answers.get(`${name} ${JSON.stringify(content)}`, () => fetchJson(`/api/prompt/${name}`, posted(content)));

  #kept(answer) {
    if (answer.text) this.corpus.add(answer);
    return answer;
  }

  #get(path, signal) {
    return this.#answers.get(path, () => fetchJson(path, { signal }));
  }
}

/** A request with content, and the token that says which page it is from. */
export function posted(content) {
  const token = document.querySelector("meta[name=headscope-token]")?.content ?? "";
  return { method: "POST", headers: { "content-type": "application/json", "x-headscope-token": token }, body: JSON.stringify(content) };
}

/** `fetch`; a server that is busy is asked again, after the pause it wants. */
export async function fetchPatiently(path, options) {
  for (let left = TRIES; ; left--) {
    const answer = await fetch(path, options);
    const pause = answer.status === 503 && Number(answer.headers.get("retry-after"));
    if (!pause || left === 1) return answer;
    await new Promise((done) => { setTimeout(done, 1000 * pause * (1 + Math.random())); });
  }
}

async function fetchJson(path, options) {
  const answer = await fetchPatiently(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server does not answer. Start it again and reload.");
  });
  const body = await answer.json().catch(() => ({ error: "The server failed; its terminal says why." }));
  if (!answer.ok) throw Object.assign(new Error(body.error), body);
  return body;
}

/** What both kinds of export share: a core, and the cards in packs. */
class Exported {
  embedded = true;
  context = null;

  constructor(corpus) {
    this.corpus = corpus;
  }

  about = async () => (await this.core()).about;
  vocab = async () => (await this.core()).vocab;
  table = async () => (await this.core()).table;

  page = async (path) => {
    throw new Error(`This export does not hold /${path}: headscope serve shows it, and an exported folder holds it.`);
  };

  async feature(latent) {
    const { pack_of: packOf, about } = await this.core();
    if (!(latent in packOf)) throw new Error(`This export holds ${about.exported} of ${about.sae.d_sae} features; ${latent} is not one of them.`);
    return (await this.cards(packOf[latent]))[latent];
  }
}

/** JSON packed into this file. */
class FileData extends Exported {
  #answers = new Answers();

  core = () => this.#unpack("data-core");
  text = () => this.#answers.get("text", () => this.#readText());

  async cards(pack) {
    await this.text();
    return this.#unpack(`data-pack-${pack}`);
  }

  start = async (latent) => (await this.#unpack("data-studies"))[latent].start;

  async study(name, latent, asked = {}) {
    const { studies } = (await this.#unpack("data-studies"))[latent];
    const found = studies[`${name} ${JSON.stringify(asked)}`] ?? studies[`${name} {}`];
    if (!found) throw new Error("This file does not hold that: headscope serve --with-model computes it.");
    if (found.missing) throw new Error(found.missing);
    await this.text();
    if (found.text) this.corpus.add(found);
    return found;
  }

  async #readText() {
    const [{ runs, bytes, ...documents }, buffer] = await Promise.all([this.#unpack("data-text"), bufferOf("data-ids")]);
    const ids = bytes === 2 ? new Uint16Array(buffer) : new Uint32Array(buffer);
    for (let i = 0, at = 0; i < runs.length; at += runs[i + 2], i += 3) this.corpus.put(runs[i], runs[i + 1], ids.subarray(at, at + runs[i + 2]));
    this.corpus.add({ text: [], ...documents });
  }

  #unpack(id) {
    return this.#answers.get(id, async () => JSON.parse(new TextDecoder().decode(await bufferOf(id))));
  }
}

/** base64 -> gzip -> bytes */
function bufferOf(id) {
  const text = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return inflate(new Blob([bytes]).stream()).arrayBuffer();
}

function inflate(stream) {
  return new Response(stream.pipeThrough(new DecompressionStream("gzip")));
}

/** JSON in the folder that the page lies in, on any host of files. */
class FolderData extends Exported {
  #answers = new Answers();

  core = () => this.#answers.get("core", () => fetchPacked("core.json.gz"));
  page = (path) => this.#answers.get(path, () => fetchPacked(`pages/${path}.json.gz`));

  cards(number) {
    return this.#answers.get(number, async () => {
      const { cards, ...text } = await fetchPacked(`packs/${number}.json.gz`);
      this.corpus.add(text);
      return cards;
    });
  }
}

/** Some hosts unpack a .gz on the way, some do not. */
async function fetchPacked(path) {
  const answer = await fetch(path).catch(() => null);
  if (!answer?.ok) throw new Error(`${path} cannot be read. Serve the folder: python -m http.server, and open the address it prints.`);
  const body = await answer.blob();
  const [first, second] = new Uint8Array(await body.slice(0, 2).arrayBuffer());
  return (first === 0x1f && second === 0x8b ? inflate(body.stream()) : new Response(body)).json();
}

/** The data of this page. @param {import("./corpus.js").Corpus} corpus where its text goes */
export function openData(corpus) {
  if (document.getElementById("data-core")) return new FileData(corpus);
  return document.querySelector("meta[name=headscope-folder]") ? new FolderData(corpus) : new ServerData(corpus);
}
