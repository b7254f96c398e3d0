// Starts the page: opens the backend, draws the bar, shows the page that the hash names, and listens to keys.

import { openBackend } from "./data.js";
import { fill, h } from "./parts/dom.js";
import { count } from "./parts/format.js";
import { isDark, toggleTheme } from "./parts/colours.js";
import { failureNote } from "./parts/work.js";
import { forgetIndex } from "./parts/store.js";
import { hideTip, startTips } from "./parts/tips.js";
import { go, link, parse } from "./router.js";
import { showHelp } from "./pages/help.js";
import * as latents from "./pages/latents.js";
import * as latent from "./pages/latent.js";
import * as prompt from "./pages/prompt.js";
import * as global from "./pages/global.js";
import * as runs from "./pages/runs.js";

// A page is {title(route), open(main, route, backend) -> {update(route), close(), keys}}.
const PAGES = { latents, latent, prompt, global, runs };
const NAV = [
  ["latents", "Latents"],
  ["prompt", "Prompt"],
  ["global", "Global"],
  ["runs", "Runs"],
];
const POLL = 1500; // milliseconds between questions about what is being loaded

const main = document.getElementById("main");
let backend;
let shown = null; // {name, id, page}

async function start() {
  startTips();
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  try {
    [backend] = await Promise.all([openBackend(), document.fonts.load("14px Inter").catch(() => [])]);
  } catch (failure) {
    fill(main, failureNote(failure));
    return;
  }
  drawBar();
  addEventListener("hashchange", show);
  document.addEventListener("keydown", onKey);
  show();
  watch();
}

function drawBar() {
  const { about } = backend;
  const links = NAV.map(([name, text]) => h("a", { href: link(name), data: { page: name } }, text));
  const theme = h("button", {
    class: "icon",
    type: "button",
    "aria-label": "Light or dark",
    data: { tip: "Light or dark" },
    on: {
      click: () => {
        toggleTheme();
        drawTheme();
      },
    },
  });
  const drawTheme = () => fill(theme, isDark() ? "☀" : "☾");
  drawTheme();
  const state = h("span", { class: "model-state", id: "model-state" });
  const facts =
    `${about.site} of ${shortName(about.language_model)} · ${count(about.n_latents)} latents, k = ` + `${about.k}`;
  fill(
    document.getElementById("bar"),
    h(
      "div",
      { class: "bar-in" },
      h("a", { class: "brand", href: link("latents") }, h("img", { src: "icon.svg", alt: "" }), "Topkapi"),
      h("div", { class: "run-name" }, h("b", {}, about.name), h("span", { title: facts }, facts)),
      h("nav", { "aria-label": "Pages" }, links),
      h(
        "div",
        { class: "bar-tools" },
        state,
        theme,
        h(
          "button",
          {
            class: "icon",
            type: "button",
            "aria-label": "Help and keys",
            data: { tip: "Help and keys: ?" },
            on: { click: showHelp },
          },
          "?",
        ),
      ),
    ),
  );
  drawModelState();
}

const shortName = (name = "") => name.replace(/^pip:/, "").split("/").slice(-1)[0];

function drawModelState() {
  const { about } = backend;
  const state = about.static ? "export" : (about.model?.state ?? "off");
  const said = {
    ready: "model ready",
    loading: "loading model",
    failed: "model failed",
    off: "model off",
    export: "export",
  }[state];
  const place = document.getElementById("model-state");
  place.className = `model-state ${state}`;
  place.textContent = said;
  if (about.model?.why && state !== "ready") place.dataset.tip = about.model.why;
  else delete place.dataset.tip;
}

/** Asks until the model and the index are there; pages hear of it by the event "about". */
async function watch() {
  const waiting = () => backend.about.model?.state === "loading" || backend.about.index?.state === "building";
  while (!backend.isStatic && waiting()) {
    await new Promise((resume) => setTimeout(resume, POLL));
    const before = backend.about;
    try {
      const now = await backend.refresh();
      drawModelState();
      if (before.index?.state === "building" && now.index?.state === "ready") forgetIndex();
      document.dispatchEvent(new CustomEvent("about", { detail: { before, now } }));
    } catch {
      // The next question may be answered.
    }
  }
}

function show() {
  hideTip();
  const route = parse(location.hash);
  const name = Object.hasOwn(PAGES, route.page) ? route.page : "latents";
  for (const a of document.querySelectorAll("nav a")) {
    const here = a.dataset.page === name || (name === "latent" && a.dataset.page === "latents");
    if (here) a.setAttribute("aria-current", "page");
    else a.removeAttribute("aria-current");
  }
  document.title = `${PAGES[name].title(route)} · ${backend.about.name} · Topkapi`;
  if (shown?.name === name && shown.id === route.id) return shown.page.update?.(route);
  shown?.page.close?.();
  fill(main);
  scrollTo(0, 0);
  main.dataset.page = name;
  shown = { name, id: route.id, page: PAGES[name].open(main, route, backend) };
}

const PLACES = { l: "latents", p: "prompt", o: "global", r: "runs" };
let leader = 0; // when g was pressed

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const typing = event.target.closest?.("input:not([type=range]):not([type=checkbox]), textarea, select");
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (Date.now() - leader < 1200 && event.key in PLACES) {
    leader = 0;
    event.preventDefault();
    go(link(PLACES[event.key]));
  } else if (event.key === "g") leader = Date.now();
  else if (event.key === "?") showHelp();
  else if (event.key === "/") {
    event.preventDefault();
    const box = main.querySelector("[data-search]");
    if (box) box.focus();
    else go(link("latents", "", { focus: 1 }));
  } else if (shown?.page.keys?.(event.key, event)) event.preventDefault();
}

start();
