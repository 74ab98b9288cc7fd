"""Where an accelerator is: ``unix:PATH``, ``tcp:HOST:PORT``, or ``fd:N`` for a socket that was inherited."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from motte.errors import InputError, PeerClosed, PeerStalled, ResourceError
from motte.link.wire import Deadline

_FORMS: Final = "unix:PATH, tcp:HOST:PORT or fd:N"
_LONGEST_UNIX_PATH: Final = 107
_AGAIN_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket in the file system; its mode lets in its owner alone."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host name or address, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class DescriptorAddress:
    """A connected stream socket that whoever started this process left open."""

    fd: int

    def __str__(self) -> str:
        return f"fd:{self.fd}"


Address = UnixAddress | TcpAddress | DescriptorAddress


def parse_address(text: str) -> Address:
    """The address that ``text`` is.

    Raises:
        InputError: none of the forms.
    """
    kind, found, rest = text.partition(":")
    wrong = InputError("not an address of an accelerator", expected=_FORMS, got=repr(text)[:200])
    if not found or not rest or "\0" in rest:
        raise wrong
    if kind == "unix":
        if len(os.fsencode(rest)) > _LONGEST_UNIX_PATH:
            raise InputError("path too long for a socket", expected=f"at most {_LONGEST_UNIX_PATH} bytes", got=rest)
        return UnixAddress(Path(rest))
    if kind == "fd" and rest.isascii() and rest.isdigit() and len(rest) < 6:
        return DescriptorAddress(int(rest))
    host, found, port = rest.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    good = port.isascii() and port.isdigit() and len(port) < 6 and int(port) < 1 << 16
    if kind != "tcp" or not found or not host or not good:
        raise wrong
    return TcpAddress(host, int(port))


def connect_socket(address: Address, deadline: Deadline, *, loopback_only: bool, wait: bool) -> socket.socket:
    """A connected socket, blocking, without TLS.

    Args:
        loopback_only: refuse every address that leads out of this machine.
        wait: try again until the deadline while nobody listens.

    Raises:
        InputError: an address that leads out, or a descriptor that is no socket. PeerClosed, PeerStalled: nobody there.
    """
    if isinstance(address, DescriptorAddress):
        return _inherited(address)
    while True:
        try:
            if isinstance(address, UnixAddress):
                return _connect(socket.AF_UNIX, str(address.path), deadline)
            family, target = resolve(address, loopback_only=loopback_only)
            return _connect(family, target, deadline)
        except TimeoutError as problem:
            raise PeerStalled("no connection in time", where=str(address), expected=deadline.expected()) from problem
        except OSError as problem:
            absent = problem.errno in (errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET, errno.EAGAIN)
            if not absent or not wait or not deadline.left_ms():
                hint = f"start it there: motte accelerator serve --listen {address}"
                raise PeerClosed(
                    "no accelerator there", where=str(address), got=problem.strerror, hint=hint
                ) from problem
            time.sleep(_AGAIN_S)


def resolve(address: TcpAddress, *, loopback_only: bool) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Family and numeric address, the first that the system gives.

    Raises:
        InputError: unknown, or with ``loopback_only`` an address that leads out of this machine.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as problem:
        raise InputError("unknown host", where=str(address), got=str(problem)) from problem
    family, _, _, _, target = found[0]
    numeric = str(target[0])
    if loopback_only and not is_loopback(numeric):
        raise InputError(
            "an accelerator on another machine is reached over TLS only",
            where=str(address),
            got=numeric,
            hint="give the pin that `motte accelerator serve` printed there; without TLS only loopback is allowed",
        )
    return family, (numeric, address.port)


def is_loopback(numeric: str) -> bool:
    """Whether a numeric address never leaves this machine."""
    return ipaddress.ip_address(numeric.partition("%")[0]).is_loopback


@contextlib.contextmanager
def listening(address: UnixAddress | TcpAddress) -> Iterator[socket.socket]:
    """A listening socket while the block runs; a Unix socket has mode 0600, and its file goes at the end.

    Raises:
        InputError: something else has the address, or the address is unknown. ResourceError: it cannot be had.
    """
    if isinstance(address, UnixAddress):
        with _listening_unix(address.path) as sock:
            yield sock
        return
    family, target = resolve(address, loopback_only=False)
    sock = socket.socket(family, socket.SOCK_STREAM)
    with sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(target)
            sock.listen()
        except OSError as problem:
            raise _cannot_listen(str(address), problem) from problem
        yield sock


@contextlib.contextmanager
def _listening_unix(path: Path) -> Iterator[socket.socket]:
    _remove_dead(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with sock:
        try:
            # The mode of a socket file is that of the descriptor: set before bind, nobody gets in between.
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(str(path))
            os.chmod(path, 0o600)
            sock.listen()
        except OSError as problem:
            raise _cannot_listen(f"unix:{path}", problem) from problem
        mine = os.stat(path)
        try:
            yield sock
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(mine, os.stat(path)):
                    os.unlink(path)


def _remove_dead(path: Path) -> None:
    """Remove the socket file of a listener that was killed; leave everything else alone."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(str(path))
    except ConnectionRefusedError:
        with contextlib.suppress(OSError):
            os.unlink(path)
    except OSError:
        return


def _cannot_listen(address: str, problem: OSError) -> InputError | ResourceError:
    if problem.errno == errno.EADDRINUSE:
        return InputError("something else is there already", where=address)
    return ResourceError("cannot listen", where=address, got=problem.strerror)


def _connect(family: int, target: object, deadline: Deadline) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        left = deadline.left_ms()
        sock.settimeout(None if left is None else max(left, 1) / 1000)
        sock.connect(target)  # type: ignore[arg-type]  # a path or a pair, as the family says
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def _inherited(address: DescriptorAddress) -> socket.socket:
    try:
        sock = socket.socket(fileno=address.fd)
    except OSError as problem:
        raise InputError("not an open socket", where=str(address), got=problem.strerror) from problem
    if sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise InputError("not a stream socket", where=str(address), got=str(sock.type))
    sock.set_inheritable(False)
    return sock
