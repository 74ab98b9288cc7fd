"""Opening a bundle: each type says how far it is trusted, and there is no way to a later one but through the earlier.

    bytes --open_bundle--> SignedBundle --unwrap--> KeyEncryptionKey --unlock--> UnlockedBundle --> plaintext

* :class:`SignedBundle`: its structure follows the specification, its header is signed by the demanded signer, and its
  release is not below the demanded minimum. Nothing is known of the ciphertext yet.
* :class:`UnlockedBundle`: its data keys opened. Every chunk that it hands out has been authenticated under them.

The file may change at any time, since the host owns it: whatever is used is first copied into memory of ours, then
checked, then used. The header is read once.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from motte.errors import (
    BundleError,
    DecryptError,
    InputError,
    KeyAccessError,
    ResourceError,
    RollbackError,
    SettingError,
    SignatureError,
)
from motte.limits import CHUNK_BYTES, MAX_RELEASE
from motte.seal import primitives
from motte.seal.header import (
    PREFIX_BYTES,
    BundleHeader,
    SectionEntry,
    front,
    parse_header,
    read_prefix,
    section_offsets,
)
from motte.seal.keys import RecipientPrivateKey, SignerPublicKey
from motte.seal.pool import Progress, check_threads, for_each_chunk

_CHUNK_CIPHERTEXT_BYTES: Final = CHUNK_BYTES + primitives.TAG_BYTES


@dataclass(frozen=True, slots=True)
class KeyEncryptionKey:
    """The key that wraps a bundle's data keys, with the bundle and the release that it is for. Secret.

    ``to_bytes`` and ``from_bytes`` are for sending it, encrypted, to the process that opens the bundle.
    """

    bundle_id: bytes
    release: int
    secret: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        """Bundle id (16 bytes), release (8, big-endian), secret (32). Secret."""
        return self.bundle_id + self.release.to_bytes(8, "big") + self.secret

    @classmethod
    def from_bytes(cls, data: bytes) -> KeyEncryptionKey:
        """The inverse of :meth:`to_bytes`; ``data`` comes from whoever we trust with keys.

        Raises:
            InputError: not that long.
        """
        if len(data) != 56:
            raise InputError("not a key-encryption key", expected="56 bytes", got=f"{len(data)} bytes")
        return cls(data[:16], int.from_bytes(data[16:24], "big"), data[24:])


def open_bundle(source: Path | int, *, signer: SignerPublicKey, min_release: int = 0) -> SignedBundle:
    """Read the front of an **unverified** file and check it (B-1 to B-15). The signature is checked before any parsing.

    Args:
        source: a path, or a descriptor open for reading, which stays the caller's to close (after the bundle).
        signer: whose signature is demanded. Anyone can seal to a public key; only this says who did.
        min_release: the lowest release accepted. Nothing else stops a host from handing out an older bundle.

    Raises:
        InputError: no such file.
        BundleError: it does not follow the specification.
        SignatureError: it is not signed by ``signer``.
        RollbackError: its release is below ``min_release``.
    """
    if type(min_release) is not int or not 0 <= min_release <= MAX_RELEASE:
        raise SettingError("not a release number", expected=f"0 to {MAX_RELEASE}", got=repr(min_release))
    fd = source if isinstance(source, int) else open_file(source)
    try:
        encoded, file_bytes = read_front(fd, signer)
        header = parse_header(encoded)
        if header.signer != signer:
            raise SignatureError(
                "the header names another signer than the one who signed it",
                check="B-9",
                expected=str(signer),
                got=str(header.signer),
            )
        check_file_bytes(header, len(encoded), file_bytes)
        if header.release < min_release:
            raise RollbackError(
                "an older release than demanded",
                check="B-15",
                expected=f"at least {min_release}",
                got=str(header.release),
                hint="get the current bundle; this one may be an old copy put in its place",
            )
        return SignedBundle(header, len(encoded), fd, owns_fd=not isinstance(source, int))
    except BaseException:
        if not isinstance(source, int):
            os.close(fd)
        raise


def open_file(path: Path) -> int:
    """Open for reading; never waits for a pipe.

    Raises:
        InputError: no such file, or not ours to read.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as problem:
        raise InputError("cannot open the bundle", where=str(path), got=problem.strerror) from problem


