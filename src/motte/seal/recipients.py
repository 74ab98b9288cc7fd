"""Adding and removing recipients: a new header in front of the same ciphertext.

Every change makes a fresh key-encryption key, wraps all data keys anew, seals it to every remaining recipient and
signs the result under a **higher release**: two different headers never share bundle and release, so a demanded
minimum tells them apart, and a host that hands out the header from before a removal can be refused.

What removal cannot do: the data keys stay, since the ciphertext stays. Somebody removed who kept an old copy, or the
data keys, can still read these weights wherever they get the ciphertext, and can still forge chunks that open (the
signed digests show it). Only sealing anew ends that, for weights that they have not read yet.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from motte.errors import InputError, SettingError
from motte.limits import CHUNK_BYTES, MAX_HEADER_BYTES
from motte.seal import primitives
from motte.seal.atomic import atomic_file
from motte.seal.header import section_offsets
from motte.seal.keys import RecipientPrivateKey, RecipientPublicKey, SignerPrivateKey
from motte.seal.pool import Progress
from motte.seal.reader import SignedBundle, check_section_digest, open_bundle
from motte.seal.writer import check_recipients, check_release, with_keys, write_all, write_front


@dataclass(frozen=True, slots=True)
class RecipientsReport:
    """What changed."""

    path: Path
    old_release: int
    release: int
    recipients: tuple[RecipientPublicKey, ...]
    """Who can open the bundle now."""


def add_recipients(
    path: Path,
    added: Sequence[RecipientPublicKey],
    *,
    opener: RecipientPrivateKey,
    signer: SignerPrivateKey,
    release: int | None = None,
    progress: Progress | None = None,
) -> RecipientsReport:
    """Let more people open the bundle at ``path``, which is replaced atomically.

    Args:
        opener: a private key that can open it now.
        signer: the key that signed it.
        release: the new release; by default one more than the old.
        progress: given bytes of ciphertext copied.

    Raises:
        InputError: somebody is a recipient already.
        TrustError, BundleError: the old bundle does not pass every check, digests included.
    """

    def change(old: tuple[RecipientPublicKey, ...]) -> tuple[RecipientPublicKey, ...]:
        for key in added:
            if key in old:
                raise InputError("a recipient already", got=str(key))
        return (*old, *added)

    return _change(path, change, opener, signer, release, progress)


def remove_recipients(
    path: Path,
    removed: Sequence[RecipientPublicKey],
    *,
    opener: RecipientPrivateKey,
    signer: SignerPrivateKey,
    release: int | None = None,
    progress: Progress | None = None,
) -> RecipientsReport:
    """Seal the bundle at ``path`` to nobody of ``removed`` any more; see the module for what that cannot do.

    Args and errors: as :func:`add_recipients`; also

    Raises:
        InputError: somebody is no recipient, or nobody would be left.
    """

    def change(old: tuple[RecipientPublicKey, ...]) -> tuple[RecipientPublicKey, ...]:
        for key in removed:
            if key not in old:
                raise InputError("not a recipient", got=str(key))
        return tuple(key for key in old if key not in removed)

    return _change(path, change, opener, signer, release, progress)


def _change(
    path: Path,
    change: Callable[[tuple[RecipientPublicKey, ...]], tuple[RecipientPublicKey, ...]],
    opener: RecipientPrivateKey,
    signer: SignerPrivateKey,
    release: int | None,
    progress: Progress | None,
) -> RecipientsReport:
    with open_bundle(path, signer=signer.public) as bundle:
        old = bundle.header
        people = tuple(sorted(set(change(tuple(entry.key for entry in old.recipients))), key=lambda key: key.raw))
        check_recipients(people)
        fresh_release = old.release + 1 if release is None else release
        check_release(fresh_release)
        if fresh_release <= old.release:
            raise SettingError("the release must rise", expected=f"at least {old.release + 1}", got=str(fresh_release))
        data_keys = bundle.data_keys(bundle.unwrap(opener))
        digests = [section.digest for section in old.sections]
        header = with_keys(replace(old, release=fresh_release), people, data_keys, digests)
        encoded_bytes = len(header.encode())
        if encoded_bytes > MAX_HEADER_BYTES:
            raise InputError("the header would be too large", expected=f"at most {MAX_HEADER_BYTES} bytes")
        with atomic_file(path, overwrite=True) as fd:
            os.fchmod(fd, stat.S_IMODE(path.stat().st_mode))
            _copy_sections(bundle, fd, section_offsets(header, encoded_bytes), progress)
            write_front(fd, header, signer, encoded_bytes)
    return RecipientsReport(path, old.release, fresh_release, people)


def _copy_sections(bundle: SignedBundle, fd: int, offsets: Sequence[int], progress: Progress | None) -> None:
    """Copy the ciphertext, checking it against the signed digests: damage is not signed a second time (B-20, B-23)."""
    buffer = memoryview(bytearray(CHUNK_BYTES + primitives.TAG_BYTES))
    for section in bundle.header.sections:
        digests = []
        for chunk in range(section.chunks):
            ciphertext = bundle.read_chunk(section, chunk, buffer)
            digests.append(primitives.chunk_digest(ciphertext))
            write_all(fd, ciphertext, offsets[section.index] + chunk * len(buffer))
            if progress is not None:
                progress(len(ciphertext))
        check_section_digest(section, digests)
