"""The page in a real browser: it counts right, works by mouse and keyboard, and asks nothing of the network."""

import csv
import dataclasses
import functools
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from reports import HOSTILE, make_report

from untwin.report.page import render

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install 'untwin[dev]'")

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_KINDS = {
    "plain": {},
    "ranked": {"compare_to": "ranked", "n_pairs": 60},
    "no-eps": {"eps": None, "audit": False, "n_pairs": 60},
    "video": {"pictures": "video", "n_pairs": 60},
    "image": {"pictures": "image", "n_pairs": 60},
    "no-pairs": {"n_pairs": 0},
    "hostile": {"hostile": True, "n_pairs": 60},
}


@functools.cache
def _report(kind):
    return make_report(**_KINDS[kind])


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("UNTWIN_BROWSER") or next(filter(None, map(shutil.which, _NAMES)), None)
    with sync_api.sync_playwright() as playwright:
        path = found or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip(
                "no browser: `apt install chromium` or `playwright install chromium` gives one, "
                "UNTWIN_BROWSER names one that is elsewhere"
            )
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        made = playwright.chromium.launch(executable_path=path, args=root)
        yield made
        made.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a report's page; at the end nothing may have been requested but it, and nothing may have been said."""
    heard, requests, contexts = [], [], []

    def open_page(report, *, width=1280, height=900, wait=True, **settings):
        path = tmp_path / "report.html"
        path.write_text(render(report), encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        assert path.as_uri() in requests
        if wait:
            page.wait_for_selector("html[data-charts=drawn]")
        return page

    yield open_page
    for context in contexts:
        assert all(page.evaluate("window.hacked") is None for page in context.pages)
        context.close()
    assert heard == []
    own = (tmp_path / "report.html").as_uri()
    assert [url for url in requests if url != own and not url.startswith(("data:", "blob:"))] == []


def _number(page, name):
    return int(page.text_content(f"#n-{name}").replace(",", ""))


def _move(page, index):
    page.evaluate(
        "i => { const s = document.getElementById('slider'); s.value = i; s.dispatchEvent(new Event('input')); }", index
    )


def _texts(page):
    """What the page says, by id; read in one go."""
    names = [f"{kind}-{name}" for kind in ("n", "note") for name in ("duplicates", "share", "kept", "bytes", "hours")]
    return page.evaluate(
        "names => ({...Object.fromEntries(names.map(n => [n, document.getElementById(n).textContent])),"
        " eps: document.getElementById('eps').value,"
        " sources: [...document.querySelectorAll('#sources tbody tr')].map(r => r.children[2].textContent),"
        " row: document.querySelector('#curve-table tr.now th').textContent })",
        [*names, "apply"],
    )


def _check_numbers(page, report, index):
    step, texts = report.steps[index], _texts(page)
    assert float(texts["eps"]) == step.eps
    assert texts["n-duplicates"] == f"{step.duplicates:,}"
    assert texts["n-kept"] == f"{report.n_compared - step.duplicates:,}"
    assert texts["n-share"] == f"{100 * step.duplicates / report.n_compared:.1f} %"
    assert texts["note-duplicates"] == ("" if step.exact else "at most")
    assert texts["note-kept"] == ("" if step.exact else "at least")
    assert texts["apply"] == f"{report.apply} --eps {step.eps}"
    assert texts["sources"] == [f"{source.duplicates[index]:,}" for source in report.sources]
    assert float(texts["row"]) == step.eps
    value, unit = texts["n-bytes"].split()
    scale = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15, "EB": 1e18}[unit]
    assert float(value.replace(",", "")) * scale == pytest.approx(step.bytes, rel=0.06)
    shown, unit = texts["n-hours"].split()
    seconds = float(shown.replace(",", "")) * {"s": 1, "min": 60, "h": 3600}[unit]
    assert seconds == pytest.approx(step.seconds, rel=0.051)


def _shown(page, side):
    cards = page.query_selector_all(f"#{side} article")
    return [int(card.get_attribute("data-pair")) for card in cards]