def read_front(fd: int, signer: SignerPublicKey | None) -> tuple[bytes, int]:
    """Checks B-1 to B-4: the header's bytes, once their signature holds, and the size of the file.

    Args:
        signer: None leaves B-4 to the caller: the header is then **unverified**.
    """
    try:
        facts = os.fstat(fd)
    except OSError as problem:
        raise InputError("not an open file", got=problem.strerror) from problem
    if not stat.S_ISREG(facts.st_mode):
        raise BundleError("not a regular file", check="B-1")
    length = read_prefix(_read(fd, PREFIX_BYTES, 0), facts.st_size)
    data = _read(fd, length + primitives.SIGNATURE_BYTES, PREFIX_BYTES)
    if len(data) != length + primitives.SIGNATURE_BYTES:
        raise BundleError("the file shrank while it was read", check="B-3")
    encoded, signature = data[:length], data[length:]
    if signer is not None:
        try:
            primitives.verify_header(signer.raw, signature, front(encoded))
        except SignatureError as problem:
            raise SignatureError(
                "not signed by the demanded signer, or altered since",
                check="B-4",
                expected=str(signer),
                hint="motte inspect FILE shows whose signature it carries",
            ) from problem
    return encoded, facts.st_size


def check_file_bytes(header: BundleHeader, header_bytes: int, file_bytes: int) -> None:
    """Check B-14.

    Raises:
        BundleError: truncated, or something follows the last section.
    """
    end = section_offsets(header, header_bytes)[-1]
    if file_bytes != end:
        what = "the file is cut off" if file_bytes < end else "something follows the last section"
        raise BundleError(what, check="B-14", expected=f"{end} bytes", got=f"{file_bytes} bytes")


