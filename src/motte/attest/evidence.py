"""Evidence as it travels: a platform's name and named documents, **unverified** until a verifier has said otherwise."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from motte.errors import EvidenceError
from motte.limits import MAX_EVIDENCE_BYTES, MAX_EVIDENCE_DOCUMENTS, MAX_NAME_BYTES
from motte.strict_json import Fields, canonical, parse

PLATFORMS = ("sgx", "tdx", "snp", "tpm", "nvidia", "simulated")
"""Kinds of evidence; each has a file of its name in :mod:`motte.attest.platforms`."""
REPORT_DATA_BYTES = 64
_FORMAT = "motte-evidence-1"


class _Malformed(EvidenceError):
    """An :class:`EvidenceError` of check E-1, for the strict reader."""

    def __init__(self, message: str, **facts: str | None) -> None:
        super().__init__(message, **{"check": "E-1", **facts})


@dataclass(frozen=True, slots=True)
class Evidence:
    """**Unverified** bytes that claim to come from a trusted execution environment.

    Attributes:
        platform: one of :data:`PLATFORMS`.
        documents: raw bytes by name, such as ``quote`` and ``collateral``; which names a platform knows stands in
            its file. Unknown names are refused by the platform's verifier.
    """

    platform: str
    documents: Mapping[str, bytes]

    def __post_init__(self) -> None:
        object.__setattr__(self, "documents", MappingProxyType(dict(self.documents)))

    def take(self, platform: str, *, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, bytes]:
        """The documents, still **unverified**, for the verifier of ``platform``.

        Raises:
            EvidenceError: evidence of another platform, a required document is missing or empty, or one is there
                that the platform does not know (check E-2).
        """
        if self.platform != platform:
            raise EvidenceError("evidence of another platform", check="E-2", expected=platform, got=self.platform[:80])
        missing = [name for name in required if not self.documents.get(name)]
        unknown = sorted(self.documents.keys() - set(required) - set(optional))
        if missing or unknown:
            expected = ", ".join(required) + (f"; allowed: {', '.join(optional)}" if optional else "")
            got = ", ".join(map(repr, sorted(self.documents)))[:200] or "none"
            raise EvidenceError(
                "not the documents of this platform", check="E-2", where=platform, expected=expected, got=got
            )
        return self.documents

    def encode(self) -> bytes:
        """Canonical JSON, with the documents in base64."""
        documents = {name: base64.b64encode(data).decode() for name, data in self.documents.items()}
        return canonical({"format": _FORMAT, "platform": self.platform, "documents": documents})

    @staticmethod
    def decode(data: bytes) -> Evidence:
        """Read **unverified** bytes.

        Raises:
            EvidenceError: not evidence as :meth:`encode` writes it, or larger than the limits (check E-1).
        """
        fields = Fields(
            parse(data, max_bytes=MAX_EVIDENCE_BYTES, what="evidence", error=_Malformed),
            where="evidence",
            error=_Malformed,
        )
        fields.choice("format", (_FORMAT,))
        platform = fields.choice("platform", PLATFORMS)
        documents = fields.any("documents")
        fields.done()
        if not isinstance(documents, dict) or len(documents) > MAX_EVIDENCE_DOCUMENTS:
            raise _Malformed("not a table of documents", where="evidence.documents")
        return Evidence(platform, {_name(name): _document(name, text) for name, text in documents.items()})


def _name(name: str) -> str:
    if not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME_BYTES:  # a lone surrogate is not printable
        raise _Malformed("a document's name is out of bounds", where="evidence.documents")
    return name


def _document(name: str, text: Any) -> bytes:
    if not isinstance(text, str):
        raise _Malformed("a document is not base64 text", where=f"evidence.documents.{name}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as problem:
        raise _Malformed("a document is not base64", where=f"evidence.documents.{name}", got=str(problem)) from problem
