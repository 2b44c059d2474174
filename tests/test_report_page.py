"""The HTML page in a real browser: it sorts, asks for nothing, complains of nothing, runs nothing
that stands in a profile, and can be read narrow and dark."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, chromium
from made_profile import INT4, INT8, REFERENCE, made_profile

from qquant.reporting.page import render_page
from qquant.reporting.schema import checked

HOSTILE = "<script>hacked=1</script>\"'><img src=x onerror=hacked=1>&amp;</script><!--"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = chromium()
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium, to test the page in a browser")
    try:
        opened = Browser(path, tmp_path_factory.mktemp("chromium"))
    except (OSError, RuntimeError) as error:
        pytest.skip(f"{path} does not start here, so the page is not tested in it: {error}")
    with opened:
        yield opened


def write(path: Path, found: dict[str, Any]) -> Path:
    path.write_text(render_page(checked(found)), encoding="utf-8")
    return path


def hostile() -> dict[str, Any]:
    """Names, texts, tasks, kernels and versions that try to be markup."""
    text = json.dumps(made_profile(2), ensure_ascii=False)
    for name in (INT4, "wiki.txt", "gsm8k", "torch-int4", "0.1.0", "2026-11-28"):
        text = text.replace(name, json.dumps(HOSTILE + name)[1:-1])
    found: dict[str, Any] = json.loads(text)
    return found


def column(browser: Browser, table: str, place: int) -> list[str]:
    rows = f"[...document.querySelectorAll('#{table} tbody tr')]"
    found: list[str] = browser.js(f"{rows}.map((r) => r.cells[{place}].textContent)")
    return found


def sorts(browser: Browser, table: str) -> list[str | None]:
    heads = f"[...document.querySelectorAll('#{table} thead th')]"
    found: list[str | None] = browser.js(f"{heads}.map((h) => h.getAttribute('aria-sort'))")
    return found


def test_a_click_sorts_and_another_turns_it_round(browser: Browser, tmp_path: Path) -> None:
    browser.resize(1280, 900)
    browser.open(write(tmp_path / "page.html", made_profile(2)))
    assert column(browser, "t-glance", 0) == [REFERENCE, INT8, INT4]
    files = "#t-glance thead th:nth-child(2) button"
    browser.click(files)
    assert column(browser, "t-glance", 1) == ["15.4 GB", "9.13 GB", "5.86 GB"]
    assert sorts(browser, "t-glance")[:3] == [None, "descending", None]
    browser.click(files)
    assert column(browser, "t-glance", 0) == [INT4, INT8, REFERENCE]
    assert sorts(browser, "t-glance")[:3] == [None, "ascending", None]
    for expected in ([INT4, INT8, REFERENCE], [INT8, INT4, REFERENCE]):
        browser.click("#t-glance thead th:nth-child(3) button")  # KL: the reference has none
        assert column(browser, "t-glance", 0) == expected  # and stays last either way
    assert sorts(browser, "t-glance")[:3] == [None, None, "ascending"]


def test_the_keyboard_sorts_too(browser: Browser, tmp_path: Path) -> None:
    browser.open(write(tmp_path / "page.html", made_profile(2)))
    browser.js("document.querySelector('#t-memory thead th:nth-child(1) button').focus()")
    browser.press_enter()
    assert column(browser, "t-memory", 0) == sorted([REFERENCE, INT8, INT4])
    assert sorts(browser, "t-memory")[0] == "ascending"


def test_it_asks_for_nothing_and_complains_of_nothing(browser: Browser, tmp_path: Path) -> None:
    path = write(tmp_path / "page.html", made_profile())
    browser.open(path)
    browser.click("details summary")
    browser.click("#save")
    assert [u for u in browser.requests() if not u.startswith(("blob:", "data:"))] == [
        path.as_uri()
    ]
    assert browser.complaints() == []
    kept = browser.js("JSON.parse(document.getElementById('profile').textContent)")
    assert kept == made_profile()


def test_what_stands_in_a_profile_is_shown_and_not_run(browser: Browser, tmp_path: Path) -> None:
    path = write(tmp_path / "page.html", hostile())
    browser.open(path)
    assert browser.js("typeof hacked") == "undefined"
    assert browser.complaints() == [] and browser.requests() == [path.as_uri()]
    assert HOSTILE + INT4 in column(browser, "t-glance", 0)
    assert browser.js("document.querySelectorAll('img').length") == 0
    assert browser.js("JSON.parse(document.getElementById('profile').textContent)") == hostile()
    assert HOSTILE in browser.js("document.title")


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_a_narrow_window(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    browser.resize(width, 800)
    browser.open(write(tmp_path / "page.html", made_profile(2)))
    assert browser.js("document.documentElement.scrollWidth") <= width
    browser.resize(1280, 900)


LONG = (
    "dequantize for 20 linears; torch-int4 for 140 linears; int4 inputs in bfloat16 and up to 32 "
    "rows, beyond dequantize; not torch-int4 for 20: groups of 24 columns; bfloat16 on cuda:0"
)


@pytest.mark.parametrize("width", [480, 1280])
def test_rows_of_what_was_timed_are_one_line_tall(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    """Whatever a kernel has to say of itself: that is told where kernels are, and at the name."""
    found = made_profile(2)
    for got in found["models"][INT4]["speed"].values():
        got["kernel"] = LONG
    browser.resize(width, 900)
    browser.open(write(tmp_path / "page.html", found))
    for table in ("t-speed", "t-speed-qwen"):
        rows = f"[...document.querySelectorAll('#{table} tbody tr')]"
        told = browser.js(f"{rows}.map((r) => [r.offsetHeight, r.cells[r.cells.length - 1].title])")
        assert max(height for height, _ in told) < 2 * 1.55 * 0.9 * 16 + 16
        assert LONG in [title for _, title in told]
        named = browser.js(f"{rows}.map((r) => r.cells[r.cells.length - 1].textContent)")
        assert "dequantize for 20 linears, torch-int4 for 140 linears" in named
        there = f"document.querySelector('#{table}')"
        beyond = browser.js(f"{there}.scrollWidth - {there}.parentElement.clientWidth")
        assert width < 1280 or beyond <= 0  # nothing hides at the right
    browser.resize(1280, 900)


_CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (colour) => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => {
      v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.documentElement).backgroundColor);
  const seen = ["h1", "header p", "nav a", ".note", ".worse", ".same", "tbody td"];
  return seen.map((s) => {
    const ink = light(getComputedStyle(document.querySelector(s)).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  });
})()"""