def _read(fd: int, count: int, offset: int) -> bytes:
    buffer = bytearray(count)
    return bytes(buffer[: read_into(fd, memoryview(buffer), offset)])


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from the file; the number of bytes read is lower only at the file's end.

    Raises:
        ResourceError: the file cannot be read.
    """
    done = 0
    try:
        while done < len(buffer):
            count = os.preadv(fd, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
    except OSError as problem:
        raise ResourceError("the bundle cannot be read", got=problem.strerror) from problem
    return done


class SignedBundle:
    """A bundle whose structure, signature and release were checked. Made by :func:`open_bundle` only.

    ``header`` is **verified**: the demanded signer wrote it. The ciphertext is not, until a chunk is opened (by whoever
    knows the data keys) or :meth:`verify_digests` has returned (as the signer wrote it).
    """

    def __init__(self, header: BundleHeader, header_bytes: int, fd: int, *, owns_fd: bool) -> None:
        self.header = header
        self._offsets = section_offsets(header, header_bytes)
        self._fd: int | None = fd
        self._owns_fd = owns_fd
        self._pinned: dict[int, tuple[bytes, ...]] = {}
        # Buffers are reused: fresh megabytes cost as much time in page faults as their decryption does.
        self._buffers: deque[bytearray] = deque()

    def unwrap(self, recipient: RecipientPrivateKey) -> KeyEncryptionKey:
        """Open the key-encryption key with our private key (B-16, B-17).

        Raises:
            KeyAccessError: the bundle is not sealed to this key.
            DecryptError: it is, but its entry does not open.
        """
        public = recipient.public
        entry = next((each for each in self.header.recipients if each.key == public), None)
        if entry is None:
            ids = ", ".join(each.key.key_id for each in self.header.recipients[:8])
            raise KeyAccessError(
                "the bundle is not sealed to this key", check="B-16", expected=f"one of {ids}", got=public.key_id
            )
        info = primitives.kek_info(self.header.bundle_id, self.header.release)
        try:
            secret = primitives.hpke_open(recipient.secret, entry.sealed_kek, info=info)
        except DecryptError as problem:
            raise DecryptError(
                "the key-encryption key does not open", check="B-17", where=f"recipient {public.key_id}"
            ) from problem
        return KeyEncryptionKey(self.header.bundle_id, self.header.release, secret)

    def unlock(self, kek: KeyEncryptionKey) -> UnlockedBundle:
        """Open every data key (B-18, B-19).

        Raises:
            KeyAccessError: a key of another bundle or release.
            DecryptError: a data key does not open.
        """
        return self.unlock_with(self.data_keys(kek))

    def unlock_with(self, data_keys: Sequence[bytes]) -> UnlockedBundle:
        """Unlock with the data keys themselves, from whoever unwrapped them for us (a key broker).

        A wrong key is found when the first chunk of its section is opened (B-21).

        Raises:
            KeyAccessError: not one key of 32 bytes for each section.
        """
        header = self.header
        if len(data_keys) != len(header.sections) or any(len(key) != primitives.KEY_BYTES for key in data_keys):
            raise KeyAccessError(
                "not the data keys of this bundle",
                expected=f"{len(header.sections)} keys of {primitives.KEY_BYTES} bytes",
                got=f"{len(data_keys)} keys",
            )
        return UnlockedBundle(
            self,
            tuple(
                primitives.SectionCipher(data_key, bundle_id=header.bundle_id, section=section)
                for section, data_key in enumerate(data_keys)
            ),
        )

    def data_keys(self, kek: KeyEncryptionKey) -> tuple[bytes, ...]:
        """The data key of every section (B-18, B-19). Secret; for whoever wraps them anew.

        Raises:
            KeyAccessError, DecryptError: as :meth:`unlock`.
        """
        header = self.header
        if (kek.bundle_id, kek.release) != (header.bundle_id, header.release):
            raise KeyAccessError(
                "a key-encryption key of another bundle or release",
                check="B-18",
                expected=f"{header.bundle_id.hex()} release {header.release}",
                got=f"{kek.bundle_id.hex()} release {kek.release}",
            )
        return tuple(self._data_key(kek, section) for section in header.sections)

    def _data_key(self, kek: KeyEncryptionKey, section: SectionEntry) -> bytes:
        try:
            return primitives.unwrap_data_key(
                kek.secret,
                section.wrapped_key,
                bundle_id=self.header.bundle_id,
                release=self.header.release,
                section=section.index,
            )
        except DecryptError as problem:
            raise DecryptError(problem.message, check="B-19", where=section_name(section)) from problem

    def verify_digests(self, progress: Progress | None = None, *, threads: int = 1) -> None:
        """Compare the ciphertext of the whole file with the signed digests (B-23).

        Afterwards every chunk that is opened is compared with the digest found here (B-22), so that what was verified
        and what is decrypted are the same bytes even if the file changes in between. It costs a SHA-256 of every
        chunk, here and when it is opened.

        Raises:
            SignatureError: a section is not what the signer sealed; names it.
            BundleError: the file was cut off meanwhile.
        """
        self._pinned = {}
        self._pinned = {
            section.index: self._verified_digests(section, threads, progress) for section in self.header.sections
        }

    @contextmanager
    def pinned(self, section: SectionEntry, *, threads: int = 1) -> Iterator[None]:
        """What is opened of ``section`` inside is the signer's own: B-22 holds inside, and B-23 is made at the end.

        In this order a chunk that nobody with keys made is reported as that (B-21).

        Raises:
            SignatureError, BundleError: see :meth:`verify_digests`; what was opened must not be used then.
        """
        if section.index in self._pinned:
            yield
            return
        digests = self._chunk_digests(section, threads, None)
        self._pinned[section.index] = digests
        try:
            yield
            check_section_digest(section, digests)
        except BaseException:
            del self._pinned[section.index]
            raise

    def _verified_digests(self, section: SectionEntry, threads: int, progress: Progress | None) -> tuple[bytes, ...]:
        digests = self._chunk_digests(section, threads, progress)
        check_section_digest(section, digests)
        return digests

    def digest_matches(self, index: int, progress: Progress | None = None) -> bool:
        """Whether the ciphertext of one section has the digest in the header: for display, nothing is pinned."""
        section = self.header.sections[index]
        return primitives.section_digest(self._chunk_digests(section, 1, progress)) == section.digest

    def _chunk_digests(self, section: SectionEntry, threads: int, progress: Progress | None) -> tuple[bytes, ...]:
        digests = [b""] * section.chunks

        def start_worker() -> Callable[[int], int]:
            buffer = memoryview(bytearray(_CHUNK_CIPHERTEXT_BYTES))

            def work(chunk: int) -> int:
                ciphertext = self.read_chunk(section, chunk, buffer)
                digests[chunk] = primitives.chunk_digest(ciphertext)
                return len(ciphertext)

            return work

        for_each_chunk(section.chunks, threads, start_worker, progress)
        return tuple(digests)

    def read_chunk(self, section: SectionEntry, chunk: int, buffer: memoryview) -> memoryview:
        """Copy one chunk's **unverified** ciphertext into ``buffer`` (B-20): the part of it that was filled.

        Raises:
            BundleError: the file ends before the chunk does.
            InputError: the bundle is closed.
        """
        if self._fd is None:
            raise InputError("the bundle is closed")
        ciphertext = buffer[: section.chunk_plaintext_bytes(chunk) + primitives.TAG_BYTES]
        offset = self._offsets[section.index] + chunk * _CHUNK_CIPHERTEXT_BYTES
        count = read_into(self._fd, ciphertext, offset)
        if count != len(ciphertext):
            raise BundleError(
                "the file ends within a chunk",
                check="B-20",
                where=place(section, chunk),
                expected=f"{len(ciphertext)} bytes",
                got=f"{count} bytes",
                hint="the file was cut off after it was opened",
            )
        return ciphertext

    def check_pinned(self, section: SectionEntry, chunk: int, ciphertext: memoryview) -> None:
        """If the section's digest was verified, check B-22 on a chunk; before, nothing.

        Raises:
            SignatureError: not the chunk whose digest was verified.
        """
        pinned = self._pinned.get(section.index)
        if pinned is not None and primitives.chunk_digest(ciphertext) != pinned[chunk]:
            raise SignatureError(
                "the chunk changed after its digest was verified", check="B-22", where=place(section, chunk)
            )

    def take_buffer(self) -> bytearray:
        """A buffer for one chunk's ciphertext; hand it back with :meth:`give_buffer`."""
        try:
            return self._buffers.pop()
        except IndexError:
            return bytearray(_CHUNK_CIPHERTEXT_BYTES)

    def give_buffer(self, buffer: bytearray) -> None:
        """Keep a buffer for the next call."""
        self._buffers.append(buffer)

    def close(self) -> None:
        """Close the file, if it was opened here. The bundle is of no use afterwards."""
        fd, self._fd = self._fd, None
        self._buffers.clear()
        if fd is not None and self._owns_fd:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_section_digest(section: SectionEntry, chunk_digests: Sequence[bytes]) -> None:
    """Check B-23 on the digests of a section's chunks.

    Raises:
        SignatureError: they are not those of the signed ciphertext.
    """
    if primitives.section_digest(chunk_digests) != section.digest:
        raise SignatureError(
            "the ciphertext is not what was signed",
            check="B-23",
            where=section_name(section),
            hint="the file was altered, or a recipient of it forged chunks; get it anew from its signer",
        )


