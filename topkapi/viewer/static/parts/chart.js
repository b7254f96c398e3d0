// Charts on uPlot: it makes scales, axes, cursor and brush; bars, lines and points are drawn here in its hooks.
// Logarithmic axes hold log10 of the numbers, so that one kind of scale serves all.

import { channels, colours } from "./colours.js";
import { number, powerOfTen, tick } from "./format.js";
import { h } from "./dom.js";
import { hideTip, showTip } from "./tips.js";

/**
 * A chart in `host` that keeps its width. `axis`: {range: [low, high], log, title, format}.
 *
 * draw(pen): called whenever it is drawn, see `Pen`. hover(x, y, pen): {x, y, lines} of what is near, or null.
 * click(x, y, pen); select({x: [low, high], y: [low, high]} or null): makes a brush. overlay(u): places elements in
 * u.over.
 * Returns {redraw(), close(), setBrush(box)}.
 */
export class Chart {
  constructor(host, options) {
    Object.assign(this, { host, options });
    host.classList.add("chart");
    host.setAttribute("role", "img");
    host.setAttribute("aria-label", options.label);
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(host);
    this.rebuild = () => this.build();
    document.addEventListener("themechange", this.rebuild);
    this.build();
  }

  build() {
    this.width = this.host.clientWidth;
    this.u?.destroy();
    this.u = undefined;
    this.isReady = false;
    if (!this.width) return;
    const { x, y, height = 220, select } = this.options;
    const paint = colours();
    this.u = new uPlot(
      {
        width: this.width,
        height,
        padding: [10, 20, 0, 0],
        legend: { show: false },
        scales: { x: { time: false, range: () => x.range }, y: { range: () => y.range } },
        series: [{}, { paths: () => null, points: { show: false } }],
        axes: [axisOf(x, paint, 0, this.width < 420 ? 50 : 60), axisOf(y, paint, 1, 36)],
        cursor: {
          points: { show: false },
          x: false,
          y: false,
          drag: { x: !!select, y: !!select, setScale: false, dist: 5 },
        },
        hooks: {
          drawAxes: [(u) => this.draw(u, paint)],
          setSelect: [(u) => this.selected(u)],
          ready: [(u) => this.ready(u)],
          setSize: [(u) => this.options.overlay?.(u)],
        },
      },
      [x.range, y.range],
      this.host,
    );
    this.listen(this.u.over);
  }

  /** Once scales are known, which is not when uPlot's constructor returns. */
  ready(u) {
    this.u = u;
    this.isReady = true;
    this.options.overlay?.(u);
    if (this.brush) this.setBrush(this.brush);
  }

  resize() {
    if (!this.u) this.build();
    else if (this.host.clientWidth && this.host.clientWidth !== this.width) {
      this.width = this.host.clientWidth;
      this.u.setSize({ width: this.width, height: this.options.height ?? 220 });
      if (this.brush) this.setBrush(this.brush);
    }
  }

