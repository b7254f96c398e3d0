// A prompt: which latents are active on it, what they cause, and what changes when they are edited.

import { announce, card, fill, h, stateNote } from "../parts/dom.js";
import { attributionPanel } from "../parts/attribution.js";
import { count, number, percent } from "../parts/format.js";
import { steeringPanel } from "../parts/steering.js";
import { theIndex } from "../parts/store.js";
import { heatOf, tokenLabel, tokenStrip, tokenText } from "../parts/tokens.js";
import { activeList } from "../parts/active.js";
import { Work, modelNote } from "../parts/work.js";
import { link, note, parse } from "../router.js";

const EXAMPLES = [
  "The capital of France is",
  "When Mary and John went to the store, John gave a drink to",
  "def fibonacci(n):\n    if n < 2:\n        return",
];

export const title = () => "Prompt";

export function open(main, route, backend) {
  return new PromptPage(main, route, backend);
}

class PromptPage {
  constructor(main, route, backend) {
    Object.assign(this, { main, backend, state: route.query, closed: false, index: null });
    theIndex(backend).then(
      (index) => {
        this.index = index;
        if (this.result) this.drawTokens();
      },
      () => {},
    );
    this.onAbout = ({ detail: { before, now } }) => before.model?.state !== now.model?.state && this.modelChanged();
    document.addEventListener("about", this.onAbout);
    this.draw();
  }

  draw() {
    const most = this.backend.about.limits?.prompt_tokens;
    this.text = h("textarea", {
      id: "prompt",
      rows: 2,
      spellcheck: false,
      value: this.state.text ?? "",
      placeholder: "Write something for the model to read",
      on: { keydown: (event) => (event.ctrlKey || event.metaKey) && event.key === "Enter" && this.run() },
    });
    this.button = h("button", { type: "button", class: "main", on: { click: () => this.run() } }, "Run");
    this.status = h("div", { class: "work-host" });
    this.work = new Work(this.status);
    this.results = h("div", { class: "stack" });
    const examples = EXAMPLES.map((text) =>
      h(
        "button",
        {
          type: "button",
          class: "quiet",
          on: {
            click: () => {
              this.text.value = text;
              this.run();
            },
          },
        },
        text.split("\n")[0],
      ),
    );
    fill(
      this.main,
      h(
        "div",
        { class: "stack" },
        h(
          "section",
          { class: "card prompt-form", "aria-label": "Prompt" },
          h("div", { class: "card-head" }, h("h1", {}, h("label", { for: "prompt" }, "Prompt"))),
          this.text,
          h(
            "div",
            { class: "row" },
            this.button,
            h(
              "span",
              { class: "hint" },
              h("kbd", {}, "Ctrl"),
              " ",
              h("kbd", {}, "Enter"),
              most ? ` · up to ${most} tokens` : "",
            ),
            h("span", { class: "beside examples-of" }, h("span", { class: "hint" }, "try"), examples),
          ),
          this.status,
        ),
        this.results,
      ),
    );
    this.steering = steeringPanel({
      backend: this.backend,
      state: this.state,
      prompt: () => this.text.value,
      remember: (state) => this.remember(state),
      index: () => this.index,
    });
    this.drawEmpty();
    this.modelChanged();
  }

  drawEmpty() {
    fill(this.results, this.steering.element);
  }

  modelChanged() {
    const blocked = modelNote(this.backend);
    this.button.disabled = Boolean(blocked);
    this.steering.setReady(!blocked);
    fill(this.status, blocked);
    if (!blocked && this.state.text && !this.result) this.run();
  }

  async run() {
    const text = this.text.value;
    if (this.button.disabled) return;
    if (!text.trim()) {
      fill(this.status, stateNote("quiet", "The prompt is empty.", ""));
      return;
    }
    this.remember({ text, token: text === this.state.text ? this.state.token : "" });
    const found = await this.work.run("Reading the prompt", (progress, signal) =>
      this.backend.work("prompt", { text }, progress, signal),
    );
    if (!found || this.closed) return;
    this.result = found;
    this.ran = text;
    this.drawResults();
    announce(`${found.tokens.length} tokens`);
  }

  drawResults() {
    this.tokensHost = h("div", {});
    this.tokensScale = h("span", { class: "scale heat" });
    this.listHost = h("div", {});
    this.attribution = attributionPanel({
      backend: this.backend,
      state: this.state,
      prompt: () => this.ran,
      tokens: this.result.tokens,
      remember: (state) => this.remember(state),
      index: () => this.index,
      steer: (latent) => this.steer(latent),
    });
    fill(
      this.results,
      h(
        "div",
        { class: "prompt-grid" },
        h(
          "div",
          { class: "stack" },
          card(
            "Tokens",
            {
              beside: this.tokensScale,
              info:
                "Colour: how badly the autoencoder explains a token's activation (its normalized squared error). " +
                "Point at a latent below to see where it is active; click a token to see its latents.",
            },
            this.tokensHost,
          ),
          this.listHost,
        ),
        this.nextCard(),
      ),
      this.attribution.element,
      this.steering.element,
    );
    this.drawTokens();
  }

