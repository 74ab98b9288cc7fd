"""Words, sizes and tables of the command line."""

from __future__ import annotations

import io
import logging

import pytest
import typer
from rich.console import Console

from motte.cli.options import parse_dims, parse_size
from motte.cli.output import Column, Line, Output, bytes_text, printable, seconds_text, table
from motte.errors import InputError, SettingError


def shown(item: object, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False, highlight=False).print(item)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("65536", 65536), ("7B", 7), ("64MiB", 64 << 20), ("1.5GiB", 3 << 29), ("2 KiB", 2048), ("0.5KiB", 512)],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "64MB", "64mib", "-1", "1e6", "0", "0.1B", "999999GiB", "\u0661", "64MiB ", "1.5.5KiB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_size(text)


def test_dimensions_are_read() -> None:
    assert parse_dims(["sequence=128"], 4) == {"batch": 4, "sequence": 128}
    assert parse_dims(None, None) == {}


@pytest.mark.parametrize("texts", [["sequence"], ["sequence=0"], ["=3"], ["a b=3"], ["a=1", "a=2"], ["batch=2"]])
def test_what_is_no_dimension_is_refused(texts: list[str]) -> None:
    with pytest.raises(SettingError):
        parse_dims(texts, 1)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1048575, "1.0 MiB"),
        (575 << 20, "575.0 MiB"),
        (1 << 50, "1024.0 TiB"),
    ],
)
def test_bytes_are_readable(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 us"),
        (12e-6, "12 us"),
        (0.00123, "1.23 ms"),
        (0.0999, "99.9 ms"),
        (0.1234, "123 ms"),
        (0.99999, "1.00 s"),
        (9.9999, "10.0 s"),
        (123.4, "123 s"),
    ],
)
def test_seconds_are_readable(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain", "plain"),
        ("two\nlines", "two\nlines"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb", "a\\x0db"),
        ("é 猫", "é 猫"),
        ("\u202eabc", "\\u202eabc"),
        ("\x9b1m", "\\x9b1m"),
        ("\ud800", "\\ud800"),
        ("\u2028", "\\u2028"),
        ("[red]x[/red]", "[red]x[/red]"),
    ],
)
def test_control_characters_are_shown_not_sent(text: str, safe: str) -> None:
    assert printable(text) == safe
    assert safe.splitlines()[0] in shown(table((Column("c", keep=True),), [(text,)]))
    assert shown(Line(text)).rstrip("\n") == safe


def test_a_table_keeps_numbers_whole_and_folds_words() -> None:
    columns = (Column("name"), Column("bytes", number=True))
    made = table(columns, [("word " * 40, "123456789"), ("x" * 200, "1"), ("all", "123456790")], title="t", totals=True)
    lines = shown(made).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert sum("123456789" in line for line in lines) == 1
    assert sum(line.count("x") for line in lines) == 200
    assert lines[-1].split() == ["all", "123456790"]
    assert set(lines[-2]) == {"─"}


def test_facts_need_no_heading() -> None:
    assert shown(table((Column("", keep=True), Column("")), [("a", "b")])).split() == ["a", "b"]


def test_quiet_silences_notes_but_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(quiet=True)
    out.note("a note")
    out.warn("a warning")
    out.result({}, Line("a result"))
    assert capsys.readouterr() == ("a result\n", "warning: a warning\n")


def test_a_warning_of_the_library_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("motte")
    before = (list(logger.handlers), logger.propagate)
    with Output().logging():
        for _ in range(3):
            logger.warning("SIMULATED %d", 1)
        logger.info("no warning")
    assert capsys.readouterr().err == "warning: SIMULATED 1\n"
    assert (logger.handlers, logger.propagate) == before


def test_an_error_has_its_facts_and_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    Output().error(InputError("bad \x1b thing", expected="a", got="b" * 100, where="here", hint="do"))
    assert capsys.readouterr().err.splitlines() == [
        "error: bad \\x1b thing",
        "  where: here",
        "  expected: a",
        f"  got: {'b' * 100}",
        "hint: do",
    ]


def test_no_progress_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Output().progress("work", total=3) as bar:
        bar.advance(1)
        bar.set(3, 3)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Output().progress("work \x1b[31m", total=3, in_bytes=True) as bar:
        bar.advance(1)
        bar.set(2, 4)
        bar.set(2, None)
    found = capsys.readouterr()
    assert found.out == ""
    assert "work \\x1b[31m" in found.err
    with Output(quiet=True).progress("work", total=3) as bar:
        bar.advance(1)
    assert capsys.readouterr() == ("", "")
