"""The tables of a folder of results: what is written reads back to the bit, and what is malformed is refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motte.bench.case import SEGMENTS, TRACED, Case, CaseResult, LayerTime, TracePoint
from motte.bench.csv_files import (
    LAYER_COLUMNS,
    NOT_THERE,
    SUMMARY_COLUMNS,
    TRACE_COLUMNS,
    check_summary,
    layer_table,
    read_layers,
    read_traces,
    summary_table,
    trace_table,
)
from motte.errors import MeasureError, RecordError, ResourceError
from motte.measure.compare import Ratio, Series

NATIVE = Case(model="resnet20", mode="native", parts=1, batch=1, engine="torch", enclave="none")
SEALED = Case(model="resnet20", mode="streamed", parts=12, batch=1, engine="torch", enclave="process", scheme="rank8")
DOCUMENT = Path(__file__).parents[2] / "docs" / "spec" / "records.md"


def a_result(case: Case = SEALED, **changes: Any) -> CaseResult:
    figures: dict[str, Any] = {
        "case": case,
        "simulated": case.enclave == "process",
        "threads": 2,
        "dtype": "float32",
        "seconds": Series(str(case), (0.1, 0.30000000000000004, 0.2)),
        "ratio": Ratio(str(case), str(NATIVE), 2.5, 2.25, 2.75, 0.95),
        "segments": {"open": 0.25, "steady": 1e-9},
        "peak_memory_bytes": 1 << 40,
        "mean_memory_bytes": 0,
        "weight_memory_bytes": 7,
        "memory_bound_bytes": None,
        "cpu_percent": 99.5,
        "energy_j": None,
        "power_w": None,
        "accuracy": 0.916,
        "bytes_out": 3,
        "bytes_in": 4,
        "trusted_flops": 10**15,
        "outside_flops": 0,
        "exposed": 0.125,
    } | changes
    absent = {name for name, value in figures.items() if value is None} | (set(SEGMENTS) - set(figures["segments"]))
    return CaseResult(**{"missing": {name: f'no "{name}", here; é' for name in absent}, **figures})


def a_point(case: Case = SEALED, **changes: Any) -> TracePoint:
    figures: dict[str, Any] = dict.fromkeys(TRACED) | {"cpu_percent": 1 / 3, "rss_bytes": 5, "context_switches": 0}
    figures |= {"time_s": 0.05, "segment": "first"} | changes
    reasons = {name: "none, here" for name in TRACED if figures[name] is None}
    return TracePoint(**{"case": case, "missing": reasons, **figures})


def a_layer(**changes: Any) -> LayerTime:
    settings: dict[str, Any] = {
        "case": SEALED, "layer": "layer1.0.conv1", "direction": "forward", "trusted_s": 0.1, "transfer_s": 0.2,
        "accelerator_s": 0.3, "wait_s": 0.0, "bytes_out": 5, "bytes_in": 6,
    }  # fmt: skip
    return LayerTime(**{**settings, **changes})


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_a_summary_says_what_the_results_say(tmp_path: Path) -> None:
    results = (a_result(NATIVE, ratio=None, simulated=False), a_result())
    text = summary_table(results)
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["mode"] for row in rows] == ["native", "streamed"]
    assert (rows[0]["ratio"], rows[0]["ratio_low"], rows[1]["ratio_low"]) == (NOT_THERE, NOT_THERE, "2.25")
    assert {row["native_seconds"] for row in rows} == {"0.2"}
    assert (rows[1]["build_s"], rows[1]["open_s"], rows[1]["steady_s"]) == (NOT_THERE, "0.25", "1e-09")
    assert (rows[1]["mean_memory_bytes"], rows[1]["energy_j"]) == ("0", NOT_THERE), "a zero is not a missing figure"
    assert '"energy_j":"no \\"energy_j\\", here; \\u00e9"' in rows[1]["missing"]
    path = written(tmp_path / "summary.csv", text)
    check_summary(path, results)
    check_summary(written(path, text.replace("0.25,", "0.250,")), results)
    for changed in (
        text.replace("0.25,", "0.26,", 1),
        text.replace("n/a", "0", 1),
        text.replace("streamed", "resident"),
    ):
        with pytest.raises(RecordError, match="not what was measured"):
            check_summary(written(path, changed), results)
    with pytest.raises(RecordError, match="number of rows"):
        check_summary(written(path, text), results[:1])


def test_every_none_of_a_summary_has_its_reason_in_the_row() -> None:
    for row in csv.DictReader(summary_table([a_result(), a_result(NATIVE, ratio=None, simulated=False)]).splitlines()):
        for name in SUMMARY_COLUMNS:
            assert (row[name] == NOT_THERE) == (f'"{name}":' in row["missing"])
    alone = next(csv.DictReader(summary_table([a_result()]).splitlines()))
    assert alone["native_seconds"] == NOT_THERE
    assert "no native case" in alone["missing"]


_COUNTS = st.integers(0, (1 << 53) - 1)
_DRAWN = ("cpu_percent", "rss_bytes", "context_switches", "power_w")
_FRACTIONS = st.floats(0, 1e300, allow_nan=False)


@settings(max_examples=30)
@given(
    st.lists(st.builds(lambda f, c, s: (f, c, s), _FRACTIONS, _COUNTS, st.sampled_from(SEGMENTS)), max_size=5),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda text: text.strip()),
)
def test_traces_read_back_to_the_bit(tmp_path_factory: pytest.TempPathFactory, drawn: Any, why: str) -> None:
    points = tuple(
        a_point(
            time_s=share, cpu_percent=share, rss_bytes=count, segment=segment, power_w=share,
            missing={name: why for name in TRACED if name not in _DRAWN},
        )
        for share, count, segment in drawn
    )  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "traces.csv"
    assert read_traces(written(path, trace_table(points))) == points


def test_layers_read_back(tmp_path: Path) -> None:
    layers = (a_layer(), a_layer(direction="backward", layer='odd "name", é\nline'))
    assert read_layers(written(tmp_path / "layers.csv", layer_table(layers))) == layers


GOOD = trace_table([a_point(), a_point(time_s=0.1)])
HEADER, FIRST, SECOND = GOOD.splitlines(keepends=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEADER.rstrip("\n"),
        GOOD.rstrip("\n"),
        HEADER.replace("time_s", "time_ms") + FIRST,
        HEADER.replace("rss_bytes,pss_bytes", "pss_bytes,rss_bytes") + FIRST,
        HEADER.replace(",missing", "") + FIRST,
        HEADER + FIRST.replace(",0.05,", ",0.05,0.05,"),
        HEADER + FIRST.replace(",0.05,", ",-0.05,"),
        HEADER + FIRST.replace(",0.05,", ",NaN,"),
        HEADER + FIRST.replace(",0.05,", ",1e999,"),
        HEADER + FIRST.replace(",0.05,", ",0x1,"),
        HEADER + FIRST.replace(",0.05,", ",,"),
        HEADER + FIRST.replace(",5,", ",5.0,", 1),
        HEADER + FIRST.replace(",5,", ",-5,", 1),
        HEADER + FIRST.replace(",5,", ",,", 1),
        HEADER + FIRST.replace(",5,", ",n/a,", 1),
        HEADER + FIRST.replace(",first,", ",inference,"),
        HEADER + FIRST.replace("process", "vault"),
        HEADER + FIRST.replace("resnet20", "../resnet20"),
        HEADER + FIRST.replace("resnet20", "summary"),
        HEADER + FIRST.replace('{""', '{""x"":""y"",""'),
        HEADER + FIRST.replace("{", "["),
        HEADER + FIRST[: FIRST.index('"{')] + "\n",
        HEADER + FIRST[: FIRST.index('"{')] + '"{""cpu_percent"":""there""}"\n',
        HEADER + "\n" + FIRST,
        HEADER + '"unterminated\n',
        HEADER + FIRST.replace("rank8", "x" * 200_000),
    ],
)
def test_a_malformed_table_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecordError) as caught:
        read_traces(written(tmp_path / "traces.csv", text))
    assert "traces.csv" in (caught.value.where or "")


def test_bytes_that_are_no_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "traces.csv"
    for data in (b"\xff\xfe\n", b"\x00\n", HEADER.encode() + b"\xff" + FIRST.encode()):
        path.write_bytes(data)
        with pytest.raises(RecordError):
            read_traces(path)
    with pytest.raises(ResourceError):
        read_traces(tmp_path / "nothing.csv")
    with pytest.raises(RecordError):
        read_layers(written(path, layer_table([a_layer()]).replace("forward", "sideways")))


@settings(max_examples=50)
@given(st.binary(max_size=100))
def test_noise_is_refused_with_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.csv"
    path.write_bytes(HEADER.encode() + data + b"\n")
    with pytest.raises(RecordError):
        read_traces(path)


# --- what cannot be constructed ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {"energy_j": None, "missing": {}},
        {"energy_j": 1.0, "missing": dict.fromkeys((*SEGMENTS, "energy_j", "power_w", "memory_bound_bytes"), "x")},
        {"missing": {}},
        {"cpu_percent": float("nan")},
        {"cpu_percent": -1.0},
        {"cpu_percent": True},
        {"peak_memory_bytes": 1.5},
        {"bytes_out": -1},
        {"exposed": 1.01},
        {"accuracy": 91.6},
        {"segments": {"inference": 1.0}},
        {"segments": {"open": float("inf")}},
        {"seconds": Series("x", ())},
        {"seconds": Series("x", (0.1, float("nan")))},
        {"ratio": Ratio("x", "y", float("nan"), 1.0, 1.0, 0.95)},
        {"simulated": False},
        {"threads": 0},
        {"dtype": ""},
    ],
)
def test_a_result_with_a_hole_or_a_wrong_figure_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(MeasureError):
        a_result(**changes)


def test_a_row_with_a_hole_cannot_be_made() -> None:
    for changes in ({"rss_bytes": None, "missing": {}}, {"missing": {}}, {"segment": "x"}, {"time_s": -1.0}):
        with pytest.raises(MeasureError):
            a_point(**changes)
    for changes in ({"direction": "x"}, {"wait_s": None}, {"bytes_out": 1.5}, {"layer": ""}, {"layer": "=1+1"}):
        with pytest.raises(MeasureError):
            a_layer(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ""},
        {"model": "a/b"},
        {"model": ".."},
        {"model": "layers"},
        {"model": "Summary"},
        {"engine": "x y"},
        {"scheme": "-x"},
        {"mode": "cloud"},
        {"enclave": "vault"},
        {"mode": "native"},
        {"parts": 0},
        {"parts": 1.0},
        {"batch": True},
        {"model": "x" * 65},
    ],
)
def test_a_case_is_always_a_file_name(changes: dict[str, Any]) -> None:
    names = {name: getattr(SEALED, name) for name in Case.__dataclass_fields__}
    with pytest.raises(MeasureError):
        Case(**{**names, **changes})


def test_the_slug_of_a_case_tells_any_two_apart() -> None:
    assert str(SEALED) == "resnet20-streamed-p12-b1-torch-process-rank8"
    assert str(NATIVE) == "resnet20-native-p1-b1-torch-none"
    names = {name: getattr(SEALED, name) for name in Case.__dataclass_fields__}
    others: list[dict[str, Any]] = [
        {"model": "vgg16"}, {"mode": "resident"}, {"parts": 1}, {"batch": 12}, {"engine": "openvino"},
        {"enclave": "gramine-sgx"}, {"scheme": ""},
    ]  # fmt: skip
    assert len({str(SEALED), *(str(Case(**{**names, **other})) for other in others)}) == 8


def test_every_column_is_in_the_specification() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for columns in (SUMMARY_COLUMNS, TRACE_COLUMNS, LAYER_COLUMNS):
        assert [name for name in columns if f"`{name}`" not in text] == []
