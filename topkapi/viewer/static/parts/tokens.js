// Tokens as people read them: a strip of text with heat, one stop of the keyboard, arrows inside.

import { h } from "./dom.js";
import { tokenPieces } from "./format.js";
import { hideTip, showTip } from "./tips.js";

/** A single token by itself, blanks visible. */
export function tokenLabel(text, className = "") {
  return h(
    "span",
    { class: `tok-label ${className}` },
    tokenPieces(text).map(([piece, mark]) => (mark ? h("span", { class: "mark" }, piece) : piece)),
  );
}

/** The same as plain text, for labels and titles. */
export const tokenText = (text) =>
  tokenPieces(text)
    .map(([piece]) => piece)
    .join("");

/** Replaces what is in a cell by a token. */
export function setToken(cell, text) {
  cell.replaceChildren(...(text === null ? ["–"] : [tokenLabel(text)]));
}

/**
 * A strip of tokens. `paint(i)`: null, or {kind: "heat" | "rise" | "fall", share: 0..1} for the background.
 * `tip(i)`: lines of the note. `at`: the token that matters, marked. `gap(i)`: nothing is known of the token.
 * `onPick(i)`: clicked or Enter.
 */
export function tokenStrip({ tokens, label, paint, tip, at = -1, gap, onPick, className = "" }) {
  const parts = tokens.flatMap((text, i) => tokenSpan(text, i, i === at));
  const pieces = parts.filter((part) => typeof part !== "string");
  const strip = h("div", { class: `strip ${className}`, role: "group", "aria-label": label }, parts);
  strip.repaint = (newPaint = paint) => {
    paint = newPaint;
    pieces.forEach((piece, i) => setHeat(piece, paint(i)));
  };
  pieces.forEach((piece, i) => gap?.(i) && piece.classList.add("gap"));
  strip.repaint();
  let current = Math.max(0, at);
  if (pieces.length) pieces[current].tabIndex = 0;

  const point = (i) => {
    if (tip) showTip(pieces[i].getClientRects()[0] ?? pieces[i].getBoundingClientRect(), ...tip(i));
  };
  strip.pick = (i) => {
    for (const piece of pieces) piece.removeAttribute("aria-current");
    if (i >= 0 && i < pieces.length) pieces[i].setAttribute("aria-current", "true");
  };
  const of = (event) => {
    const piece = event.target.closest(".token");
    return piece ? Number(piece.dataset.i) : -1;
  };
  strip.addEventListener("pointerover", (event) => of(event) >= 0 && point(of(event)));
  strip.addEventListener("pointerleave", hideTip);
  strip.addEventListener("focusin", (event) => of(event) >= 0 && point(of(event)));
  strip.addEventListener("focusout", hideTip);
  strip.addEventListener("click", (event) => of(event) >= 0 && onPick?.(of(event)));
  strip.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (event.key in steps) {
      event.preventDefault();
      pieces[current].tabIndex = -1;
      current = Math.max(0, Math.min(pieces.length - 1, of(event) + steps[event.key]));
      pieces[current].tabIndex = 0;
      pieces[current].focus();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      onPick?.(of(event));
    }
  });
  return strip;
}

/** A token's span. A space that begins it stays outside, so that heat covers the word and not the gap before it. */
function tokenSpan(text, i, marked) {
  if (/^ \S/.test(text)) return [i ? " " : "", tokenSpan(text.slice(1), i, marked)].flat();
  if (/^ +$/.test(text)) return [blankSpan(text, i, marked)];
  const span = h("span", { class: marked ? "token at" : "token", tabIndex: -1, data: { i } });
  for (const part of text.split(/(\n|⏎|\r|\t)/)) {
    if (part === "\n" || part === "⏎")
      span.append(h("span", { class: "mark" }, "⏎"), h("span", { class: "break" }, "\n"));
    else if (part === "\r") span.append(h("span", { class: "mark" }, "␍"));
    else if (part === "\t") span.append(h("span", { class: "mark" }, "⇥"), " ");
    else if (part) span.append(part);
  }
  return [span];
}

/** Spaces alone: shown as a sign where they are marked or warm, and as they are elsewhere. */
function blankSpan(text, i, marked) {
  return h(
    "span",
    { class: marked ? "token blank at" : "token blank", tabIndex: -1, data: { i } },
    h("span", { class: "space" }, text),
    h("span", { class: "mark" }, "␣".repeat(text.length)),
  );
}

function setHeat(piece, heat) {
  piece.classList.remove("heat", "rise", "fall");
  if (!heat || !(heat.share > 0)) return;
  piece.classList.add(heat.kind);
  piece.style.setProperty("--share", Math.min(1, heat.share).toFixed(3));
}

/** Heat of a value beside the largest there can be. */
export const heatOf = (value, most) =>
  value > 0 && most > 0 ? { kind: "heat", share: 0.12 + 0.88 * (value / most) } : null;

/** Heat of a change on the diverging scale: `rise` above 0, `fall` below. */
export function changeOf(change, most) {
  if (!Number.isFinite(change) || !(most > 0) || change === 0 || change === null) return null;
  return { kind: change > 0 ? "rise" : "fall", share: Math.abs(change) / most };
}
