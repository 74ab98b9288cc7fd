"""Opening and sealing a bundle, against a bare loop over the same chunks.

    python benchmarks/bench_seal.py --mib 256 --repeats 9 --threads 1 2

Every round runs each candidate once, after one round of warm-up; printed are the median rate over rounds, the lowest
and highest, and the median of the ratios within a round. Files lie in memory (``--folder``, default /dev/shm): a disk
would hide the arithmetic. One candidate's rate is plaintext bytes over the seconds of the call.

The bare loops do no more than the format demands of anyone: to open, copy each chunk out of the file and decrypt it
into the destination; to seal, copy each chunk from memory, encrypt, hash, write. Sealing is compared without the
SHA-256 too, which shows what the digest costs on this machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from motte.limits import CHUNK_BYTES, MIB
from motte.measure.compare import compare
from motte.seal import BytesPart, RecipientPrivateKey, SignerPrivateKey, UnlockedBundle, open_bundle, write_bundle
from motte.seal.primitives import chunk_digest

TAGGED = CHUNK_BYTES + 16
Candidates = dict[str, Callable[[], None]]


def bare_open(path: Path, plaintext_bytes: int, into: memoryview) -> Callable[[], None]:
    """Bare pread + decrypt_into of whole chunks, which this writes to ``path`` first."""
    cipher, chunks = AESGCM(bytes(32)), plaintext_bytes // CHUNK_BYTES
    with path.open("wb") as file:
        for index in range(chunks):
            file.write(cipher.encrypt(index.to_bytes(12, "big"), os.urandom(CHUNK_BYTES), b"bound"))
    fd = os.open(path, os.O_RDONLY)
    buffer = memoryview(bytearray(TAGGED))

    def run() -> None:
        for index in range(chunks):
            os.preadv(fd, [buffer], index * TAGGED)
            start = index * CHUNK_BYTES
            cipher.decrypt_into(index.to_bytes(12, "big"), buffer, b"bound", into[start : start + CHUNK_BYTES])

    return run


def bare_seal(path: Path, plaintext: memoryview, *, digest: bool) -> Callable[[], None]:
    """Bare copy + encrypt_into (+ SHA-256) + pwrite + fsync."""
    cipher, chunks = AESGCM(bytes(32)), len(plaintext) // CHUNK_BYTES
    clear, buffer = memoryview(bytearray(CHUNK_BYTES)), memoryview(bytearray(TAGGED))

    def run() -> None:
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        for index in range(chunks):
            start = index * CHUNK_BYTES
            clear[:] = plaintext[start : start + CHUNK_BYTES]
            cipher.encrypt_into(index.to_bytes(12, "big"), clear, b"bound", buffer)
            if digest:
                chunk_digest(buffer)
            os.pwrite(fd, buffer, index * TAGGED)
        os.fsync(fd)
        os.close(fd)

    return run


def measure(candidates: Candidates, plaintext_bytes: int, repeats: int) -> None:
    """Interleave, and print one line for each candidate; the first one is what the others are compared with."""
    found = compare(candidates, warmup=1, repeats=repeats)
    for row in found.rows():
        low, high = (plaintext_bytes / row[name] / 1e9 for name in ("max", "min"))
        ratio = "" if row["ratio"] is None else f"{1 / row['ratio']:5.2f} of the first's rate"
        rate = f"{plaintext_bytes / row['median'] / 1e9:6.2f} GB/s ({low:.2f} to {high:.2f})"
        print(f"{row['name']:44} n={row['repeats']} {rate}  {ratio}")


def opener(bundle: UnlockedBundle, into: memoryview, threads: int) -> Callable[[], None]:
    """One call of open_part."""
    return lambda: bundle.open_part(0, into, threads=threads)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="plaintext of the one part, MiB")
    parser.add_argument("--repeats", type=int, default=9, help="rounds after the warm-up, at least 5")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where the files lie")  # noqa: S108
    options = parser.parse_args()
    if options.repeats < 5 or options.mib < 1:
        parser.error("at least 5 repeats and 1 MiB")
    size = options.mib * MIB
    owner, reader = SignerPrivateKey.new(), RecipientPrivateKey.new()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        into = memoryview(bytearray(os.urandom(CHUNK_BYTES)) * options.mib)

        def seal(threads: int) -> None:
            write_bundle(
                folder / "x.motte",
                release=1,
                manifest=b"",
                parts=[BytesPart(into)],
                recipients=[reader.public],
                signer=owner,
                threads=threads,
                overwrite=True,
            )

        print(f"sealing {options.mib} MiB")
        candidates: Candidates = {
            "bare copy, encrypt_into, SHA-256, pwrite": bare_seal(folder / "bare", into, digest=True),
            "bare without SHA-256": bare_seal(folder / "bare", into, digest=False),
        }
        for threads in options.threads:
            candidates[f"write_bundle, {threads} threads"] = lambda threads=threads: seal(threads)  # type: ignore[misc]
        measure(candidates, size, options.repeats)

        print(f"opening {options.mib} MiB")
        with (
            open_bundle(folder / "x.motte", signer=owner.public) as bundle,
            open_bundle(folder / "x.motte", signer=owner.public) as verified,
        ):
            verified.verify_digests()
            plain, checked = bundle.unlock(bundle.unwrap(reader)), verified.unlock(verified.unwrap(reader))
            candidates = {"bare pread, decrypt_into": bare_open(folder / "bare", size, into)}
            for threads in options.threads:
                candidates[f"open_part, {threads} threads"] = opener(plain, into, threads)
                candidates[f"open_part after verify_digests, {threads} threads"] = opener(checked, into, threads)
            measure(candidates, size, options.repeats)


if __name__ == "__main__":
    main()
