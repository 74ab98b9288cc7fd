"""Shared libraries as files: what they need and name, and taking symbols out of them without breaking them.

64-bit little-endian ELF only (System V ABI, "Object Files"), read strictly from files of this machine that will be
trusted anyway; a malformed one is refused, never guessed at.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from motte.errors import FormatError

_MAGIC: Final = b"\x7fELF\x02\x01"
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_DYNAMIC: Final = struct.Struct("<QQ")
_LOAD, _DYNAMIC_SEGMENT = 1, 2
_DYNAMIC_SYMBOLS: Final = 11
_NEEDED, _STRINGS, _SYMBOLS, _NAME, _GNU_HASH, _HASH = 1, 5, 6, 14, 0x6FFFFEF5, 4
_PAGE: Final = 4096
_STRIP_TIMEOUT_S: Final = 120


@dataclass(frozen=True, slots=True)
class Segment:
    """One PT_LOAD segment."""

    offset: int
    address: int
    file_bytes: int
    memory_bytes: int
    alignment: int

    @property
    def aligned(self) -> bool:
        """Whether a loader can map it: offset and address agree modulo its alignment, which is whole pages."""
        return self.alignment >= _PAGE and (self.address - self.offset) % self.alignment == 0


@dataclass(frozen=True, slots=True)
class Library:
    """What a shared library or program says of itself.

    ``missing`` and ``offered`` are names of its dynamic symbols that others must, and it does, define.
    """

    segments: tuple[Segment, ...]
    needed: tuple[str, ...]
    name: str | None
    missing: frozenset[str]
    offered: frozenset[str]

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that its segments take."""
        return sum(segment.memory_bytes for segment in self.segments)

    @property
    def aligned(self) -> bool:
        """Whether every segment can be mapped."""
        return bool(self.segments) and all(segment.aligned for segment in self.segments)


def is_elf(data: bytes) -> bool:
    """Whether ``data`` begins as a 64-bit little-endian ELF file."""
    return data.startswith(_MAGIC)


def read_library(data: bytes, *, where: str = "library") -> Library:
    """Read a whole file.

    Raises:
        FormatError: not such a file, or a table of it lies outside of it.
    """
    if not is_elf(data):
        raise FormatError("not a 64-bit little-endian ELF file", where=where)
    try:
        header = _HEADER.unpack_from(data)
        entries = [_SEGMENT.unpack_from(data, header[5] + index * _SEGMENT.size) for index in range(header[10])]
        loads = tuple(Segment(e[2], e[3], e[5], e[6], e[7]) for e in entries if e[0] == _LOAD)
        dynamic = next((e for e in entries if e[0] == _DYNAMIC_SEGMENT), None)
        if dynamic is None:
            return Library(loads, (), None, frozenset(), frozenset())
        return _read_dynamic(data, loads, dynamic[2], dynamic[5])
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as problem:
        raise FormatError("malformed ELF file", where=where, got=str(problem)) from problem


def _read_dynamic(data: bytes, loads: tuple[Segment, ...], start: int, size: int) -> Library:
    entries = [_DYNAMIC.unpack_from(data, start + place) for place in range(0, size, _DYNAMIC.size)]
    table = dict(reversed(entries))
    strings = _offset(loads, table[_STRINGS]) if _STRINGS in table else 0
    missing: set[str] = set()
    offered: set[str] = set()
    if _SYMBOLS in table:
        first = _offset(loads, table[_SYMBOLS])
        for index in range(1, _symbol_count(data, loads, table)):
            name, info, _, section, _, _ = _SYMBOL.unpack_from(data, first + index * _SYMBOL.size)
            if info >> 4 in (1, 2):  # global or weak
                (offered if section else missing).add(_string(data, strings + name))
    return Library(
        segments=loads,
        needed=tuple(_string(data, strings + value) for tag, value in entries if tag == _NEEDED),
        name=_string(data, strings + table[_NAME]) if _NAME in table else None,
        missing=frozenset(missing),
        offered=frozenset(offered),
    )


def _symbol_count(data: bytes, loads: tuple[Segment, ...], table: dict[int, int]) -> int:
    """From DT_HASH, else from the table of sections, else from the GNU hash, which knows no undefined ones alone."""
    if _HASH in table:
        return int(struct.unpack_from("<II", data, _offset(loads, table[_HASH]))[1])
    header = _HEADER.unpack_from(data)
    sections = [_SECTION.unpack_from(data, header[6] + index * _SECTION.size) for index in range(header[12])]
    for section in sections:
        if section[1] == _DYNAMIC_SYMBOLS:
            return int(section[5]) // _SYMBOL.size
    return _gnu_count(data, _offset(loads, table[_GNU_HASH])) if _GNU_HASH in table else 0


def _gnu_count(data: bytes, start: int) -> int:
    buckets, first, bloom, _ = struct.unpack_from("<4I", data, start)
    place = start + 16 + 8 * bloom
    last = max(struct.unpack_from(f"<{buckets}I", data, place), default=0)
    chain = place + 4 * buckets
    while last >= first and not struct.unpack_from("<I", data, chain + 4 * (last - first))[0] & 1:
        last += 1
    return int(max(last + 1, first))


def _offset(loads: tuple[Segment, ...], address: int) -> int:
    for segment in loads:
        if segment.address <= address < segment.address + segment.file_bytes:
            return address - segment.address + segment.offset
    raise ValueError(f"address {address:#x} lies in no segment")


def _string(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


def strip_version() -> str | None:
    """First line of ``strip --version``; None where there is no strip."""
    if shutil.which("strip") is None:
        return None
    done = subprocess.run(["strip", "--version"], capture_output=True, text=True, timeout=_STRIP_TIMEOUT_S, check=False)
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None


def stripped(data: bytes) -> bytes:
    """``data`` without symbols and debug information, where that is safe; otherwise ``data`` itself.

    Libraries that auditwheel or patchelf changed may come out with segments that no loader maps: the result is kept
    only where every segment is aligned and everything that a loader reads is as it was.
    """
    if not is_elf(data) or shutil.which("strip") is None:
        return data
    before = read_library(data)
    with tempfile.TemporaryDirectory(prefix="motte-strip-") as folder:
        source, target = Path(folder) / "in", Path(folder) / "out"
        source.write_bytes(data)
        words = ["strip", "--strip-all", "--enable-deterministic-archives", "-o", str(target), str(source)]
        done = subprocess.run(words, capture_output=True, timeout=_STRIP_TIMEOUT_S, check=False)
        if done.returncode != 0 or not target.exists():
            return data
        result = target.read_bytes()
    return result if len(result) < len(data) and same_for_a_loader(before, result) else data


def same_for_a_loader(before: Library, result: bytes) -> bool:
    """Whether ``result`` can be mapped and needs, names and offers what ``before`` did."""
    try:
        after = read_library(result)
    except FormatError:
        return False
    facts = ("needed", "name", "missing", "offered")
    return after.aligned and all(getattr(before, fact) == getattr(after, fact) for fact in facts)
