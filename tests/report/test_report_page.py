"""The page as text: self-contained, small, every text escaped, every image and heading in place."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from motte.bench.results import Results, write_results
from motte.errors import InputError, RecordError
from motte.limits import MAX_REPORT_IMAGES_BYTES
from motte.report import words
from motte.report.answers import answers, sentence
from motte.report.chart import Chart
from motte.report.charts import charts
from motte.report.gathered import gather
from motte.report.html import data_block, escaped, tag
from motte.report.images import Inlined
from motte.report.page import Content, page
from motte.report.plotly_source import digest, library
from motte.report.trace_charts import MAX_POINTS
from motte.report.write import Report, make_report

HOSTILE_TAG = "<img src=x onerror"
PNG = b"\x89PNG\r\n\x1a\n" + b"rest"


class Page(HTMLParser):
    """Every element with its attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._script = self._script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[-1] += data
        else:
            self.words.append(data)


@pytest.fixture(scope="module")
def text(made: Report) -> str:
    return made.page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(text: str) -> Page:
    return Page(text)


def test_no_text_of_a_file_becomes_markup(text: str, parsed: Page) -> None:
    assert HOSTILE_TAG not in text
    assert "\u202e" not in text
    assert sum(name == "script" for name, _ in parsed.elements) == 3
    assert not [each for name, each in parsed.elements if any(key.startswith("on") for key in each)]
    assert any(HOSTILE_TAG in each for each in parsed.words), "it is still shown, as text"


def test_the_policy_lets_our_scripts_run_and_nothing_else(parsed: Page) -> None:
    policies = [
        each["content"] for name, each in parsed.elements if each.get("http-equiv") == "Content-Security-Policy"
    ]
    (policy,) = [each for each in policies if each is not None]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert "connect-src" not in rules, "what is not named falls back to none"
    assert set(rules["script-src"].split()) == {f"'{digest(parsed.scripts[-1].encode())}'", f"'{library().digest}'"}
    kinds = [each.get("type") for name, each in parsed.elements if name == "script"]
    assert kinds == ["application/json", "text/plain", None]


def test_nothing_is_fetched(parsed: Page) -> None:
    for name, each in parsed.elements:
        address = each.get("src") or (each.get("href") if name in ("link", "script") else None)
        assert address is None or address.startswith("data:")
        link = each.get("href")
        assert link is None or not re.match(r"[a-z]+:|//", link)
    style = next(each for each in parsed.words if ":root" in each)
    assert "url(" not in style
    assert "@import" not in style


