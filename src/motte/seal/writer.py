"""Sealing: sections encrypted chunk by chunk into a new file, then the signed header in front of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from motte.errors import InputError, ResourceError, SettingError
from motte.limits import (
    CHUNK_BYTES,
    MAX_HEADER_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_PARTS,
    MAX_RECIPIENTS,
    MAX_RELEASE,
    MAX_SECTION_BYTES,
)
from motte.seal import primitives
from motte.seal.atomic import atomic_file
from motte.seal.header import (
    SEALED_KEK_BYTES,
    BundleHeader,
    RecipientEntry,
    SectionEntry,
    ciphertext_bytes,
    front,
    parse_header,
    section_offsets,
)
from motte.seal.keys import RecipientPublicKey, SignerPrivateKey
from motte.seal.pool import Progress, check_threads, for_each_chunk
from motte.seal.run_terms import RunTerms

_CHUNK_CIPHERTEXT_BYTES: Final = CHUNK_BYTES + primitives.TAG_BYTES


class PartSource(Protocol):
    """Where the plaintext of one part comes from.

    With ``threads`` above one, ``read_into`` is called from several threads at once, at different offsets.
    """

    @property
    def bytes(self) -> int:
        """Length in bytes; must not change while it is sealed."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill all of ``buffer`` with the plaintext from ``offset`` on; it never reaches beyond :attr:`bytes`."""


class BytesPart:
    """A part that lies in memory already."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data).cast("B") if len(data) else memoryview(b"")

    @property
    def bytes(self) -> int:
        """Length in bytes."""
        return len(self._data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copy from ``offset`` on."""
        buffer[:] = self._data[offset : offset + len(buffer)]


@dataclass(frozen=True, slots=True)
class SectionReport:
    """How one section was sealed; ``index`` 0 is the manifest, ``i + 1`` is part ``i``."""

    index: int
    plaintext_bytes: int
    ciphertext_bytes: int
    seconds: float
    """From the first read of its plaintext to the last write of its ciphertext; not synced yet."""

    @property
    def bytes_per_second(self) -> float:
        """Plaintext bytes per second."""
        return self.plaintext_bytes / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class SealReport:
    """What :func:`write_bundle` wrote."""

    path: Path
    bundle_id: str
    release: int
    file_bytes: int
    seconds: float
    """The whole call: sections, header, sync to disk, rename."""
    sections: tuple[SectionReport, ...]

    @property
    def plaintext_bytes(self) -> int:
        """Of all sections."""
        return sum(section.plaintext_bytes for section in self.sections)

    @property
    def bytes_per_second(self) -> float:
        """Plaintext bytes per second over the whole call."""
        return self.plaintext_bytes / self.seconds if self.seconds > 0 else 0.0


