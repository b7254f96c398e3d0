// A table of any length: only the rows in sight exist, and they are used again as it scrolls.

import { h, oncePerFrame } from "./dom.js";

const TALLEST = 8e6; // pixels: browsers clip taller elements; beyond it scrolling moves in larger steps
const SPARE = 6; // rows drawn above and below those in sight

/** `columns`: [{name, title, className, tip, draw(cell, i)}]; `onSort(name)`, `onOpen(i)`. */
export class VirtualTable {
  constructor({ label, columns, rowHeight, onSort, onOpen, onSelect, onPoint }) {
    Object.assign(this, { columns, rowHeight, onOpen, onSelect });
    this.items = new Uint32Array(0);
    this.length = 0;
    this.selected = -1;
    this.pool = [];
    this.heads = columns.map((column) => this.head(column, onSort));
    this.body = h("div", { class: "vt-body", role: "rowgroup" });
    this.scroller = h(
      "div",
      {
        class: "vt-scroll",
        tabIndex: 0,
        role: "table",
        "aria-label": label,
        on: {
          scroll: oncePerFrame(() => this.draw()),
          keydown: (event) => this.onKey(event),
          click: (event) => this.onClick(event),
        },
      },
      h("div", { class: "vt-row vt-head", role: "row", "aria-rowindex": "1" }, this.heads),
      this.body,
    );
    this.scroller.addEventListener("pointerover", (event) => {
      const row = event.target.closest(".vt-row[data-at]");
      if (row && !event.buttons) onPoint(this.items[Number(row.dataset.at)]);
    });
    this.element = this.scroller;
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.scroller);
  }

  close() {
    this.observer.disconnect();
  }

  head(column, onSort) {
    const button = h(
      "button",
      { type: "button", data: column.tip ? { tip: column.tip } : {}, on: { click: () => onSort(column.name) } },
      column.title,
    );
    return h("div", { class: `vt-cell ${column.className ?? ""}`, role: "columnheader" }, button);
  }

  showSort(name, descending) {
    this.columns.forEach((column, at) => {
      const here = column.name === name;
      this.heads[at].setAttribute("aria-sort", here ? (descending ? "descending" : "ascending") : "none");
    });
  }

  /** Shows the first `length` of `items`. */
  show(items, length) {
    this.items = items;
    this.length = length;
    this.scroller.setAttribute("aria-rowcount", String(length + 1));
    this.total = length * this.rowHeight;
    this.body.style.height = `${Math.min(this.total, TALLEST)}px`;
    this.select(Math.min(this.selected, length - 1), false);
    this.draw(true);
  }

  get viewHeight() {
    return this.scroller.clientHeight - this.rowHeight; // less the head
  }

  /** Pixels of content above what is in sight, of all its height. */
  get above() {
    const shown = Math.min(this.total, TALLEST) - this.viewHeight;
    const all = this.total - this.viewHeight;
    return all <= shown || shown <= 0 ? this.scroller.scrollTop : (this.scroller.scrollTop / shown) * all;
  }

  draw(afresh = false) {
    if (!this.scroller.clientHeight) return;
    const above = this.above;
    const first = Math.max(0, Math.floor(above / this.rowHeight) - SPARE);
    const end = Math.min(this.length, Math.ceil((above + this.viewHeight) / this.rowHeight) + SPARE);
    while (this.pool.length < end - first) this.pool.push(this.newRow());
    const shift = this.scroller.scrollTop - above;
    const free = this.pool.filter((row) => afresh || row.at < first || row.at >= end);
    const placed = new Set(
      afresh ? [] : this.pool.filter((row) => row.at >= first && row.at < end).map((row) => row.at),
    );
    for (let at = first; at < end; at++) if (!placed.has(at)) this.place(free.shift(), at);
    for (const row of free) {
      row.at = -1;
      row.element.hidden = true;
    }
    for (const row of this.pool)
      if (row.at >= 0) row.element.style.transform = `translateY(${row.at * this.rowHeight + shift}px)`;
  }

  newRow() {
    const cells = this.columns.map((column) => h("div", { class: `vt-cell ${column.className ?? ""}`, role: "cell" }));
    const element = h("div", { class: "vt-row", role: "row" }, cells);
    this.body.append(element);
    return { element, cells, at: -1 };
  }

  place(row, at) {
    row.at = at;
    row.element.hidden = false;
    row.element.setAttribute("aria-rowindex", String(at + 2));
    row.element.classList.toggle("selected", at === this.selected);
    row.element.dataset.at = at;
    this.columns.forEach((column, c) => column.draw(row.cells[c], this.items[at]));
  }

  select(at, scroll = true) {
    this.selected = at;
    for (const row of this.pool) row.element.classList.toggle("selected", row.at === at && at >= 0);
    if (at < 0) return;
    if (scroll) this.reveal(at);
    this.onSelect?.(this.items[at]);
  }

  move(by) {
    if (this.length) this.select(Math.max(0, Math.min(this.length - 1, this.selected + by)));
  }

  /** Scrolls as little as needed, or so that the row is in the middle. */
  reveal(at, middle = false) {
    const top = at * this.rowHeight;
    const above = this.above;
    let wanted = above;
    if (middle) wanted = Math.max(0, Math.min(this.total - this.viewHeight, top - this.viewHeight / 2));
    else if (top < above) wanted = top;
    else if (top + this.rowHeight > above + this.viewHeight) wanted = top + this.rowHeight - this.viewHeight;
    if (wanted === above) return;
    const all = this.total - this.viewHeight;
    const shown = Math.min(this.total, TALLEST) - this.viewHeight;
    this.scroller.scrollTop = all <= shown ? wanted : (wanted / all) * shown;
    this.draw();
  }

  open() {
    if (this.selected >= 0 && this.selected < this.length) this.onOpen(this.items[this.selected]);
  }

  onKey(event) {
    const page = Math.max(1, Math.floor(this.viewHeight / this.rowHeight) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key in steps && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      this.move(steps[event.key]);
    }
  }

  onClick(event) {
    const row = event.target.closest(".vt-row[data-at]");
    if (!row || event.target.closest("a")) return;
    this.select(Number(row.dataset.at), false);
    this.open();
  }
}
