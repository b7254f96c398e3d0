"""A headless Chromium for tests of the page, and a page that notices what must not happen."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
QUIET = ["quic", "background-networking", "component-update", "sync", "gpu"]
ARGUMENTS = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((part, i) => part * a + under[i] * (1 - a));
  const behind = (element) => element
    ? over(rgba(getComputedStyle(element).backgroundColor), behind(element.parentElement)) : [255, 255, 255];
  const linear = (part) => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join("").trim();
    const box = element.getBoundingClientRect();
    if (!text || !box.width || box.width < 2 || element.closest(":disabled, [aria-hidden], .unseen, .skip")) continue;
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const style = getComputedStyle(element);
    const under = behind(element);
    const [a, b] = [light(over(rgba(style.color), under)), light(under)].sort((x, y) => y - x);
    const wanted = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
    const contrast = (a + 0.05) / (b + 0.05);
    const name = element.className || element.tagName;
    if (contrast < wanted) found.push(`${contrast.toFixed(2)}: ${name} “${text.slice(0, 40)}”`);
  }
  return [...new Set(found)];
}"""  # of an element's own text; backgrounds that are images are passed over
PATIENCE = 8_000  # milliseconds until something must have happened


def missing() -> str | None:
    """Why there is no browser; None where there is one."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "the page is tested with playwright, which is not installed: pip install playwright"
    return None if CHROMIUM.exists() else f"the page is tested in {CHROMIUM}, which is not there: apt install chromium"


@contextmanager
def chromium() -> Iterator:
    """A browser. Skips the tests where there is none, or fails them with TOPKAPI_BROWSER=required."""
    if reason := missing():
        (pytest.fail if os.environ.get("TOPKAPI_BROWSER") == "required" else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Window:
    """A page of the viewer at `address`; `complaints` are errors of scripts, of the console and of the policy."""

    def __init__(self, context, address: str) -> None:
        self.page, self.address = context.new_page(), address
        self.page.set_default_timeout(PATIENCE)
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(f"script: {error}"))
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))

    def go(self, hash_: str, until: str = "main .card") -> None:
        """Show a hash and wait for an element of its page."""
        self.page.goto(f"{self.address}{hash_}")
        self.page.wait_for_selector(until)

    def text(self, selector: str) -> str:
        """What an element says."""
        return self.page.locator(selector).first.inner_text()

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript expression is true. Playwright's own waiting would need `eval` in the page."""
        end = time.monotonic() + PATIENCE / 1000
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, f"not so after {PATIENCE / 1000:g} s: {condition}"
            self.page.wait_for_timeout(20)

    def ask(self, path: str):
        """The JSON answer of the server, as the page gets it."""
        return self.page.evaluate("path => fetch(path).then(answer => answer.json())", path)

    def faint(self) -> list[str]:
        """Texts in sight whose contrast with what is behind them is below that of WCAG 2.2, level AA."""
        return self.page.evaluate(CONTRAST)

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
