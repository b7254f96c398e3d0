// The state of the page is in the hash: `#/latent/12?tab=top&low=1`. Every state is a link.

/** {page, id, query: Map-like object of strings} of a hash. */
export function parse(hash) {
  const [path, search = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [page = "", id = ""] = path.split("/");
  return { page: page || "latents", id: decode(id), query: Object.fromEntries(new URLSearchParams(search)) };
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** The hash of a page; what is empty in `query` is left out. */
export function link(page, id = "", query = {}) {
  const kept = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const search = new URLSearchParams(kept).toString();
  return `#/${page}${id === "" ? "" : `/${encodeURIComponent(id)}`}${search ? `?${search}` : ""}`;
}

/** Goes to a hash: a new entry of the history. */
export function go(hash) {
  if (location.hash === hash) dispatchEvent(new HashChangeEvent("hashchange"));
  else location.hash = hash;
}

/** Puts a new state into the address without an entry of the history, and without telling the page. */
export function note(hash) {
  history.replaceState(history.state, "", hash);
}
