// Clamping latents while the model writes: what it writes with and without, on the same random numbers.

import { card, fill, h, field } from "./dom.js";
import { interval, number, percent } from "./format.js";
import { heatOf, tokenStrip } from "./tokens.js";
import { Work } from "./work.js";

const REACH = 4; // of the slider, in units of a latent's maximum
const DEFAULTS = { T: "1", seed: "0", n: "4", new: "24", pattern: "" };

/** The panel; {element, add(latent), setReady(yes), setState(state), close()}. Its state is in the hash. */
export function steeringPanel({ backend, state, prompt, remember, index }) {
  const limits = backend.about.limits ?? { samples: 32, new_tokens: 128, edits: 16 };
  let edits = readEdits(state.edits);
  const rows = h("div", { class: "edits" });
  const results = h("div", {});
  const work = new Work(results);
  const inputs = {
    T: h("input", { type: "number", min: 0, max: 5, step: 0.1 }),
    seed: h("input", { type: "number", min: 0, step: 1 }),
    n: h("input", { type: "number", min: 1, max: limits.samples, step: 1 }),
    new: h("input", { type: "number", min: 1, max: limits.new_tokens, step: 1 }),
    pattern: h("input", {
      type: "text",
      placeholder: "regular expression to count",
      spellcheck: false,
      autocomplete: "off",
    }),
  };
  const button = h("button", { type: "button", class: "main", on: { click: () => run() } }, "Write");
  let ready = false;
  const isWhole = ({ latent, value }) => latent !== "" && value !== "";
  const settle = () => (button.disabled = !ready || !edits.length || !edits.every(isWhole));
  const keep = () => {
    remember({
      edits: edits
        .map(({ latent, value, unit, where }) => [latent, value, unit === "maximum" ? "m" : "a", where].join(":"))
        .join(";"),
    });
    settle();
  };
  const draw = () => {
    const drawn = edits.map((edit) =>
      editRow(edit, backend.about.n_latents, index, keep, () => {
        edits = edits.filter((other) => other !== edit);
        draw();
        keep();
      }),
    );
    fill(
      rows,
      drawn.length
        ? drawn
        : h("p", { class: "small" }, "Add a latent to clamp while the model writes on from the prompt."),
    );
    settle();
  };
  const add = (latent = "") => {
    if (edits.length >= limits.edits) return;
    edits.push({ latent: String(latent), value: "2", unit: "maximum", where: "all" });
    draw();
    keep();
    element.scrollIntoView({ block: "nearest" });
    rows.lastElementChild.querySelector(latent === "" ? "input" : "input[type=range]").focus({ preventScroll: true });
  };
  const setState = (now) => {
    edits = readEdits(now.edits);
    for (const [name, input] of Object.entries(inputs)) input.value = now[name] ?? DEFAULTS[name];
    draw();
  };
  for (const [name, input] of Object.entries(inputs)) {
    input.addEventListener("change", () => remember({ [name]: input.value === DEFAULTS[name] ? "" : input.value }));
  }

  async function run() {
    const text = prompt();
    const asked = {
      text,
      edits: edits.map(({ latent, value, unit, where }) => ({
        latent: Number(latent),
        value: Number(value),
        unit,
        where,
      })),
      n_samples: Number(inputs.n.value),
      n_tokens: Number(inputs.new.value),
      temperature: Number(inputs.T.value),
      seed: Number(inputs.seed.value),
      pattern: inputs.pattern.value,
    };
    remember({ text });
    const found = await work.run("Writing", (progress, signal) => backend.work("steer", asked, progress, signal));
    if (found) fill(results, resultView(found, asked.pattern));
  }

  const element = card(
    "Clamp and write",
    {
      className: "steering",
      info:
        "The latents are set to these values while the model writes; the same random numbers are used with " +
        "and without. What the autoencoder does not explain stays as it is.",
      beside: h("button", { type: "button", on: { click: () => add() } }, "Add a latent"),
    },
    rows,
    h(
      "div",
      { class: "settings" },
      field("Temperature", inputs.T),
      field("Seed", inputs.seed),
      field("Samples", inputs.n),
      field("New tokens", inputs.new),
      field("Count a pattern", inputs.pattern),
      button,
    ),
    results,
  );
  setState(state);
  return {
    element,
    add,
    setState,
    close: () => work.cancel(),
    setReady: (yes) => {
      ready = yes;
      settle();
    },
  };
}

