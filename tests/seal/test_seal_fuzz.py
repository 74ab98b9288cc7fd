"""Fuzzing: no crash, no plaintext that nobody sealed, no allocation beyond a bound."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from motte.errors import BundleError, MotteError
from motte.limits import MAX_HEADER_BYTES, MIB
from motte.seal import SignerPrivateKey, inspect, open_bundle
from motte.seal.header import ciphertext_bytes, parse_header
from motte.strict_json import canonical

HERE = Path(__file__).parent
VECTORS = HERE.parent / "vectors"
GOOD = (VECTORS / "good-three-parts.motte").read_bytes()
HEADER_BYTES = int.from_bytes(GOOD[8:12], "big")
HEADER: dict[str, Any] = json.loads(GOOD[12 : 12 + HEADER_BYTES])


def load_harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_bundle", HERE / "fuzz_bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HARNESS = load_harness()
SLOW = settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))


FORGED = "forged-by-a-recipient.motte"
"""Opens, by design, to what a recipient forged; only the digests tell."""


def small_vectors() -> list[Path]:
    return [each for each in sorted(VECTORS.glob("*.motte")) if each.stat().st_size < 100_000 and each.name != FORGED]


def test_the_harness_passes_on_every_small_vector() -> None:
    for path in small_vectors():
        HARNESS.check(b"\x00" + path.read_bytes())


def test_the_harness_can_find_something() -> None:
    with pytest.raises(AssertionError, match="nobody sealed"):
        HARNESS.check(b"\x00" + (VECTORS / FORGED).read_bytes())


@SLOW
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 6), st.binary(max_size=6)), min_size=1, max_size=4
    ),
    cut=st.one_of(st.none(), st.integers(0, len(GOOD))),
    more=st.binary(max_size=40),
)
def test_mutated_files(edits: list[tuple[int, int, bytes]], cut: int | None, more: bytes) -> None:
    data = bytearray(GOOD)
    for place, removed, put in edits:
        data[place : place + removed] = put
    HARNESS.read_file(bytes(data[:cut]) + more)


@SLOW
@given(data=st.binary(max_size=2000))
@example(data=b"")
def test_any_bytes(data: bytes) -> None:
    HARNESS.read_file(data)
    HARNESS.read_file(GOOD[:8] + data)
    HARNESS.read_file(HARNESS.signed(data))


@SLOW
@given(edits=st.binary(min_size=5, max_size=30))
def test_mutated_headers_that_are_signed(edits: bytes) -> None:
    HARNESS.read_file(HARNESS.signed(HARNESS.edited(edits)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [way] if way else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*way, key))
    return found


@SLOW
@given(place=st.sampled_from(places(HEADER)), value=JSON)
def test_any_value_in_any_field_that_is_signed(place: tuple[Any, ...], value: Any) -> None:
    header = json.loads(GOOD[12 : 12 + HEADER_BYTES])
    target = header
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = value
    encoded = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    HARNESS.read_file(HARNESS.signed(encoded))


def test_what_is_read_is_what_was_written() -> None:
    assert parse_header(canonical(HEADER)).encode() == canonical(HEADER)


# --- allocation ---------------------------------------------------------------------------------------------------


def peak_bytes(action: Callable[[], object]) -> int:
    """Python's own allocations while ``action`` fails with a MotteError."""
    tracemalloc.start()
    try:
        with pytest.raises(MotteError):
            action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SIGNER = SignerPrivateKey(HARNESS.secret("signer")).public


def edited(pattern: bytes, replacement: bytes) -> bytes:
    header, count = re.subn(pattern, replacement, GOOD[12 : 12 + HEADER_BYTES], count=1)
    assert count == 1
    return HARNESS.signed(header)


def with_section_of(section: int, plaintext_bytes: int) -> bytes:
    header = json.loads(canonical(HEADER))
    sizes = {"plaintext_bytes": plaintext_bytes, "ciphertext_bytes": ciphertext_bytes(plaintext_bytes)}
    header["sections"][section].update(sizes)
    return HARNESS.signed(canonical(header))


ABSURD = {
    "a header of 4 GiB": GOOD[:8] + b"\xff\xff\xff\xff" + GOOD[12:],
    "a header of 4 MiB in a short file": GOOD[:8] + (MAX_HEADER_BYTES).to_bytes(4, "big") + GOOD[12:],
    "a header of 4 MiB and a byte, all there": HARNESS.signed(bytes(MAX_HEADER_BYTES + 1)),
    "a section of 64 GiB": with_section_of(1, 64 << 30),
    "a manifest of 256 MiB": with_section_of(0, 256 << 20),
    "4,096 parts": edited(rb'"parts":3', b'"parts":4096'),
    "an integer of 4,000 digits": edited(rb'"release":7', b'"release":' + b"9" * 4000),
}


@pytest.mark.parametrize("name", list(ABSURD))
def test_absurd_sizes_allocate_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.motte"
    path.write_bytes(ABSURD[name])
    assert peak_bytes(lambda: open_bundle(path, signer=SIGNER)) < MIB
    if "header" in name:
        with pytest.raises(BundleError) as caught:
            open_bundle(path, signer=SIGNER)
        assert caught.value.check == "B-3"


@pytest.mark.parametrize("item", [b"[]", b"1e5", b'{"a":0}'])
def test_a_full_header_of_small_things_is_bounded(item: bytes, tmp_path: Path) -> None:
    """The worst that a signer can make us parse: 4 MiB of the smallest values."""
    count = (MAX_HEADER_BYTES - 2) // (len(item) + 1)
    path = tmp_path / "x.motte"
    path.write_bytes(HARNESS.signed(b"[" + b",".join([item] * count) + b"]"))
    assert peak_bytes(lambda: open_bundle(path, signer=SIGNER)) < 48 * MAX_HEADER_BYTES


def test_nothing_is_parsed_before_the_signature_holds(tmp_path: Path) -> None:
    """An unsigned header costs its own bytes, whatever is in it."""
    header = b"[" + b",".join([b"{}"] * 200_000) + b"]"
    path = tmp_path / "x.motte"
    path.write_bytes(GOOD[:8] + len(header).to_bytes(4, "big") + header + bytes(64))
    assert peak_bytes(lambda: open_bundle(path, signer=SIGNER)) < 6 * len(header)
    assert peak_bytes(lambda: inspect(path)) > 6 * len(header), "the bound above could not fail"


# --- atheris ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_atheris_finds_nothing(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install atheris")
    for path in small_vectors():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(b"\x00" + data)
        (tmp_path / f"{path.name}.header").write_bytes(b"\x01" + data[12 : 12 + int.from_bytes(data[8:12], "big")])
    command = [sys.executable, str(HERE / "fuzz_bundle.py"), "-runs=5000", "-max_len=8192", "-rss_limit_mb=0"]
    done = subprocess.run(
        [*command, "-max_total_time=60", "-seed=1", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"Done \d+ runs", done.stderr), done.stderr[-2000:]