def _check_pairs(page, report):
    """Brute force: the six pairs on either side of the line that are nearest to it."""
    at = np.float32(1 - float(page.input_value("#eps")))
    scores = np.asarray([pair.score for pair in report.pairs])
    above, below = (np.flatnonzero(side) for side in (scores.astype(np.float32) >= at, scores.astype(np.float32) < at))
    assert _shown(page, "above") == sorted(above, key=lambda i: (scores[i], i))[:6]
    assert _shown(page, "below-cards") == sorted(below, key=lambda i: (-scores[i], i))[:6]


def test_the_page_counts_right_and_is_heard_by_nobody(opened):
    report = _report("plain")
    page = opened(report)
    start = next(i for i, step in enumerate(report.steps) if step.eps == report.eps)
    for index in (start, 0, len(report.steps) - 1, 40):
        _move(page, index)
        _check_numbers(page, report, index)
        page.wait_for_timeout(200)
        _check_pairs(page, report)
    assert len(_shown(page, "above")) == len(_shown(page, "below-cards")) == 6
    page.focus("#slider")
    page.keyboard.press("ArrowRight")
    _check_numbers(page, report, 41)
    page.click("#back")
    _check_numbers(page, report, start)
    assert f"{report.n_duplicates:,}" in page.text_content("#force")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "ranked", "no-eps"])
def test_every_position_of_the_slider_shows_its_numbers(opened, kind):
    report = _report(kind)
    page = opened(report)
    assert float(page.input_value("#eps")) == (0.05 if report.eps is None else report.eps)
    for index in range(len(report.steps)):
        _move(page, index)
        _check_numbers(page, report, index)


def _plot(page, chart):
    """Where the axes of a chart are."""
    return page.locator(f"#{chart} .nsewdrag").first.bounding_box()


@pytest.mark.slow
def test_dragging_the_line_moves_the_slider_in_both_charts(opened):
    report = _report("plain")
    page = opened(report)
    for chart in ("histogram", "curve"):
        page.locator(f"#{chart}").scroll_into_view_if_needed()
        area = _plot(page, chart)
        widest = 0.3
        for target in (0.2, 0.02, 0.11):
            box = page.locator(f"#{chart} .handle").bounding_box()
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
            page.mouse.down()
            page.mouse.move(area["x"] + area["width"] * target / widest, box["y"] + 80, steps=4)
            page.mouse.up()
            index = int(page.input_value("#slider"))
            assert report.steps[index].eps == pytest.approx(target, abs=0.004)
            _check_numbers(page, report, index)
            moved = page.locator(f"#{chart} .handle").bounding_box()
            assert moved["x"] + moved["width"] / 2 == pytest.approx(area["x"] + area["width"] * target / widest, abs=8)


@pytest.mark.slow
def test_a_finger_drags_the_line_too(opened):
    report = _report("plain")
    page = opened(report, width=390, height=844, has_touch=True, is_mobile=True)
    page.locator("#curve").scroll_into_view_if_needed()
    box = page.locator("#curve .handle").bounding_box()
    touch = page.context.new_cdp_session(page)
    x, y = box["x"] + box["width"] / 2, box["y"] + 60
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    for i in range(1, 6):
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [{"x": x + 20 * i, "y": y}]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    expected = 0.3 * (x + 100 - _plot(page, "curve")["x"]) / _plot(page, "curve")["width"]
    assert float(page.input_value("#eps")) == pytest.approx(expected, abs=0.004)
    _check_numbers(page, report, int(page.input_value("#slider")))


@pytest.mark.slow
def test_the_number_field_takes_the_nearest_position(opened):
    report = _report("plain")
    page = opened(report)
    page.fill("#eps", "0.1004")
    page.keyboard.press("Tab")
    index = int(page.input_value("#slider"))
    assert abs(report.steps[index].eps - 0.1004) == min(abs(step.eps - 0.1004) for step in report.steps)
    _check_numbers(page, report, index)
    page.focus("#eps")
    page.keyboard.press("ArrowUp")
    _check_numbers(page, report, index + 1)


