"""The page in a real browser: what it shows is what the API says, and it can be used by keys and in narrow windows.

Mutations seen to fail: rows sorted ascending where descending is asked; `innerHTML` for a label; the range of a mode
not sent to the server; a label kept in the page alone, or not saved when the page is left, or not tried again, or
sent while another is on its way; names of metrics looked up among those that every object has; softer text in light
windows; a table wider than a telephone.
"""

import json
import os
import re
import shutil
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

import topkapi.study
from tests.viewer.browser import Window, chromium
from tests.viewer.serving import served
from tests.viewer.test_damaged_files import POINT
from topkapi.viewer.app import STATIC
from topkapi.viewer.export import export

ROWS = ".vt-body .vt-row:not([hidden])"
PAGES = {
    "#/latents": ROWS,
    "#/latent/LATENT": ".example",
    "#/prompt": "#prompt",
    "#/global": ".chart canvas",
    "#/runs": "table.runs",
}
VALUES = "all => all.map(one => Number(one.firstChild.data))"
MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A run of this module's own, with a label that must not act as markup."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("pages") / "tiny")
    study = topkapi.study.open(run / "study", run)
    marked = {"3": {"label": MARKUP, "note": "<script>alert(2)</script>"}}
    about = {"autoencoder": study.identity["autoencoder"], "labels": marked}
    (run / "labels.json").write_text(json.dumps(about), encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def study(run):
    return topkapi.study.open(run / "study", run)


@pytest.fixture(scope="module")
def busiest(study):
    """The latent that fires most often."""
    return int(study.n_fired.argmax())


@pytest.fixture(scope="module")
def address(run):
    with served(run) as address:
        yield address


@pytest.fixture(scope="module")
def context(browser, address):
    """One profile for all tests, and a server whose model is there."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, reduced_motion="reduce")
    window = Window(context, address)
    window.go("#/latents", ".model-state")
    window.wait_for("document.querySelector('.model-state').className.includes('ready')")
    window.wait_for("fetch('api/about').then(answer => answer.json()).then(said => said.index.state === 'ready')")
    window.page.close()
    return context


@pytest.fixture
def window(context, address):
    """A page in which nothing may go wrong."""
    window = Window(context, address)
    yield window
    window.page.close()
    assert window.complaints == []


def rows(window):
    """The numbers of the latents in sight, from the top."""
    found = window.page.evaluate(
        "[...document.querySelectorAll('.vt-body .vt-row:not([hidden])')]"
        ".map(row => [Number(row.dataset.at), Number(row.querySelector('a').textContent)])"
    )
    return [latent for _, latent in sorted(found)]


def shown(value):
    """A number as the page writes it."""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.2e}".replace("e-0", "e-")


def test_all_modules_are_fetched_at_once():
    modules = {path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*.js") if "vendor" not in path.parts}
    named = re.findall('modulepreload" href="([^"]*)"', (STATIC / "index.html").read_text(encoding="utf-8"))
    assert sorted(named) == sorted(modules - {"app.js", "theme.js"})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_three_widths_and_can_be_read_in_light_and_dark(context, address, busiest, scheme):
    window = Window(context, address)
    window.page.emulate_media(color_scheme=scheme)
    for hash_, until in PAGES.items():
        window.page.set_viewport_size({"width": 1400, "height": 800})
        window.go(hash_.replace("LATENT", str(busiest)), until)
        assert window.faint() == [], hash_
        for width in (1400, 768, 360):
            window.page.set_viewport_size({"width": width, "height": 800})
            window.page.wait_for_timeout(60)  # charts follow in the next frame
            assert window.overflow() <= 0, (hash_, width)
    window.page.close()
    assert window.complaints == []


def test_a_latents_numbers_are_the_studys(window, study, busiest):
    latent = study.latent(busiest)
    window.go(f"#/latent/{busiest}", ".example")
    figures = {name: window.text(f'[data-figure="{name}"] dd') for name in ("fired", "mean", "maximum")}
    assert figures["fired"].replace("\u202f", "") == str(latent.n_fired)
    for name in ("mean", "maximum"):
        assert float(figures[name]) == pytest.approx(float(shown(getattr(latent, name))))
    low, high = window.ask(f"api/latent/{busiest}")["density_interval"]
    said = [float(part) for part in re.findall(r"[\d.e-]+", window.text('[data-figure="density"] .sub'))]
    assert said == pytest.approx([low, high], rel=5e-3)
    values = window.page.locator(".example .value").evaluate_all(VALUES)
    assert values == pytest.approx([one.value for one in latent.top(10)], rel=5e-3)


def test_the_table_sorts_and_filters_as_the_study_does(window, study):
    window.go("#/latents", ROWS)
    by_importance = sorted(range(study.n_latents), key=lambda i: (-study.importance[i].astype("f4"), i))
    assert rows(window)[:12] == by_importance[:12]
    window.page.get_by_role("button", name="Density", exact=True).click()
    by_density = sorted(range(study.n_latents), key=lambda i: (-study.n_fired[i], i))
    assert rows(window)[:12] == by_density[:12]
    middle = float(sorted(study.density)[study.n_latents // 2])
    window.page.keyboard.press("/")
    window.page.keyboard.type(f"density<{middle:.6g} dead:no")
    wanted = [i for i in by_density if 0 < study.density[i] < float(f"{middle:.6g}")]
    window.wait_for(f"document.querySelector('.shown-count').textContent.startsWith('{len(wanted)} of')")
    assert rows(window)[:8] == wanted[:8]
    window.page.reload()
    window.page.wait_for_selector(ROWS)
    assert rows(window)[:8] == wanted[:8]  # the state is in the address


def test_a_mistaken_query_is_told_and_nothing_is_lost(window):
    told = "document.querySelector('.finder-error').textContent.includes('densty')"
    window.go("#/latents", ROWS)
    window.page.fill("[data-search]", "densty<1")
    window.wait_for(told)
    assert rows(window)
    window.page.reload()
    window.page.wait_for_selector(ROWS)
    window.wait_for(told)


def test_a_brush_keeps_what_lies_in_it(window, study):
    window.go("#/latents", ".chart canvas")
    box = window.page.locator(".scatter-card .u-over").bounding_box()
    middle = box["x"] + box["width"] / 2
    window.page.mouse.move(box["x"] + 2, box["y"] + 2)
    window.page.mouse.down()
    window.page.mouse.move(middle, box["y"] + box["height"] - 2, steps=4)
    window.page.mouse.up()
    window.wait_for("location.hash.includes('box=')")
    bounds = window.page.evaluate("new URLSearchParams(location.hash.split('?')[1]).get('box')").split(",")
    low, high = (10 ** float(bound) for bound in bounds[:2])
    inside = [i for i in range(study.n_latents) if low <= study.density[i] <= high]
    assert 0 < len(inside) < study.n_latents
    assert set(rows(window)) <= set(inside)
    assert window.text(".shown-count").startswith(f"{len(inside)} of")
    drawn = window.page.locator(".u-select").bounding_box()
    window.page.reload()
    window.page.wait_for_selector(".brushed .u-select")
    again = window.page.locator(".u-select").bounding_box()
    assert all(abs(again[side] - drawn[side]) < 2 for side in drawn)  # pixels


def test_keys_alone_lead_from_the_table_to_a_latent_and_on(window):
    window.go("#/latents", ROWS)
    first, second = rows(window)[:2]
    window.page.keyboard.press("j")
    window.page.keyboard.press("j")
    window.page.keyboard.press("Enter")
    window.wait_for(f"location.hash.startsWith('#/latent/{second}')")
    window.wait_for(f"document.querySelector('h1')?.textContent.trim() === 'Latent {second}'")  # drawn after the hash
    window.page.keyboard.press("j" if second < 100 else "k")
    window.wait_for(f"document.querySelector('h1').textContent !== 'Latent {second}'")
    window.page.go_back()
    window.page.go_back()
    window.page.wait_for_selector(".vt-row.selected")
    assert window.page.locator(".vt-row.selected a").inner_text() == str(second)
    window.page.keyboard.press("k")
    assert window.page.locator(".vt-row.selected a").inner_text() == str(first)
    for key, name in zip("poru", ("Prompt", "The dictionary", "Runs", "Runs"), strict=True):
        window.page.keyboard.press("g")
        window.page.keyboard.press(key)
        window.wait_for(f"document.querySelector('h1')?.textContent === '{name}'")
    window.page.keyboard.press("?")
    window.page.wait_for_selector("dialog[open]")
    window.page.keyboard.press("Escape")
    window.page.wait_for_selector("dialog", state="detached")


def test_a_clicked_mode_shows_its_examples_alone(window, study, busiest):
    values = study.latent(busiest).values
    cut, end = float(sorted(values)[len(values) // 3]), float(values.max()) * 1.001
    modes = [
        {"low": 0.0, "high": cut, "peak": cut / 2, "share": 0.33},
        {"low": cut, "high": end, "peak": cut, "share": 0.67},
    ]

    def with_modes(route):
        answer = route.fetch()
        route.fulfill(response=answer, json=answer.json() | {"modes": modes})

    window.page.route(re.compile(rf"api/latent/{busiest}$"), with_modes)
    window.go(f"#/latent/{busiest}", ".mode")
    assert window.page.locator(".mode").count() == 2
    window.page.locator(".mode").first.click()
    n = int((values < cut).sum())
    window.wait_for(f"document.querySelector('.examples-note').textContent.includes('{n} firings')")
    found = window.page.locator(".example .value").evaluate_all(VALUES)
    assert found
    assert max(found) < cut * 1.005
    window.page.get_by_role("button", name="Show all values").click()
    window.wait_for("document.querySelectorAll('.examples-note .chip').length === 0")


def test_ablating_shows_the_effects_that_were_measured(window, study, busiest):
    window.go(f"#/latent/{busiest}?tab=random", ".example")
    row = study.latent(busiest).random(10, 0)[0].row
    with window.page.expect_request(re.compile("api/ablation")) as asked:
        window.page.get_by_role("button", name="Ablate").first.click()
    assert json.loads(asked.value.post_data) == {"latent": busiest, "row": row}
    window.page.wait_for_selector(".effects .token")
    measured = window.page.evaluate(
        "body => fetch('api/ablation', {method: 'POST', headers: {'Content-Type': 'application/json'}, body})"
        ".then(answer => answer.text()).then(text => JSON.parse(text.trim().split('\\n').at(-1)).result)",
        asked.value.post_data,
    )
    changes = [abs(one["loss_change"]) for one in measured["positions"] if one["loss_change"] is not None]
    assert f"{shown(max(changes))} nats" in window.text(".effects-head")
    assert window.faint() == []


def test_a_prompt_is_read_attributed_and_continued(window):
    window.go("#/prompt")
    window.page.fill("#prompt", "The old river finds a house")
    window.page.keyboard.press("Control+Enter")
    window.page.wait_for_selector(".prompt-strip .token")
    assert window.page.locator(".prompt-strip").inner_text().strip() == "The old river finds a house"
    assert window.page.locator(".latent-row").count() > 0
    window.page.locator(".prompt-strip .token").last.click()
    window.wait_for("location.hash.includes('token=')")

    plus, minus = (window.page.locator(f".next li:nth-child({n}) button").nth(n - 1) for n in (1, 2))
    plus.click()
    minus.click()
    window.page.get_by_role("button", name="Attribute", exact=True).click()
    window.page.wait_for_selector(".attribution tbody tr")
    assert "Rank correlation" in window.text(".summary") or "Too few" in window.text(".summary")
    assert window.page.locator(".attribution .bar-number").count() > 10

    window.page.locator(".attribution tbody button").first.click()
    window.page.get_by_label("Number", exact=True).fill("3")
    for name, value in {"Samples": "2", "New tokens": "6", "Count a pattern": "e"}.items():
        window.page.get_by_label(name, exact=True).fill(value)
        window.page.keyboard.press("Tab")
    window.page.get_by_role("button", name="Write", exact=True).click()
    window.page.wait_for_selector(".pairs .strip")
    assert window.page.locator(".pairs .strip").count() == 4
    assert "of 2" in window.text(".counts")
    assert window.faint() == []
    state = dict(part.split("=", 1) for part in window.page.evaluate("location.hash").split("?")[1].split("&"))
    assert re.fullmatch(r"\d+%3A3%3Am%3Aall", state["edits"])
    assert (state["n"], state["new"]) == ("2", "6")


def test_a_latent_without_a_number_is_not_clamped(window):
    window.go("#/prompt")
    window.page.fill("#prompt", "The old river")
    window.page.get_by_role("button", name="Add a latent").click()
    write = window.page.get_by_role("button", name="Write", exact=True)
    assert write.is_disabled()
    window.page.get_by_label("Latent", exact=True).fill("3")
    assert write.is_enabled()


def test_a_prompt_of_which_training_would_use_nothing_says_so(window):
    window.go("#/prompt?text=e", ".prompt-strip .token")
    assert "training leaves out" in window.text(".state-note").lower()
    for n in (1, 2):
        window.page.locator(f".next li:nth-child({n}) button").nth(n - 1).click()
    window.page.get_by_role("button", name="Attribute", exact=True).click()
    window.page.wait_for_selector(".attribution .state-note")
    assert window.page.locator(".attribution table").count() == 0


def test_a_link_to_a_prompt_reads_it_once(window):
    asked = []
    window.page.on("request", lambda request: asked.append(request.url) if "api/prompt" in request.url else None)
    window.go("#/prompt?text=The+old+river", ".prompt-strip .token")
    assert len(asked) == 1


def test_an_index_that_was_made_while_another_page_showed_is_read_again(window):
    asked, building = [], [True]

    def about(route):
        answer = route.fetch()
        found = answer.json()
        if building:
            found["index"]["state"] = "building"
        route.fulfill(response=answer, json=found)

    window.page.route("**/api/about", about)
    window.page.on("request", lambda request: asked.append(request.url) if "api/columns" in request.url else None)
    window.go("#/latents", ROWS)
    window.go("#/runs", "table.runs")
    building.clear()
    with window.page.expect_response("**/api/about"):
        pass
    window.page.wait_for_timeout(200)
    window.go("#/latents", ROWS)
    assert len(asked) == 2


def test_a_page_that_there_is_none_of_is_the_table(window):
    window.go("#/constructor", ROWS)


def test_a_label_is_saved_and_there_after_reloading(window, run, busiest):
    window.go(f"#/latent/{busiest}", "#label")
    window.page.fill("#label", "river words")
    window.page.fill("#note", "with a note")
    window.wait_for("document.querySelector('.saved').textContent === 'Saved'")
    assert json.loads((run / "labels.json").read_text())["labels"][str(busiest)]["label"] == "river words"
    window.page.reload()
    window.page.wait_for_selector("#label")
    assert window.page.input_value("#label") == "river words"
    assert window.text(".given") == "river words"
    window.go('#/latents?q=label:"river words"', ROWS)
    assert rows(window) == [busiest]


@pytest.mark.parametrize("how", ["another page", "closed"])
def test_a_label_typed_just_before_the_page_is_left_is_saved(context, address, run, busiest, how):
    window = Window(context, address)
    window.go(f"#/latent/{busiest}", "#label")
    window.page.fill("#label", f"until {how}")
    window.page.goto("about:blank") if how == "another page" else window.page.close(run_before_unload=True)
    until = time.monotonic() + 5
    while f'"until {how}"' not in (run / "labels.json").read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    window.page.close()


def test_of_two_labels_on_their_way_the_later_one_is_kept(window, run, busiest):
    held = []
    window.go(f"#/latent/{busiest}", "#label")
    window.page.route("**/api/labels/*", lambda route: route.continue_() if held else held.append(route))
    window.page.fill("#label", "on its way")
    window.page.press("#label", "Enter")
    window.wait_for("document.querySelector('.saved').textContent === 'Saving …'")
    window.page.fill("#label", "behind it")
    window.page.press("#label", "Enter")
    window.page.wait_for_timeout(100)  # in which one that does not wait would have arrived
    held[0].continue_()
    window.wait_for("document.querySelector('.saved').textContent === 'Saved'")
    assert window.ask("api/labels")["labels"][str(busiest)]["label"] == "behind it"
    window.page.unroute("**/api/labels/*")


def test_a_label_that_takes_the_place_of_another_windows_is_told(context, window, address, busiest):
    other = Window(context, address)
    for each in (window, other):
        each.go(f"#/latent/{busiest}", "#label")
    for each, text in ((other, "what they think"), (window, "what we think")):
        each.page.fill("#label", text)
        each.page.press("#label", "Enter")
        each.wait_for("document.querySelector('.saved').textContent.startsWith('Saved')")
    other.page.close()
    assert "“what they think" in window.text(".saved")
    window.page.fill("#note", "because")
    window.wait_for("document.querySelector('.saved').textContent === 'Saved'")


def test_a_label_that_could_not_be_saved_is_saved_when_the_latent_is_left(context, address, run, busiest):
    window = Window(context, address)
    window.go(f"#/latent/{busiest}", "#label")
    window.page.route("**/api/labels/*", lambda route: route.abort())
    window.page.fill("#label", "at last")
    window.wait_for("document.querySelector('.saved').textContent.startsWith('Not saved:')")
    window.page.unroute("**/api/labels/*")
    with window.page.expect_response("**/api/labels/*"):
        window.go("#/latents", ROWS)
    assert '"at last"' in (run / "labels.json").read_text()
    window.page.close()


def test_names_in_files_are_only_names(window, run):
    (run / "eval.json").write_text('{"constructor": 0.25, "l0": 4, "intervals": {"l0": [3, 5]}}')
    (run.parent / "sweep").mkdir()
    (run.parent / "sweep" / "sweep.json").write_text("{}")
    (run.parent / "sweep" / "sweep.jsonl").write_text(json.dumps(POINT | {"name": run.name}))
    window.go("#/global", ".chart canvas")
    said = window.text("main")
    assert "constructor\t0.25" in said
    assert "[3.00, 5.00]" in said
    window.go("#/runs", "table.runs")
    assert window.page.locator("table.runs tr.here").count() == 1
    shutil.rmtree(run.parent / "sweep")
    (run / "eval.json").unlink()


def test_what_is_damaged_or_left_out_is_told(window, run, monkeypatch):
    monkeypatch.setattr("topkapi.viewer.runs.MOST", 2)
    for name in ("broken", "older"):
        (run.parent / name).mkdir()
        shutil.copy(run / "config.json", run.parent / name)
    (run.parent / "broken" / "eval.json").write_text('{"normalized_mse": "text"}')
    os.utime(run.parent / "older", (0, 0))
    window.go("#/runs", "table.runs")
    assert "left out: 1 " in window.text(".page-head")
    assert "broken" in window.text(".state-note.failed")
    assert "normalized_mse" in window.text(".state-note.failed")
    assert window.page.locator("table.runs tbody tr").count() == 2
    assert window.faint() == []


def test_markup_in_tokens_and_labels_is_text(window, busiest):
    window.page.on("dialog", lambda dialog: window.complaints.append(dialog.message))

    def poisoned(route):
        answer = route.fetch()
        found = answer.json()
        for group in found["groups"]:
            for example in group["examples"]:
                example["tokens"] = [MARKUP] * len(example["tokens"])
        route.fulfill(response=answer, json=found)

    window.page.route(re.compile(r"api/latent/\d+/examples"), poisoned)
    window.go(f"#/latent/{busiest}", ".example")
    assert MARKUP in window.text(".example .strip")
    window.page.locator(".example .token").first.hover()
    window.go("#/latent/3", "#label")
    assert window.text(".given") == MARKUP
    window.go("#/latents?q=labelled:yes", ROWS)
    assert MARKUP in window.text(".vt-body")
    assert window.page.locator("main img, main script").count() == 0


def test_without_its_model_the_page_says_how_to_have_it(browser, run):
    with served(run, model=False) as address:
        context = browser.new_context()
        window = Window(context, address)
        window.go("#/prompt")
        assert "needs the model: topkapi view RUN" in window.text("main")
        assert window.page.get_by_role("button", name="Run").is_disabled()
        window.go("#/latent/3", "#label")
        assert "needs the model: topkapi view RUN" in window.text("main")
        context.close()
        assert window.complaints == []


def test_a_server_that_goes_away_is_told(window, busiest):
    window.go(f"#/latent/{busiest}", ".example")
    window.page.route(re.compile("api/"), lambda route: route.abort())
    window.page.get_by_role("tab", name="Random").click()
    window.page.wait_for_selector(".state-note.failed")
    assert "does not answer" in window.text(".state-note.failed")
    window.complaints.clear()  # the browser tells of the request that failed


def test_an_export_needs_no_server_of_ours(browser, run, study, busiest, tmp_path):
    export(run, study, tmp_path / "out" / "tiny", 5, votes=False)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "out")
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        context = browser.new_context()
        window = Window(context, f"http://127.0.0.1:{server.server_port}/tiny/")
        for hash_, until in PAGES.items():
            window.go(hash_.replace("LATENT", str(busiest)), until)
        window.go(f"#/latent/{busiest}", ".example")
        assert window.text('[data-figure="fired"] dd').replace("\u202f", "") == str(study.n_fired[busiest])
        assert "needs the model: topkapi view RUN" in window.text(".side")
        assert "cannot be changed" in window.text(".saved")
        assert window.page.get_attribute("#label", "readonly") is not None
        context.close()
        server.shutdown()
        assert window.complaints == []
