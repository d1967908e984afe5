"""The page in a real browser: it renders, answers pointer and keyboard, fits, and stays quiet."""

import itertools

import pytest

from jexit.report.page import write_report
from jexit.report.runs import read_run, read_runs
from jexit.report.training_curves import write_charts
from report_files import EXITS, LAYERS, completions, write_evaluated, write_trained

pytestmark = pytest.mark.browser

CELL = '[role="gridcell"]'
SCHEMES = ("light", "dark")
WIDTHS = (400, 800, 1600)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_trained(tmp_path_factory.mktemp("run") / "a")


@pytest.fixture(scope="module")
def reports(tmp_path_factory, trained):
    """An evaluation with every part, and training runs side by side with evaluations."""
    root = tmp_path_factory.mktemp("runs")
    evaluated = write_evaluated(root / "eval")
    several = [trained, write_trained(root / "b", seed=1), evaluated]
    several.append(write_evaluated(root / "other", 1))
    return {
        "eval": write_report(read_runs([evaluated])),
        "several": write_report(read_runs(several), root / "several.html"),
    }


@pytest.fixture
def open_page(browser):
    """Opens a page and, at the end, checks that it said and asked for nothing."""
    heard, contexts = [], []

    def opened(path, *, scheme="light", width=1400, scripts=True):
        size = {"width": width, "height": 900}
        contexts.append(
            browser.new_context(color_scheme=scheme, viewport=size, java_script_enabled=scripts)
        )
        page = contexts[-1].new_page()
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        address = path.as_uri()

        def asked(request):
            if request.url != address and not request.url.startswith("data:"):
                heard.append(f"request: {request.url}")

        page.on("request", asked)
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not heard


def test_nothing_is_wider_than_the_page_and_texts_in_charts_do_not_collide(reports, open_page):
    pages = [open_page(path) for path in reports.values()]
    for page, width in itertools.product(pages, WIDTHS):
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        beyond = page.evaluate(
            """() => [...document.querySelectorAll('section *')]
                .filter(e => !e.closest('.scroll table, svg') && e.checkVisibility())
                .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
                .map(e => e.outerHTML.slice(0, 80))"""
        )
        assert beyond == []
        charts = page.evaluate(
            """() => [...document.querySelectorAll('.chart > svg')].map(svg => ({
                frame: svg.getBoundingClientRect().toJSON(),
                title: svg.getAttribute('aria-label'),
                texts: [...svg.querySelectorAll('text')].map(t => ({
                    text: t.textContent, box: t.getBoundingClientRect().toJSON(),
                    size: parseFloat(getComputedStyle(t).fontSize) * svg.getScreenCTM().a}))}))"""
        )
        assert len(charts) >= 10
        for chart in charts:
            assert_legible(chart["title"], chart["frame"], chart["texts"])


def assert_legible(title, frame, texts):
    """Texts are large enough, inside the frame, and none lies on another."""
    for index, first in enumerate(texts):
        assert first["size"] >= 8.5, (title, first)
        a = first["box"]
        assert frame["left"] - 1 <= a["left"] and a["right"] <= frame["right"] + 1, first
        for second in texts[:index]:
            b = second["box"]
            across = min(a["right"], b["right"]) - max(a["left"], b["left"])
            down = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
            # Boxes are as high as the font's tallest letters.
            assert across < 1 or down < 4, (title, first["text"], second["text"])


def test_pages_and_files_of_charts_look_right_in_light_and_dark(reports, trained, open_page):
    seen = {}
    for scheme in SCHEMES:
        page = open_page(reports["eval"], scheme=scheme)
        seen[scheme] = page.evaluate(
            """() => {
                const style = (s, key) => getComputedStyle(document.querySelector(s))[key];
                return [style('body', 'backgroundColor'), style('body', 'color'),
                    style('svg .tick', 'fill'), style('svg .mark.s1', 'fill'),
                    style('.bar.c32', 'fill'), style('.c32[role=gridcell]', 'backgroundColor')]}"""
        )
    assert all(one != other for one, other in zip(*seen.values(), strict=True))
    assert seen["dark"][4] == seen["dark"][5]
    for scheme, path in itertools.product(SCHEMES, write_charts(read_run(trained))):
        found = open_page(path, scheme=scheme).evaluate(
            """() => ({
                frame: document.documentElement.getBoundingClientRect().toJSON(),
                paper: getComputedStyle(document.querySelector('.paper')).fill,
                tick: getComputedStyle(document.querySelector('.tick')).fill,
                texts: [...document.querySelectorAll('text')].map(t => ({
                    text: t.textContent, box: t.getBoundingClientRect().toJSON(), size: 12}))})"""
        )
        assert_legible(path.name, found["frame"], found["texts"])
        assert [found["paper"], found["tick"]] == [seen[scheme][0], seen[scheme][2]]


