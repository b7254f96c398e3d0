// The runs beside this one: a table, error against sparsity, and error against size with the fitted law.

import { Chart, legend } from "../parts/chart.js";
import { card, fill, h, stateNote } from "../parts/dom.js";
import { count, interval, number, percent } from "../parts/format.js";
import { failureNote } from "../parts/work.js";
import { link, note, parse } from "../router.js";

export const title = () => "Runs";

const COLUMNS = [
  ["path_name", "Run", (run) => run.path_name, "left"],
  ["n_latents", "Latents", (run) => count(run.n_latents)],
  ["k", "k", (run) => count(run.k)],
  ["activation", "Activation", (run) => run.activation ?? "–", "left"],
  ["tokens", "Tokens", (run) => count(run.tokens)],
  ["lr", "Learning rate", (run) => number(run.lr)],
  ["seed", "Seed", (run) => run.seed ?? "–"],
  ["normalized_mse", "Normalized MSE", (run) => number(run.normalized_mse)],
  ["l0", "L0", (run) => number(run.l0)],
  ["dead_fraction", "Dead", (run) => percent(run.dead_fraction)],
  ["loss_recovered", "Loss recovered", (run) => percent(run.loss_recovered)],
  ["ce_spliced", "Cross-entropy", (run) => number(run.ce_spliced)],
  ["has_study", "Study", (run) => (run.has_study ? "yes" : "no")],
];
const PALETTE = ["accent", "second", "fall", "rise", "heat", "soft"];

export function open(main, route, backend) {
  const page = { closed: false, charts: [], state: route.query };
  fill(main, h("p", { class: "state" }, "Looking for runs …"));
  backend.runs().then(
    (found) => page.closed || draw(main, found, page),
    (failure) => page.closed || fill(main, failureNote(failure)),
  );
  return {
    update: (next) => {
      page.state = next.query;
      page.drawRows?.();
    },
    close: () => {
      page.closed = true;
      page.charts.forEach((chart) => chart.close());
    },
  };
}

function draw(main, found, page) {
  const measured = found.runs.filter((run) => run.normalized_mse > 0 && run.l0 > 0 && run.n_latents > 0);
  const hosts = [h("div", {}), h("div", {})];
  const ks = [...new Set(measured.map((run) => run.k))].sort((a, b) => a - b);
  const colourOf = (k) => PALETTE[ks.indexOf(k) % PALETTE.length];
  fill(
    main,
    h(
      "div",
      { class: "page-head" },
      h("h1", {}, "Runs"),
      h(
        "span",
        { class: "sub" },
        found.runs.length === 1
          ? "no other run is beside this one"
          : `${count(found.runs.length)} in the folder of this one`,
        found.n_left_out ? `; left out: ${count(found.n_left_out)} that changed longer ago` : "",
      ),
    ),
    h(
      "div",
      { class: "stack" },
      problemsNote(found.problems),
      table(found, page),
      measured.length
        ? h(
            "div",
            { class: "grid" },
            card("Error and sparsity", { info: "Normalized MSE against the measured L0." }, hosts[0]),
            card(
              "Error and size",
              { beside: legend(ks.slice(0, 6).map((k) => [colourOf(k), k === null ? "no k" : `k = ${k}`])) },
              hosts[1],
              lawNote(found.fit),
            ),
          )
        : stateNote("quiet", "No run here is evaluated.", null, h("p", {}, h("code", {}, "topkapi eval RUN"))),
    ),
  );
  if (!measured.length) return;
  page.charts.push(scatter(hosts[0], measured, found.here, "l0", "L0", () => "accent"));
  page.charts.push(
    scatter(
      hosts[1],
      measured,
      found.here,
      "n_latents",
      "latents",
      (run) => colourOf(run.k),
      lawLines(found.fit, ks, measured, colourOf),
    ),
  );
}

function problemsNote(problems) {
  if (!problems.length) return null;
  const each = problems.map(({ path_name: name, why }) => h("p", {}, h("b", {}, name), `: ${why}`));
  return stateNote("failed", "Some files here are damaged; their numbers are missing below.", null, each);
}