  draw(u, paint) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    this.pen = new Pen(u, paint);
    this.options.draw(this.pen);
    ctx.restore();
  }

  listen(over) {
    const at = (event) => {
      const box = over.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top, box];
    };
    const { hover, click } = this.options;
    if (hover) {
      over.addEventListener("pointermove", (event) => {
        const [left, top, box] = at(event);
        const found = this.pen && !event.buttons && hover(left, top, this.pen);
        over.classList.toggle("points", Boolean(found && click));
        if (!found) return hideTip();
        const [x, y] = [box.left + this.u.valToPos(found.x, "x"), box.top + this.u.valToPos(found.y, "y")];
        return showTip({ left: x - 4, right: x + 4, top: y - 4, bottom: y + 4 }, ...found.lines);
      });
      over.addEventListener("pointerleave", hideTip);
    }
    if (click || this.options.select) {
      let from = null;
      over.addEventListener("pointerdown", (event) => (from = [event.clientX, event.clientY]));
      over.addEventListener("click", (event) => {
        if (from && Math.hypot(event.clientX - from[0], event.clientY - from[1]) > 4) return;
        const [left, top] = at(event);
        const acted = click?.(left, top, this.pen);
        if (!acted && this.brush) {
          this.setBrush(null);
          this.options.select(null);
        }
      });
    }
  }

  selected(u) {
    const { left, top, width, height } = u.select;
    if (this.placing || !this.options.select || (width < 5 && height < 5)) return;
    this.brush = {
      x: [u.posToVal(left, "x"), u.posToVal(left + width, "x")],
      y: [u.posToVal(top + height, "y"), u.posToVal(top, "y")],
    };
    this.options.select(this.brush);
  }

  setBrush(box) {
    this.brush = box;
    this.host.classList.toggle("brushed", Boolean(box));
    if (!this.isReady) return;
    this.placing = true;
    const place = box
      ? { left: this.u.valToPos(box.x[0], "x"), top: this.u.valToPos(box.y[1], "y") }
      : { left: 0, top: 0, width: 0, height: 0 };
    if (box) {
      place.width = this.u.valToPos(box.x[1], "x") - place.left;
      place.height = this.u.valToPos(box.y[0], "y") - place.top;
    }
    this.u.setSelect(place, false);
    this.placing = false;
  }

  redraw() {
    this.u?.redraw(false, true);
  }

  close() {
    this.observer.disconnect();
    document.removeEventListener("themechange", this.rebuild);
    this.u?.destroy();
    hideTip();
  }
}

function axisOf(axis, paint, side, space) {
  const format = axis.format ?? (axis.log ? powerOfTen : tick);
  const made = {
    stroke: paint.soft,
    font: "11px Inter, sans-serif",
    space,
    size: side ? 46 : 30,
    gap: 4,
    grid: { stroke: paint.grid, width: 1, show: side === 1 },
    ticks: { stroke: paint.line, width: 1, size: 4 },
    border: side ? { show: false } : { show: true, stroke: paint.line, width: 1 },
    values: (_, ticks) => ticks.map((tick) => format(tick)),
  };
  if (axis.title)
    Object.assign(made, { label: axis.title, labelSize: 18, labelGap: 2, labelFont: "11px Inter, sans-serif" });
  if (axis.log)
    made.splits = (u) =>
      logTicks(axis.range, side ? u.bbox.height / devicePixelRatio / 32 : u.bbox.width / devicePixelRatio / 60);
  return made;
}

/** Whole decades; where there are few, more of each, as far as there is room. */
function logTicks([low, high], most) {
  const inside = (tick) => tick >= low - 1e-9 && tick <= high + 1e-9;
  const powers = Array.from({ length: Math.ceil(high) - Math.floor(low) + 1 }, (_, i) => Math.floor(low) + i);
  const every = Math.max(1, Math.ceil((high - low) / Math.max(2, most)));
  if (high - low >= 2) return powers.filter((power) => power % every === 0 && inside(power));
  const choices = [
    [1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9],
    [1, 1.5, 2, 3, 4, 5, 6, 8],
    [1, 2, 5],
    [1],
  ];
  const ticks = choices.map((steps) =>
    powers.flatMap((power) => steps.map((step) => power + Math.log10(step))).filter(inside),
  );
  return ticks.find((found) => found.length <= Math.max(2, most)) ?? ticks.at(-1);
}

/** Draws in the units of the scales. */
class Pen {
  constructor(u, paint) {
    Object.assign(this, { u, paint, ctx: u.ctx, ratio: devicePixelRatio });
  }

  x = (value) => this.u.valToPos(value, "x", true);
  y = (value) => this.u.valToPos(value, "y", true);

