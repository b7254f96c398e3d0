// Chooses light or dark before anything is drawn, so that a page never flashes in the wrong one.
try {
  const kept = localStorage.getItem("topkapi-theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
} catch {
  // No storage, as in a private window: the system's choice holds.
}
