// The dictionary as a whole: distributions over latents, how training went, what was measured.

import { Chart, histogram, legend, numbersTable } from "../parts/chart.js";
import { card, fill, h, segmented, stateNote, term } from "../parts/dom.js";
import { count, interval, number, percent, powerOfTen, tick } from "../parts/format.js";
import { failureNote } from "../parts/work.js";
import { link, note, parse } from "../router.js";

export const title = () => "Global";

const SERIES = {
  __proto__: null, // names come from files: "constructor" has no text here
  normalized_mse: "normalized MSE",
  auxk: "AuxK loss",
  l1: "L1 penalty",
  l0: "L0",
  dead_fraction: "dead share",
  lr: "learning rate",
  tokens_per_second: "tokens per second",
};
const MEASURED = {
  __proto__: null,
  normalized_mse: ["Normalized MSE", "Error over that of predicting the mean: 0 is perfect, 1 is the mean."],
  l0: ["L0", "Latents above 0 a token."],
  dead_fraction: ["Dead latents", "Share of latents that never fired while evaluated.", percent],
  ce_clean: ["Cross-entropy, clean", "Nats a token of the language model."],
  ce_spliced: ["Cross-entropy, spliced", "With the reconstruction in the place of the activation."],
  ce_zero_ablation: ["Cross-entropy, zeros", "With zeros in its place."],
  ce_mean_ablation: ["Cross-entropy, mean", "With the mean activation in its place."],
  kl: ["KL", "KL(clean || spliced) of next-token distributions, nats."],
  loss_recovered: ["Loss recovered", "1 where splicing costs nothing, 0 where it costs as much as zeros.", percent],
  n_tokens: ["Tokens", "Tokens evaluated.", count],
};

export function open(main, route, backend) {
  const charts = [];
  const page = { closed: false, state: route.query };
  fill(main, h("p", { class: "state" }, "Counting …"));
  backend.global().then(
    (found) => {
      if (page.closed) return;
      draw(main, found, page, charts, backend);
    },
    (failure) => page.closed || fill(main, failureNote(failure)),
  );
  return {
    update: (next) => {
      page.state = next.query;
      page.showSeries?.();
    },
    close: () => {
      page.closed = true;
      charts.forEach((chart) => chart.close());
    },
  };
}

function draw(main, found, page, charts, backend) {
  const { about } = backend;
  const later = []; // charts need their width: drawn once they are on the page
  fill(
    main,
    h(
      "div",
      { class: "page-head" },
      h("h1", {}, "The dictionary"),
      h(
        "span",
        { class: "sub" },
        `${count(about.n_latents)} latents on ${count(about.study.n_tokens)} tokens of the ` +
          `${about.study.split.replaceAll("_", "-")} split`,
      ),
    ),
    figures(found),
    h(
      "div",
      { class: "grid" },
      distributionCard("Density", "density", found.density, later, "Share of tokens on which a latent fires."),
      distributionCard("Importance", "importance", found.importance, later, "Mean squared value over all tokens."),
      trainingCard(found.training, page, later),
      cumulativeCard(found.cumulative, later),
      evaluationCard(found.evaluation, found.evaluation_problem),
      h("div", { class: "stack" }, alignmentCard(found.alignment, later), denseCard(found.dense)),
    ),
  );
  for (const make of later) {
    const chart = make();
    if (chart) charts.push(chart);
  }
}

function figures({ density, dense, evaluation }) {
  const entries = [
    ["Normalized MSE", number(evaluation?.normalized_mse), "held-out"],
    ["Loss recovered", percent(evaluation?.loss_recovered), "of zero ablation"],
    ["L0", number(evaluation?.l0), "latents a token"],
    ["Never fired", count(density.n_dead), "in the study"],
    ["Dense mass", percent(dense.mass), `of the ${count(dense.d_model)} densest`],
  ];
  return h(
    "dl",
    { class: "figures" },
    entries.map(([name, value, sub]) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, value), h("dd", { class: "sub" }, sub)),
    ),
  );
}

