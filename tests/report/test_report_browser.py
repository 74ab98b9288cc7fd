"""The page in a real browser: it draws, sorts, shows values, fits the screen, and asks nothing of any network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

from motte.bench.results import write_results
from motte.report.write import Report, make_report

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror=window.broken=2></script>%{x}"
FIRST = "#figures-all .plot >> nth=0"


@dataclass
class Opened:
    page: Any
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def made(made_up: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """One model, hostile text everywhere: few figures, but one of every kind."""
    place = tmp_path_factory.mktemp("browser") / "out"
    write_results(
        place,
        made_up.results(
            ("resnet50",), modes=("native", "resident", "asymmetric"), parts=(1, 4), trace_points=40, words=HOSTILE
        ),
    )
    return make_report(place, figures=False)


@pytest.fixture(scope="module", params=[(1280, "light"), (400, "dark")], ids=["1280-light", "400-dark"])
def opened(request: pytest.FixtureRequest, browser: Any, made: Report) -> Iterator[Opened]:
    """The page with every figure drawn; the tests below leave it so."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    found = Opened(context.new_page())
    found.page.on("console", lambda message: found.problems.append(f"{message.type}: {message.text}"))
    found.page.on("pageerror", lambda problem: found.problems.append(str(problem)))
    found.page.on("request", lambda asked: found.requests.append(asked.url))
    found.page.goto(made.page.as_uri())
    draw_all(found.page)
    yield found
    context.close()


def draw_all(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    plots = page.evaluate("document.querySelectorAll('.plot').length")
    for at in range(plots):
        page.evaluate(f"document.querySelectorAll('.plot')[{at}].scrollIntoView()")
        page.wait_for_selector(f".plot >> nth={at} >> .main-svg >> nth=0", timeout=120_000)
    page.wait_for_timeout(300)


def test_it_draws_everything_fits_and_asks_for_nothing(opened: Opened, made: Report, tmp_path: Any) -> None:
    page = opened.page
    states = page.evaluate("[...document.querySelectorAll('.plot')].map((each) => each.dataset.state)")
    assert len(states) > 10
    assert set(states) == {"drawn"}
    assert opened.problems == []
    assert opened.requests == [made.page.as_uri()]
    assert page.evaluate("window.broken") is None
    root = "document.documentElement"
    assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
    # Nothing sticks out of the screen but what scrolls within its own region.
    outside = """[...document.querySelectorAll('body *')].filter((each) => !each.closest('.scroll, .skip, svg') &&
        each.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
        .map((each) => each.outerHTML.slice(0, 90))"""
    assert page.evaluate(outside) == []
    page.screenshot(path=str(tmp_path / "page.png"))
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_legends_in_the_page_follow_the_data(opened: Opened) -> None:
    page = opened.page
    found = page.evaluate("""[...document.querySelectorAll('.plot')].filter((each) => each.layout.showlegend)
        .map((each) => ({
        names: each.data.map((trace) => trace.name),
        shown: [...each.querySelectorAll('.legendtext')].map((text) => text.textContent),
        arrays: each.data.map((trace) => JSON.stringify([trace.type, trace.name, trace.x, trace.y])),
    }))""")
    assert len(found) > 8
    for each in found:
        assert each["shown"] == each["names"]
        assert len(set(each["arrays"])) == len(each["arrays"])


def test_tables_sort_both_ways_and_say_so(opened: Opened) -> None:
    page = opened.page
    button = page.locator("#tables table >> nth=0 >> thead th button", has_text="Median")
    heading = button.locator("xpath=..")
    cells = """(button) => { const heading = button.parentElement; return [...heading.closest('table').tBodies[0].rows]
        .map((row) => row.cells[heading.cellIndex].getAttribute('data-value')); }"""
    before = [float(value) for value in button.evaluate(cells)]
    button.click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert [float(value) for value in button.evaluate(cells)] == sorted(before)
    button.focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert [float(value) for value in button.evaluate(cells)] == sorted(before, reverse=True)
    ratios = page.locator("#tables table >> nth=0 >> thead th button", has_text="Times native")
    for _ in range(2):
        ratios.click()
        values = ratios.evaluate(cells)
        missing = values.count(None)
        assert missing > 0
        assert values[-missing:] == [None] * missing, "figures that are not there stay at the end"
    assert heading.get_attribute("aria-sort") == "none"


def test_hover_shows_the_value(opened: Opened) -> None:
    page = opened.page
    page.locator(FIRST).scroll_into_view_if_needed()
    page.wait_for_selector(f"{FIRST} >> .point")
    shown = page.evaluate("document.querySelector('#figures-all .plot').data[0]")
    box = page.locator(f"{FIRST} >> .trace.scatter >> nth=0 >> .point >> nth=0").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(f"{FIRST} >> .hovertext")
    told = page.locator(f"{FIRST} >> .hovertext").text_content()
    assert shown["name"] in told
    assert f"{shown['y'][0]:.4g}"[:5] in told


def test_colours_follow_the_theme(opened: Opened) -> None:
    page = opened.page
    read = """() => [getComputedStyle(document.body).backgroundColor,
        document.querySelector('#figures-all .plot').data[0].marker.color]"""
    ground, mark = page.evaluate(read)
    before = "dark" if ground == "rgb(20, 23, 28)" else "light"
    page.emulate_media(color_scheme="light" if before == "dark" else "dark")
    for _ in range(200):
        if page.evaluate(read)[1] != mark:
            break
        page.wait_for_timeout(100)
    assert page.evaluate(read)[0] != ground
    assert page.evaluate(read)[1] != mark
    page.emulate_media(color_scheme=before)


def test_without_scripts_the_text_is_there(browser: Any, made: Report) -> None:
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(made.page.as_uri())
    body = page.inner_text("body")
    for said in (
        "How much slower?",
        "SIMULATED",
        "Interactive figures need JavaScript",
        "trusted, resident, 4 parts",
        HOSTILE,
    ):
        assert said in body
    context.close()