  drawTokens() {
    const { tokens } = this.result;
    this.worst = Math.max(1e-9, ...tokens.map((token) => token.error ?? 0));
    this.strip = tokenStrip({
      tokens: tokens.map((token) => token.text),
      label: "Tokens of the prompt",
      className: "prompt-strip pickable",
      paint: this.errorPaint,
      gap: (i) => !tokens[i].kept,
      tip: (i) => this.tip(i),
      onPick: (i) => this.pick(i),
    });
    fill(this.tokensHost, this.strip);
    this.showScale(null);
    this.drawList();
  }

  errorPaint = (i) => {
    const token = this.result.tokens[i];
    return token.kept ? heatOf(token.error, this.worst) : null;
  };

  showScale(latent, most) {
    if (latent === null) fill(this.tokensScale, "error 0", h("i"), number(this.worst));
    else fill(this.tokensScale, `latent ${latent} 0`, h("i"), number(most));
  }

  tip(i) {
    const { error, active, n_active: nActive, kept, text } = this.result.tokens[i];
    const lines = [h("b", {}, tokenText(text)), `error ${number(error)} · ${count(nActive)} latents`];
    if (!kept) lines.push("not a token that the autoencoder was trained on");
    if (this.pointed !== undefined && this.pointed !== null)
      lines.push(`latent ${this.pointed}: ${number(active.find(([latent]) => latent === this.pointed)?.[1] ?? 0)}`);
    return lines;
  }

  get token() {
    const at = this.state.token === undefined || this.state.token === "" ? null : Number(this.state.token);
    return at !== null && this.result.tokens[at] ? at : null;
  }

  pick(i) {
    this.remember({ token: this.token === i ? "" : String(i) });
    this.drawList();
  }

  drawList() {
    this.strip.pick(this.token ?? -1);
    const list = activeList({
      tokens: this.result.tokens,
      token: this.token,
      index: this.index,
      onPoint: (latent) => this.point(latent),
      steer: (latent) => this.steer(latent),
    });
    const clear =
      this.token !== null &&
      h("button", { class: "quiet", type: "button", on: { click: () => this.pick(this.token) } }, "Whole prompt");
    const head =
      this.token === null
        ? "Active latents"
        : h("span", {}, "Active on ", tokenLabel(this.result.tokens[this.token].text));
    const made = card(
      "",
      {
        beside: clear,
        info:
          this.token === null
            ? "Latents of all tokens, those nearest to their own maximum first. Each strip has a cell a token."
            : "Latents of this token, strongest first.",
      },
      list,
    );
    made.querySelector("h2").append(head);
    fill(this.listHost, made);
  }

  /** Paints the prompt by one latent, or by error again. */
  point(latent) {
    this.pointed = latent;
    if (latent === null) {
      this.strip.repaint(this.errorPaint);
      this.showScale(null);
      return;
    }
    const values = this.result.tokens.map(({ active, kept }) =>
      kept ? (active.find(([other]) => other === latent)?.[1] ?? 0) : 0,
    );
    const most = Math.max(...values, this.index?.maximum[latent] || 0);
    this.strip.repaint((i) => heatOf(values[i], most));
    this.showScale(latent, most);
  }

  nextCard() {
    const add = (side) => (text) => this.attribution.add(side, text);
    const row = ({ text, p }) =>
      h(
        "li",
        { class: "sharebar", style: { "--share": p.toFixed(4) } },
        h("span", { class: "what" }, tokenLabel(text)),
        h("span", { class: "num" }, percent(p)),
        ...[
          ["positive", "+", "for"],
          ["negative", "−", "against"],
        ].map(([side, sign, word]) =>
          h(
            "button",
            {
              type: "button",
              "aria-label": `Attribute ${word} “${tokenText(text)}”`,
              data: { tip: `Ask which latents speak ${word} it` },
              on: { click: () => add(side)(text) },
            },
            sign,
          ),
        ),
      );
    return card(
      "Next token",
      { info: "What the model predicts after the prompt. + and − choose tokens for the attribution below." },
      h("ol", { class: "next" }, this.result.next.map(row)),
    );
  }

  steer(latent) {
    this.steering.add(latent);
  }

  remember(state) {
    this.state = { ...this.state, ...state };
    note(link("prompt", "", this.state));
    this.state = parse(location.hash).query;
  }

  update(route) {
    const before = this.state;
    this.state = route.query;
    if ((before.text ?? "") !== (this.state.text ?? "")) {
      this.text.value = this.state.text ?? "";
      if (this.state.text) this.run();
    } else if (this.result) this.drawList();
    if ((before.edits ?? "") !== (this.state.edits ?? "")) this.steering.setState(this.state);
  }

  close() {
    this.closed = true;
    this.work.cancel();
    this.attribution?.close();
    this.steering.close();
    document.removeEventListener("about", this.onAbout);
  }
}