  /** Bars from the bottom; values that are not finite are left out. `colour(i)` gives each one's colour. */
  bars(edges, values, colour) {
    const { ctx, u } = this;
    const bottom = u.bbox.top + u.bbox.height;
    const gap = this.x(edges[1]) - this.x(edges[0]) > 5 * this.ratio ? this.ratio : 0;
    values.forEach((value, i) => {
      if (!Number.isFinite(value)) return;
      const left = Math.round(this.x(edges[i]));
      const right = Math.round(this.x(edges[i + 1]));
      const top = Math.min(this.y(value), bottom);
      ctx.fillStyle = colour(i);
      ctx.fillRect(left, top, Math.max(1, right - left - gap), bottom - top);
    });
  }

  line(xs, ys, colour, { width = 1.75, dash = [] } = {}) {
    const { ctx } = this;
    ctx.strokeStyle = colour;
    ctx.lineWidth = width * this.ratio;
    ctx.lineJoin = "round";
    ctx.setLineDash(dash.map((part) => part * this.ratio));
    ctx.beginPath();
    let drawing = false;
    for (let i = 0; i < xs.length; i++) {
      const known = Number.isFinite(xs[i]) && Number.isFinite(ys[i]);
      if (known) ctx[drawing ? "lineTo" : "moveTo"](this.x(xs[i]), this.y(ys[i]));
      drawing = known;
    }
    ctx.stroke();
    ctx.setLineDash([]);
  }

  dot(x, y, colour, radius = 4.5, ring = null) {
    const { ctx } = this;
    ctx.beginPath();
    ctx.arc(this.x(x), this.y(y), radius * this.ratio, 0, 2 * Math.PI);
    ctx.fillStyle = colour;
    ctx.fill();
    if (!ring) return;
    ctx.strokeStyle = ring;
    ctx.lineWidth = 2 * this.ratio;
    ctx.stroke();
  }

  text(text, x, y, colour, lift = 0) {
    const { ctx } = this;
    ctx.font = `${11 * this.ratio}px Inter, sans-serif`;
    ctx.fillStyle = colour;
    ctx.textAlign = "left"; // uPlot leaves that of its axes
    ctx.fillText(text, this.x(x) + 8 * this.ratio, this.y(y) + (4 + lift) * this.ratio);
  }
}

/** Bars of a histogram with counts on a linear or logarithmic axis, a note on hover, and whatever `over` draws. */
export function histogram(
  host,
  {
    edges,
    counts,
    logCounts = false,
    x,
    height,
    label,
    what,
    colour,
    over,
    overlay,
    most = Math.max(1, ...counts),
    curves = [],
    room = 1.06,
    describe,
  },
) {
  const values = logCounts ? counts.map((n) => (n > 0 ? Math.log10(n) : NaN)) : counts;
  const y = logCounts
    ? {
        range: [Math.log10(0.5), Math.log10(most) + (room > 1.1 ? 0.8 : 0.2)],
        log: true,
        title: what,
        format: (power) => (power < 5 ? String(Math.round(10 ** power)) : powerOfTen(power)),
      }
    : {
        range: [0, Math.max(most, ...curves.flat()) * room],
        title: what,
        format: (n) => (n >= 1e4 ? `${number(n / 1e3)}k` : Number.isInteger(n) ? String(n) : tick(n)),
      };
  const write = x.log ? (value) => number(10 ** value) : (value) => number(value);
  return new Chart(host, {
    height,
    label,
    overlay,
    x: { range: [edges[0], edges.at(-1)], ...x },
    y,
    draw: (pen) => {
      pen.bars(edges, values, (i) => colour?.(i, pen.paint) ?? pen.paint.accent);
      over?.(pen);
    },
    hover: (left, top, pen) => {
      const value = pen.u.posToVal(left, "x");
      const i = edges.findIndex((edge, e) => value >= edge && value < edges[e + 1]);
      if (i < 0 || !(counts[i] > 0)) return null;
      const said = describe ? describe(i) : `${counts[i].toLocaleString("en-GB")} ${what}`;
      return {
        x: (edges[i] + edges[i + 1]) / 2,
        y: values[i],
        lines: [`${write(edges[i])} to ${write(edges[i + 1])}`, said],
      };
    },
  });
}

