// One latent: its numbers, how its values are distributed, the text it fires on, what it does, what is beside it.

import { neighboursCard, positionsCard, votesCard } from "../parts/beside.js";
import { histogram, numbersTable } from "../parts/chart.js";
import { card, fill, freshId, h, segmented, stateNote, term } from "../parts/dom.js";
import { exampleGroups } from "../parts/examples.js";
import { GAP, count, interval, number, percent } from "../parts/format.js";
import { labelCard } from "../parts/label.js";
import { labelSaved } from "../parts/store.js";
import { failureNote, modelNote } from "../parts/work.js";
import { go, link, parse } from "../router.js";

const TABS = [
  ["top", "Top"],
  ["random", "Random"],
  ["quantile", "Quantiles"],
  ["near", "Near misses"],
];
const FIRST = { top: 10, random: 10, quantile: 3, near: 10 };
const MOST = 100; // examples that can be asked for
const DEFAULTS = { tab: "top", seed: "0", low: "", high: "", counts: "linear", breaks: "", n: "" };

export const title = (route) => `Latent ${route.id}`;

export function open(main, route, backend) {
  const page = new LatentPage(main, Number(route.id), backend);
  page.start(route);
  return page;
}

class LatentPage {
  constructor(main, i, backend) {
    Object.assign(this, { main, i, backend, closed: false, charts: [], asked: 0 });
    this.onAbout = ({ detail: { before, now } }) => {
      if (before.model?.state !== now.model?.state && this.latent) {
        this.votes?.draw();
        this.loadExamples();
      }
    };
    document.addEventListener("about", this.onAbout);
  }

  async start(route) {
    const { n_latents: n } = this.backend.about;
    if (!/^\d+$/.test(route.id) || this.i >= n) {
      fill(
        this.main,
        h("h1", {}, "No such latent"),
        stateNote(
          "quiet",
          `There is no latent “${route.id}”.`,
          `This autoencoder has latents 0 to ${n - 1}.`,
          h("p", {}, h("a", { href: link("latents") }, "All latents")),
        ),
      );
      return;
    }
    this.drawHead(null);
    this.body = h("div", {}, h("p", { class: "state" }, "Reading …"));
    this.main.append(this.body);
    try {
      this.latent = await this.backend.latent(this.i);
    } catch (failure) {
      if (!this.closed) fill(this.body, failureNote(failure));
      return;
    }
    if (this.closed) return;
    this.drawHead(this.latent.label);
    this.drawBody();
    this.update(route);
  }

  // ---- the head ----

  drawHead(label) {
    const { n_latents: n } = this.backend.about;
    const step = (by, text, key) => {
      const to = this.i + by;
      const inside = to >= 0 && to < n;
      return inside
        ? h(
            "a",
            {
              class: "button",
              href: link("latent", to, this.carried()),
              "aria-label": `${text} latent`,
              data: { tip: `${text} latent: ${key}` },
            },
            by < 0 ? "←" : "→",
          )
        : h("button", { type: "button", disabled: true, "aria-label": `${text} latent` }, by < 0 ? "←" : "→");
    };
    const jump = h("input", {
      class: "jump",
      type: "number",
      min: 0,
      max: n - 1,
      placeholder: "number",
      "aria-label": "Jump to latent",
      on: {
        keydown: (event) =>
          event.key === "Enter" &&
          jump.value !== "" &&
          go(link("latent", Math.max(0, Math.min(n - 1, Math.floor(Number(jump.value)))))),
      },
    });
    this.given = h("span", { class: "given" }, label?.label ?? "");
    const head = h(
      "div",
      { class: "latent-head" },
      h("div", { class: "latent-name" }, h("h1", {}, `Latent ${this.i}`), this.given),
      h(
        "div",
        { class: "latent-tools" },
        step(-1, "Previous", "k"),
        jump,
        step(1, "Next", "j"),
        h("a", { class: "button", href: link("prompt", "", { edits: `${this.i}:2:m:all` }) }, "Steer with this latent"),
      ),
    );
    if (this.head) this.head.replaceWith(head);
    else fill(this.main, head);
    this.head = head;
  }

  /** What of the state stays when going to the next latent. */
  carried() {
    const { tab, breaks, counts } = { ...DEFAULTS, ...parse(location.hash).query };
    return { tab: tab === DEFAULTS.tab ? "" : tab, breaks, counts: counts === DEFAULTS.counts ? "" : counts };
  }