function distributionCard(name, what, found, later, info) {
  const host = h("div", {});
  if (!found.counts.length) return card(name, {}, stateNote("quiet", "No latent fired.", "There is nothing to count."));
  const fits = found.fits;
  const said = h("div", { class: "small" });
  if (fits) {
    const { gaussian, laplace } = fits;
    const better =
      { gaussian: "A Gaussian fits better", laplace: "A Laplace distribution fits better" }[found.better] ??
      "Neither fits clearly better";
    const each = (fit) => `at ${powerOf(fit.location)}, scale ${number(fit.scale)} decades`;
    said.append(
      h(
        "p",
        {},
        h("b", {}, better),
        `: log-likelihood ratio ${number(found.log_likelihood_ratio)}`,
        found.log_likelihood_ratio_interval ? ` ${interval(found.log_likelihood_ratio_interval)}` : "",
        found.p === undefined ? "." : `, p ${found.p < 0.001 ? "< 0.001" : `= ${number(found.p, 2)}`}.`,
      ),
      h(
        "p",
        {},
        `Gaussian ${each(gaussian)}; Laplace ${each(laplace)}. `,
        found.n_dead === 1 ? "1 latent never fired and is" : `${count(found.n_dead)} latents never fired and are`,
        " left out.",
      ),
    );
  } else said.append(h("p", {}, `Nothing is fitted: ${found.why ?? "too few latents fired"}.`));
  later.push(() =>
    histogram(host, {
      edges: found.edges,
      counts: found.counts,
      height: 230,
      what: "latents",
      x: { log: true, title: `${what}` },
      label:
        `Histogram of ${what} over latents, logarithmic${fits ? ", with a Gaussian and a Laplace distribution fitted" : ""}. ` +
        "The numbers are in the table below.",
      colour: (_, paint) => paint.faint,
      curves: fits ? [fits.gaussian.curve, fits.laplace.curve] : [],
      over: (pen) => {
        if (!fits) return;
        pen.line(found.edges, fits.gaussian.curve, pen.paint.accent, { width: 2 });
        pen.line(found.edges, fits.laplace.curve, pen.paint.second, { width: 2, dash: [5, 4] });
      },
    }),
  );
  return card(
    `${name} of latents`,
    {
      info,
      beside:
        fits &&
        legend([
          ["accent", "Gaussian"],
          ["second", "Laplace", true],
        ]),
    },
    host,
    said,
    numbersTable(
      [what, "latents"],
      found.counts.map((n, i) => [`${powerOf(found.edges[i])} to ${powerOf(found.edges[i + 1])}`, count(n)]),
    ),
  );
}

const powerOf = (power) => number(10 ** power);

function cumulativeCard({ share_of_latents: latents, share_of_importance: importance }, later) {
  if (!latents.length) return card("Cumulative importance", {}, stateNote("quiet", "No latent fired.", ""));
  const host = h("div", {});
  const at = (share) => importance[latents.findIndex((of) => of >= share)];
  const logs = latents.map((share) => Math.log10(share));
  later.push(
    () =>
      new Chart(host, {
        height: 230,
        label:
          `Share of all importance that the most important latents have together: ${percent(at(0.01))} for ` +
          `the first 1 %, ${percent(at(0.1))} for the first 10 %.`,
        x: { range: [logs[1], 0], log: true, title: "share of latents, most important first", format: shareOf },
        y: { range: [0, 1.02], title: "share of importance", format: (share) => percent(share, 2) },
        draw: (pen) => pen.line(logs, importance, pen.paint.accent, { width: 2 }),
        hover: (left, top, pen) => {
          const x = pen.u.posToVal(left, "x");
          const i = logs.findIndex((log) => log >= x);
          return i < 0
            ? null
            : {
                x: logs[i],
                y: importance[i],
                lines: [`the first ${percent(latents[i])} of latents`, `${percent(importance[i])} of importance`],
              };
        },
      }),
  );
  const rows = [0.001, 0.01, 0.1, 0.5]
    .filter((share) => share >= latents[1])
    .map((share) => [percent(share), percent(at(share))]);
  return card("Cumulative importance", {}, host, numbersTable(["latents", "importance"], rows));
}

const shareOf = (power) => (power >= -2.001 ? percent(10 ** power, 1) : powerOfTen(power));

function alignmentCard(all, later) {
  const { edges, counts } = occupied(all);
  const host = h("div", {});
  const middle = median(edges, counts);
  later.push(() =>
    histogram(host, {
      edges,
      counts,
      height: 170,
      what: "latents",
      x: { title: "cosine of encoder and decoder row" },
      label:
        `Histogram of the alignment of encoder and decoder, median about ${number(middle)}. The numbers ` +
        "are in the table below.",
    }),
  );
  return card(
    "Alignment",
    { info: "The cosine of a latent's encoder row and its decoder row." },
    host,
    numbersTable(
      ["cosine", "latents"],
      counts.map((n, i) => [`${number(edges[i])} to ${number(edges[i + 1])}`, count(n)]).filter((_, i) => counts[i]),
    ),
  );
}

/** The bins in use, and two more on each side. */
function occupied({ edges, counts }) {
  const first = Math.max(0, counts.findIndex((n) => n > 0) - 2);
  const end = Math.min(counts.length, counts.findLastIndex((n) => n > 0) + 3);
  return { edges: edges.slice(first, end + 1), counts: counts.slice(first, end) };
}

function median(edges, counts) {
  const half = counts.reduce((a, b) => a + b, 0) / 2;
  let sum = 0;
  const i = counts.findIndex((n) => (sum += n) >= half);
  return (edges[i] + edges[i + 1]) / 2;
}

