"""Fetch published weights into a cache, and believe nothing but the hash in their name. Data sets too, by full hash.

torchvision publishes ``NAME-HASH.pth``, where HASH is the first hexadecimal digits of the file's SHA-256. A download is
hashed while it is written under a temporary name; only a file that matches gets its final name, so the cache never
holds a half or a wrong one. The cache is ``$XDG_CACHE_HOME/motte/weights`` (``~/.cache/motte/weights``). No torch here.

Eight hexadecimal digits are 32 bits: they find damage and mix-ups, not an attacker who can search for a match. Against
one stands https alone, which is why a redirect may never leave it.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO
from urllib.parse import urlsplit

from motte.errors import InputError, ResourceError, TrustError
from motte.limits import MAX_WEIGHTS_FILE_BYTES, MIB

Progress = Callable[[int, int | None], None]
"""Called with bytes done and bytes in all (None: the server did not say)."""

_HASH = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")
_READ_BYTES = 1 * MIB
_TIMEOUT_S = 30.0
_HINT = "use --weights FILE with a file that you have, or --random-weights to try everything but the answers"


def cache_folder() -> Path:
    """Where downloaded weights lie; not created here. A relative ``XDG_CACHE_HOME`` counts as unset, as XDG says."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "motte" / "weights"


def file_name(url: str) -> str:
    """The last part of the URL's path.

    Raises:
        InputError: it carries no hash, so that nothing could be checked.
    """
    name = urlsplit(url).path.rpartition("/")[2]
    if _HASH.search(name) is None:
        raise InputError("no hash in the name of the published file", where=url, expected="NAME-SHA256PREFIX.pth")
    return name


def hash_matches(path: Path) -> bool:
    """Whether the file's SHA-256 starts with the digits in its own name (False where the name has none)."""
    found = _HASH.search(path.name)
    return found is not None and file_sha256(path).startswith(found[1])


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached(url: str) -> Path | None:
    """The checked file of ``url`` in the cache, or None when it is not there.

    Raises:
        TrustError: there is a file, and its content is not what its name says.
    """
    path = cache_folder() / file_name(url)
    if not path.is_file():
        return None
    if not hash_matches(path):
        raise TrustError(
            "cached weights do not match the hash in their name",
            where=str(path),
            got=f"sha256 {file_sha256(path)[:16]}...",
            hint="delete the file and run `motte zoo pull` again",
        )
    return path


def fetch(url: str, *, progress: Progress | None = None, timeout_s: float = _TIMEOUT_S) -> Path:
    """Download ``url`` into the cache unless it is there already; the path of the checked file.

    Raises:
        ResourceError: offline, refused, cut short, too slow, or no room to write.
        TrustError: what came does not match the hash in the name, or the server redirected to something unsafe.
    """
    there = cached(url)
    if there is not None:
        return there
    final = cache_folder() / file_name(url)
    _fetch(url, final, lambda digest: _check(digest, final, url), _WEIGHTS, progress, timeout_s)
    return final


@dataclass(frozen=True, slots=True)
class Published:
    """What is downloaded: how errors name it, what they advise, and the most bytes that it may have."""

    what: str
    hint: str
    max_bytes: int


_WEIGHTS = Published("weights", _HINT, MAX_WEIGHTS_FILE_BYTES)


def fetch_known(
    url: str,
    final: Path,
    *,
    sha256: str,
    published: Published,
    progress: Progress | None = None,
    timeout_s: float = _TIMEOUT_S,
) -> None:
    """Download ``url`` to ``final``, a file whose whole SHA-256 is known; nothing is kept that has another.

    Args:
        sha256: 64 hexadecimal digits in lower case.

    Raises:
        ResourceError, TrustError: as :func:`fetch`.
    """

    def check(digest: str) -> None:
        if digest != sha256:
            raise TrustError(
                f"the downloaded {published.what} are not the published ones; nothing was kept",
                where=url,
                expected=f"sha256 {sha256[:16]}...",
                got=f"sha256 {digest[:16]}...",
                hint="something on the way changed or replaced the file; do not use it",
            )

    _fetch(url, final, check, published, progress, timeout_s)


def _fetch(
    url: str,
    final: Path,
    check: Callable[[str], None],
    published: Published,
    progress: Progress | None,
    timeout_s: float,
) -> None:
    """Download under a passing name; ``final`` appears only after ``check`` took the file's SHA-256."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=final.parent)
    except OSError as problem:
        raise ResourceError("cannot write to the cache", where=str(final.parent), got=str(problem)) from problem
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            digest = _download(url, file, published, progress, timeout_s)
            file.flush()
            os.fsync(file.fileno())
        check(digest)
        temporary.replace(final)
    except BaseException:  # Ctrl-C too leaves nothing behind
        temporary.unlink(missing_ok=True)
        raise


def _download(
    url: str, file: BinaryIO | IO[bytes], published: Published, progress: Progress | None, timeout_s: float
) -> str:
    opener = urllib.request.build_opener(_SafeRedirects())
    if urlsplit(url).scheme not in ("http", "https"):
        raise InputError("not a web address", got=url)
    # The scheme was just checked, and a redirect is checked again.
    request = urllib.request.Request(url, headers={"User-Agent": "motte"})  # noqa: S310
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return _copy(answer, file, published, progress, url)
    except TrustError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as problem:  # URLError and timeouts are OSErrors
        reason = getattr(problem, "reason", None) or problem
        if isinstance(problem, urllib.error.HTTPError):  # an answer too, which holds its connection open
            reason = str(problem)
            problem.close()
        raise ResourceError(
            f"cannot download the published {published.what}", where=url, got=str(reason)[:200], hint=published.hint
        ) from problem


def _copy(
    answer: http.client.HTTPResponse,
    file: BinaryIO | IO[bytes],
    published: Published,
    progress: Progress | None,
    url: str,
) -> str:
    length = answer.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    digest, done = hashlib.sha256(), 0
    if total is not None and total > published.max_bytes:
        raise _too_large(url, total, published.max_bytes)
    while block := answer.read(_READ_BYTES):
        done += len(block)
        if done > published.max_bytes:
            raise _too_large(url, done, published.max_bytes)
        file.write(block)
        digest.update(block)
        if progress is not None:
            progress(done, total)
    if total is not None and done != total:
        raise ResourceError(
            "the download was cut short", where=url, expected=f"{total} bytes", got=f"{done} bytes", hint="run it again"
        )
    return digest.hexdigest()


def _too_large(url: str, size: int, most: int) -> TrustError:
    return TrustError("published file too large", where=url, expected=f"at most {most} bytes", got=f"{size} bytes")


def _check(digest: str, final: Path, url: str) -> None:
    found = _HASH.search(final.name)
    if found is None or not digest.startswith(found[1]):
        raise TrustError(
            "downloaded weights do not match the hash in their name; nothing was kept",
            where=url,
            expected=f"sha256 {found[1] if found else '?'}...",
            got=f"sha256 {digest[:16]}...",
            hint="something on the way changed or replaced the file; do not use it",
        )


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https down to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after not in ("http", "https") or (before == "https" and after != "https"):
            fp.close()
            raise TrustError("unsafe redirect", where=req.full_url, got=newurl[:200], expected="https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
