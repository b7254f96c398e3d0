// What ablating a latent at one token does to the tokens after it.

import { fill, h } from "./dom.js";
import { number, percent, signed } from "./format.js";
import { changeOf, tokenLabel, tokenStrip, tokenText } from "./tokens.js";

const CONTEXT_BEFORE = 24; // tokens shown before the ablated one

/** The answer of api/ablation as an element: text coloured by change of loss, and what is known of one token. */
export function effectsView(found, latent) {
  const { tokens, at, positions } = found;
  const first = Math.max(0, at - CONTEXT_BEFORE);
  const end = Math.min(tokens.length, at + positions.length + 1);
  // positions[j] is of the prediction made at token at + j, whose loss is that of the token after it.
  const effectOn = (i) => positions[i - at - 1];
  const changes = positions.map((one) => one.loss_change).filter((change) => change !== null);
  const largest = Math.max(0, ...changes.map(Math.abs));
  const most = Math.max(1e-6, largest); // of the colours
  const detail = h("div", { class: "effect-detail" });
  const shown = tokens.slice(first, end);
  const strip = tokenStrip({
    tokens: shown,
    at: at - first,
    className: "pickable",
    label: `Effects of ablating latent ${latent} at the token “${tokenText(tokens[at])}”`,
    paint: (i) => changeOf(effectOn(i + first)?.loss_change, most),
    tip: (i) => tipLines(i + first, at, effectOn(i + first)),
    onPick: (i) => choose(i + first),
  });
  const choose = (i) => {
    if (!effectOn(i)) return;
    strip.pick(i - first);
    drawDetail(detail, tokens[i] ?? null, effectOn(i));
  };
  const worst = positions.reduce(
    (best, one, j) => (Math.abs(one.loss_change ?? 0) > Math.abs(positions[best].loss_change ?? 0) ? j : best),
    0,
  );
  const head = h(
    "div",
    { class: "effects-head" },
    h(
      "span",
      {},
      h("b", {}, `Without latent ${latent}`),
      changes.length ? " at the marked token, the loss of later tokens changes by up to " : " at the marked token: ",
      h("b", {}, changes.length ? `${number(largest)} nats` : "no token follows in its context"),
    ),
    scaleOf(most),
    found.sparsity !== null && found.sparsity !== undefined
      ? h(
          "span",
          {
            data: {
              tip:
                "The share of logits that it changes, so to speak: (L1 / L2)² of the changes, over their number, of " +
                "the next 16 tokens. 64 % where changes are Gaussian noise.",
            },
          },
          `spread over ${percent(found.sparsity)} of logits`,
        )
      : null,
  );
  const view = h("div", { class: "effects" }, head, strip, detail);
  choose(at + 1 + worst);
  return view;
}

function scaleOf(most) {
  return h(
    "span",
    {
      class: "scale change",
      "aria-label": `Colours: from ${number(-most)} (easier without it) to ${signed(most)} nats (harder without it)`,
    },
    number(-most),
    h("i"),
    signed(most),
  );
}

function tipLines(i, at, effect) {
  if (i === at) return ["the latent is set to 0 here"];
  if (!effect) return ["before the ablation: unchanged"];
  return [`loss ${signed(effect.loss_change)} nats`, `KL ${number(effect.kl)} nats`];
}

function drawDetail(detail, text, effect) {
  const votes = (title, entries) =>
    h(
      "div",
      {},
      h("div", { class: "list-title" }, title),
      h(
        "ol",
        { class: "rank" },
        entries
          .slice(0, 5)
          .map((vote) =>
            h(
              "li",
              {},
              h("span", { class: "what" }, tokenLabel(vote.text)),
              h("span", { class: "num" }, h("b", {}, signed(vote.logit)), signedPercent(vote.probability)),
            ),
          ),
      ),
    );
  fill(
    detail,
    h(
      "div",
      {},
      h("div", { class: "list-title" }, "Predicting"),
      h("p", {}, text === null ? "what follows the context" : tokenLabel(text)),
      h("p", {}, h("b", {}, signed(effect.loss_change)), h("span", { class: "dim" }, " nats of loss")),
      h("p", {}, h("b", {}, number(effect.kl)), h("span", { class: "dim" }, " nats of KL")),
    ),
    votes("Likelier without it (logit, probability)", effect.up),
    votes("Less likely without it", effect.down),
  );
}

/** A change of a probability, nothing where nobody would notice it. */
function signedPercent(share) {
  return Math.abs(share) < 1e-4 ? "" : ` ${share > 0 ? "+" : "−"}${percent(Math.abs(share), 2)}`;
}