def write_bundle(
    path: Path,
    *,
    release: int,
    manifest: bytes,
    parts: Sequence[PartSource],
    recipients: Sequence[RecipientPublicKey],
    signer: SignerPrivateKey,
    public_weights: Sequence[str] = (),
    run: RunTerms | None = None,
    inputs: Sequence[Path] = (),
    threads: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SealReport:
    """Seal ``manifest`` and ``parts`` into a new file: whole and synced when this returns, absent if it raises.

    Args:
        release: higher than that of every bundle of this model handed out before; recipients demand a minimum.
        manifest: opaque; becomes section 0.
        recipients: who can open it; at least one. Order and repetitions do not matter.
        public_weights: names that the signed header marks as public. Everything is encrypted all the same.
        run: the terms of its runs, signed in clear; without them no key broker can release its keys.
        inputs: files that the content is read from; refused as ``path``.
        threads: chunks sealed at a time.
        progress: given plaintext bytes, the manifest's included.

    Raises:
        SettingError, InputError: an argument out of bounds; ``path`` exists, or is one of ``inputs``.
        ResourceError: no room.
    """
    begin = time.perf_counter()
    sources: tuple[PartSource, ...] = (BytesPart(manifest), *parts)
    sizes = tuple(source.bytes for source in sources)
    people = tuple(sorted(set(recipients), key=lambda key: key.raw))
    names = tuple(sorted(set(public_weights)))
    _check_arguments(release, sizes, people, threads)
    _refuse_inputs(path, inputs)

    bundle_id = primitives.random_bytes(primitives.BUNDLE_ID_BYTES)
    data_keys = [primitives.random_bytes(primitives.KEY_BYTES) for _ in sizes]
    blank = _blank_header(bundle_id, release, signer, sizes, people, names, run)
    encoded_bytes = _checked_length(blank)
    offsets = section_offsets(blank, encoded_bytes)
    with atomic_file(path, overwrite=overwrite) as fd:
        reports, digests = [], []
        for index, (source, data_key) in enumerate(zip(sources, data_keys, strict=True)):
            start = time.perf_counter()
            cipher = primitives.SectionCipher(data_key, bundle_id=bundle_id, section=index)
            digests.append(_seal_section(fd, offsets[index], cipher, source, sizes[index], threads, progress))
            seconds = time.perf_counter() - start
            reports.append(SectionReport(index, sizes[index], ciphertext_bytes(sizes[index]), seconds))
        header = with_keys(blank, people, data_keys, digests)
        write_front(fd, header, signer, encoded_bytes)
    seconds = time.perf_counter() - begin
    return SealReport(path, bundle_id.hex(), release, offsets[-1], seconds, tuple(reports))


def _check_arguments(
    release: int, sizes: tuple[int, ...], people: tuple[RecipientPublicKey, ...], threads: int
) -> None:
    check_threads(threads)
    check_release(release)
    if not 1 <= len(sizes) - 1 <= MAX_PARTS:
        raise InputError("not a number of parts", expected=f"1 to {MAX_PARTS}", got=str(len(sizes) - 1))
    for index, size in enumerate(sizes):
        most = MAX_SECTION_BYTES if index else MAX_MANIFEST_BYTES
        if not 0 <= size <= most:
            what = f"part {index}" if index else "the manifest"
            raise InputError(f"{what} is too large", expected=f"at most {most} bytes", got=f"{size} bytes")
    check_recipients(people)


def check_recipients(people: tuple[RecipientPublicKey, ...]) -> None:
    """Refuse none, and more than the format allows.

    Raises:
        InputError: so it is.
    """
    if not 1 <= len(people) <= MAX_RECIPIENTS:
        raise InputError("not a number of recipients", expected=f"1 to {MAX_RECIPIENTS}", got=str(len(people)))


def check_release(release: int) -> None:
    """Refuse what is not a release number.

    Raises:
        SettingError: so it is.
    """
    if type(release) is not int or not 0 <= release <= MAX_RELEASE:
        raise SettingError("not a release number", expected=f"0 to {MAX_RELEASE}", got=repr(release))


def _refuse_inputs(path: Path, inputs: Sequence[Path]) -> None:
    for each in inputs:
        same = each.resolve() == path.resolve()
        if same or (path.exists() and each.exists() and path.samefile(each)):
            raise InputError("the bundle would replace what it is made from", where=str(path))


def _blank_header(
    bundle_id: bytes,
    release: int,
    signer: SignerPrivateKey,
    sizes: tuple[int, ...],
    people: tuple[RecipientPublicKey, ...],
    names: tuple[str, ...],
    run: RunTerms | None,
) -> BundleHeader:
    """The header with zeros for what is not known yet; all of that has a fixed length, so its length is final."""
    digest, wrapped = bytes(primitives.DIGEST_BYTES), bytes(primitives.WRAPPED_KEY_BYTES)
    sections = tuple(
        SectionEntry(index, size, ciphertext_bytes(size), digest, wrapped) for index, size in enumerate(sizes)
    )
    entries = tuple(RecipientEntry(key, bytes(SEALED_KEK_BYTES)) for key in people)
    return BundleHeader(bundle_id, release, signer.public, sections, entries, names, run)


def _checked_length(header: BundleHeader) -> int:
    """The length of the encoded header, once it has passed the reader's own checks."""
    encoded = header.encode()
    if len(encoded) > MAX_HEADER_BYTES:
        raise InputError(
            "the header would be too large",
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            got=f"{len(encoded)} bytes",
            hint="fewer recipients, parts or public weights",
        )
    parse_header(encoded)
    return len(encoded)


def _seal_section(
    fd: int,
    offset: int,
    cipher: primitives.SectionCipher,
    source: PartSource,
    size: int,
    threads: int,
    progress: Progress | None,
) -> bytes:
    """Encrypt and write one section; its digest."""
    chunks = max(1, -(-size // CHUNK_BYTES))
    digests = [b""] * chunks
    plain_buffers: list[bytearray] = []

    def start_worker() -> Callable[[int], int]:
        longest = min(size, CHUNK_BYTES)
        plain_buffers.append(bytearray(longest))
        plain, sealed = memoryview(plain_buffers[-1]), memoryview(bytearray(longest + primitives.TAG_BYTES))

        def work(chunk: int) -> int:
            start = chunk * CHUNK_BYTES
            plaintext = plain[: min(CHUNK_BYTES, size - start)]
            ciphertext = sealed[: len(plaintext) + primitives.TAG_BYTES]
            source.read_into(start, plaintext)
            cipher.seal(chunk, chunk == chunks - 1, plaintext, ciphertext)
            digests[chunk] = primitives.chunk_digest(ciphertext)
            write_all(fd, ciphertext, offset + chunk * _CHUNK_CIPHERTEXT_BYTES)
            return len(plaintext)

        return work

    try:
        for_each_chunk(chunks, threads, start_worker, progress)
    finally:
        for each in plain_buffers:
            each[:] = bytes(len(each))
    return primitives.section_digest(digests)


def write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of ``data`` at ``offset``.

    Raises:
        ResourceError: no progress.
        OSError: as the system says.
    """
    left = memoryview(data)
    while left:
        count = os.pwrite(fd, left, offset)
        if count == 0:
            raise ResourceError("the bundle cannot be written")
        left, offset = left[count:], offset + count


def with_keys(
    header: BundleHeader,
    people: tuple[RecipientPublicKey, ...],
    data_keys: Sequence[bytes],
    digests: Sequence[bytes],
) -> BundleHeader:
    """The header with a fresh key-encryption key: data keys wrapped under it, itself sealed to ``people``."""
    bundle_id, release = header.bundle_id, header.release
    kek = primitives.random_bytes(primitives.KEY_BYTES)
    sections = tuple(
        SectionEntry(
            section.index,
            section.plaintext_bytes,
            section.ciphertext_bytes,
            digest,
            primitives.wrap_data_key(kek, data_key, bundle_id=bundle_id, release=release, section=section.index),
        )
        for section, data_key, digest in zip(header.sections, data_keys, digests, strict=True)
    )
    info = primitives.kek_info(bundle_id, release)
    entries = tuple(RecipientEntry(key, primitives.hpke_seal(key.raw, kek, info=info)) for key in people)
    return BundleHeader(bundle_id, release, header.signer, sections, entries, header.public_weights, header.run)


def write_front(fd: int, header: BundleHeader, signer: SignerPrivateKey, expected_bytes: int) -> None:
    """Write magic, length, header and signature at the beginning of the file.

    Raises:
        InputError: the header is not as long as the room left for it.
    """
    encoded = header.encode()
    if len(encoded) != expected_bytes:
        raise InputError("the header changed its length", expected=str(expected_bytes), got=str(len(encoded)))
    start = front(encoded)
    write_all(fd, start + primitives.sign_header(signer.secret, start), 0)