  drawBody() {
    const { backend, i, latent } = this;
    const fired = latent.n_fired > 0;
    this.votes = votesCard(backend, i);
    this.label = labelCard(backend, i, latent.label, (said) => {
      latent.label = said;
      labelSaved(i, said);
      this.given.textContent = said.label;
    });
    const positions = fired ? positionsCard(latent.positions) : null;
    const side = [this.label.element, this.votes.element, neighboursCard(backend, latent), positions?.element];
    fill(
      this.body,
      this.figures(),
      h(
        "div",
        { class: "latent-grid" },
        fired ? [this.examplesCard(), this.histogramCard()] : this.neverFired(),
        h("div", { class: "side stack" }, side),
      ),
    );
    if (positions) this.charts.push(positions.draw());
  }

  neverFired() {
    const text =
      `Not on one of the ${count(this.latent.n_tokens)} tokens studied: no values, no examples, no ` + "histogram.";
    const note = stateNote("quiet", "This latent never fired.", text);
    return h("section", { class: "card examples", "aria-label": "Examples" }, note);
  }

  figures() {
    const of = this.latent;
    const quantiles = of.quantiles
      ? `5 %: ${number(of.quantiles["0.05"])} · 95 %: ${number(of.quantiles["0.95"])}`
      : "";
    const entries = [
      [
        "Density",
        number(of.density),
        interval(of.density_interval),
        "Share of tokens on which it fires, with the 95 % interval of a Poisson count.",
      ],
      [
        "Fired",
        count(of.n_fired),
        `of ${count(of.n_tokens)} tokens${of.is_sample ? "; a sample is kept" : ""}`,
        "Tokens on which its value is above 0.",
      ],
      [
        "Importance",
        number(of.importance),
        of.importance_interval ? interval(of.importance_interval) : "no interval: few firings",
        "Mean squared value over all tokens, about what the error would grow by without it; with the 95 % interval.",
      ],
      [
        "Mean",
        number(of.mean),
        of.quantiles ? `median ${number(of.quantiles["0.5"])}` : "",
        "Mean value of its firings.",
      ],
      ["Maximum", number(of.maximum), quantiles, "Its largest value; quantiles of its firings below."],
      [
        "Kurtosis",
        number(of.kurtosis),
        of.skewness === null ? "" : `skewness ${number(of.skewness)}`,
        "E[a⁴] / E[a²]² of its firings; skewness is E[a³] / E[a²]^1.5. Both about zero.",
      ],
      ["Alignment", number(of.alignment), "encoder · decoder", "Cosine of its encoder and its decoder row."],
    ];
    return h(
      "dl",
      { class: "figures" },
      entries.map(([name, value, sub, tip]) =>
        h(
          "div",
          { data: { figure: name.toLowerCase() } },
          h("dt", {}, term(name, tip)),
          h("dd", {}, value === GAP ? h("span", { class: "dim", "aria-label": "never fired" }, GAP) : value),
          h("dd", { class: "sub", title: sub }, sub || "\u00a0"),
        ),
      ),
    );
  }

  // ---- the histogram ----

  histogramCard() {
    this.histHost = h("div", {});
    this.histSwitch = segmented(
      "Counts",
      [
        ["linear", "Linear"],
        ["log", "Log"],
      ],
      "linear",
      (counts) => this.change({ counts }),
    );
    this.histNote = h("p", { class: "small" });
    const { edges, counts } = this.latent.histogram;
    const rows = counts
      .map((n, i) => [`${number(edges[i])} to ${number(edges[i + 1])}`, count(n)])
      .filter((_, i) => counts[i]);
    return card(
      "Values of its firings",
      { className: "hist", beside: this.histSwitch },
      this.histHost,
      this.histNote,
      numbersTable(["value", "firings"], rows),
    );
  }