@pytest.mark.slow
def test_marks_are_kept_and_downloaded_with_hostile_ids_intact(opened, tmp_path):
    report = _report("hostile")
    page = opened(report)
    page.click("#next")
    order = sorted(range(60), key=lambda i: (abs(report.pairs[i].score - (1 - report.eps)), i))
    expected, keys = [], ["1", "2", "3", "s", "d", "u"]
    for n, i in enumerate(order):
        focused = page.evaluate("document.activeElement.closest('article')?.dataset.pair")
        assert int(focused) == i  # from doubtful to clear
        page.keyboard.press(keys[n % 6])
        pair = report.pairs[i]
        label = ["same", "different", None][n % 3]
        if label:
            ids = report.clips[pair.row].id, report.clips[pair.other].id
            expected.append([*ids, f"{pair.score:.9g}", label, str(pair.pairs_at_least)])
        page.keyboard.press("n")
    assert page.text_content("#marks") == "20 same, 20 different, 20 unsure"
    assert set(HOSTILE) <= {row[0] for row in expected} | {report.clips[report.pairs[i].row].id for i in order}
    page.reload()
    page.wait_for_selector("html[data-charts=drawn]")
    assert page.text_content("#marks") == "20 same, 20 different, 20 unsure"
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "labels.csv"
    download.value.save_as(tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["id", "other_id", "cosine_sim_score", "label", "pairs_at_least"]
    assert len(rows) == 40
    key = lambda row: (row[0], row[1])  # noqa: E731
    for row, wanted in zip(sorted(rows, key=key), sorted(expected, key=key), strict=True):
        assert [*row[:2], *row[3:]] == [*wanted[:2], *wanted[3:]]
        assert float(row[2]) == float(wanted[2])
        assert len(row[2].split(".")[1]) == 9


@pytest.mark.slow
def test_hostile_characters_are_shown_by_their_number(opened):
    page = opened(_report("hostile"))
    for _ in range(20):
        for side in ("above", "below"):
            if page.is_visible(f"#{side}-more"):
                page.click(f"#{side}-more")
    shown = page.inner_text("main")
    for number in ("U+202E", "U+2028", "U+0000", "U+001B", "U+FEFF", "U+000A"):
        assert number in shown
    assert "\u202e" not in shown
    assert "</script><script>window.hacked=1</script>" in shown
    assert "(2,000 characters)" in shown


@pytest.mark.slow
def test_the_command_is_copied(opened):
    report = _report("hostile")
    page = opened(report, permissions=["clipboard-read", "clipboard-write"])
    page.click("#apply-copy")
    page.locator("#apply-copy", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == f"{report.apply} --eps {report.eps}"


@pytest.mark.slow
def test_short_times_are_not_rounded_to_nothing_and_media_get_a_command(opened):
    report = _report("no-pairs")
    times = [0.0, 0.4, 59.9, 60.0, 3590.0, 3600.0, 356_000.0, 3.6e6]
    steps = [dataclasses.replace(step, seconds=time) for step, time in zip(report.steps, times, strict=False)]
    steps += report.steps[len(times) :]
    media = "untwin apply out --mode move --media 'my clips'"
    page = opened(dataclasses.replace(report, steps=tuple(steps), apply_media=media))
    shown = []
    for index in range(len(times)):
        _move(page, index)
        shown.append(page.text_content("#n-hours"))
        assert page.text_content("#apply-media") == f"{media} --eps {steps[index].eps}"
    assert shown == ["0 s", "0.4 s", "59.9 s", "1.0 min", "59.8 min", "1.0 h", "98.9 h", "1,000 h"]


@pytest.mark.slow
@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_frames_follow_one_another_unless_motion_is_not_wanted(opened, motion):
    page = opened(_report("video"), reduced_motion=motion)
    strip = page.locator("#above button.strip").first
    strip.scroll_into_view_if_needed()
    strip.hover()
    place = "e => getComputedStyle(e).backgroundPositionX"
    seen = set()
    for _ in range(12):
        seen.add(strip.evaluate(place))
        page.wait_for_timeout(150)
    assert (len(seen) > 2) == (motion == "no-preference")
    if motion == "reduce":
        strip.focus()
        page.keyboard.press("Enter")
        assert strip.evaluate(place) == "20%"


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(_KINDS))
def test_axe_finds_nothing_and_nothing_is_wider_than_the_page(opened, kind):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs pip install 'untwin[dev]'")
    page = opened(_report(kind))
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    for scheme in ("light", "dark"):
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(200)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            found = axe.Axe().run(page).response
            assert [(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in found["violations"]] == []
            assert len(found["passes"]) > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "video"])
