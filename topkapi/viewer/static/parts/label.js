// The name and the note that people give to a latent, saved as they type, and when the page is left.

import { card, h } from "./dom.js";

const SAVE_AFTER = 700; // milliseconds of quiet before a label is saved

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
  const close = isStatic
    ? () => {}
    : saveOnChange({ label, note, state }, (said) => backend.saveLabel(i, said.label, said.note), onSaved);
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

/** Saves after a moment of quiet, and says so; returns what saves at once and listens no more. */
function saveOnChange({ label, note, state }, send, onSaved) {
  let due;
  let isUnsaved = false;
  const say = (text, failed = false) => {
    state.textContent = text;
    state.classList.toggle("failed", failed);
  };
  const save = async () => {
    clearTimeout(due);
    due = undefined;
    isUnsaved = false;
    const said = { label: label.value.trim(), note: note.value.trim() };
    say("Saving …");
    try {
      await send(said);
      onSaved(said);
      if (!due) say("Saved");
    } catch (failure) {
      isUnsaved = true;
      say(`Not saved: ${failure.message}`, true);
    }
  };
  const saveNow = () => isUnsaved && save();
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
  addEventListener("pagehide", saveNow);
  document.addEventListener("visibilitychange", saveNow);
  return () => {
    removeEventListener("pagehide", saveNow);
    document.removeEventListener("visibilitychange", saveNow);
    saveNow();
  };
}