def test_text_can_be_read_in_light_and_dark(browser: Browser, tmp_path: Path) -> None:
    """Contrast of 4.5 at least, as WCAG 2 asks for (AA)."""
    path = write(tmp_path / "page.html", made_profile(2))
    papers = []
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        browser.open(path)
        assert min(browser.js(_CONTRAST)) >= 4.5
        papers.append(browser.js("getComputedStyle(document.documentElement).backgroundColor"))
    browser.scheme("light")
    assert papers[0] != papers[1]


class Elements(HTMLParser):
    """Every element with its attributes, for what needs no browser."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_refers_to_nothing_outside() -> None:
    page = render_page(checked(hostile()))
    links = [
        value
        for _, attributes in Elements(page).found
        for key, value in attributes.items()
        if key in ("src", "href", "action", "poster", "srcset", "xlink:href")
    ]
    assert links and all(re.fullmatch(r"#[a-z]+|data:,", str(link)) for link in links)
    assert "@import" not in page and "url(" not in page
    tags = [tag for tag, _ in Elements(page).found]
    assert tags.count("script") == 2 and "img" not in tags


def test_every_figure_has_its_raw_number() -> None:
    found = made_profile(2)
    page = render_page(checked(found))
    kl = found["models"][INT4]["accuracy"]["domains"]["wiki.txt"]["kl"]
    titles = {a.get("title") for tag, a in Elements(page).found if tag in ("td", "th")}
    assert f"{kl[0]!r} ± {kl[1]!r}" in titles
    assert str(found["models"][INT4]["speed"]["qwen-1-2048"]["qwen_tokens_per_s"]) in titles


def test_the_same_profile_gives_the_same_page() -> None:
    assert render_page(checked(made_profile())) == render_page(checked(made_profile()))