/** Points as an image, so that 100 000 of them are drawn in milliseconds: a pixel is darker the more points it has, by
 * the logarithm.
 * `shown(i)` tells which are drawn in the strong colour; others are faint. */
export function scatterImage(pen, xs, ys, shown) {
  const { left, top, width, height } = pen.u.bbox;
  const [w, tall] = [Math.round(width), Math.round(height)];
  const strong = new Uint16Array(w * tall);
  const faint = new Uint16Array(w * tall);
  const few = shown.reduce((sum, one) => sum + one, 0) < 1000;
  const size = Math.max(2, Math.round((xs.length < 2e4 || few ? 3 : xs.length < 6e4 ? 2 : 1.5) * pen.ratio));
  const [x0, y0] = [pen.x(0) - left, pen.y(0) - top];
  const [perX, perY] = [pen.x(1) - left - x0, pen.y(1) - top - y0];
  for (let i = 0; i < xs.length; i++) {
    if (!(xs[i] > -Infinity && ys[i] > -Infinity)) continue;
    const into = shown[i] ? strong : faint;
    const [px, py] = [Math.round(x0 + xs[i] * perX - size / 2), Math.round(y0 + ys[i] * perY - size / 2)];
    for (let row = Math.max(0, py); row < Math.min(tall, py + size); row++) {
      for (let at = Math.max(0, px); at < Math.min(w, px + size); at++) into[row * w + at]++;
    }
  }
  const image = new ImageData(w, tall);
  const pixels = new Uint32Array(image.data.buffer);
  const most = Math.max(
    2,
    strong.reduce((a, b) => Math.max(a, b), 0),
  );
  const first = few ? 0.9 : xs.length < 2e4 ? 0.5 : 0.3;
  const opacity = (n) => first + (1 - first) * (Math.log(n) / Math.log(Math.min(most, DARKEST)));
  const [accent, grey] = [shades(pen.paint.accent, opacity), shades(pen.paint.soft, (n) => 0.35 * (1 - 0.75 ** n))];
  for (let p = 0; p < pixels.length; p++) {
    if (strong[p]) pixels[p] = accent[Math.min(strong[p], DARKEST)];
    else if (faint[p]) pixels[p] = grey[Math.min(faint[p], DARKEST)];
  }
  const canvas = new OffscreenCanvas(w, tall);
  canvas.getContext("2d").putImageData(image, 0, 0);
  pen.ctx.drawImage(canvas, Math.round(left), Math.round(top));
}

const DARKEST = 60; // points on one pixel, above which it gets no darker

/** The colour of a pixel on which n points lie, as an ImageData's four bytes in one number. */
function shades(colour, opacity) {
  const [r, g, b] = channels(colour);
  const bytes = Uint8Array.from(
    { length: 4 * (DARKEST + 1) },
    (_, i) => [r, g, b, 255 * Math.min(1, opacity(Math.max(1, Math.floor(i / 4))))][i % 4],
  );
  return new Uint32Array(bytes.buffer);
}

/** A small table of a chart's numbers, folded away: the text alternative. */
export function numbersTable(titles, rows) {
  return h(
    "details",
    { class: "numbers" },
    h("summary", {}, "The numbers"),
    h(
      "div",
      { class: "numbers-scroll" },
      h(
        "table",
        {},
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            titles.map((title) => h("th", { scope: "col" }, title)),
          ),
        ),
        h(
          "tbody",
          {},
          rows.map((row) =>
            h(
              "tr",
              {},
              row.map((cell) => h("td", {}, String(cell))),
            ),
          ),
        ),
      ),
    ),
  );
}

/** Which line is which: [[colour name, text, dashed]]. */
export function legend(entries) {
  return h(
    "ul",
    { class: "legend" },
    entries.map(([colour, text, dashed]) =>
      h(
        "li",
        {},
        h("span", { class: `swatch ${dashed ? "dashed" : ""}`, style: { "--swatch": `var(--${colour})` } }),
        text,
      ),
    ),
  );
}
