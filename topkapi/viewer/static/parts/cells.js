// A strip with a cell a token, as one element however many tokens there are: a gradient with hard stops.

import { h } from "./dom.js";
import { hideTip, showTip } from "./tips.js";

const WIDEST = 28; // pixels of a cell

/** `paints`: of each token null or {kind: "heat" | "rise" | "fall", share}. `here`: a token to mark.
 * `tip(i)`: lines of a note. */
export function cellStrip(paints, { here = null, tip = null, label = null } = {}) {
  const n = paints.length;
  const at = (i) => `${((100 * i) / n).toFixed(3)}%`;
  const stops = [];
  paints.forEach((paint, i) => {
    if (paint)
      stops.push(["transparent", at(i)], [mixed(paint), at(i)], [mixed(paint), at(i + 1)], ["transparent", at(i + 1)]);
  });
  const strip = h("span", {
    class: "cells",
    style: { "max-width": `${n * WIDEST}px` },
    ...(label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" }),
  });
  if (stops.length)
    strip.style.backgroundImage = `linear-gradient(90deg, ${stops.map((stop) => stop.join(" ")).join(", ")})`;
  if (here !== null) strip.append(h("i", { style: { left: at(here), width: at(1) } }));
  if (tip) {
    strip.addEventListener("pointermove", (event) => {
      const box = strip.getBoundingClientRect();
      const i = Math.max(0, Math.min(n - 1, Math.floor(((event.clientX - box.left) / box.width) * n)));
      showTip({ left: event.clientX, right: event.clientX, top: box.top, bottom: box.bottom }, ...tip(i));
    });
    strip.addEventListener("pointerleave", hideTip);
  }
  return strip;
}

const mixed = ({ kind, share }) =>
  `color-mix(in oklab, var(--${kind}) ${(100 * Math.min(1, share)).toFixed(1)}%, transparent)`;