function denseCard(dense) {
  const rows = [
    [
      "Dense measure",
      number(dense.measure),
      `Mean density of the ${count(dense.d_model)} densest latents over L0. It lies in ${interval(dense.bounds)}.`,
    ],
    [
      "Dense mass",
      percent(dense.mass),
      `Share of all firings that these carry. It lies in ${interval(dense.bounds.map((bound) => dense.d_model * bound))}.`,
    ],
    ...Object.entries(dense.n_dense ?? {}).map(([bound, n]) => [
      `Denser than ${bound}`,
      count(n),
      "Latents that fire on more than this share of tokens.",
    ]),
  ];
  return card("Dense latents", {}, rowsTable(rows));
}

function rowsTable(rows) {
  return h(
    "table",
    {},
    h(
      "tbody",
      {},
      rows.map(([name, value, tip]) => h("tr", {}, h("td", {}, tip ? term(name, tip) : name), h("td", {}, value))),
    ),
  );
}

function evaluationCard(evaluation, problem) {
  if (problem) return card("Evaluation", {}, stateNote("failed", "What was measured cannot be read.", problem));
  if (!evaluation)
    return card(
      "Evaluation",
      {},
      stateNote("quiet", "Not evaluated yet.", null, h("p", {}, h("code", {}, "topkapi eval RUN"))),
    );
  const { intervals, ...metrics } = evaluation;
  const intervalOf = (name, write) => (Object.hasOwn(intervals, name) ? interval(intervals[name], write) : "");
  const rows = Object.entries(metrics).flatMap(([name, value]) => {
    const [text, tip, write = number] = MEASURED[name] ?? [name.replaceAll("_", " "), null];
    return typeof value === "number" ? [[text, `${write(value)} ${intervalOf(name, write)}`, tip]] : [];
  });
  return card("Evaluation", {}, rowsTable(rows));
}

function trainingCard(training, page, later) {
  const { tokens, series } = training;
  const names = Object.keys(series).filter((name) => series[name].some((value) => value !== null));
  if (!tokens.length || !names.length)
    return card("Training", {}, stateNote("quiet", "No training curves.", "metrics.jsonl is missing or empty."));
  const host = h("div", {});
  const select = h(
    "select",
    { "aria-label": "Which series" },
    names.map((name) => h("option", { value: name }, SERIES[name] ?? name.replaceAll("_", " "))),
  );
  const scale = segmented(
    "Scale",
    [
      ["log", "Log"],
      ["linear", "Linear"],
    ],
    "log",
    (y) => change({ y: y === "log" ? "" : y }),
  );
  let chart = null;
  const change = (state) => {
    const hash = link("global", "", { ...page.state, ...state });
    note(hash);
    page.state = parse(hash).query;
    page.showSeries();
  };
  select.addEventListener("change", () => change({ series: select.value === names[0] ? "" : select.value }));
  const show = () => {
    const name = names.includes(page.state.series) ? page.state.series : names[0];
    const positive = series[name].every((value) => value === null || value > 0);
    select.value = name;
    const log = positive && page.state.y !== "linear";
    scale.show(log ? "log" : "linear");
    for (const button of scale.children) button.disabled = !positive && button.value === "log";
    chart?.close();
    host.replaceChildren();
    chart = seriesChart(host, tokens, series[name], SERIES[name] ?? name, log);
  };
  page.showSeries = show;
  later.push(() => {
    show();
    return { close: () => chart.close() };
  });
  const lastOf = (name) => series[name].findLast((value) => value !== null);
  return card(
    "Training",
    { beside: h("div", { class: "beside" }, select, scale) },
    host,
    numbersTable(
      ["series", `after ${count(tokens.at(-1))} tokens`],
      names.map((name) => [SERIES[name] ?? name, number(lastOf(name))]),
    ),
  );
}

function seriesChart(host, tokens, values, name, log) {
  const ys = values.map((value) => (value === null ? NaN : log ? Math.log10(value) : value));
  const known = ys.filter(Number.isFinite);
  let [low, high] = [Math.min(...known), Math.max(...known)];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const room = 0.06 * (high - low);
  return new Chart(host, {
    height: 230,
    label: `${name} while training, over ${count(tokens.at(-1))} tokens; last ${number(values.at(-1))}.`,
    x: { range: [0, tokens.at(-1)], title: "tokens", format: millions },
    y: { range: [low - room, high + room], log, title: name },
    draw: (pen) => pen.line(tokens, ys, pen.paint.accent, { width: 1.75 }),
    hover: (left, top, pen) => {
      const x = pen.u.posToVal(left, "x");
      const i = tokens.findIndex((at) => at >= x);
      return i < 0 || !Number.isFinite(ys[i])
        ? null
        : { x: tokens[i], y: ys[i], lines: [`${number(values[i])}`, `after ${count(tokens[i])} tokens`] };
    },
  });
}

const millions = (tokens) =>
  tokens >= 1e9
    ? `${tick(tokens / 1e9)}B`
    : tokens >= 1e6
      ? `${tick(tokens / 1e6)}M`
      : tokens >= 1e3
        ? `${Math.round(tokens / 1e3)}k`
        : String(tokens);