function table(found, page) {
  const body = h("tbody", {});
  const heads = COLUMNS.map(([name, text, , align]) =>
    h(
      "th",
      { scope: "col", class: align ?? "" },
      h("button", { type: "button", on: { click: () => sortBy(name) } }, text),
    ),
  );
  const sortBy = (name) => {
    const now = page.state.sort ?? "path_name";
    page.state = { ...page.state, sort: now === name ? `-${name}` : name };
    note(link("runs", "", page.state));
    page.state = parse(location.hash).query;
    page.drawRows();
  };
  page.drawRows = () => {
    const sort = page.state.sort ?? "path_name";
    const [name, sign] = [sort.replace("-", ""), sort.startsWith("-") ? -1 : 1];
    heads.forEach((head, at) =>
      head.setAttribute("aria-sort", COLUMNS[at][0] === name ? (sign > 0 ? "ascending" : "descending") : "none"),
    );
    const rows = [...found.runs].sort((a, b) => compare(a[name], b[name], sign));
    fill(
      body,
      rows.map((run) =>
        h(
          "tr",
          { class: run.path_name === found.here ? "here" : "" },
          COLUMNS.map(([, , write, align]) => h("td", { class: align ?? "" }, String(write(run)))),
        ),
      ),
    );
  };
  page.drawRows();
  return h(
    "section",
    { class: "card", "aria-label": "Table of runs" },
    h(
      "div",
      { class: "table-scroll", tabIndex: 0, role: "region", "aria-label": "Table of runs, scrolls sideways" },
      h("table", { class: "runs" }, h("thead", {}, h("tr", {}, heads)), body),
    ),
    h("p", { class: "caveat" }, "Another run is opened with ", h("code", {}, "topkapi view RUN"), "."),
  );
}

/** Gaps come last either way. */
function compare(a, b, sign) {
  const gap = (value) => value === null || value === undefined;
  if (gap(a) || gap(b)) return gap(a) - gap(b);
  return sign * (typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
}

function scatter(host, runs, here, name, text, colour, lines = []) {
  const points = runs.map((run) => ({ run, x: Math.log10(run[name]), y: Math.log10(run.normalized_mse) }));
  const reach = (values) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const room = Math.max(0.15, 0.12 * (high - low));
    return [low - room, high + room];
  };
  return new Chart(host, {
    height: 280,
    label:
      `Normalized MSE of ${runs.length} runs against ${text}, both logarithmic. The numbers are in the ` +
      "table above.",
    x: { range: reach(points.map((point) => point.x)), log: true, title: text },
    y: {
      range: reach([...points.map((point) => point.y), ...lines.flatMap((line) => line.ys)]),
      log: true,
      title: "normalized MSE",
    },
    draw: (pen) => {
      for (const line of lines) pen.line(line.xs, line.ys, pen.paint[line.colour], { width: 1.5, dash: [5, 4] });
      for (const { run, x, y } of points)
        pen.dot(x, y, pen.paint[colour(run)], run.path_name === here ? 7 : 5, pen.paint.surface);
      const own = points.find(({ run }) => run.path_name === here);
      if (own) pen.text("this run", own.x, own.y, pen.paint.ink, -10);
    },
    hover: (left, top, pen) => {
      const near = points
        .map((point) => [Math.hypot(pen.u.valToPos(point.x, "x") - left, pen.u.valToPos(point.y, "y") - top), point])
        .sort((a, b) => a[0] - b[0])[0];
      if (!near || near[0] > 12) return null;
      const { run, x, y } = near[1];
      return {
        x,
        y,
        lines: [
          run.path_name,
          `normalized MSE ${number(run.normalized_mse)}, L0 ${number(run.l0)}, ${count(run.n_latents)} latents`,
        ],
      };
    },
  });
}

/** L(n, k) of the fitted law, a line for each k. */
function lawLines(fit, ks, runs, colourOf) {
  if (!fit) return [];
  const { alpha, beta_k: betaK, beta_n: betaN, gamma, zeta, eta } = fit.law;
  const sizes = runs.map((run) => Math.log(run.n_latents));
  const [low, high] = [Math.min(...sizes), Math.max(...sizes)];
  const xs = Array.from({ length: 41 }, (_, i) => low + ((high - low) * i) / 40);
  return ks
    .filter((k) => k > 0)
    .map((k) => {
      const logK = Math.log(k);
      const rest = zeta === null ? 0 : Math.exp(zeta + eta * logK);
      const loss = (logN) => Math.exp(alpha + betaK * logK + betaN * logN + gamma * logK * logN) + rest;
      return { colour: colourOf(k), xs: xs.map((x) => x / Math.LN10), ys: xs.map((x) => Math.log10(loss(x))) };
    });
}

function lawNote(fit) {
  if (!fit) return h("p", { class: "small" }, "No law L(n, k) is fitted: too few evaluated TopK runs, or too alike.");
  const names = { alpha: "α", beta_k: "βk", beta_n: "βn", gamma: "γ", zeta: "ζ", eta: "η" };
  const parts = Object.entries(names)
    .filter(([name]) => fit.law[name] !== null)
    .map(
      ([name, sign]) =>
        `${sign} ${number(fit.law[name])}${fit.intervals?.[name] ? ` ${interval(fit.intervals[name])}` : ""}`,
    );
  return h(
    "p",
    { class: "small" },
    "Dashed: L(n, k) = exp(α + βk ln k + βn ln n + γ ln k ln n) + exp(ζ + η ln k) through " +
      `${count(fit.n_points)} runs, rms ${number(fit.rms)}. ${parts.join(", ")}.`,
  );
}
