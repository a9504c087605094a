"""The page in a real browser: nothing on the console, nothing loaded, every figure drawn, readable and reachable."""

import os
import re

import numpy as np
import pytest

from bench_results import METHODS, cell, experiment, table_of_methods
from browser import CHROMIUM, Browser
from zotune.bench.report.figures import COLOURS
from zotune.bench.report.html import page
from zotune.bench.report.sections import make_section

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

PHONE, DESK = 390, 1280


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page with tables, figures of every kind, claims and costs."""
    asked = {
        "sentence": "A is best",
        "where": "Tab. 2",
        "more": [{"method": "fo_sgd"}],
        "less": [{"method": "zo_adam"}],
    }
    accuracies = dict(zip(METHODS, np.linspace(0.9, 0.6, 8), strict=True))
    schemes = ("lora", "full", "prefix", "prompt", "head")
    first = make_section("table2", experiment(claims=[asked]), table_of_methods(accuracies, schemes))
    layout = {"rows": ["method"], "columns": ["length"], "x": "length", "y": ["step_bytes"]}
    sizes = [
        cell({"method": m, "length": n}, measured=[{"step_bytes": n << 13}], values=[{"formula_bytes": n << 13}])
        for m in ("fo_sgd", "zo_sgd")
        for n in (64, 128, 2048)
    ]
    second = make_section("fig3", experiment(kind="memory", layout=layout, paper=[]), sizes)
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(page([first, second], "cpu"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_quiet_and_loads_nothing(browser, report, width, scheme):
    browser.open(report, width, scheme)
    assert browser.complaints() == []
    assert browser.requests() == [f"file://{report}"]


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_every_figure_is_drawn_with_all_its_points_inside_it(browser, report, width):
    browser.open(report, width)
    found = browser.ask(
        """[...document.querySelectorAll("figure")].map(f => {
            const inside = m => {
                const a = m.getBoundingClientRect(), b = m.closest("svg").getBoundingClientRect();
                const beside = a.left >= b.left - 1 && a.right <= b.right + 1;
                return a.width > 1 && beside && a.top >= b.top && a.bottom <= b.bottom;
            };
            return [f.id, +f.dataset.points, [...f.querySelectorAll(".panels .mark")].filter(inside).length];
        })"""
    )
    assert [name for name, *_ in found] == [
        "table2-standing",
        "table2-spent",
        "table2-way",
        "fig3-along",
        "fig3-theory",
    ]
    assert all(drawn == expected > 0 for _, expected, drawn in found), found


def test_a_phone_shows_it_without_scrolling_sideways_and_in_letters_that_can_be_read(browser, report):
    browser.open(report, PHONE)
    assert browser.ask("document.documentElement.scrollWidth") == PHONE
    smallest = browser.ask(
        """Math.min(...[...document.querySelectorAll("p, td, th, li, dd, svg text")].filter(e => e.textContent.trim()
            && e.getBoundingClientRect().height).map(e => {
            const svg = e.closest("svg");
            const shrunk = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
            return parseFloat(getComputedStyle(e).fontSize) * shrunk;
        }))"""
    )
    assert smallest >= 10.5
    cut = browser.ask(
        """[...document.querySelectorAll("svg text")].filter(t => {
            const a = t.getBoundingClientRect(), b = t.closest("svg").getBoundingClientRect();
            return a.left < b.left - 1 || a.right > b.right + 1;
        }).map(t => t.textContent)"""
    )
    assert cut == []
    crossed = browser.ask(
        """[...document.querySelectorAll("svg")].flatMap(svg => {
            const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
            const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
            return boxes.flatMap(([s, a], i) => boxes.slice(i + 1).filter(([, b]) => meet(a, b)).map(([t]) => [s, t]));
        })"""
    )
    assert crossed == []


def test_wide_tables_scroll_by_keyboard(browser, report):
    browser.open(report, PHONE)
    regions = browser.ask('document.querySelectorAll("[role=region][tabindex]").length')
    for _ in range(60):
        browser.press("Tab")
        if browser.ask('document.activeElement.matches("[aria-labelledby=table2-numbers]")'):
            break
    assert browser.ask("document.activeElement.scrollWidth > document.activeElement.clientWidth")
    before = browser.ask("document.activeElement.scrollLeft")
    browser.press("ArrowRight")
    moved = "new Promise(done => setTimeout(() => done(document.activeElement.scrollLeft), 500))"
    found = browser.call("Runtime.evaluate", expression=moved, awaitPromise=True, returnByValue=True)
    assert found["result"]["value"] > before
    assert regions >= 3


def test_the_first_key_leads_past_the_header(browser, report):
    browser.open(report, DESK)
    browser.press("Tab")
    assert browser.ask("document.activeElement.className") == "skip"
    assert browser.ask("document.activeElement.getBoundingClientRect().left") >= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, report, scheme):
    browser.open(report, DESK, scheme)
    pairs = browser.ask(
        """[...document.querySelectorAll("p, td, th, li, dd, dt, a, h1, h2, h3, .badge, .paper, .interval")].map(e => {
            let ground = e;
            const shown = element => getComputedStyle(element).backgroundColor;
            while (shown(ground) === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
            return [getComputedStyle(e).color, shown(ground)];
        })"""
    )
    assert min(contrast(*map(rgb, pair)) for pair in set(map(tuple, pairs))) >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_differ_for_those_who_see_few(browser, report, scheme):
    """For red-green blindness, simulated; series also differ in their markers."""
    browser.open(report, DESK, scheme)
    style = "getComputedStyle(document.documentElement).getPropertyValue"
    shown = [browser.ask(f"{style}('--{name}')").strip() for name in ["ink", *(f"c{i}" for i in range(1, 8))]]
    if scheme == "light":
        assert [c.lower() for c in COLOURS[1:]] == shown[1:]
    seen = [deuteranope(rgb(c)) for c in shown]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[i + 1 :]) > 45
    assert min(contrast(rgb(c), rgb(browser.ask(f"{style}('--paper')").strip())) for c in shown) > 2.2


def rgb(text):
    if text.startswith("#"):
        return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))
    return tuple(float(x) for x in re.findall(r"[\d.]+", text)[:3])


def linear(colour):
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour) / 255]


def contrast(a, b):
    """WCAG 2's ratio."""
    light, dark = sorted((float(np.dot([0.2126, 0.7152, 0.0722], linear(c))) for c in (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def deuteranope(colour):
    """What is seen without the cones for green (Machado, Oliveira and Fernandes, 2009), severity 1."""
    seen = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    turned = np.clip(np.array(seen) @ linear(colour), 0, 1)
    return 255 * np.where(turned <= 0.0031308, 12.92 * turned, 1.055 * turned ** (1 / 2.4) - 0.055)


def test_it_prints(browser, report):
    browser.open(report, DESK, media="print")
    assert browser.ask('getComputedStyle(document.querySelector(".skip")).display') == "none"
    assert len(browser.call("Page.printToPDF")["data"]) > 10_000


@pytest.mark.skipif("ZOTUNE_PICTURES" not in os.environ, reason="pictures to look at are made on request")
def test_pictures(browser, report):
    from pathlib import Path

    for width, scheme in ((PHONE, "light"), (DESK, "dark")):
        browser.open(report, width, scheme)
        browser.picture(Path(os.environ["ZOTUNE_PICTURES"]) / f"report-{width}-{scheme}.png")
