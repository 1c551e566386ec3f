/** Where the page's JSON comes from: the server, or this file itself. Both answer the same questions; types.d.ts says what. */

const KEPT = 64; // answers kept in memory

/** JSON from the server that serves the page. */
class ServerData {
  embedded = false;
  #kept = new Map();

  about = () => this.#get("/api/about");
  vocab = () => this.#get("/api/vocab");
  table = () => this.#get("/api/table");
  feature = (latent) => this.#get(`/api/feature/${latent}`);
  context = (block) => this.#get(`/api/context/${block}`);

  #get(path) {
    const answer = this.#kept.get(path) ?? fetchJson(path);
    this.#kept.delete(path);
    this.#kept.set(path, answer);
    answer.catch(() => this.#kept.delete(path));
    if (this.#kept.size > KEPT) this.#kept.delete(this.#kept.keys().next().value);
    return answer;
  }
}

async function fetchJson(path) {
  const answer = await fetch(path).catch(() => {
    throw new Error("The server does not answer. Start it again and reload.");
  });
  const body = await answer.json().catch(() => ({ error: "The server failed; its terminal says why." }));
  if (!answer.ok) throw new Error(body.error);
  return body;
}

/** JSON packed into this file by the export. */
class EmbeddedData {
  embedded = true;
  #packs = new Map();

  about = async () => (await this.#unpack("data-core")).about;
  vocab = async () => (await this.#unpack("data-core")).vocab;
  table = async () => (await this.#unpack("data-core")).table;
  context = null;

  async feature(latent) {
    const { pack_of: packOf, about } = await this.#unpack("data-core");
    if (!(latent in packOf)) throw new Error(`This file holds ${about.exported} of ${about.sae.d_sae} features; ${latent} is not one of them.`);
    return (await this.#unpack(`data-pack-${packOf[latent]}`))[latent];
  }

  #unpack(id) {
    if (!this.#packs.has(id)) this.#packs.set(id, inflate(document.getElementById(id).textContent));
    return this.#packs.get(id);
  }
}

/** base64 -> gzip -> JSON */
function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

/** The data of this page. */
export function openData() {
  return document.getElementById("data-core") ? new EmbeddedData() : new ServerData();
}