  drawHistogram() {
    const { latent, state } = this;
    const { edges, counts } = latent.histogram;
    const range = this.range;
    this.histSwitch.show(state.counts);
    this.hist?.close();
    this.histHost.replaceChildren();
    this.hist = histogram(this.histHost, {
      edges,
      counts,
      logCounts: state.counts === "log",
      height: 210,
      what: "firings",
      room: latent.modes.length > 1 ? 1.2 : undefined,
      x: { title: "value" },
      label:
        `Histogram of ${count(latent.n_fired)} firings from 0 to ${number(latent.maximum)}, with ` +
        `${latent.modes.length} ${latent.modes.length === 1 ? "mode" : "modes"}. The numbers are in the ` +
        "table below.",
      colour: (i, paint) => (range && (edges[i + 1] <= range[0] || edges[i] >= range[1]) ? paint.faint : paint.accent),
      overlay: (u) => this.drawModes(u),
    });
    const { modes, dip } = latent;
    const shares =
      modes.length > 1
        ? `${modes.length} modes: click one to see its examples alone.`
        : modes.length === 1
          ? "One mode."
          : "Too few firings to count modes.";
    const p = dip && (dip.p < 0.001 ? "< 0.001" : `= ${number(dip.p, 2)}`);
    this.histNote.textContent = dip ? `${shares} Dip test against one mode: p ${p}.` : shares;
  }

  drawModes(u) {
    for (const old of u.over.querySelectorAll(".mode")) old.remove();
    const { modes } = this.latent;
    if (modes.length < 2) return;
    modes.forEach((mode, m) => {
      const left = Math.max(0, u.valToPos(mode.low, "x"));
      const right = Math.min(u.over.clientWidth, u.valToPos(mode.high, "x"));
      const chosen = this.range && this.range[0] === mode.low && this.range[1] === mode.high;
      const said =
        `Mode ${m + 1}: ${number(mode.low)} to ${number(mode.high)}, peak at ${number(mode.peak)}, ` +
        `${percent(mode.share, 2)} of firings`;
      const button = h(
        "button",
        {
          class: "mode",
          type: "button",
          "aria-label": said,
          "aria-pressed": String(Boolean(chosen)),
          data: { tip: said },
          on: {
            click: () =>
              this.change(
                chosen ? { low: "", high: "", n: "" } : { low: String(mode.low), high: String(mode.high), n: "" },
              ),
          },
          style: { left: `${left}px`, width: `${Math.max(6, right - left)}px` },
        },
        right - left > 34
          ? h(
              "span",
              { "aria-hidden": "true" },
              right - left > 86 ? `mode ${m + 1} · ${percent(mode.share, 2)}` : percent(mode.share, 2),
            )
          : null,
      );
      u.over.append(button);
    });
  }

  get range() {
    const { low, high } = this.state;
    return low !== "" && high !== "" ? [Number(low), Number(high)] : null;
  }

  // ---- the examples ----

  examplesCard() {
    this.tabs = h(
      "div",
      {
        class: "tabs",
        role: "tablist",
        "aria-label": "Which examples",
        on: { keydown: (event) => this.tabKey(event) },
      },
      TABS.map(([name, text]) =>
        h(
          "button",
          {
            role: "tab",
            type: "button",
            id: `tab-${name}`,
            "aria-controls": "examples-list",
            value: name,
            on: { click: () => this.change({ tab: name, n: "" }) },
          },
          text,
        ),
      ),
    );
    const breaks = h("input", {
      type: "checkbox",
      id: freshId("breaks"),
      on: { change: () => this.change({ breaks: breaks.checked ? "1" : "" }) },
    });
    this.breaks = breaks;
    this.exampleNote = h("div", { class: "examples-note" });
    this.list = h("div", { class: "examples-list", id: "examples-list", role: "tabpanel" });
    return h(
      "section",
      { class: "card examples", "aria-label": "Examples" },
      h("h2", { class: "unseen" }, "Examples"),
      h(
        "div",
        { class: "examples-bar" },
        this.tabs,
        h("div", { class: "beside" }, h("label", { class: "check", for: breaks.id }, breaks, "line breaks")),
      ),
      this.exampleNote,
      this.list,
    );
  }

  tabKey(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const at = TABS.findIndex(([name]) => name === this.state.tab);
    const to = TABS[(at + by + TABS.length) % TABS.length][0];
    this.change({ tab: to, n: "" });
    this.tabs.querySelector(`#tab-${to}`).focus();
  }

  async loadExamples() {
    if (!this.list || this.latent.n_fired === 0) return;
    const { state } = this;
    const asked = ++this.asked;
    const n = Number(state.n) || FIRST[state.tab];
    const wait = setTimeout(() => fill(this.list, h("p", { class: "state" }, "Reading …")), 250);
    try {
      const found = await this.backend.examples(this.i, { kind: state.tab, n, seed: state.seed, range: this.range });
      if (asked !== this.asked || this.closed) return;
      clearTimeout(wait);
      this.drawExamples(found, n);
    } catch (failure) {
      clearTimeout(wait);
      if (asked === this.asked && !this.closed) fill(this.list, failureNote(failure));
    }
  }