function readEdits(text) {
  return (text ?? "")
    .split(";")
    .filter(Boolean)
    .map((part) => {
      const [latent, value = "2", unit = "m", where = "all"] = part.split(":");
      return {
        latent,
        value,
        unit: unit === "a" ? "absolute" : "maximum",
        where: where === "active" ? "active" : "all",
      };
    });
}

function editRow(edit, nLatents, index, keep, remove) {
  const latent = h("input", { type: "number", min: 0, max: nLatents - 1, step: 1, value: edit.latent });
  const slider = h("input", { type: "range", min: -REACH, max: REACH, step: 0.05 });
  const value = h("input", { type: "number", step: "any", value: edit.value });
  const unit = h(
    "select",
    {},
    h("option", { value: "maximum" }, "× maximum"),
    h("option", { value: "absolute" }, "absolute"),
  );
  const where = h(
    "select",
    {},
    h("option", { value: "all" }, "at all tokens"),
    h("option", { value: "active" }, "where it is active"),
  );
  unit.value = edit.unit;
  where.value = edit.where;
  const maximum = () => index()?.maximum[Number(latent.value)] || 1;
  const perUnit = () => (unit.value === "maximum" ? 1 : maximum());
  const showSlider = () => {
    slider.value = Number(value.value) / perUnit();
    slider.setAttribute("aria-valuetext", `${number(Number(slider.value))} times its maximum`);
  };
  const changed = () => {
    Object.assign(edit, { latent: latent.value, value: value.value, unit: unit.value, where: where.value });
    keep();
  };
  slider.addEventListener("input", () => {
    value.value = String(Number((Number(slider.value) * perUnit()).toPrecision(4)));
    changed();
  });
  value.addEventListener("input", () => {
    showSlider();
    changed();
  });
  latent.addEventListener("input", () => {
    showSlider();
    changed();
  });
  unit.addEventListener("change", () => {
    const times = Number(slider.value);
    value.value = String(Number((times * perUnit()).toPrecision(4)));
    changed();
  });
  where.addEventListener("change", changed);
  showSlider();
  const sliderField = field("Value", slider);
  sliderField.classList.add("slider");
  return h(
    "div",
    { class: "edit" },
    field("Latent", latent),
    sliderField,
    field("Number", value),
    field("Unit", unit),
    field("Where", where),
    h(
      "button",
      { class: "icon", type: "button", "aria-label": `Remove latent ${edit.latent}`, on: { click: remove } },
      "✕",
    ),
  );
}

function resultView({ samples, counts, mean_kl: meanKl }, pattern) {
  const most = Math.max(1e-6, ...samples.flatMap((sample) => sample.kl.filter(Number.isFinite)));
  return h(
    "div",
    { class: "steered" },
    h(
      "div",
      { class: "counts small" },
      h("span", {}, h("b", {}, number(meanKl)), " nats of KL a token"),
      counts ? [countOf("without", counts.clean, pattern), countOf("clamped", counts.steered, pattern)] : null,
      h(
        "span",
        { class: "scale heat", "aria-label": `Colour: KL from 0 to ${number(most)} nats` },
        "KL 0",
        h("i"),
        number(most),
      ),
    ),
    h(
      "div",
      { class: "pairs" },
      h("h3", { class: "list-title" }, "Without"),
      h("h3", { class: "list-title" }, "Clamped, coloured by KL; faint as long as both are the same"),
      samples.flatMap((sample, s) => pair(sample, s, most)),
    ),
  );
}

function countOf(name, count, pattern) {
  return h(
    "span",
    { data: { tip: `Samples in which ${pattern} occurs` } },
    `${name}: `,
    h("b", {}, `${count.n} of ${count.of}`),
    ` ${interval([count.low, count.high], (share) => percent(share, 2))}`,
  );
}

function pair({ clean, steered, kl, first_difference: first }, s, most) {
  const strips = [
    tokenStrip({ tokens: clean, label: `Sample ${s + 1} without clamping`, paint: () => null }),
    tokenStrip({
      tokens: steered,
      label: `Sample ${s + 1} with clamping`,
      paint: (i) => heatOf(kl[i], most),
      tip: (i) => [
        `KL ${number(kl[i])} nats`,
        first !== null && i >= first ? "after the first difference" : "the same as without",
      ],
    }),
  ];
  for (const strip of strips) {
    strip.querySelectorAll(".token").forEach((token, i) => {
      if (first === null || i < first) token.classList.add("same");
      else if (i === first) token.classList.add("differs");
    });
  }
  return strips;
}