def test_first_paint_within_a_second_and_the_slider_within_50_ms(opened, kind):
    page = opened(_report(kind))
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    drawn = page.evaluate("performance.now()")
    print(f"{kind}: first contentful paint {paint:.0f} ms, charts before {drawn:.0f} ms")
    assert paint < 1000
    taken = page.evaluate(
        """async () => {
            const slider = document.getElementById("slider"), shown = document.getElementById("n-duplicates");
            const times = [];
            for (let i = 0; i <= 60; i += 1) {
                await new Promise((done) => requestAnimationFrame(done));
                const before = shown.textContent, start = performance.now();
                slider.value = i;
                slider.dispatchEvent(new Event("input"));
                void document.body.offsetHeight;
                times.push(performance.now() - start);
                if (i && shown.textContent === before) throw new Error("the number did not follow");
            }
            return times;
        }"""
    )
    print(f"{kind}: slider to laid-out numbers, median {np.median(taken):.1f} ms, longest {max(taken):.1f} ms")
    assert np.median(taken) < 50


@pytest.mark.slow
def test_all_but_the_charts_works_before_plotly_has_run(opened):
    report = _report("plain")
    page = opened(report, wait=False)
    # Nothing waits for the charts: the page's own script has run when the document is there.
    assert page.evaluate("document.querySelectorAll('#above article').length") == 6
    without = re.sub(
        r'(<script type="text/plain" id="plotly">).*?(</script>)', r"\1\2", render(report), flags=re.DOTALL
    )
    page.evaluate("window.stop()")
    path = Path(page.url.removeprefix("file://")).with_name("without.html")
    path.write_text(without, encoding="utf-8")
    bare = page.context.new_page()
    errors = []
    bare.on("pageerror", lambda error: errors.append(str(error)))
    bare.goto(path.as_uri())
    bare.wait_for_timeout(300)
    for index in (3, 50):
        _move(bare, index)
        _check_numbers(bare, report, index)
        bare.wait_for_timeout(200)
        _check_pairs(bare, report)
    assert "No chart here" in bare.text_content("#histogram")
    assert bare.locator("#histogram-table tbody tr").count() == len(report.bin_counts)
    assert errors == []


@pytest.mark.slow
def test_a_page_without_pairs_or_pictures_says_so(opened):
    page = opened(_report("no-pairs"))
    assert page.text_content("#above").strip() == "There are none."
    page.click("#next")
    assert "no pairs" in page.text_content("#said")
    assert page.is_disabled("#download")


@pytest.mark.slow
def test_the_page_works_where_nothing_can_be_removed(opened):
    report = _report("no-pairs")
    steps = tuple(dataclasses.replace(step, duplicates=0, bytes=0, seconds=0.0) for step in report.steps)
    bare = dataclasses.replace(
        report,
        steps=steps,
        sources=(),
        source_column=None,
        size_column=None,
        duration_column=None,
        bin_counts=(0,) * 120,
    )
    page = opened(bare)
    _move(page, 5)
    assert _number(page, "duplicates") == 0
    assert page.locator("#n-bytes").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "video", "hostile"])
def test_screenshots_for_a_person_to_look_at(opened, kind, tmp_path):
    folder = Path(os.environ.get("UNTWIN_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page = opened(_report(kind))
    for scheme in ("light", "dark"):
        for width in (390, 1280, 1920):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(300)
            path = folder / f"{kind}-{width}-{scheme}.png"
            page.screenshot(path=path, full_page=True)
            assert path.stat().st_size > 20_000
