// All latents: a table that can be asked, and where they lie in density and importance.

import { Chart, scatterImage } from "../parts/chart.js";
import { announce, card, fill, h, oncePerFrame, stateNote } from "../parts/dom.js";
import { count, number, tick } from "../parts/format.js";
import { NOT_COUNTED } from "../parts/index.js";
import { QueryError, compile } from "../parts/query.js";
import { Preview } from "../parts/preview.js";
import { theIndex } from "../parts/store.js";
import { VirtualTable } from "../parts/table.js";
import { setToken } from "../parts/tokens.js";
import { failureNote } from "../parts/work.js";
import { go, link, note, parse } from "../router.js";

const ROW = 34; // pixels, as in style.css
const NEAR = 9; // pixels from a point of the scatter plot
const DEFAULT_SORT = "-importance";
const BOX = ["density", "importance"];

export const title = () => "Latents";

export function open(main, route, backend) {
  const page = new LatentsPage(main, backend);
  page.start(route);
  return page;
}

class LatentsPage {
  constructor(main, backend) {
    Object.assign(this, { main, backend, closed: false });
    this.onAbout = ({ detail: { before, now } }) => this.heard(before, now);
    document.addEventListener("about", this.onAbout);
  }

  async start(route) {
    fill(this.main, h("p", { class: "state" }, "Loading the index …"));
    try {
      this.index = await theIndex(this.backend);
    } catch (failure) {
      if (!this.closed) fill(this.main, failureNote(failure));
      return;
    }
    if (this.closed) return;
    this.logs = BOX.map((name) => Float32Array.from(this.index[name], Math.log10));
    this.reach = BOX.map((name) => logReach(this.index[name]));
    this.kept = new Uint8Array(this.index.n_latents).fill(1);
    this.draw();
    this.update(route);
  }

  draw() {
    this.box = h("input", {
      type: "search",
      data: { search: "" },
      autocomplete: "off",
      spellcheck: false,
      "aria-label": "Search the latents",
      "aria-describedby": "finder-error",
      placeholder: 'density<1e-4 modes>=2 top:"Paris" label:foo',
      on: { input: () => this.typed(), keydown: (event) => this.boxKey(event) },
    });
    this.error = h("div", { class: "finder-error", id: "finder-error", role: "status" });
    this.weight = h(
      "select",
      { "aria-label": "How a random latent is drawn" },
      ["uniform", "by density", "by importance"].map((text) => h("option", { value: text }, text)),
    );
    this.info = h("span", { class: "shown-count" });
    this.chips = h("div", { class: "chips" });
    this.banner = h("div", {});
    this.table = this.newTable();
    this.chartHost = h("div", { class: "brushable" });
    this.preview = new Preview(this.backend, () => this.index);
    fill(
      this.main,
      h("h1", { class: "unseen" }, "Latents"),
      h(
        "div",
        { class: "finder" },
        h(
          "div",
          { class: "finder-box" },
          this.box,
          h("span", { class: "slash", "aria-hidden": "true" }, "/"),
          this.error,
        ),
        h(
          "div",
          { class: "random" },
          h("button", { type: "button", on: { click: () => this.random() } }, "Random latent"),
          this.weight,
        ),
      ),
      this.banner,
      h(
        "div",
        { class: "index-grid" },
        h(
          "section",
          { class: "card index-card", "aria-label": "Table of latents" },
          h("div", { class: "index-info" }, this.info, this.chips, h("div", { class: "beside" }, this.labelTools())),
          this.table.element,
        ),
        h(
          "div",
          { class: "stack aside" },
          card(
            "Density and importance",
            {
              className: "scatter-card",
              info:
                "Each point is a latent. Density: the share of tokens on which it fires. Importance: its mean " +
                "squared " +
                "value over all tokens. Drag over points to keep only those; click one to open it.",
            },
            this.chartHost,
          ),
          this.preview.element,
        ),
      ),
    );
    this.chart = this.newChart();
    this.showBanner();
  }

  labelTools() {
    const download = h(
      "button",
      { type: "button", class: "quiet", on: { click: () => this.exportLabels() } },
      "Export labels",
    );
    if (this.backend.isStatic) return [download];
    const file = h("input", {
      type: "file",
      accept: "application/json,.json",
      hidden: true,
      "aria-label": "File of labels",
      on: { change: () => this.importLabels(file.files[0]) },
    });
    return [
      file,
      h("button", { type: "button", class: "quiet", on: { click: () => file.click() } }, "Import labels"),
      download,
    ];
  }