def section_name(section: SectionEntry) -> str:
    """How errors name a section. For people parts count from 1, as in every table; section i is part i."""
    return "the manifest" if section.index == 0 else f"part {section.index}"


def place(section: SectionEntry, chunk: int) -> str:
    """How errors name a chunk."""
    return f"{section_name(section)}, chunk {chunk} of {section.chunks}"


class UnlockedBundle:
    """A bundle whose data keys are open. Made by :class:`SignedBundle` only; holds secrets until closed.

    Parts are numbered from 0; part ``i`` is section ``i + 1``. Python cannot erase key bytes for certain: closing drops
    the last references, no more.
    """

    def __init__(self, signed: SignedBundle, ciphers: tuple[primitives.SectionCipher, ...]) -> None:
        self._signed = signed
        self._ciphers = ciphers

    @property
    def signed(self) -> SignedBundle:
        """The bundle that was unlocked."""
        return self._signed

    @property
    def parts(self) -> int:
        """Number of parts."""
        return self._signed.header.parts

    def manifest(self, *, threads: int = 1) -> bytes:
        """The plaintext of the manifest, authenticated and as the signer wrote it (B-23 on this section, B-20 to B-22).

        Raises:
            DecryptError, SignatureError, BundleError: as :meth:`open_part`.
        """
        section = self._signed.header.sections[0]
        into = bytearray(section.plaintext_bytes)
        with self._signed.pinned(section, threads=threads):
            self._open_section(section, memoryview(into), threads, None)
        return bytes(into)

    def part_bytes(self, index: int) -> int:
        """Plaintext bytes of part ``index``, 0 to ``parts - 1``: as signed, so ``into`` can be allocated."""
        return self._part(index).plaintext_bytes

    def _part(self, index: int) -> SectionEntry:
        if type(index) is not int or not 0 <= index < self.parts:
            raise InputError("no such part", expected=f"0 to {self.parts - 1}", got=repr(index))
        return self._signed.header.sections[index + 1]

    def open_part(self, index: int, into: memoryview, *, threads: int = 1, progress: Progress | None = None) -> None:
        """Decrypt part ``index`` into ``into``, chunk by chunk, each authenticated (B-20 to B-22).

        Each thread uses a buffer of 1 MiB + 16 bytes, kept for the next call. ``into`` must not be read before this
        returns: OpenSSL writes a chunk before it knows whether it is authentic.

        Args:
            into: writable, contiguous bytes, exactly :meth:`part_bytes` long.

        Raises:
            DecryptError: a chunk does not authenticate; names section and chunk. All of ``into`` is zeroed.
            SignatureError: a chunk differs from the verified digest; likewise.
            BundleError: the file was cut off after it was opened; likewise.
        """
        section = self._part(index)
        if into.readonly or not into.c_contiguous or into.nbytes != section.plaintext_bytes:
            raise InputError(
                "not a destination for this part",
                expected=f"{section.plaintext_bytes} writable contiguous bytes",
                got=f"{into.nbytes} bytes{', read-only' if into.readonly else ''}",
            )
        self._open_section(section, into.cast("B") if into.nbytes else memoryview(bytearray()), threads, progress)

    def open_part_chunk(self, index: int, chunk: int) -> bytes:
        """The plaintext of one chunk of part ``index``, authenticated (B-20 to B-22). Safe from several threads.

        Raises:
            InputError: no such part or chunk.
            DecryptError, SignatureError, BundleError: as :meth:`open_part`; nothing of the chunk is handed out.
        """
        section = self._part(index)
        if not self._ciphers:
            raise InputError("the bundle is closed")
        if type(chunk) is not int or not 0 <= chunk < section.chunks:
            raise InputError("no such chunk", expected=f"0 to {section.chunks - 1}", got=repr(chunk)[:80])
        into, buffer = bytearray(section.chunk_plaintext_bytes(chunk)), self._signed.take_buffer()
        try:
            self._open_chunk(self._ciphers[section.index], section, chunk, memoryview(buffer), memoryview(into))
        finally:
            self._signed.give_buffer(buffer)
        return bytes(into)

    def _open_section(self, section: SectionEntry, into: memoryview, threads: int, progress: Progress | None) -> None:
        check_threads(threads)
        if not self._ciphers:
            raise InputError("the bundle is closed")
        signed, cipher = self._signed, self._ciphers[section.index]
        taken: list[bytearray] = []

        def start_worker() -> Callable[[int], int]:
            taken.append(signed.take_buffer())
            buffer = memoryview(taken[-1])

            def work(chunk: int) -> int:
                start, length = chunk * CHUNK_BYTES, section.chunk_plaintext_bytes(chunk)
                self._open_chunk(cipher, section, chunk, buffer, into[start : start + length])
                return length

            return work

        try:
            for_each_chunk(section.chunks, threads, start_worker, progress)
        except BaseException:
            zero(into)  # half a part is never left for anyone to use
            raise
        finally:
            for each in taken:
                signed.give_buffer(each)

    def _open_chunk(
        self,
        cipher: primitives.SectionCipher,
        section: SectionEntry,
        chunk: int,
        buffer: memoryview,
        destination: memoryview,
    ) -> None:
        ciphertext = self._signed.read_chunk(section, chunk, buffer)
        self._signed.check_pinned(section, chunk, ciphertext)
        try:
            cipher.open(chunk, chunk == section.chunks - 1, ciphertext, destination)
        except DecryptError as problem:
            raise DecryptError(
                problem.message, check="B-21", where=place(section, chunk), hint=problem.hint
            ) from problem

    def close(self) -> None:
        """Drop the data keys. The signed bundle stays open."""
        self._ciphers = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def zero(buffer: memoryview) -> None:
    """Overwrite with zeros, without a second buffer of the same size."""
    blank = bytes(CHUNK_BYTES)
    for start in range(0, len(buffer), CHUNK_BYTES):
        piece = buffer[start : start + CHUNK_BYTES]
        piece[:] = blank[: len(piece)]
