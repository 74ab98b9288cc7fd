"""A log that only the data's owner can read, written entry by entry by a process that may be killed at any time.

    magic "motte-log-1\\n", length of the header (4 bytes, big-endian), header, signature (64 bytes), entries

The header is canonical JSON: who signed, and the log's key, sealed (HPKE) to each recipient. An entry is a length (4
bytes, big-endian) and a message of an authenticated channel under that key: entries cannot be altered, swapped,
repeated or left out in the middle. What a host can do is cut the end off; a log that was closed properly ends with an
entry that says so, and the reader tells the difference. Entries are padded to multiples of 256 bytes, so that their
lengths say little; their number and their times are visible.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from motte.errors import DecryptError, FormatError, InputError, KeyAccessError, ResourceError, SignatureError
from motte.limits import MAX_LOG_ENTRY_BYTES, MAX_LOG_FILE_BYTES, MAX_LOG_HEADER_BYTES, MAX_RECIPIENTS
from motte.seal import primitives
from motte.seal.atomic import atomic_file
from motte.seal.keys import RecipientPrivateKey, RecipientPublicKey, SignerPublicKey
from motte.seal.writer import write_all
from motte.strict_json import Fields, canonical, parse
from motte.train.files import read_bounded
from motte.train.owner import OwnerKeys

MAGIC: Final = b"motte-log-1\n"
FORMAT: Final = "motte-log/1"
_PADDED_BYTES: Final = 256
_DIRECTION: Final = b"training log"
_END: Final = {"kind": "end"}
_SEALED_KEY_BYTES: Final = primitives.KEY_BYTES + primitives.HPKE_EXTRA_BYTES
Entry = Mapping[str, Any]


class SealedLogWriter:
    """Writes one new file. Each entry is on its way to the disk when :meth:`write` returns.

    Raises:
        InputError: the file exists. ResourceError: it cannot be written.
    """

    def __init__(self, path: Path, keys: OwnerKeys) -> None:
        self.path = path
        log_id, key = primitives.random_bytes(16), primitives.random_bytes(primitives.KEY_BYTES)
        recipients = [
            {"key": person.raw.hex(), "sealed": primitives.hpke_seal(person.raw, key, info=_info(log_id)).hex()}
            for person in keys.everybody
        ]
        header = {"format": FORMAT, "log_id": log_id.hex(), "signer": keys.signer.public.raw.hex()}
        encoded = canonical({**header, "recipients": recipients})
        front = MAGIC + len(encoded).to_bytes(4, "big") + encoded
        with atomic_file(path, overwrite=False, mode=0o600) as fd:
            write_all(fd, front + primitives.sign_log(keys.signer.secret, front), 0)
        self._log_id = log_id
        self._cipher = primitives.ChannelCipher(key, _DIRECTION)
        self._fd: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def write(self, entry: Entry) -> None:
        """Append one entry.

        Raises:
            InputError: the log is closed, or the entry too large. ResourceError: no room.
        """
        if self._fd is None:
            raise InputError("the log is closed", where=str(self.path))
        plain = canonical(dict(entry))
        plain += b" " * (-len(plain) % _PADDED_BYTES)
        if len(plain) + primitives.TAG_BYTES > MAX_LOG_ENTRY_BYTES:
            raise InputError("an entry of the log is too large", expected=f"at most {MAX_LOG_ENTRY_BYTES} bytes")
        sealed = self._cipher.seal(plain, self._log_id)
        # One write: another process that reads meanwhile sees whole entries, but for a full disk.
        line = len(sealed).to_bytes(4, "big") + sealed
        try:
            written = os.write(self._fd, line)
        except OSError as problem:
            raise ResourceError("the log cannot be written", where=str(self.path), got=problem.strerror) from problem
        if written != len(line):
            raise ResourceError("no room for the log", where=str(self.path))

    def close(self) -> None:
        """Write that nothing follows, and sync. Safe to call again."""
        if self._fd is None:
            return
        try:
            self.write(_END)
            os.fsync(self._fd)
        finally:
            fd, self._fd = self._fd, None
            os.close(fd)


@dataclass(frozen=True, slots=True)
class SealedLog:
    """What a log holds, authenticated, and whether it was closed: if not, its end may have been cut off."""

    entries: tuple[Entry, ...]
    closed: bool


def read_log(path: Path, opener: RecipientPrivateKey, *, signer: SignerPublicKey) -> SealedLog:
    """Read an **unverified** file.

    Raises:
        InputError: no such file. FormatError: not such a log. SignatureError: not signed by ``signer``.
        KeyAccessError: not sealed to this key. DecryptError: an entry was altered, left out or moved.
    """
    data = read_bounded(path, MAX_LOG_FILE_BYTES, what="the log")
    encoded, start = _verified_header(data, signer, path)
    log_id, key = _log_key(encoded, opener, signer, path)
    return _entries(memoryview(data)[start:], log_id, key, path)


def _verified_header(data: bytes, signer: SignerPublicKey, path: Path) -> tuple[bytes, int]:
    begin = len(MAGIC) + 4
    if data[: len(MAGIC)] != MAGIC or len(data) < begin:
        raise FormatError("not a sealed log", where=str(path))
    length = int.from_bytes(data[len(MAGIC) : begin], "big")
    end = begin + length + primitives.SIGNATURE_BYTES
    if length > MAX_LOG_HEADER_BYTES or len(data) < end:
        raise FormatError("the header is cut off, or too large", where=str(path))
    try:
        primitives.verify_log(signer.raw, data[begin + length : end], data[: begin + length])
    except SignatureError as problem:
        hint = "the log was written with --checkpoint-signer: give its public key as --signer"
        raise SignatureError(problem.message, where=str(path), expected=str(signer), hint=hint) from problem
    return data[begin : begin + length], end


def _log_key(encoded: bytes, opener: RecipientPrivateKey, signer: SignerPublicKey, path: Path) -> tuple[bytes, bytes]:
    fields = Fields(parse(encoded, max_bytes=MAX_LOG_HEADER_BYTES, what=str(path)), where=str(path))
    fields.choice("format", (FORMAT,))
    log_id = fields.hexadecimal("log_id", length_bytes=16)
    if fields.hexadecimal("signer", length_bytes=primitives.KEY_BYTES) != signer.raw:
        raise SignatureError("the header names another signer than the one who signed it", where=str(path))
    people = dict(fields.items("recipients", max_items=MAX_RECIPIENTS, read=_read_recipient))
    fields.done()
    sealed = people.get(opener.public)
    if sealed is None:
        raise KeyAccessError("the log is not sealed to this key", where=str(path), got=opener.public.key_id)
    return log_id, primitives.hpke_open(opener.secret, sealed, info=_info(log_id))


def _read_recipient(value: object, where: str) -> tuple[RecipientPublicKey, bytes]:
    fields = Fields(value, where=where)
    key = RecipientPublicKey(fields.hexadecimal("key", length_bytes=primitives.KEY_BYTES))
    sealed = fields.hexadecimal("sealed", length_bytes=_SEALED_KEY_BYTES)
    fields.done()
    return key, sealed


def _entries(data: memoryview, log_id: bytes, key: bytes, path: Path) -> SealedLog:
    cipher, at = primitives.ChannelCipher(key, _DIRECTION), 0
    found: list[Entry] = []
    while at < len(data):
        where = f"{path}, entry {len(found) + 1}"
        length = int.from_bytes(data[at : at + 4], "big")
        if length > MAX_LOG_ENTRY_BYTES:
            raise FormatError("an entry is too large", where=where)
        if at + 4 > len(data) or at + 4 + length > len(data):
            return SealedLog(tuple(found), closed=False)
        try:
            plain = cipher.open(data[at + 4 : at + 4 + length], log_id)
        except DecryptError as problem:
            raise DecryptError("an entry was altered, left out or moved", where=where) from problem
        at += 4 + length
        entry = parse(plain, max_bytes=MAX_LOG_ENTRY_BYTES, what=where)
        if not isinstance(entry, dict):
            raise FormatError("not an entry of a log", where=where)
        if entry == _END:
            if at != len(data):
                raise FormatError("something follows the last entry", where=where)
            return SealedLog(tuple(found), closed=True)
        found.append(entry)
    return SealedLog(tuple(found), closed=False)


def _info(log_id: bytes) -> bytes:
    return b"training log key\x00" + log_id