  newTable() {
    const { index } = this;
    const bar = (at) => (cell, i) => {
      const [low, high] = this.reach[at];
      const log = this.logs[at][i];
      cell.textContent = Number.isFinite(log) ? number(index[BOX[at]][i]) : "0";
      cell.style.setProperty(
        "--share",
        Number.isFinite(log) ? Math.max(0.02, (log - low) / (high - low)).toFixed(3) : 0,
      );
    };
    const plain = (name) => (cell, i) => (cell.textContent = number(index[name][i]));
    const columns = [
      { name: "latent", title: "Latent", className: "left", draw: (cell, i) => this.drawNumber(cell, i) },
      { name: "density", title: "Density", className: "bar", tip: "Share of tokens on which it fires", draw: bar(0) },
      {
        name: "importance",
        title: "Importance",
        className: "bar",
        tip: "Mean squared value over all tokens",
        draw: bar(1),
      },
      { name: "mean", title: "Mean", className: "c-mean", tip: "Mean value of its firings", draw: plain("mean") },
      { name: "maximum", title: "Maximum", className: "c-max", tip: "Its largest value", draw: plain("maximum") },
      {
        name: "kurtosis",
        title: "Kurtosis",
        className: "c-kurtosis",
        tip: "E[a⁴] / E[a²]² over its firings",
        draw: plain("kurtosis"),
      },
      {
        name: "modes",
        title: "Modes",
        className: "c-modes",
        tip: "Peaks in the distribution of its values",
        draw: (cell, i) => (cell.textContent = modesText(index.modes[i])),
      },
      {
        name: "top",
        title: "Top token",
        className: "left",
        tip: "The token on which it fires most strongly",
        draw: (cell, i) => this.drawToken(cell, i),
      },
      {
        name: "label",
        title: "Label",
        className: "left c-label",
        draw: (cell, i) => (cell.textContent = index.label(i)),
      },
    ];
    return new VirtualTable({
      label: "Latents",
      columns,
      rowHeight: ROW,
      onSort: (name) => this.sortBy(name),
      onOpen: (i) => go(link("latent", i)),
      onSelect: (i) => this.selected(i),
      onPoint: (i) => this.preview.show(i),
    });
  }

  drawNumber(cell, i) {
    if (!cell.firstChild) cell.append(h("a", { tabIndex: -1 }));
    cell.firstChild.textContent = String(i);
    cell.firstChild.href = link("latent", i);
    cell.parentElement.classList.toggle("never", this.index.n_fired[i] === 0);
  }

  drawToken(cell, i) {
    if (this.index.n_fired[i] === 0) cell.textContent = "never fired";
    else setToken(cell, this.index.topToken(i));
  }

  newChart() {
    const [x, y] = this.reach.map(([low, high]) => [low - 0.06 * (high - low), high + 0.06 * (high - low)]);
    const shown = count(this.index.n_latents);
    return new Chart(this.chartHost, {
      height: 300,
      label:
        `Scatter plot of ${shown} latents: density across, importance up, both logarithmic. The table and ` +
        "its query give the same numbers.",
      x: { range: x, log: true, title: "density" },
      y: { range: y, log: true, title: "importance" },
      draw: (pen) => this.drawPoints(pen),
      hover: (left, top, pen) => this.pointAt(left, top, pen),
      click: (left, top, pen) => {
        const found = this.pointAt(left, top, pen);
        if (found) go(link("latent", found.i));
        return Boolean(found);
      },
      select: (box) =>
        this.change({ box: box ? [...box.x, ...box.y].map((bound) => bound.toFixed(4)).join(",") : "" }, true),
    });
  }

  drawPoints(pen) {
    scatterImage(pen, this.logs[0], this.logs[1], this.kept);
    const i = this.table.selected >= 0 ? this.table.items[this.table.selected] : -1;
    if (i >= 0 && Number.isFinite(this.logs[0][i]))
      pen.dot(this.logs[0][i], this.logs[1][i], pen.paint.second, 5, pen.paint.surface);
  }