def expected_detail(place):
    """What the page says of a token of the second completion shown, the sampled one."""
    record = completions()[3]
    assert record["policy"] == "sample"
    hazards = zip(EXITS, record["hazards"][place], strict=True)
    lines = [f"hazard at exit {layer}: {h:.3f}" for layer, h in hazards if h is not None]
    return "\n".join(
        [f"depth {record['depths'][place]} of {LAYERS}", *(lines or ["no exit was reached"])]
    )


def test_the_pointer_reads_tokens_curves_points_and_bars(reports, open_page):
    page = open_page(reports["eval"])
    detail = page.locator("#detail")
    assert not detail.is_visible()
    cells = page.locator(".map").nth(1).locator(CELL)
    for place in (0, 5):
        cells.nth(place).hover()
        assert detail.is_visible() and detail.inner_text() == expected_detail(place)
        assert cells.nth(place).get_attribute("title") is None  # or it would show twice
        box, at = detail.bounding_box(), cells.nth(place).bounding_box()
        assert box["y"] >= at["y"] + at["height"] or box["y"] + box["height"] <= at["y"]
    page.locator("h1").hover()
    assert not detail.is_visible()
    page = open_page(reports["several"])
    detail = page.locator("#detail")
    column = page.locator("#training .chart .told").nth(3)
    column.hover()
    assert column.locator("title").count() == 0  # or it would show twice
    first, *values = detail.inner_text().splitlines()
    assert first == "step 4" and [value.partition(": ")[0] for value in values] == ["a", "b"]
    assert all(value.endswith("%") for value in values)
    page.locator("#policies svg[role=img] .mark").last.hover()
    assert "correct (" in detail.inner_text()
    page.locator("#exits .bar").first.hover()
    assert "of tokens" in detail.inner_text()


def focused(page):
    return page.evaluate(
        """() => { const cell = document.activeElement, map = cell.closest('.map');
            return map ? [[...document.querySelectorAll('.map')].indexOf(map),
                [...map.querySelectorAll('[role=gridcell]')].indexOf(cell)] : null }"""
    )


def test_the_keyboard_moves_through_cells_and_shows_the_same(reports, open_page):
    page = open_page(reports["eval"], width=400)
    detail, cells = page.locator("#detail"), page.locator(".map").nth(1).locator(CELL)
    page.locator(".map").nth(0).locator(CELL).first.focus()
    assert focused(page) == [0, 0] and detail.is_visible()
    page.keyboard.press("Tab")  # a map is one stop
    last = len(completions()[3]["tokens"]) - 1
    for key, place in (("ArrowRight", 1), ("ArrowLeft", 0), ("End", last), ("Home", 0)):
        page.keyboard.press(key)
        assert focused(page) == [1, place]
        assert detail.inner_text() == expected_detail(place)
        active = page.locator(":focus")
        assert active.get_attribute("aria-describedby") == "detail"
        assert active.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
        box = detail.bounding_box()  # stays on a narrow page
        assert box["x"] >= 0 and box["x"] + box["width"] <= 400
        assert box["y"] >= 0 and box["y"] + box["height"] <= 900
    page.keyboard.press("ArrowDown")
    assert page.locator(":focus").bounding_box()["y"] > cells.first.bounding_box()["y"]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    # Back by Tab goes to the cell that was left, not to the first.
    page.keyboard.press("Tab")
    assert focused(page) == [2, 0]
    page.keyboard.press("Shift+Tab")
    assert focused(page) == [1, 1]
    page.keyboard.press("Escape")
    assert not detail.is_visible()
    told = page.locator(".map").nth(1).aria_snapshot()  # what screen readers get
    assert told.startswith('- grid "Tokens under sample"') and told.count("gridcell") == last + 1


def test_without_scripts_and_on_paper_the_page_can_be_read(reports, open_page):
    page = open_page(reports["eval"], scripts=False)
    cell = page.locator(".map").nth(1).locator(CELL).nth(5)
    assert cell.get_attribute("title") == expected_detail(5)
    assert cell.locator("sub").inner_text() == str(completions()[3]["depths"][5])
    assert page.locator(".chart svg").first.is_visible()
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert page.locator(".map").last.bounding_box()["height"] > 0  # nothing is folded away
    assert page.pdf().startswith(b"%PDF")
