"""The report in a real browser, of a real chain and of a sweep: quiet, within its file, within the screen, sortable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgepress.pipeline.cli import app
from tests.pipeline import report_help as made

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium with chromedriver on this machine"),
]
WIDTHS = (1280, 800, 400)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a way to any network; every request it tries is logged."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(BROWSER)
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking"),
        *("no-first-run", "disable-component-update", "disable-sync", "host-resolver-rules=MAP * ~NOTFOUND"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of all five stages of the tiny chain with samples, and of a sweep with a long and hostile name."""
    place = tmp_path_factory.mktemp("reports")
    run = shutil.copytree(chain, place / "run", symlinks=True)
    names = ("none", "<img src=x onerror=alert(1)> " + "longword" * 30, "both")
    state = {"configurations": [{"name": n, "recipe": {"soc": "siracusa", "seed": 0}, "failure": ""} for n in names]}
    sweep = made.write_sweep(place / "sweep", made.sweep_rows(names), state)
    for out in (run, sweep):
        told = CliRunner().invoke(app, ["report", str(out), "--samples", "2", "--tokens", "5", "--prompts", "A file"])
        assert told.exit_code == 0, told.output
    return {"run": run / "report.html", "sweep": sweep / "report.html"}


def opened(browser: Any, page: Path, width: int) -> set[str]:
    """Show a page at a width in CSS pixels; the addresses that it asked for."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("performance")
    browser.get(page.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "sweep"])
def test_it_is_quiet_and_asks_for_nothing(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    asked = opened(browser, pages[name], width)
    assert pages[name].as_uri() in asked
    assert {url for url in asked if not url.startswith("data:")} == {pages[name].as_uri()}
    assert browser.get_log("browser") == []
    drawn = browser.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth, i.currentSrc])")
    assert len(drawn) >= 4
    assert all(complete and pixels > 0 for complete, pixels, _ in drawn)


def test_the_check_for_requests_and_errors_would_see_them(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "loud.html"
    page.write_text("<!doctype html><img src='http://example.invalid/x.png'><script>console.error('no')</script>")
    assert "http://example.invalid/x.png" in opened(browser, page, 400)
    assert any("no" in entry["message"] for entry in browser.get_log("browser"))


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_it_keeps_within_the_screen(browser: Any, pages: dict[str, Path], name: str) -> None:
    sources = {}
    for width in WIDTHS:
        opened(browser, pages[name], width)
        script = "const e = document.documentElement; return [e.scrollWidth, e.clientWidth, window.innerWidth]"
        content, room, window = browser.execute_script(script)
        assert content == room <= window == width  # a scroll bar may take its strip of the window
        sources[width] = browser.execute_script("return document.images[0].currentSrc")
        small = browser.execute_script(
            "return [...document.querySelectorAll('p, td, th, li, dd, dt, figcaption, summary')]"
            ".filter(e => e.innerText && parseFloat(getComputedStyle(e).fontSize) < 12).length"
        )
        assert small == 0
    assert sources[1280] != sources[400]  # a drawing of its own for the narrow screen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_and_all_is_readable(browser: Any, pages: dict[str, Path], width: int, scheme: str) -> None:
    """Commands wrap within their box, columns line up, a wider table has its cue, text stands out from the page."""
    wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    opened(browser, pages["run"], width)
    cut = "return [...document.querySelectorAll('section > pre, .deeds pre')].map(e => e.scrollWidth - e.clientWidth)"
    assert set(browser.execute_script(cut)) == {0}
    middles = "return [...document.querySelectorAll('.items .change')].map(e => e.getBoundingClientRect().left)"
    assert len(set(browser.execute_script(middles))) == 1
    browser.execute_async_script(  # the cues are told of the tables' new sizes before the second frame
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
    )
    tables = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth > e.clientWidth + 2,"
        " e.previousElementSibling.getBoundingClientRect().height > 0])"
    )
    assert len(tables) >= 2 and all(wide == told for wide, told in tables)
    colours = browser.execute_script(
        "const page = getComputedStyle(document.body).backgroundColor;"
        "return [...document.querySelectorAll('h1, h2, p, th, td, a, figcaption, .value, .verdict, .cue, dt, code')]"
        ".filter(e => e.innerText).map(e => [getComputedStyle(e).color, page])"
    )
    assert min(_contrast(text, page) for text, page in {tuple(pair) for pair in colours}) >= 4.5  # WCAG 2.2, 1.4.3
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def _contrast(text: str, page: str) -> float:
    """WCAG's ratio of two colours as `rgb(r, g, b)`."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
        r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    dark, light = sorted((luminance(text), luminance(page)))
    return (light + 0.05) / (dark + 0.05)


def test_headings_sort_both_ways_and_rows_without_a_value_stay_last(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.by import By

    opened(browser, pages["run"], 1280)
    heads = browser.find_elements(By.CSS_SELECTOR, "table.sortable thead button")
    names = [head.text for head in heads]

    def column(name: str) -> list[str]:
        script = (
            "return [...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[arguments[0]].innerText)"
        )
        cells: list[str] = browser.execute_script(script, names.index(name))
        return cells

    before = [float(text.replace(",", "")) for text in column("perplexity")]
    assert len(before) == 6
    for direction in (False, True):
        heads[names.index("perplexity")].click()
        after = [float(text.replace(",", "")) for text in column("perplexity")]
        assert after == sorted(before, reverse=direction)
    seconds = heads[names.index("seconds")]
    for _ in range(2):
        seconds.click()
        assert column("seconds")[-1] == "–"  # the uncompressed model took none
    state = browser.execute_script("return [...document.querySelectorAll('th[aria-sort]')].map(h => h.ariaSort)")
    assert state.count("descending") == 1 and state.count("none") == len(names) - 1
    heads[names.index("stage")].send_keys("\n")  # by keyboard too
    assert column("stage") == sorted(column("stage"))


def test_samples_stand_side_by_side_and_are_kept(
    pages: dict[str, Path], browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selenium.webdriver.common.by import By

    opened(browser, pages["run"], 1280)
    articles = browser.find_elements(By.CSS_SELECTOR, ".samples article")
    assert len(articles) == 2
    assert len({article.location["y"] for article in articles}) == 1
    assert "uncompressed" in articles[0].text

    def refused(*_: object) -> None:
        raise AssertionError("generated again")

    monkeypatch.setattr("edgepress.eval.generation.continue_prompt", refused)
    again: Callable[..., Any] = CliRunner().invoke
    told = again(app, ["report", str(pages["run"].parent), "--samples", "2", "--tokens", "5", "--prompts", "A file"])
    assert told.exit_code == 0, told.output
