// The name and the note that people give to a latent, saved as they type, and when the page is left.

import { card, h } from "./dom.js";

const SAVE_AFTER = 700; // milliseconds of quiet before a label is saved
const NONE = { label: "", note: "" };

/** The card; {element, close()}. `onSaved({label, note})`. Read-only in an export. */
export function labelCard(backend, i, saved, onSaved) {
  const { isStatic } = backend;
  const state = h(
    "span",
    { class: "saved", role: "status" },
    isStatic ? "An export cannot be changed." : saved ? "Saved" : "",
  );
  const label = h("input", {
    type: "text",
    id: "label",
    maxLength: 200,
    value: saved?.label ?? "",
    readOnly: isStatic,
    placeholder: isStatic ? "no label" : "a few words",
    autocomplete: "off",
  });
  const note = h("textarea", {
    id: "note",
    rows: 2,
    maxLength: 10000,
    value: saved?.note ?? "",
    readOnly: isStatic,
    placeholder: isStatic ? "" : "what speaks for it, what against",
  });
  const send = async (said) => (await backend.saveLabel(i, said.label, said.note)).replaced[i] ?? NONE;
  const close = isStatic
    ? () => {}
    : saveOnChange({ label, note, state }, saved ?? NONE, send, onSaved);
  const element = card(
    "Label",
    { beside: state },
    h(
      "div",
      { class: "label-form" },
      h("div", { class: "field" }, h("label", { for: "label" }, "Label"), label),
      h("div", { class: "field" }, h("label", { for: "note" }, "Note"), note),
    ),
  );
  return { element, close };
}

/**
 * Saves after a moment of quiet, and says so, and what of another window's that took the place of; `known` is what was
 * saved so far. Returns what saves at once and listens no more.
 */
function saveOnChange({ label, note, state }, known, send, onSaved) {
  let due;
  let isUnsaved = false;
  let isSaving = false;
  const say = (text, failed = false) => {
    state.textContent = text;
    state.classList.toggle("failed", failed);
  };
  /** Saves what is written now, whatever is on its way; whether it was saved. */
  const saveAnyway = async () => {
    clearTimeout(due);
    due = undefined;
    isUnsaved = false;
    const said = { label: label.value.trim(), note: note.value.trim() };
    say("Saving …");
    try {
      const replaced = await send(said);
      onSaved(said);
      const lost = [NONE, known, said].some((one) => isSame(one, replaced)) ? "" : `${replaced.label} ${replaced.note}`;
      known = said;
      if (!due) say(lost ? `Saved, in place of what another window saved: “${lost.trim()}”` : "Saved");
      return true;
    } catch (failure) {
      isUnsaved = true;
      say(`Not saved: ${failure.message}`, true);
      return false;
    }
  };
  /** Saves one after the other, as two on their way may cross: what is written meanwhile is saved when one is done. */
  const save = async () => {
    clearTimeout(due);
    due = undefined;
    if (isSaving) return;
    isSaving = true;
    while ((await saveAnyway()) && isUnsaved && !due);
    isSaving = false;
  };
  const saveNow = () => isUnsaved && save();
  const leave = () => isUnsaved && saveAnyway(); // nothing may be left to be done afterwards
  for (const input of [label, note]) {
    input.addEventListener("input", () => {
      say("Not saved yet");
      isUnsaved = true;
      clearTimeout(due);
      due = setTimeout(save, SAVE_AFTER);
    });
    input.addEventListener("change", saveNow);
  }
  label.addEventListener("keydown", (event) => event.key === "Enter" && saveNow());
  addEventListener("pagehide", leave);
  document.addEventListener("visibilitychange", leave);
  return () => {
    removeEventListener("pagehide", leave);
    document.removeEventListener("visibilitychange", leave);
    leave();
  };
}

const isSame = (one, other) => one.label === other.label && one.note === other.note;
