// What is shown beside the examples of a latent: votes, neighbours, positions.

import { histogram, numbersTable } from "./chart.js";
import { card, fill, h, segmented } from "./dom.js";
import { count, number, percent, signed } from "./format.js";
import { theIndex } from "./store.js";
import { tokenLabel } from "./tokens.js";
import { failureNote, modelNote } from "./work.js";
import { link } from "../router.js";

/** The tokens a latent votes for; {element, draw()}: `draw` asks again, as when the model is there. */
export function votesCard(backend, i) {
  const host = h("div", {}, h("p", { class: "small" }, "Reading …"));
  const draw = () => drawVotes(host, backend, i);
  draw();
  const element = card(
    "Votes",
    {
      info:
        "Which tokens its decoder row would make likelier or less likely if it went straight to the output, " +
        "passing over the layers between. z: in standard deviations over the vocabulary.",
    },
    host,
  );
  return { element, draw };
}

async function drawVotes(host, backend, i) {
  const blocked = !backend.isStatic && modelNote(backend);
  if (blocked) {
    fill(host, blocked);
    return;
  }
  try {
    const found = await backend.votes(i);
    if (!found) {
      fill(host, modelNote(backend));
      return;
    }
    const list = (title, entries) =>
      h(
        "div",
        {},
        h("h3", {}, title),
        h(
          "ol",
          { class: "rank" },
          entries.map((vote) =>
            h(
              "li",
              {},
              h("span", { class: "what" }, tokenLabel(vote.text)),
              h(
                "span",
                { class: "num", data: { tip: `logit ${signed(vote.logit)}, z ${signed(vote.z)}` } },
                h("b", {}, signed(vote.z, 2)),
                " z",
              ),
            ),
          ),
        ),
      );
    fill(
      host,
      h("div", { class: "two" }, list("For", found.up), list("Against", found.down)),
      found.caveat ? h("p", { class: "caveat" }, found.caveat) : null,
    );
  } catch (failure) {
    fill(host, failureNote(failure));
  }
}

/** Latents of similar rows, and those that fire on the same tokens. */
export function neighboursCard(backend, { nearest, coactive }) {
  const host = h("ol", { class: "rank" });
  const kinds = [
    ["decoder", "Decoder"],
    ["encoder", "Encoder"],
    ["coactive", "Firing together"],
  ];
  const rows = {
    decoder: () => nearest.decoder.map((one) => [one.latent, number(one.cosine), "cosine of the decoder rows"]),
    encoder: () => nearest.encoder.map((one) => [one.latent, number(one.cosine), "cosine of the encoder rows"]),
    coactive: () =>
      coactive?.map((one) => [
        one.latent,
        number(one.jaccard),
        `fire both on ${count(one.n_both)} tokens: ${percent(one.given_this)} of this one's, ` +
          `${percent(one.given_other)} of the other's; Jaccard ${number(one.jaccard)}`,
      ]),
  };
  const show = async (kind) => {
    const found = rows[kind]();
    if (!found) return fill(host, h("li", { class: "dim" }, "needs the complete code: this study keeps a sample"));
    if (!found.length) return fill(host, h("li", { class: "dim" }, "none"));
    fill(
      host,
      found.map(([other, value, tip]) =>
        h(
          "li",
          { data: { tip } },
          h(
            "span",
            { class: "what" },
            h("a", { href: link("latent", other) }, String(other)),
            h("span", { class: "label dim", data: { of: other } }),
          ),
          h("span", { class: "num" }, h("b", {}, value)),
        ),
      ),
    );
    const index = await theIndex(backend).catch(() => null);
    if (index) for (const place of host.querySelectorAll(".label")) nameIn(place, index);
    return undefined;
  };
  show("decoder");
  return card("Neighbours", { beside: segmented("Near in what", kinds, "decoder", show) }, host);
}

/** How often a latent fires at each place of a context; {element, draw()}: `draw` once it is on the page. */
export function positionsCard({ fired, encoded }) {
  const host = h("div", {});
  const groups = binned(fired, encoded);
  const element = card(
    "Where in a context",
    {
      info:
        "The share of tokens at each place of a context on which it fires. Places at which no token was " +
        "encoded are left out.",
    },
    host,
    numbersTable(
      ["position", "fired", "tokens"],
      groups.map(({ from, to, n, of }) => [to > from + 1 ? `${from} to ${to - 1}` : from, count(n), count(of)]),
    ),
  );
  const draw = () => {
    const shares = groups.map(({ n, of }) => (of ? n / of : NaN));
    const edges = [...groups.map(({ from }) => from), groups.at(-1).to];
    const top = Math.max(...shares.filter(Number.isFinite));
    return histogram(host, {
      edges,
      counts: shares.map((share) => share || 0),
      height: 130,
      what: "density",
      most: top,
      x: { title: "position" },
      label: "Density at each position of a context. The numbers are in the table below.",
      describe: (g) => `fires on ${count(groups[g].n)} of ${count(groups[g].of)} tokens`,
    });
  };
  return { element, draw };
}

function nameIn(place, index) {
  const i = Number(place.dataset.of);
  if (index.label(i)) place.textContent = index.label(i);
  else if (index.topToken(i) !== null) place.replaceChildren(tokenLabel(index.topToken(i)));
}

/** Positions in at most 64 groups of equal width. */
function binned(fired, encoded) {
  const width = Math.ceil(encoded.length / 64);
  const groups = [];
  for (let from = 0; from < encoded.length; from += width) {
    const to = Math.min(encoded.length, from + width);
    const sum = (counts) => counts.slice(from, to).reduce((a, b) => a + b, 0);
    groups.push({ from, to, n: sum(fired), of: sum(encoded) });
  }
  return groups;
}
