"""The page as a file: what is in it, and what is not. How it behaves is in `test_browser`."""

import base64
import dataclasses
import hashlib
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from reports import HOSTILE, make_report

from untwin.report.data import Strip
from untwin.report.page import MAX_BYTES, render


class _Elements(HTMLParser):
    """Start tags with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._script = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
            self._script = True

    def handle_endtag(self, tag):
        self._script = self._script and tag != "script"

    def handle_data(self, data):
        if self._script:
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def hostile():
    return make_report(hostile=True, n_pairs=60)


@pytest.fixture(scope="module")
def page(hostile):
    return render(hostile)


def _content(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_hostile_text_adds_no_element_and_no_attribute(page):
    harmless = render(make_report(n_pairs=60))
    kinds = [
        {(tag, name) for tag, attributes in _Elements(text).tags for name in attributes or [""]}
        for text in (page, harmless)
    ]
    assert kinds[0] == kinds[1] | {("span", "class")}  # the numbers of invisible characters
    scripts = [sum(tag == "script" for tag, _ in _Elements(text).tags) for text in (page, harmless)]
    assert scripts == [3, 3]


def test_the_data_inside_the_page_are_the_reports_to_the_last_character(page, hostile):
    content = _content(page)
    assert [clip["id"] for clip in content["clips"]] == [clip.id for clip in hostile.clips]
    assert set(HOSTILE) <= {clip["id"] for clip in content["clips"]}
    assert [pair["score"] for pair in content["pairs"]] == [pair.score for pair in hostile.pairs]
    assert content["apply"] == hostile.apply


def test_the_data_hold_no_character_that_could_end_a_script(page):
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert len(data) > 10_000
    assert data.isascii()
    assert not set("<>&") & set(data)
    assert not re.search(r"[\x00-\x1f]", data)


def test_invisible_characters_of_the_static_part_stand_as_their_number(page):
    static = page[: page.index('id="data"')]
    for character in "\u202e\u2028\u2029\u200b\ufeff\x00\x1b":
        assert character not in static
    assert "U+202E" in static  # in the command that makes the run again
    assert html.escape(HOSTILE[0]) in static or HOSTILE[0].replace("<", "&lt;").replace(">", "&gt;") in static
    assert "{{ 7 * 7 }}" not in static.replace(HOSTILE[8], "")


def test_the_policy_allows_the_pages_own_scripts_and_nothing_from_elsewhere(page):
    elements = _Elements(page)
    (policy,) = [a["content"] for tag, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"]
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    assert allowed["img-src"] == "data:"
    assert "unsafe" not in allowed["script-src"]
    data, *scripts = elements.scripts
    assert data.startswith("{")
    assert len(scripts[1]) > 10**6
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts]
    assert allowed["script-src"].split() == hashes


def test_no_attribute_fetches_anything(page):
    for tag, attributes in _Elements(page).tags:
        for name in ("src", "href", "action", "srcset", "poster", "formaction"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_plotlys_licence_is_in_the_page(page):
    assert "Licensed under the MIT license" in page


def test_pictures_that_do_not_fit_are_left_out_and_say_so():
    report = make_report(n_pairs=40)
    uri = "data:image/jpeg;base64," + "A" * 600_000
    clips = tuple(dataclasses.replace(clip, strip=Strip(uri, 4, 160, 90)) for clip in report.clips)
    report = dataclasses.replace(report, clips=clips)
    page = render(report)
    assert MAX_BYTES - 700_000 < len(page.encode()) <= MAX_BYTES
    shown = {i for i, clip in enumerate(_content(page)["clips"]) if clip["strip"]}
    assert 10 < len(shown) < len(clips)
    for i, clip in enumerate(_content(page)["clips"]):
        assert (i in shown) != ("15 MB" in clip["problem"])
    # Those nearest to the line have theirs.
    nearest = sorted(report.pairs, key=lambda pair: abs(pair.score - (1 - report.eps)))[: len(shown) // 2]
    assert shown == {index for pair in nearest for index in (pair.row, pair.other)} | (shown - {*range(80)})


def test_numbers_that_json_cannot_hold_become_null():
    page = render(dataclasses.replace(make_report(n_pairs=1), total_seconds=float("nan")))
    assert _content(page)["total_seconds"] is None


def test_a_text_with_half_a_surrogate_pair_can_be_written():
    page = render(dataclasses.replace(make_report(n_pairs=1), output="folder-\udcff", reproduce="untwin run \udcff"))
    assert b"U+DCFF" in page.encode()


@pytest.mark.parametrize("package", ["jinja2", "plotly"])
def test_a_missing_package_names_the_extra(package):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from untwin.errors import MissingExtraError\n"
        "try:\n    import untwin.report.page\n"
        "except MissingExtraError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "untwin[report]" in done.stdout
