"""What a fuzzer calls: any bytes as a bundle, or as a header that the right signer signed. Needs atheris to run itself.

    python tests/seal/fuzz_bundle.py -runs=20000 -max_len=8192 CORPUS_FOLDER

Anything but a MotteError, and any plaintext that was never sealed, is a finding.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
from pathlib import Path

VECTORS = Path(__file__).parent.parent / "vectors"
MAX_DATA_BYTES = 1 << 30


def check(data: bytes) -> None:
    """Read ``data`` in every way that there is. The first byte chooses: a whole file, a header, or an edited header."""
    if not data:
        return
    kind, rest = data[0] % 3, data[1:]
    if kind == 0:
        read_file(rest)
    elif kind == 1:
        read_file(signed(rest))
    else:
        read_file(signed(edited(rest)))


def signed(header: bytes) -> bytes:
    """``header`` as the right signer would sign it, with the ciphertext of a good bundle behind it."""
    from motte.seal import primitives
    from motte.seal.header import front

    good = (VECTORS / "good-three-parts.motte").read_bytes()
    length = int.from_bytes(good[8:12], "big")
    start = front(header)
    return start + primitives.sign_header(secret("signer"), start) + good[76 + length :]


def edited(edits: bytes) -> bytes:
    """The header of a good bundle, each five bytes of ``edits`` putting two bytes at a place of it."""
    good = (VECTORS / "good-three-parts.motte").read_bytes()
    header = bytearray(good[12 : 12 + int.from_bytes(good[8:12], "big")])
    for at in range(0, len(edits) - 4, 5):
        place = int.from_bytes(edits[at : at + 2], "big") % (len(header) + 1)
        header[place : place + edits[at + 2] % 4] = edits[at + 3 : at + 5]
    return bytes(header)


def secret(name: str) -> bytes:
    """A test key."""
    return bytes.fromhex(json.loads((VECTORS / "keys.json").read_text())[name])


def read_file(data: bytes) -> None:
    """Inspect, open and read; every refusal is a MotteError, and what comes out is what was sealed."""
    from motte.errors import MotteError
    from motte.seal import RecipientPrivateKey, SignerPrivateKey, inspect, open_bundle

    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, data)
        try:
            inspect(Path(f"/proc/self/fd/{fd}"), digests=True)
        except MotteError as problem:
            str(problem)
        try:
            with open_bundle(fd, signer=SignerPrivateKey(secret("signer")).public) as bundle:
                if bundle.header.signer.raw != SignerPrivateKey(secret("signer")).public.raw:
                    raise AssertionError("another signer was accepted")
                unlocked = bundle.unlock(bundle.unwrap(RecipientPrivateKey(secret("alice"))))
                must_be(unlocked.manifest(), 0)
                for index in range(unlocked.parts):
                    into = bytearray(unlocked.part_bytes(index))
                    unlocked.open_part(index, memoryview(into))
                    must_be(into, index + 1)
                bundle.verify_digests()
        except MotteError as problem:
            str(problem)
    finally:
        os.close(fd)


def must_be(found: bytes | bytearray, section: int) -> None:
    """Refuse plaintext that was never sealed."""
    if hashlib.shake_256(b"motte vector section %d" % section).digest(len(found)) != found:
        raise AssertionError("plaintext that nobody sealed")


def main() -> None:
    """Run atheris with the options of the command line, in at most 1 GiB of data.

    The bound is the kernel's and not libFuzzer's ``-rss_limit_mb``: that one reads a peak which a process inherits from
    the one that started it, such as a test run that has loaded models.
    """
    import atheris

    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))

    with atheris.instrument_imports(include=["motte"]):
        import motte.seal.inspection
        import motte.seal.reader  # noqa: F401
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
