"""The numbered checks of docs/spec/bundle.md, in the order in which a reader makes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Final

from motte.errors import BundleError

CHECKS: Final = MappingProxyType(
    {
        "B-1": "a regular file, long enough for the shortest bundle",
        "B-2": "the magic",
        "B-3": "the header's length is within bounds and within the file",
        "B-4": "the signature over magic, length and header is the demanded signer's",
        "B-5": "the header is strict JSON",
        "B-6": "the format is one that this reader knows",
        "B-7": "the header is encoded canonically",
        "B-8": "the header has exactly the known fields, each of its type and within its bounds",
        "B-9": "the header names the key that signed it",
        "B-10": "one section for the manifest and one for each part, in order",
        "B-11": "each section's ciphertext is 16 bytes longer per chunk than its plaintext",
        "B-12": "recipients are sorted, different from each other, and usable keys",
        "B-13": "names of public weights are sorted and different from each other",
        "B-14": "the file ends where the last section ends",
        "B-15": "the release is not below the demanded minimum",
        "B-16": "our key is among the recipients",
        "B-17": "the key-encryption key opens with our key",
        "B-18": "the key-encryption key is of this bundle and this release",
        "B-19": "every data key opens with the key-encryption key",
        "B-20": "the chunk is wholly there",
        "B-21": "the chunk authenticates under its data key, bundle, section, place and end mark",
        "B-22": "the chunk is the one whose digest was verified",
        "B-23": "the section's ciphertext has the signed digest",
    }
)
"""Number of a check -> what must hold."""


@contextmanager
def numbered(check: str) -> Iterator[None]:
    """Give every :class:`BundleError` raised inside, and not numbered yet, the number ``check``."""
    try:
        yield
    except BundleError as problem:
        if problem.check is None:
            problem.check = check
        raise
