// The colours of the style sheet, resolved for canvases, and the choice between light and dark.

const NAMES = ["ink", "soft", "line", "grid", "accent", "heat", "rise", "fall", "surface", "faint", "second"];
const probe = document.createElement("span");
probe.hidden = true;

/** {ink: "rgb(...)", ...} as they are now. */
export function colours() {
  if (!probe.isConnected) document.body.append(probe);
  return Object.fromEntries(
    NAMES.map((name) => {
      probe.style.color = `var(--${name})`;
      return [name, getComputedStyle(probe).color];
    }),
  );
}

/** [r, g, b] from 0 to 255 of a resolved colour. */
export function channels(colour) {
  const pixel = new OffscreenCanvas(1, 1).getContext("2d");
  pixel.fillStyle = colour;
  pixel.fillRect(0, 0, 1, 1);
  return [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3);
}

const dark = matchMedia("(prefers-color-scheme: dark)");

export const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";

/** The other theme, remembered. */
export function toggleTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("topkapi-theme", theme);
  } catch {
    // It holds until the page is closed.
  }
  document.dispatchEvent(new Event("themechange"));
}

dark.addEventListener("change", () => document.dispatchEvent(new Event("themechange")));