  pointAt(left, top, pen) {
    const [xs, ys] = this.logs;
    const x0 = pen.u.valToPos(0, "x");
    const y0 = pen.u.valToPos(0, "y");
    const perX = pen.u.valToPos(1, "x") - x0;
    const perY = pen.u.valToPos(1, "y") - y0;
    let best = NEAR ** 2;
    let found = -1;
    for (let i = 0; i < xs.length; i++) {
      if (!this.kept[i]) continue;
      const away = (x0 + xs[i] * perX - left) ** 2 + (y0 + ys[i] * perY - top) ** 2;
      if (away < best) [best, found] = [away, i];
    }
    if (found < 0) return null;
    const name = this.index.label(found) || this.index.topToken(found);
    const lines = [
      `latent ${found}${name ? ` · ${name}` : ""}`,
      `density ${number(this.index.density[found])} · importance ${number(this.index.importance[found])}`,
    ];
    return { i: found, x: xs[found], y: ys[found], lines };
  }

  /** Shows the state of a hash. */
  update(route) {
    if (!this.index) return;
    this.state = { sort: DEFAULT_SORT, q: "", box: "", at: "", ...route.query };
    if (document.activeElement !== this.box) this.box.value = this.state.q;
    if (this.state.focus) {
      this.box.focus();
      delete this.state.focus;
    }
    this.filter();
  }

  filter() {
    const { index, state } = this;
    const box = state.box.split(",").map(Number);
    const bounds = box.length === 4 && box.every(Number.isFinite) ? box : null;
    try {
      const keep = compile(state.q, index);
      const [xs, ys] = this.logs;
      for (let i = 0; i < this.kept.length; i++) {
        const inside =
          !bounds || (xs[i] >= bounds[0] && xs[i] <= bounds[1] && ys[i] >= bounds[2] && ys[i] <= bounds[3]);
        this.kept[i] = inside && keep(i) ? 1 : 0;
      }
      this.showError("");
    } catch (failure) {
      if (!(failure instanceof QueryError)) throw failure;
      this.showError(failure.message); // and what was shown stays
      if (!this.table.length) {
        this.kept.fill(1);
        this.sort();
      }
      return;
    }
    this.chart.setBrush(bounds ? { x: bounds.slice(0, 2), y: bounds.slice(2) } : null);
    this.showChips(bounds);
    this.sort();
  }

  showError(text) {
    this.error.textContent = text;
    this.box.setAttribute("aria-invalid", String(Boolean(text)));
  }

  showChips(bounds) {
    const clear = () => this.change({ box: "" }, true);
    const [x0, x1, y0, y1] = (bounds ?? []).map((power) => tick(Number((10 ** power).toPrecision(2))));
    fill(
      this.chips,
      bounds &&
        h(
          "span",
          { class: "chip" },
          `density ${x0} to ${x1}, importance ${y0} to ${y1}`,
          h("button", { type: "button", "aria-label": "Clear the brush", on: { click: clear } }, "✕"),
        ),
    );
  }

  sort() {
    const descending = this.state.sort.startsWith("-");
    const asked = this.state.sort.replace("-", "");
    const name = this.table.columns.some((column) => column.name === asked) ? asked : "latent";
    const order = this.index.order(name, descending);
    const items = new Uint32Array(order.length);
    let length = 0;
    for (const i of order) if (this.kept[i]) items[length++] = i;
    this.table.showSort(name, descending);
    this.table.selected = this.state.at === "" ? -1 : items.subarray(0, length).indexOf(Number(this.state.at));
    this.table.show(items, length);
    if (this.table.selected >= 0) this.table.reveal(this.table.selected, true);
    if (length) this.preview.show(items[Math.max(0, this.table.selected)]);
    this.chart.redraw();
    this.info.textContent =
      length === items.length ? `${count(length)} latents` : `${count(length)} of ${count(items.length)} latents`;
    announce(this.info.textContent);
    this.showEmpty(length === 0);
  }

  showEmpty(empty) {
    this.empty?.remove();
    if (!empty) return;
    const clear = h(
      "button",
      {
        type: "button",
        on: {
          click: () => {
            this.box.value = "";
            this.change({ q: "", box: "" }, true);
          },
        },
      },
      "Clear the query",
    );
    this.empty = stateNote("quiet", "No latent is like this.", "", clear);
    this.table.body.append(this.empty);
    this.table.body.style.height = "auto";
  }

