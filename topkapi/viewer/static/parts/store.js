// What several pages need and is read once: the index of latents with its labels.

import { Index } from "./index.js";

let asked = null;

/** The index; the same one for all pages until `forgetIndex`. */
export function theIndex(backend) {
  asked ??= Promise.all([backend.columns(), backend.labels()])
    .then(([columns, labels]) => new Index(columns, labels))
    .catch((failure) => {
      asked = null;
      throw failure;
    });
  return asked;
}

/** Reads the columns again, as when modes have been counted. */
export function forgetIndex() {
  asked = null;
}

/** Tells the index of a label that was saved. */
export async function labelSaved(i, { label, note }) {
  const index = await asked?.catch(() => null);
  if (!index) return;
  const labels = Object.fromEntries(index.labels);
  if (label || note) labels[i] = { label, note };
  else delete labels[i];
  index.setLabels(labels);
}