def test_headings_ids_and_alternatives(parsed: Page) -> None:
    levels = [int(name[1]) for name, _ in parsed.elements if re.fullmatch("h[1-6]", name)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [each["id"] for _, each in parsed.elements if "id" in each]
    assert len(ids) == len(set(ids))
    targets = [each["href"][1:] for _, each in parsed.elements if (each.get("href") or "").startswith("#")]
    assert targets
    assert set(targets) <= set(ids)
    for name, each in parsed.elements:
        if name == "svg" or each.get("role") == "img":
            assert len(each.get("aria-label") or "") > 30
        if name == "img":
            assert each.get("alt")
    labelled = [each["aria-labelledby"] for _, each in parsed.elements if "aria-labelledby" in each]
    assert set(labelled) <= set(ids)
    assert {"lang": "en"} in [each for name, each in parsed.elements if name == "html"]


def test_every_heading_of_a_table_is_a_button(parsed: Page) -> None:
    headings = [at for at, (name, each) in enumerate(parsed.elements) if name == "th" and each.get("scope") == "col"]
    assert len(headings) > 20
    for at in headings:
        assert parsed.elements[at][1]["aria-sort"] == "none"
        assert parsed.elements[at + 1][0] == "button"


def test_what_is_missing_says_why_below(parsed: Page) -> None:
    shown = " ".join(parsed.words)
    assert "n/a" in shown
    assert "this machine shows no energy counter" in shown
    assert "the baseline" in shown
    assert "Not drawn, and why:" in shown


def test_a_simulation_says_so_and_hardware_does_not(
    made: Report, text: str, made_up: ModuleType, tmp_path: Path
) -> None:
    assert made.simulated
    assert '<div class="banner"' in text
    assert "SIMULATED: no hardware protection" in text
    write_results(tmp_path / "hard", made_up.results(("alexnet",), enclaves=("gramine-sgx",), trace_points=3))
    hard = make_report(tmp_path / "hard", figures=False)
    assert not hard.simulated
    assert "SIMULATED" not in hard.page.read_text(encoding="utf-8")


def test_the_three_answers(made_up: ModuleType) -> None:
    results = made_up.results(("resnet50",), modes=("native", "resident", "asymmetric"), parts=(1,), trace_points=0)
    slower, memory, left = answers(gather(results))
    by_mode = {each.case.mode: each for each in results.cases}
    ratios = [by_mode[mode].ratio.median for mode in ("asymmetric", "resident")]
    assert slower.answer == (
        f"protected runs take {words.digits(ratios[0])} to {words.digits(ratios[1])} times as long as native ones"
    )
    assert "95% interval" in slower.details[0]
    peaks = sorted(by_mode[mode].peak_memory_bytes for mode in ("asymmetric", "resident"))
    assert memory.answer.startswith(f"protected runs hold {words.bytes_(peaks[0])} to {words.bytes_(peaks[1])}")
    assert left.answer.endswith("asymmetric (rank8) sent 8.58 MiB a request")
    assert "13.0 % of the energy" in left.details[1]
    trusted = made_up.results(("resnet50",), parts=(1,), trace_points=0)
    assert "no activation left the trusted side" in sentence(gather(trusted))


def test_what_was_not_measured_is_no_answer(made_up: ModuleType) -> None:
    results = made_up.results(("resnet50",), parts=(1,), trace_points=0)
    hidden = ("ratio", "peak_memory_bytes", "exposed", "bytes_out")
    blind = tuple(
        replace(
            each, ratio=None, peak_memory_bytes=None, exposed=None, bytes_out=None,
            missing=dict(each.missing) | dict.fromkeys(hidden, "hidden"),
        )
        for each in results.cases
    )  # fmt: skip
    slower, memory, left = answers(gather(replace(results, cases=blind)))
    assert "not measured" in slower.answer
    assert "not measured" in memory.answer
    assert any("hidden" in each for each in (*slower.details, *memory.details))
    assert "no activation left" not in left.answer
    assert "not measured" in left.answer
    assert "nothing" not in left.answer


def test_links_lead_to_files_that_are_there(parsed: Page, folder: Path) -> None:
    links = {each.get("href") or "" for _, each in parsed.elements}
    for name in ("summary.csv", "vgg16.csv", "layers.csv", "records.jsonl", "run.json"):
        assert name in links
    beside = [link for link in links if link and not link.startswith("#")]
    assert all((folder / link).is_file() for link in beside)


def test_arrays_are_stored_once(parsed: Page) -> None:
    stored = json.loads(parsed.scripts[0])
    arrays = [tuple(each) for each in stored["arrays"]]
    assert len(arrays) == len(set(arrays))
    named = [trace["name"] for figure in stored["figures"].values() for trace in figure["data"]]
    assert named
    assert not any("<" in name for name in named)


def test_a_page_is_not_replaced_unasked(folder: Path, made: Report, tmp_path: Path) -> None:
    before = made.page.read_bytes()
    with pytest.raises(InputError, match="exists already"):
        make_report(folder, figures=False, overwrite=False)
    assert made.page.read_bytes() == before
    with pytest.raises(InputError, match="no results lie there"):
        make_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_folder_leaves_no_page(folder: Path, tmp_path: Path, results: Results) -> None:
    write_results(tmp_path / "cut", results)
    table = tmp_path / "cut" / "vgg16.csv"
    table.write_bytes(table.read_bytes()[:-400])
    with pytest.raises(RecordError):
        make_report(tmp_path / "cut")
    assert not (tmp_path / "cut" / "report.html").exists()
    assert not (tmp_path / "cut" / "figures").exists()


def test_the_classic_suite_stays_below_six_megabytes(made_up: ModuleType, tmp_path: Path) -> None:
    # Somewhat longer than the page shows: a longer trace is thinned to as many points.
    data = gather(made_up.results(trace_points=MAX_POINTS + 5))
    found = charts(data)
    longest = max(len(each.x) for one in found if isinstance(one, Chart) for each in one.series)
    assert longest == pytest.approx(MAX_POINTS, abs=5)
    content = Content(
        data=data, audit=None, charts=found, files=(), with_files=True, images=Inlined(tmp_path), library=library()
    )
    assert len(page(content).encode()) + MAX_REPORT_IMAGES_BYTES * 4 / 3 < 6_000_000


def test_escaping() -> None:
    assert escaped("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert escaped("a\u202eb\x00\u2028") == "a\\u{202e}b\\u{0}\\u{2028}"
    assert tag("a", "<x>", href='"><script>', class_="c") == (
        '<a href="&quot;&gt;&lt;script&gt;" class="c">&lt;x&gt;</a>'
    )
    assert "</script" not in data_block({"a": "</script><!--"}, "x")[:-9]


def test_only_pictures_of_the_folder_are_carried_along(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    (inside / "audit").mkdir(parents=True)
    (inside / "audit" / "good.png").write_bytes(PNG)
    (inside / "audit" / "text.png").write_bytes(b"secret")
    (tmp_path / "out.png").write_bytes(PNG)
    (inside / "audit" / "link.png").symlink_to(tmp_path / "out.png")
    images = Inlined(inside)
    assert (images.address("audit/good.png") or "").startswith("data:image/png;base64,")
    for name in ("audit/text.png", "audit/link.png", "../out.png", "audit", "audit/none.png"):
        assert images.address(name) is None


def test_words() -> None:
    assert [words.seconds(value) for value in (12.34, 0.0789, 5.5e-6)] == ["12.3 s", "78.9 ms", "5.50 us"]
    assert [words.bytes_(value) for value in (0, 1023, 1024, 1 << 30)] == ["0 B", "1,023 B", "1.00 KiB", "1.00 GiB"]
    assert [words.digits(value) for value in (0, 0.6, 9.99, 34.9, 12345)] == ["0", "0.600", "9.99", "34.9", "12,345"]
    assert words.count(4e9) == "4.00 G"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
