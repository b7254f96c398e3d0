// Work that takes a while: a progress bar after a moment, a button to cancel, and what went wrong in words.

import { announce, fill, h, stateNote } from "./dom.js";
import { Failure } from "../data.js";

const PATIENCE = 300; // milliseconds before the bar is shown

/** Runs one piece of work at a time in `host`; a new one cancels the one before. */
export class Work {
  constructor(host) {
    this.host = host;
  }

  /** The result of `ask(onProgress, signal)`; undefined if it failed or was cancelled, which the host then says. */
  async run(what, ask) {
    this.cancel();
    const controller = new AbortController();
    this.controller = controller;
    const bar = h("progress", { "aria-label": what });
    const said = h("span", { class: "work-what" }, what);
    const stop = h("button", { type: "button", class: "quiet", on: { click: () => this.cancel() } }, "Cancel");
    const show = setTimeout(() => fill(this.host, h("div", { class: "work" }, said, bar, stop)), PATIENCE);
    const progress = ({ done, total, what: step }) => {
      said.textContent = step && step !== what.toLowerCase() ? `${what} · ${step}` : what;
      if (total > 0) Object.assign(bar, { max: total, value: done });
      else bar.removeAttribute("value");
    };
    try {
      const result = await ask(progress, controller.signal);
      if (this.controller !== controller) return undefined;
      fill(this.host);
      announce(`${what}: done`);
      return result;
    } catch (failure) {
      if (this.controller !== controller && failure.name === "AbortError") return undefined;
      if (failure.name === "AbortError") fill(this.host, stateNote("quiet", "Cancelled."));
      else fill(this.host, failureNote(failure));
      return undefined;
    } finally {
      clearTimeout(show);
    }
  }

  cancel() {
    this.controller?.abort();
  }
}

/** A failure as a note: what we expected in its own words, anything else as a fault of the page. */
export function failureNote(failure) {
  if (!(failure instanceof Failure)) console.error(failure);
  return stateNote("failed", "This did not work.", failure.message);
}

/** Why the model cannot be asked, as a note; null where it can. */
export function modelNote(backend) {
  const { model = {}, static: exported } = backend.about;
  const state = exported ? "off" : model.state;
  if (state === "ready") return null;
  if (state === "loading") return stateNote("quiet", "The model is being loaded …", "This works in a moment.");
  if (state === "failed") return stateNote("failed", "The model could not be loaded.", model.why);
  const hint = h("p", {}, "needs the model: ", h("code", {}, "topkapi view RUN"));
  return stateNote("quiet", exported ? "This is an export: numbers without a model." : "The model is off.", null, hint);
}