  drawExamples({ groups, n_matching: matching }, n) {
    const { backend, latent, state } = this;
    const ready = !modelNote(backend);
    const about = {
      latent: this.i,
      maximum: latent.maximum,
      backend,
      canAblate: ready,
      whyNot:
        backend.about.model?.state === "loading" ? "the model is being loaded" : "needs the model: topkapi view RUN",
    };
    const shown = groups.reduce((sum, group) => sum + group.examples.length, 0);
    this.drawNote(matching, shown);
    if (!shown) {
      fill(
        this.list,
        stateNote(
          "quiet",
          "No firing is in this range.",
          backend.isStatic ? "An export holds some examples of each latent; the viewer itself has all." : "",
        ),
      );
      return;
    }
    const grown = shown >= (state.tab === "quantile" ? n * groups.length : n) && n < MOST && !backend.isStatic;
    const more =
      grown &&
      h(
        "p",
        { class: "state" },
        h(
          "button",
          { type: "button", on: { click: () => this.change({ n: String(Math.min(MOST, n * 2)) }) } },
          "More examples",
        ),
      );
    fill(this.list, exampleGroups(groups, about), more);
  }

  drawNote(matching, shown) {
    const { state, latent } = this;
    const said = {
      top: "Strongest firings, one of each context, no text twice.",
      random: `Drawn uniformly from all firings${latent.is_sample ? " kept" : ""}: not chosen by strength.`,
      quantile: "Drawn from each fifth of the firings by value.",
      near: "Its weakest firings: tokens on which it only just made it into the k largest.",
    }[state.tab];
    const range =
      this.range &&
      h(
        "span",
        { class: "chip" },
        `values ${number(this.range[0])} to ${number(this.range[1])}`,
        matching === null ? "" : ` · ${count(matching)} firings`,
        h(
          "button",
          {
            type: "button",
            "aria-label": "Show all values",
            on: { click: () => this.change({ low: "", high: "", n: "" }) },
          },
          "✕",
        ),
      );
    const draws = ["random", "quantile"].includes(state.tab) && !this.backend.isStatic;
    const redraw =
      draws &&
      h(
        "span",
        {},
        `seed ${state.seed} `,
        h(
          "button",
          {
            class: "quiet",
            type: "button",
            on: { click: () => this.change({ seed: String(Number(state.seed) + 1) }) },
          },
          "Redraw",
        ),
      );
    fill(this.exampleNote, said, range, redraw, h("span", { class: "unseen" }, `${shown} shown`));
  }

  // ---- the state ----

  update(route) {
    if (!this.latent || this.latent.n_fired === 0) return;
    const before = this.state;
    this.state = { ...DEFAULTS, ...route.query };
    if (!TABS.some(([name]) => name === this.state.tab)) this.state.tab = DEFAULTS.tab;
    const { state } = this;
    for (const tab of this.tabs.children) {
      const here = tab.value === state.tab;
      tab.setAttribute("aria-selected", String(here));
      tab.tabIndex = here ? 0 : -1;
      if (here) this.list.setAttribute("aria-labelledby", tab.id);
    }
    this.breaks.checked = state.breaks === "1";
    this.list.classList.toggle("breaks", state.breaks === "1");
    const same = (...names) => before && names.every((name) => before[name] === state[name]);
    if (!same("counts", "low", "high")) this.drawHistogram();
    if (!same("tab", "seed", "low", "high", "n")) this.loadExamples();
  }

  change(state) {
    const all = { ...this.state, ...state };
    const kept = Object.fromEntries(Object.entries(all).filter(([name, value]) => value !== DEFAULTS[name]));
    const hash = link("latent", this.i, kept);
    history.pushState(null, "", hash);
    this.update(parse(hash));
  }

  keys(key) {
    const by = { j: 1, k: -1 }[key];
    const to = this.i + by;
    if (!by || to < 0 || to >= this.backend.about.n_latents) return false;
    go(link("latent", to, this.carried()));
    return true;
  }

  close() {
    this.closed = true;
    this.label?.close();
    document.removeEventListener("about", this.onAbout);
    this.hist?.close();
    for (const chart of this.charts) chart.close();
  }
}
