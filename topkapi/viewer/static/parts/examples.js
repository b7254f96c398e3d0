// Examples of a latent: text around firings, heat by value, and what ablation does, when asked for.

import { announce, fill, h } from "./dom.js";
import { effectsView } from "./effects.js";
import { count, number } from "./format.js";
import { heatOf, tokenStrip, tokenText } from "./tokens.js";
import { Work } from "./work.js";

/** Groups of examples. `about`: {latent, maximum, canAblate, backend}. */
export function exampleGroups(groups, about) {
  const several = groups.length > 1;
  return groups
    .flatMap((group) => [
      several ? h("h3", { class: "group-title" }, group.title) : null,
      ...group.examples.map((example) => exampleRow(example, about)),
    ])
    .filter(Boolean);
}

function exampleRow(example, about) {
  const more = h("div", { class: "more", hidden: true });
  const button = h(
    "button",
    {
      class: "quiet",
      type: "button",
      "aria-expanded": "false",
      disabled: !about.canAblate,
      data: { tip: about.canAblate ? "Set the latent to 0 here and measure what changes" : about.whyNot },
      on: { click: () => toggle() },
    },
    "Ablate",
  );
  const work = about.canAblate ? new Work(more) : null;
  const toggle = async () => {
    const opening = more.hidden;
    more.hidden = !opening;
    button.setAttribute("aria-expanded", String(opening));
    if (!opening) return work.cancel();
    if (more.dataset.done) return undefined;
    const found = await work.run("Ablating", (progress, signal) =>
      about.backend.work("ablation", { latent: about.latent, row: example.row }, progress, signal),
    );
    if (!found) return undefined;
    more.dataset.done = "yes";
    fill(more, effectsView(found, about.latent));
    announce("Effects of the ablation are shown");
    return undefined;
  };
  return h(
    "article",
    { class: "example" },
    h(
      "div",
      { class: "value" },
      number(example.value),
      h(
        "span",
        { class: "where", title: `document ${example.document}, token ${example.position} of its context` },
        `doc ${count(example.document)}`,
      ),
      h("span", { class: "where" }, `token ${count(example.position)}`),
    ),
    exampleStrip(example, about),
    button,
    more,
  );
}

function exampleStrip({ tokens, values, at, value }, { maximum }) {
  return tokenStrip({
    tokens,
    at,
    label: `Text around a firing of ${number(value)} on “${tokenText(tokens[at])}”`,
    gap: (i) => values[i] === null,
    paint: (i) => heatOf(values[i], maximum),
    tip: (i) => [
      values[i] === null
        ? "not known: no activation was kept of this token"
        : values[i] > 0
          ? `${number(values[i])} · ${Math.round((100 * values[i]) / maximum)}\u202f% of its maximum`
          : "does not fire",
    ],
  });
}
