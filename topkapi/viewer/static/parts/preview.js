// The strongest examples of the latent that the pointer or the keys are at, beside the table.

import { card, fill, h } from "./dom.js";
import { number } from "./format.js";
import { heatOf, tokenLabel, tokenStrip, tokenText } from "./tokens.js";
import { link } from "../router.js";

const WAIT = 140; // milliseconds at one latent before its examples are asked for
const EXAMPLES = 5;
const AROUND = [9, 6]; // tokens shown before and after

export class Preview {
  constructor(backend, index) {
    Object.assign(this, { backend, index, shown: -1, due: 0 });
    this.host = h(
      "div",
      { class: "preview" },
      h("p", { class: "small" }, "Point at a row, or use j and k, to read where it fires most strongly."),
    );
    this.element = card("Preview", { className: "preview-card" }, this.host);
    this.heading = this.element.querySelector("h2");
  }

  show(i) {
    if (i === this.shown || !this.element.offsetParent) return; // it is hidden in narrow windows
    this.shown = i;
    clearTimeout(this.due);
    this.due = setTimeout(() => this.load(i), WAIT);
  }

  async load(i) {
    const index = this.index();
    const name = index.label(i) || (index.topToken(i) === null ? "" : tokenLabel(index.topToken(i)));
    try {
      const found = index.n_fired[i] ? await this.backend.examples(i, { kind: "top", n: EXAMPLES }) : { groups: [] };
      if (this.shown !== i) return;
      fill(this.heading, h("a", { href: link("latent", i) }, `Latent ${i}`), " ", h("span", { class: "dim" }, name));
      const examples = found.groups.flatMap((group) => group.examples).slice(0, EXAMPLES);
      fill(
        this.host,
        examples.length
          ? examples.map((example) => this.row(example, index.maximum[i]))
          : h("p", { class: "small" }, "It never fired."),
      );
    } catch (failure) {
      if (this.shown === i) fill(this.host, h("p", { class: "small" }, failure.message));
    }
  }

  row({ value, tokens, values, at }, maximum) {
    const first = Math.max(0, at - AROUND[0]);
    const part = tokens.slice(first, at + AROUND[1] + 1);
    return h(
      "div",
      { class: "preview-row" },
      h("span", { class: "num" }, number(value)),
      tokenStrip({
        tokens: part,
        at: at - first,
        label: `A firing of ${number(value)} on “${tokenText(tokens[at])}”`,
        paint: (j) => heatOf(values[j + first], maximum),
      }),
    );
  }
}
