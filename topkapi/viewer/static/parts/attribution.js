// Which latents speak for some next tokens and against others: estimated for all, measured by ablation for the first.

import { card, fill, h } from "./dom.js";
import { Failure } from "../data.js";
import { interval, number, signed } from "./format.js";
import { link } from "../router.js";
import { nameOf, noneActive } from "./active.js";
import { cellStrip } from "./cells.js";
import { tokenLabel, tokenText } from "./tokens.js";
import { Work } from "./work.js";

const SHOWN = 20;
const VERIFIED = 10;

export function attributionPanel({ backend, state, prompt, tokens, remember, index, steer }) {
  const chosen = { positive: listOf(state.pos), negative: listOf(state.neg) };
  const results = h("div", {});
  const work = new Work(results);
  const button = h("button", { class: "main", type: "button", on: { click: () => run() } }, "Attribute");
  const fields = {};
  for (const [side, text, tip] of [
    ["positive", "Tokens for", "type a token, Enter"],
    ["negative", "Tokens against", "type a token, Enter"],
  ]) {
    fields[side] = tokenField(text, tip, chosen[side], backend, () => changed());
  }
  const changed = () => {
    remember({
      pos: chosen.positive.length ? JSON.stringify(chosen.positive) : "",
      neg: chosen.negative.length ? JSON.stringify(chosen.negative) : "",
    });
    button.disabled = !chosen.positive.length || !chosen.negative.length;
  };
  button.disabled = !chosen.positive.length || !chosen.negative.length;

  async function run() {
    const asked = {
      text: prompt(),
      positive: chosen.positive,
      negative: chosen.negative,
      top: SHOWN,
      verify: VERIFIED,
      steps: 0,
    };
    const found = await work.run("Attributing", (progress, signal) =>
      backend.work("attribution", asked, progress, signal),
    );
    if (found) fill(results, resultView(found, tokens, index(), steer));
  }

  const element = card(
    "Attribution",
    {
      className: "attribution",
      info:
        "The metric is the mean logit of the tokens for less that of the tokens against, after the prompt. " +
        "Attribution: by how much it would fall without a latent, to first order. Measured: by how much it " +
        "does fall when the latent is set to 0.",
    },
    h("div", { class: "attribute-form" }, fields.positive.element, fields.negative.element, button),
    results,
  );
  return { element, close: () => work.cancel(), add: (side, text) => fields[side].add(text.replaceAll("⏎", "\n")) };
}

function listOf(json) {
  try {
    const found = JSON.parse(json ?? "[]");
    return Array.isArray(found) ? found.filter((text) => typeof text === "string") : [];
  } catch {
    return [];
  }
}

/** A field of several tokens: what is typed must be one token each. */
function tokenField(title, placeholder, chosen, backend, onChange) {
  const said = h("span", { class: "hint finder-error", role: "alert" });
  const input = h("input", { type: "text", autocomplete: "off", spellcheck: false, placeholder });
  const box = h("div", { class: "token-field", on: { click: (event) => event.target === box && input.focus() } });
  const draw = () =>
    fill(
      box,
      chosen.map((text, at) =>
        h(
          "span",
          { class: "chip" },
          tokenLabel(text),
          h(
            "button",
            {
              type: "button",
              "aria-label": `Remove “${tokenText(text)}”`,
              on: {
                click: () => {
                  chosen.splice(at, 1);
                  draw();
                  onChange();
                },
              },
            },
            "✕",
          ),
        ),
      ),
      input,
    );
  const add = (text) => {
    if (!chosen.includes(text)) chosen.push(text);
    draw();
    onChange();
  };
  const typed = async () => {
    const text = input.value;
    if (!text) return;
    try {
      const { tokens } = await backend.tokenise(text);
      if (tokens.length !== 1)
        throw new Failure(
          `“${text}” is ${tokens.length} tokens: ${tokens.map((token) => tokenText(token.text)).join(" | ")}. ` +
            "Words inside a text begin with a space.",
        );
      said.textContent = "";
      input.value = "";
      add(text);
      input.focus();
    } catch (failure) {
      said.textContent = failure.message;
    }
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") typed();
    if (event.key === "Backspace" && !input.value && chosen.length) {
      chosen.pop();
      draw();
      onChange();
      input.focus();
    }
  });
  draw();
  input.id = `tokens-${title.replace(" ", "-").toLowerCase()}`;
  return { element: h("div", { class: "field" }, h("label", { for: input.id }, title), box, said), add };
}

function resultView({ metric, rows, rank_correlation: correlation }, tokens, index, steer) {
  if (!rows.length) return noneActive(tokens);
  const most = Math.max(1e-9, ...rows.flatMap((row) => [Math.abs(row.attribution), Math.abs(row.measured ?? 0)]));
  const mostAt = Math.max(1e-9, ...rows.flatMap((row) => row.by_position.map(Math.abs)));
  const agreement = correlation
    ? `Rank correlation of attribution and ablation: ${number(correlation.value)} ` +
      `${interval([correlation.low, correlation.high])}, ${correlation.n} latents.`
    : "Too few latents are measured for a rank correlation.";
  return h(
    "div",
    {},
    h("p", { class: "small summary" }, `Metric: ${signed(metric)} logits. ${agreement} Red speaks for, blue against.`),
    h(
      "div",
      { class: "table-scroll", tabIndex: 0, role: "region", "aria-label": "Attributed latents" },
      h(
        "table",
        {},
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("th", { scope: "col" }, "Latent"),
            h("th", { scope: "col", class: "left" }, "Label"),
            h("th", { scope: "col", class: "left" }, "Attribution"),
            h("th", { scope: "col", class: "left" }, "Measured"),
            h("th", { scope: "col", class: "left" }, "By position"),
            h("th", { scope: "col" }, h("span", { class: "unseen" }, "Steer")),
          ),
        ),
        h(
          "tbody",
          {},
          rows.map((row) =>
            h(
              "tr",
              {},
              h("td", {}, h("a", { href: link("latent", row.latent) }, String(row.latent))),
              h("td", { class: "left name" }, row.label?.label || nameOf(row.latent, index)),
              h("td", { class: "left" }, bar(row.attribution, most)),
              h(
                "td",
                { class: "left" },
                row.measured === null ? h("span", { class: "dim" }, "not measured") : bar(row.measured, most),
              ),
              h("td", { class: "left" }, strip(row, tokens, mostAt)),
              h(
                "td",
                {},
                h(
                  "button",
                  {
                    class: "quiet at-hover",
                    type: "button",
                    "aria-label": `Steer with latent ${row.latent}`,
                    on: { click: () => steer(row.latent) },
                  },
                  "Steer",
                ),
              ),
            ),
          ),
        ),
      ),
    ),
  );
}

function bar(value, most) {
  return h(
    "div",
    { class: "bar-number" },
    h(
      "div",
      { class: "diverging" },
      h("i", { class: value < 0 ? "below" : "", style: { "--share": (Math.abs(value) / most).toFixed(4) } }),
    ),
    h("span", { class: "num" }, signed(value)),
  );
}

function strip(row, tokens, most) {
  const paints = row.by_position.map((value) =>
    value ? { kind: value > 0 ? "rise" : "fall", share: (Math.abs(value) / most) ** 0.6 } : null,
  );
  return cellStrip(paints, {
    label: "Attribution by position",
    tip: (i) => [`${tokenText(tokens[i]?.text ?? "")}: ${signed(row.by_position[i])}`],
  });
}
