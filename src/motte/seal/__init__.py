"""Parts -> bundle: one file ``NAME.motte`` of sealed sections behind a signed header (docs/spec/bundle.md).

The format works on bytes and knows nothing of graphs; only ``manifest`` and ``package``, on top of it, do. In the
order in which a bundle comes to be and is used: ``primitives`` (AEAD, HPKE and signatures),
``keys``, ``header``, ``writer``, ``reader``, ``recipients``, ``inspection``, ``unseal``; beneath them ``checks`` (the
numbered checks), ``pool`` (chunks on several threads) and ``atomic`` (a file that appears whole or not at all).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

_HOME: Final = {
    "KeyEncryptionKey": "reader",
    "SignedBundle": "reader",
    "UnlockedBundle": "reader",
    "open_bundle": "reader",
    "BytesPart": "writer",
    "PartSource": "writer",
    "SealReport": "writer",
    "SectionReport": "writer",
    "write_bundle": "writer",
    "RecipientsReport": "recipients",
    "add_recipients": "recipients",
    "remove_recipients": "recipients",
    "Inspection": "inspection",
    "inspect": "inspection",
    "BundleHeader": "header",
    "RecipientPrivateKey": "keys",
    "RecipientPublicKey": "keys",
    "SignerPrivateKey": "keys",
    "SignerPublicKey": "keys",
}
# ``unseal`` is not among them: writing plaintext to disk is imported by its full name, motte.seal.unseal.unseal.

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
