// What keys do and what can be asked of the index.

import { h } from "../parts/dom.js";

const KEYS = [
  ["/", "search the latents"],
  ["?", "this help"],
  ["j  k", "next, previous"],
  ["Enter", "open the selected row"],
  ["g  l", "latents"],
  ["g  p", "prompt"],
  ["g  o", "global"],
  ["g  r", "runs"],
  ["← →", "inside a text: the next token"],
  ["Esc", "leave a box"],
];
const QUERIES = [
  ["density<1e-4", "columns: density, importance, mean, maximum, kurtosis, modes, fired, latent; with < <= > >= = !="],
  ["modes>=2", "several modes of activation"],
  ["dead:no", "latents that fired; dead:yes, labelled:yes, labelled:no"],
  ['top:"Paris"', "the token on which it fires most strongly contains this"],
  ["label:foo", "its label contains this; note:foo"],
  ["Paris", "free text: top token, label or number"],
  ["-label:foo", "a minus turns a term round"],
];

export function showHelp() {
  const close = h("button", { type: "button", class: "quiet", on: { click: () => dialog.close() } }, "Close");
  const dialog = h(
    "dialog",
    { "aria-label": "Help", on: { close: () => dialog.remove() } },
    h("div", { class: "card-head" }, h("h2", {}, "Keys and queries"), h("div", { class: "beside" }, close)),
    h(
      "div",
      { class: "keys" },
      KEYS.flatMap(([keys, what]) => [
        h(
          "span",
          {},
          keys.split("  ").flatMap((key, i) => (i ? [" ", h("kbd", {}, key)] : [h("kbd", {}, key)])),
        ),
        h("span", {}, what),
      ]),
    ),
    h("h3", {}, "Queries of the index; terms side by side must all hold"),
    h(
      "dl",
      {},
      QUERIES.flatMap(([query, what]) => [h("dt", {}, h("code", {}, query)), h("dd", {}, what)]),
    ),
  );
  document.body.append(dialog);
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.showModal();
}
