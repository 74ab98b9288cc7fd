"""Runs a program that sees an image and nothing else of this machine. A program of its own, started by path.

    python -I -S -B bare.py PLACE IMAGE [FILE...] -- PROGRAM ARGUMENT...

In a new mount namespace PLACE, an empty folder, becomes an empty file system; the folders of IMAGE are put into it
read-only, each FILE at its own path, and of the kernel's files /proc, /sys/devices/system, /dev/null and /dev/urandom:
what Gramine emulates too. Then it becomes the root, and PROGRAM runs, with no network. This shows that an image is
closed; it is no wall against a program that wants out.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

_NEWNS, _NEWUSER, _NEWNET = 0x0002_0000, 0x1000_0000, 0x4000_0000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18
_NO_PERMISSION = 126
_LIBC = ctypes.CDLL(None, use_errno=True)


def _call(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def _mount(source: str, target: str, kind: str | None, flags: int) -> None:
    words = (source.encode(), target.encode(), None if kind is None else kind.encode())
    _call(_LIBC.mount(*words, ctypes.c_ulong(flags), None), f"mount {target}")


def _own_namespaces() -> None:
    uid, gid = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEWNS | _NEWNET) == 0:
        return
    if ctypes.get_errno() != errno.EPERM:
        _call(-1, "unshare")
    _call(_LIBC.unshare(_NEWUSER | _NEWNS | _NEWNET), "unshare with a user namespace")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _show(source: str, place: str, *, writable: bool = False) -> None:
    """``source`` at the same path below ``place``."""
    target = place + source
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb"):
            pass
    _bind(source, target, writable=writable)


def _bind(source: str, target: str, *, writable: bool) -> None:
    _mount(source, target, None, _BIND | _RECURSIVE)
    if not writable:
        # Flags that a mount has already must be stated again, or an unprivileged user may not change it.
        kept = os.statvfs(target).f_flag & 0b1110
        _mount("none", target, None, _BIND | _REMOUNT | _READ_ONLY | kept)


def main(words: list[str]) -> None:
    """Make the place, then become the program."""
    end = words.index("--")
    place, image, *files = words[:end]
    try:
        _own_namespaces()
        _mount("none", "/", None, _RECURSIVE | _PRIVATE)
        _mount("none", place, "tmpfs", 0)
        for name in sorted(os.listdir(image)):
            os.mkdir(f"{place}/{name}")
            _bind(f"{image}/{name}", f"{place}/{name}", writable=False)
        for path in (*files, "/sys/devices/system"):
            _show(path, place)
        for path in ("/proc", "/dev/null", "/dev/urandom"):
            _show(path, place, writable=True)
        os.makedirs(f"{place}/tmp", exist_ok=True)  # noqa: S108  (its own, in the new file system)
        os.chroot(place)
        os.chdir("/")
    except OSError as problem:
        sys.stderr.write(f"no namespace of its own: {problem}\n")
        sys.exit(_NO_PERMISSION)
    os.execve(words[end + 1], words[end + 1 :], dict(os.environ))  # noqa: S606  (this program is for that)


if __name__ == "__main__":
    main(sys.argv[1:])
