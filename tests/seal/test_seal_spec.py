"""The numbers of the checks are the same in the specification, the code and the vectors; the bounds too."""

from __future__ import annotations

import re
from pathlib import Path

from motte import errors, limits
from motte.seal.checks import CHECKS
from motte.seal.header import FORMAT, MAGIC

ROOT = Path(__file__).parent.parent.parent
SPEC = (ROOT / "docs" / "spec" / "bundle.md").read_text()
SOURCE = {path.name: path.read_text() for path in (ROOT / "src" / "motte" / "seal").glob("*.py")}


def test_the_specification_lists_every_check_once_and_in_order() -> None:
    rows = re.findall(r"^\| (B-\d+) \| .* \| (\w+) \|$", SPEC, flags=re.MULTILINE)
    assert [number for number, _ in rows] == list(CHECKS)
    for _, error in rows:
        assert issubclass(getattr(errors, error), errors.MotteError)


def test_the_code_raises_every_check_and_no_other() -> None:
    used = set()
    for name, text in SOURCE.items():
        if name != "checks.py":
            used |= set(re.findall(r'(?:check=|numbered\()"(B-\d+)"', text))
    assert used == set(CHECKS)


def test_the_code_mentions_no_unknown_check() -> None:
    for name, text in {**SOURCE, "the specification": SPEC}.items():
        assert set(re.findall(r"B-\d+", text)) <= set(CHECKS), name


def test_the_bounds_of_the_specification_are_those_of_the_code() -> None:
    assert limits.MAX_HEADER_BYTES == 4 * limits.MIB
    assert (limits.MAX_PARTS, limits.MAX_RECIPIENTS) == (4096, 1024)
    assert (limits.MAX_SECTION_BYTES, limits.MAX_MANIFEST_BYTES) == (64 * limits.GIB, 256 * limits.MIB)
    assert limits.MAX_RELEASE == 2**53 - 1
    assert (limits.MAX_GRAPH_WEIGHTS, limits.MAX_NAME_BYTES) == (100_000, 512)
    assert limits.CHUNK_BYTES == 1 << 20
    for text in ("2 bytes to 4 MiB", "1 to 4,096", "1 to 1,024", "0 to 64 GiB", "0 to 256 MiB", "0 to 2^53 - 1"):
        assert f"| {text} |" in SPEC
    assert " ".join(f"{byte:02X}" for byte in MAGIC) in SPEC
    assert f'"{FORMAT}"' in SPEC


def test_the_domain_strings_of_the_specification_are_those_of_the_code() -> None:
    found = set(re.findall(r'b"(motte-[^"]*)\\x00"', SOURCE["primitives.py"]))
    # Of the channel to the worker, the files of a training run (docs/spec/training.md), the broker
    # (docs/spec/broker.md) and simulated evidence (docs/spec/evidence.md).
    found -= {"motte-channel-1", "motte-derived-key-1", "motte-log-1 header"}
    found -= {"motte-statement-1", "motte-secret-1", "motte-mac-1", "motte-simulated-evidence-1"}
    assert len(found) == 8
    for domain in found:
        assert f'"{domain}\\0"' in SPEC, domain