  sortBy(name) {
    const rising = ["latent", "top", "label"].includes(name);
    const first = rising ? name : `-${name}`;
    const second = rising ? `-${name}` : name;
    this.table.scroller.scrollTop = 0;
    this.change({ sort: this.state.sort === first ? second : first, at: "" }, true);
  }

  typed = oncePerFrame(() => {
    this.change({ q: this.box.value, at: "" }, false);
    this.table.scroller.scrollTop = 0;
  });

  boxKey(event) {
    if (event.key === "Enter" || event.key === "ArrowDown") {
      event.preventDefault();
      if (event.key === "Enter" && /^\d+$/.test(this.box.value.trim()) && Number(this.box.value) < this.index.n_latents)
        return go(link("latent", Number(this.box.value)));
      this.table.scroller.focus();
      if (this.table.length) this.table.select(0);
    }
    return undefined;
  }

  /** A new state: as an entry of the history, or in place of the present one. */
  change(state, entry) {
    const { sort, ...rest } = { ...this.state, ...state };
    const hash = link("latents", "", { ...rest, sort: sort === DEFAULT_SORT ? "" : sort });
    if (entry) history.pushState(null, "", hash);
    else note(hash);
    this.update(parse(hash));
  }

  selected(i) {
    this.state.at = String(i);
    const { sort, ...rest } = this.state;
    note(link("latents", "", { ...rest, sort: sort === DEFAULT_SORT ? "" : sort }));
    this.chart.redraw();
    this.preview.show(i);
  }

  random() {
    const { items, length } = this.table;
    if (!length) return;
    const weights = {
      uniform: () => 1,
      "by density": (i) => this.index.n_fired[i],
      "by importance": (i) => this.index.importance[i],
    }[this.weight.value];
    let total = 0;
    for (let at = 0; at < length; at++) total += weights(items[at]);
    let left = Math.random() * total;
    let at = -1;
    while (at < length - 1 && left >= 0) left -= weights(items[++at]);
    go(link("latent", items[at]));
  }

  exportLabels() {
    const text = JSON.stringify({ labels: Object.fromEntries(this.index.labels) }, null, 1);
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    h("a", { href: url, download: `labels-${this.backend.about.name}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  async importLabels(file) {
    if (!file) return;
    try {
      const { labels } = JSON.parse(await file.text());
      await this.backend.importLabels(labels);
      this.index.setLabels(await this.backend.labels());
      this.filter();
      fill(this.banner, h("div", { class: "banner" }, `Labels of ${file.name} are saved.`));
    } catch (failure) {
      fill(this.banner, failureNote(failure));
    }
  }

  showBanner() {
    const { index } = this.backend.about;
    if (index?.state === "failed") {
      fill(this.banner, stateNote("failed", "Modes and top tokens are not known.", "The terminal of topkapi view says why."));
      return;
    }
    fill(
      this.banner,
      index?.state === "building" &&
        h(
          "div",
          { class: "banner" },
          `Modes and top tokens are being found: ${count(index.done)} of ${count(index.total)}`,
          h("progress", { max: index.total, value: index.done, "aria-label": "Modes and top tokens" }),
        ),
    );
  }

  async heard(before, now) {
    if (!this.index) return;
    this.showBanner();
    if (before.index?.state !== "building" || now.index?.state !== "ready") return;
    try {
      this.index = await theIndex(this.backend);
    } catch {
      return;
    }
    if (this.closed) return;
    this.table.close();
    const table = this.newTable();
    this.table.element.replaceWith(table.element);
    this.table = table;
    this.filter();
  }

  keys(key) {
    if (!this.table) return false;
    if (key === "j") this.table.move(1);
    else if (key === "k") this.table.move(-1);
    else if (key === "Enter" && !document.activeElement.matches("a, button, summary, select")) this.table.open();
    else return false;
    return true;
  }

  close() {
    this.closed = true;
    document.removeEventListener("about", this.onAbout);
    this.chart?.close();
    this.table?.close();
  }
}

const modesText = (modes) => (modes === NOT_COUNTED ? "–" : modes === 0 ? "–" : String(modes));

/** log10 of the smallest and largest value above 0. */
function logReach(values) {
  let low = Infinity;
  let high = 0;
  for (const value of values) {
    if (value > 0 && value < low) low = value;
    if (value > high) high = value;
  }
  if (!high) return [-6, 0];
  return low === high ? [Math.log10(low) - 1, Math.log10(high) + 1] : [Math.log10(low), Math.log10(high)];
}
