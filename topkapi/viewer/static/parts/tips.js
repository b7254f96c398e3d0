// One floating note for everything: elements with data-tip, tokens, and points of charts.

import { fill, h } from "./dom.js";

const note = h("div", { class: "tip", id: "tip", role: "tooltip", hidden: true });

/** Shows lines (texts or elements) beside a rectangle of the window: {left, top, right, bottom}. */
export function showTip(rect, ...lines) {
  fill(
    note,
    lines.map((line) => (typeof line === "string" ? h("div", {}, line) : line)),
  );
  note.hidden = false;
  const { width, height } = note.getBoundingClientRect();
  const left = Math.max(8, Math.min(innerWidth - width - 8, (rect.left + rect.right) / 2 - width / 2));
  const above = rect.top - height - 8;
  note.style.left = `${left}px`;
  note.style.top = `${above > 8 ? above : Math.min(rect.bottom + 8, innerHeight - height - 8)}px`;
}

export function hideTip() {
  note.hidden = true;
}

/** Starts showing the notes of elements with data-tip. */
export function startTips() {
  document.body.append(note);
  const shown = (event) => {
    const owner = event.target.closest?.("[data-tip]");
    if (owner) showTip(owner.getBoundingClientRect(), owner.dataset.tip);
  };
  for (const type of ["pointerover", "focusin"]) document.addEventListener(type, shown);
  // A touch neither hovers nor focuses; buttons that do something keep their note out of the way of what they did.
  document.addEventListener("click", (event) => (event.target.closest?.(".term, .explain") ? shown(event) : hideTip()));
  const left = (event) => {
    if (event.target.closest?.("[data-tip]")) hideTip();
  };
  for (const type of ["pointerout", "focusout"]) document.addEventListener(type, left);
  document.addEventListener("scroll", hideTip, { capture: true, passive: true });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
}
