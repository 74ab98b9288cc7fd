"""Collateral of SGX and TDX quotes: what Intel signs about a platform type; given, cached, or fetched from a PCCS.

Collateral is signed and dated by Intel, so it need not come from a trusted place; but whoever chooses it may choose an
older one that is still in force (about 30 days). So a verifier's own sources come before what the evidence brings
along: given by the caller, else the cache while it is in force, else the PCCS; only a verifier that has no PCCS takes
the evidence's own. ``Anchors.intel_min_evaluation`` refuses what is older than a known revision. Check numbers:
docs/spec/evidence.md, G-2 and D-2.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from motte.errors import EvidenceError, MotteError, ResourceError, SettingError
from motte.limits import MAX_COLLATERAL_BYTES
from motte.seal.atomic import atomic_file
from motte.strict_json import Fields, canonical, parse

_TEXTS: Final = (
    "pck_crl_issuer_chain",
    "tcb_info_issuer_chain",
    "tcb_info",
    "qe_identity_issuer_chain",
    "qe_identity",
)
_BYTES: Final = ("root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature")
_HEX: Final = frozenset("0123456789abcdefABCDEF")


def library() -> ModuleType:
    """The package ``dcap-qvl``, imported when it is first needed.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        import dcap_qvl  # type: ignore[import-untyped]  # it has stubs, and no marker that says so
    except ImportError as problem:
        hint = "pip install dcap-qvl"
        raise ResourceError("SGX and TDX quotes need a package", expected="dcap-qvl", hint=hint) from problem
    module: ModuleType = dcap_qvl
    return module


@dataclass(frozen=True, slots=True)
class Collateral:
    """**Unverified** collateral: PEM chains and JSON as text, revocation lists (DER) and signatures as bytes."""

    pck_crl_issuer_chain: str
    root_ca_crl: bytes
    pck_crl: bytes
    tcb_info_issuer_chain: str
    tcb_info: str
    tcb_info_signature: bytes
    qe_identity_issuer_chain: str
    qe_identity: str
    qe_identity_signature: bytes

    @staticmethod
    def decode(data: bytes | str, *, check: str, where: str = "collateral") -> Collateral:
        """Read the JSON that ``dcap-qvl`` writes: bytes as hexadecimal. A ``pck_certificate_chain`` in it is not
        used, since the chain of the quote itself is what counts.

        Raises:
            EvidenceError: something else (``check``).
        """

        class Malformed(EvidenceError):
            def __init__(self, message: str, **facts: str | None) -> None:
                super().__init__(message, **{"check": check, **facts})

        value = parse(data, max_bytes=MAX_COLLATERAL_BYTES, what=where, error=Malformed)
        fields = Fields(value, where=where, error=Malformed)
        found: dict[str, Any] = {name: fields.text(name, max_bytes=MAX_COLLATERAL_BYTES) for name in _TEXTS}
        for name in _BYTES:
            text = fields.text(name, max_bytes=MAX_COLLATERAL_BYTES)
            if len(text) % 2 or not set(text) <= _HEX:
                raise Malformed("not hexadecimal", where=f"{where}.{name}")
            found[name] = bytes.fromhex(text)
        if fields.has("pck_certificate_chain"):
            fields.any("pck_certificate_chain")
        fields.done()
        return Collateral(**found)

    def encode(self) -> bytes:
        """The same JSON, canonical."""
        texts = {name: getattr(self, name) for name in _TEXTS}
        return canonical(texts | {name: getattr(self, name).hex() for name in _BYTES})

    def for_library(self) -> Any:
        """As ``dcap_qvl.QuoteCollateralV3``."""
        return library().QuoteCollateralV3(**{name: getattr(self, name) for name in (*_TEXTS, *_BYTES)})


class CollateralCache:
    """A folder with one file for each kind of platform. Files are written whole; a malformed one is an error.

    Args:
        folder: made when something is first stored.
        key: names the kind of platform; its words hold letters and digits only.
    """

    def __init__(self, folder: Path, key: tuple[str, ...]) -> None:
        if not all(word.isascii() and word.isalnum() for word in key):
            raise SettingError("not a name of collateral", got=repr(key)[:80])
        self.path = folder / ("-".join(key).lower() + ".json")

    def load(self, *, check: str) -> Collateral | None:
        """The collateral that is stored, still **unverified**; None: none.

        Raises:
            EvidenceError: the file does not hold collateral (``check``).
            ResourceError: it cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                data = file.read(MAX_COLLATERAL_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as problem:
            raise ResourceError("the cache cannot be read", where=str(self.path), got=problem.strerror) from problem
        try:
            return Collateral.decode(data, check=check, where=self.path.name)
        except EvidenceError as problem:
            problem.hint = f"delete {self.path}"
            raise

    def store(self, collateral: Collateral) -> None:
        """Keep ``collateral``, which must be verified.

        Raises:
            ResourceError: the folder cannot be written to.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise ResourceError("no cache", where=str(self.path.parent), got=problem.strerror) from problem
        with atomic_file(self.path, overwrite=True, mode=0o644) as fd, os.fdopen(fd, "wb", closefd=False) as file:
            file.write(collateral.encode())


def fetch(url: str, quote: bytes, *, timeout_s: float, check: str) -> Collateral:
    """Ask the PCCS (or Intel's PCS) at ``url`` for the collateral of ``quote``, whose layout was checked.

    It runs in a thread of its own, so that it works inside an event loop too; the answer is **unverified**.

    Raises:
        SettingError: not an http(s) address, or not a time limit.
        ResourceError: no answer in ``timeout_s`` seconds in all, or no collateral in it.
        EvidenceError: what came is out of bounds (``check``).
    """
    if not url.startswith(("https://", "http://")):
        raise SettingError("not the address of a PCCS", expected="https://...", got=repr(url)[:80])
    if not 0 < timeout_s <= 600:
        raise SettingError("not a time limit", where="intel_pccs_timeout_s", expected="above 0, at most 600 s")

    async def asked() -> Any:
        return await asyncio.wait_for(library().get_collateral(url, quote), timeout_s)

    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            found = pool.submit(lambda: asyncio.run(asked())).result()
    except TimeoutError as problem:
        got = f"nothing in {timeout_s:g} s"
        raise ResourceError("the PCCS did not answer in time", where=url, got=got) from problem
    except MotteError:
        raise
    except Exception as problem:  # the library's errors are ValueError and RuntimeError, with a text only
        hint = "is the address right, and does this PCCS know the platform?"
        raise ResourceError("the PCCS gave no collateral", where=url, got=str(problem)[:300], hint=hint) from problem
    return Collateral.decode(found.to_json(), check=check, where="collateral of the PCCS")
