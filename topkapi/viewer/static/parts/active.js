// The latents active on a prompt, each with a strip of cells, a cell a token: a matrix that can be read as a list.

import { fill, h, stateNote } from "./dom.js";
import { number } from "./format.js";
import { cellStrip } from "./cells.js";
import { link } from "../router.js";
import { heatOf, tokenLabel } from "./tokens.js";

const FIRST = 16; // latents shown before one asks for more
const MOST = 400;

/** `token`: number of the token whose latents are listed, null for all of them. */
export function activeList({ tokens, token, index, onPoint, steer }) {
  const rows =
    token === null ? ofPrompt(tokens, index) : tokens[token].active.map(([latent, value]) => ({ latent, value }));
  if (!rows.length) return noneActive(tokens);
  const list = h("div", { class: "latent-rows", role: "list", on: { pointerleave: () => onPoint(null) } });
  const draw = (n) => {
    const shown = rows.slice(0, n).map((row) => activeRow(row, { tokens, token, index, onPoint, steer }));
    const more =
      n === FIRST &&
      rows.length > n &&
      h(
        "button",
        { class: "quiet", type: "button", on: { click: () => draw(MOST) } },
        rows.length > MOST ? `The first ${MOST}` : `All ${rows.length}`,
      );
    fill(list, shown, more);
  };
  draw(FIRST);
  return list;
}

/** What is said where nothing is active: why, where training would use none of the tokens. */
export function noneActive(tokens) {
  const why = "Training leaves out the first position and special tokens, and the text has nothing else: write more.";
  return stateNote("quiet", "No latent is active here.", tokens.some(({ kept }) => kept) ? "" : why);
}

function ofPrompt(tokens, index) {
  const best = new Map();
  for (const { active, kept } of tokens)
    for (const [latent, value] of active) if (kept) best.set(latent, Math.max(best.get(latent) ?? 0, value));
  const share = ({ latent, value }) => value / (index?.maximum[latent] || 1);
  return [...best].map(([latent, value]) => ({ latent, value })).sort((a, b) => share(b) - share(a));
}

function activeRow({ latent, value }, { tokens, token, index, onPoint, steer }) {
  const most = Math.max(index?.maximum[latent] || 0, value);
  const values = tokens.map(({ active, kept }) => (kept ? (active.find(([other]) => other === latent)?.[1] ?? 0) : 0));
  const cells = cellStrip(
    values.map((one) => heatOf(one, most)),
    { here: token },
  );
  const share = index ? ` · ${Math.round((100 * value) / most)}\u202f% of its maximum` : "";
  return h(
    "div",
    {
      class: "latent-row",
      role: "listitem",
      on: { pointerenter: () => onPoint(latent), focusin: () => onPoint(latent) },
    },
    h("a", { href: link("latent", latent) }, String(latent)),
    nameOf(latent, index),
    h("span", { class: "num", data: { tip: `${number(value)}${share}` } }, number(value)),
    cells,
    h(
      "button",
      {
        class: "quiet at-hover",
        type: "button",
        "aria-label": `Steer with latent ${latent}`,
        on: { click: () => steer(latent) },
      },
      "Steer",
    ),
  );
}

/** What a latent is called: its label, or its top token. */
export function nameOf(latent, index) {
  const name = h("span", { class: "name" });
  if (index?.label(latent)) name.append(index.label(latent));
  else if (index && index.topToken(latent) !== null) name.append(tokenLabel(index.topToken(latent)));
  return name;
}
