"""A shared library that stands in for a large one whose functions are never called: same name, same symbols, no code.

numpy is linked with OpenBLAS (28 MB with its Fortran runtime), which a worker whose engine computes elsewhere does not
use, but for one product of two ones with which numpy tests itself when it is imported. So two functions are real here,
``cblas_sdot`` and ``cblas_ddot`` with 64-bit integers, and every other one is an illegal instruction: a call ends the
worker, and never gives a wrong number.

x86_64, System V ABI ("Object Files", "Dynamic Linking", "Function Calling Sequence").
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from motte.enclave.elf import read_library
from motte.errors import UnsupportedError

_PAGE: Final = 4096
_TRAP: Final = bytes.fromhex("0f0b")  # ud2
# float cblas_sdot(rdi: n, rsi: x, rdx: incx, rcx: y, r8: incy): xmm0 = 0; while n > 0: xmm0 += *x * *y; step both.
_SDOT: Final = bytes.fromhex("0f57c0 4885ff 7e19 f30f100e f30f5909 f30f58c1 488d3496 4a8d0c81 48ffcf ebe2 c3")
_DDOT: Final = bytes.fromhex("0f57c0 4885ff 7e19 f20f100e f20f5909 f20f58c1 488d34d6 4a8d0cc1 48ffcf ebe2 c3")
_REAL: Final = {"cblas_sdot64_": _SDOT, "cblas_ddot64_": _DDOT}
_ALIGN: Final = 16


def make_stub(original: bytes, users: Iterable[bytes], *, where: str) -> bytes:
    """The library that stands in for ``original`` for the libraries ``users`` that are linked with it.

    Raises:
        UnsupportedError: one whose integers are not of 64 bits, whose real functions would be called in another way.
    """
    library = read_library(original, where=where)
    wanted = frozenset().union(*(read_library(data, where=where).missing for data in users)) & library.offered
    if library.name is None or not wanted or not all(name.endswith("64_") for name in wanted):
        raise UnsupportedError(
            "this OpenBLAS cannot be left out of an image",
            where=where,
            expected="a named library whose functions end in 64_",
            got=", ".join(sorted(wanted)[:4]) or "none used",
            hint="build without --slim",
        )
    return _library(library.name, sorted(wanted))


def _library(name: str, symbols: list[str]) -> bytes:
    code, places = bytearray(_TRAP.ljust(_ALIGN, b"\x90")), {}
    for symbol in symbols:
        real = next((body for suffix, body in _REAL.items() if symbol.endswith(suffix)), None)
        places[symbol] = 0 if real is None else len(code)
        if real is not None:
            code += real.ljust(-(-len(real) // _ALIGN) * _ALIGN, b"\x90")
    strings = bytearray(b"\0")
    offsets = {}
    for text in (name, *symbols):
        offsets[text] = len(strings)
        strings += text.encode() + b"\0"
    count = len(symbols) + 1
    head = 64 + 4 * 56
    hash_start = head
    symbols_start = -(-(hash_start + 4 * (2 + 1 + count)) // 8) * 8
    strings_start = symbols_start + 24 * count
    code_start = -(-(strings_start + len(strings)) // _PAGE) * _PAGE
    dynamic_start = -(-(code_start + len(code)) // _PAGE) * _PAGE
    # One bucket: a chain through all symbols. The loader looks each up once.
    table = struct.pack(f"<{3 + count}I", 1, count, min(1, len(symbols)), 0, *range(2, count), 0)
    starts = [(offsets[symbol], code_start + places[symbol]) for symbol in symbols]
    entries = [bytes(24), *(struct.pack("<IBBHQQ", text, 0x12, 0, 1, start, _ALIGN) for text, start in starts)]
    dynamic = [(14, offsets[name]), (4, hash_start), (5, strings_start), (6, symbols_start), (10, len(strings))]
    dynamic += [(11, 24), (0, 0)]
    segments = (
        _segment(1, 4, 0, strings_start + len(strings), _PAGE),
        _segment(1, 5, code_start, len(code), _PAGE),
        _segment(1, 6, dynamic_start, 16 * len(dynamic), _PAGE),
        _segment(2, 6, dynamic_start, 16 * len(dynamic), 8),
    )
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack("<16sHHIQQQIHHHHHH", identity, 3, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    out = bytearray(dynamic_start)
    for start, part in (
        (0, header + b"".join(segments)),
        (hash_start, table),
        (symbols_start, b"".join(entries)),
        (strings_start, strings),
        (code_start, code),
    ):
        out[start : start + len(part)] = part
    return bytes(out) + b"".join(struct.pack("<QQ", *entry) for entry in dynamic)


def _segment(kind: int, rights: int, start: int, size: int, alignment: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, rights, start, start, start, size, size, alignment)
