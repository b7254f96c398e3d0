// Where the numbers come from: a running `topkapi view`, or the files of `topkapi export`. Both have the same methods.

const SHARD = 256; // latents in a file of an export
const SHARDS = 4; // files kept, of some 25 MB each

export class Failure extends Error {}

/** Answers of a running server. */
class Live {
  constructor(about) {
    this.about = about;
    this.isStatic = false;
  }

  async refresh() {
    this.about = await get("api/about");
    return this.about;
  }

  columns = () => fetchColumns("api/columns");
  labels = async () => (await get("api/labels")).labels;
  latent = (i) => get(`api/latent/${i}`);
  votes = (i) => get(`api/latent/${i}/votes`);
  global = once(() => get("api/global"));
  runs = once(() => get("api/runs"));
  tokenise = (text) => send("POST", "api/tokenise", { text });

  /** {groups, n_matching}; `range` is [low, high] or null. */
  examples(i, { kind, n, seed, range }) {
    const asked = new URLSearchParams({ kind, n, seed: seed ?? 0 });
    if (range) {
      asked.set("low", range[0]);
      asked.set("high", range[1]);
    }
    return get(`api/latent/${i}/examples?${asked}`);
  }

  /** Arrives even if the page is closed meanwhile. */
  saveLabel = (i, label, note) => send("PUT", `api/labels/${i}`, { label, note }, { keepalive: true });
  importLabels = (labels) => send("POST", "api/labels", { labels });

  /** Work of the language model: calls `onProgress` with {done, total, what} and returns the result. */
  work = (what, asked, onProgress, signal) => stream(`api/${what}`, asked, onProgress, signal);
}

/** The files of an export. */
class Static {
  constructor(about) {
    this.about = about;
    this.isStatic = true;
    this.shards = new Map();
  }

  refresh = async () => this.about;
  columns = () => fetchColumns("api/columns.bin");
  labels = async () => (await get("api/labels.json")).labels;
  global = once(() => get("api/global.json"));
  runs = once(() => get("api/runs.json"));

  async latent(i) {
    const shard = Math.floor(i / SHARD);
    const asked = this.shards.get(shard) ?? get(`api/latents/${shard}.json`);
    this.shards.delete(shard);
    this.shards.set(shard, asked); // last: the first one is the one that was not asked for longest
    if (this.shards.size > SHARDS) this.shards.delete(this.shards.keys().next().value);
    const found = (await asked.catch((failure) => this.forget(shard, failure)))[i % SHARD];
    if (!found) throw new Failure(`There is no latent ${i} in this export.`);
    return found;
  }

  /** It may be there the next time. */
  forget(shard, failure) {
    this.shards.delete(shard);
    throw failure;
  }

  /** null where they were not exported. */
  votes = async (i) => (await this.latent(i)).votes ?? null;

  /** What was exported of the kind; of a range those that lie in it. */
  async examples(i, { kind, range }) {
    const { examples } = await this.latent(i);
    const exported = examples[kind];
    if (!range) return exported;
    const inside = ({ value }) => value >= range[0] && value < range[1];
    const groups = exported.groups.map((group) => ({ ...group, examples: group.examples.filter(inside) }));
    return { groups: groups.filter((group) => group.examples.length), n_matching: null };
  }
}

/** The backend of this page. A server says what it is at api/about, an export in the file api/about.json. */
export async function openBackend() {
  const isExport = document.documentElement.dataset.backend === "static";
  if (!isExport) {
    const answer = await request("api/about");
    if (answer.ok) return new Live(await answer.json());
  }
  const about = await get("api/about.json");
  return about.static ? new Static(about) : new Live(about);
}

function once(ask) {
  let asked;
  return () =>
    (asked ??= ask().catch((failure) => {
      asked = undefined;
      throw failure;
    }));
}

async function request(url, options) {
  try {
    return await fetch(url, options);
  } catch (failure) {
    if (failure.name === "AbortError") throw failure;
    throw new Failure("The server does not answer. Is `topkapi view` still running?");
  }
}

async function sentence(answer) {
  const said = await answer.json().catch(() => ({}));
  return said.error ?? `The server answered ${answer.status} ${answer.statusText}.`;
}

async function get(url) {
  const answer = await request(url);
  if (!answer.ok) throw new Failure(await sentence(answer));
  return answer.json();
}

async function send(method, url, body, { keepalive = false } = {}) {
  const headers = { "Content-Type": "application/json" };
  const answer = await request(url, { method, headers, body: JSON.stringify(body), keepalive });
  if (!answer.ok) throw new Failure(await sentence(answer));
  return answer.json();
}

async function stream(url, asked, onProgress, signal) {
  const headers = { "Content-Type": "application/json" };
  const answer = await request(url, { method: "POST", headers, body: JSON.stringify(asked), signal });
  if (!answer.ok) throw new Failure(await sentence(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    held += value ?? "";
    const lines = held.split("\n");
    held = done ? "" : lines.pop();
    for (const line of lines) {
      if (!line.trim()) continue;
      const said = JSON.parse(line);
      if (said.error) throw new Failure(said.error);
      if ("result" in said) return said.result;
      if (said.progress) onProgress(said.progress);
    }
    if (done) throw new Failure("The answer broke off before its end: the server may have been stopped.");
  }
}

const ARRAYS = { f4: Float32Array, u4: Uint32Array, u1: Uint8Array };

/** The columns of the index: {n_latents, n_tokens, tokens, and a typed array under the name of each column}. */
async function fetchColumns(url) {
  const answer = await request(url);
  if (!answer.ok) throw new Failure(await sentence(answer));
  return readColumns(await answer.arrayBuffer());
}

/** 8 bytes: length of the JSON header; the header; the arrays, each at its offset from the start of the file. */
function readColumns(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const found = { n_latents: header.n_latents, n_tokens: header.n_tokens, tokens: header.tokens };
  for (const { name, dtype, offset } of header.columns) {
    found[name] = new ARRAYS[dtype](buffer, offset, header.n_latents);
  }
  return found;
}
