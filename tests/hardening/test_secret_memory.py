"""What direct reads of a process's memory meet, and what root can do all the same: both are shown."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from motte.errors import ResourceError
from motte.trusted import secret_memory
from motte.trusted.arena import Arena
from motte.trusted.harden import SECRET_MEMORY, harden
from motte.trusted.kernel import LIBC, system_call
from motte.trusted.secret_memory import Block, SecretBytes, why_no_secret_memory

CANARY = b"MOTTE-CANARY-" + bytes(range(200, 219))
NO_SECRET_MEMORY = why_no_secret_memory()
needs_secret = pytest.mark.skipif(NO_SECRET_MEMORY is not None, reason=f"no secret memory: {NO_SECRET_MEMORY}")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may read another process's memory like this")

# The canary is made in place, byte by byte, so that no copy of it lies anywhere else in the child.
HOLD = """
import ctypes
from motte.trusted.secret_memory import Block
from motte.trusted import harden
def fill(block):
    for i, c in enumerate(b"MOTTE-CANARY-"):
        block.view[i] = c
    for i in range(19):
        block.view[13 + i] = 200 + i
    return ctypes.addressof(ctypes.c_char.from_buffer(block.view))
secret, ordinary = Block(4096), Block(4096, secret=False)
print(secret.kind, fill(secret), fill(ordinary), flush=True)
"""


@dataclass
class Target:
    pid: int
    secret: int
    ordinary: int
    process: subprocess.Popen[str]


@contextmanager
def target(held: Callable[[str], object], script: str = HOLD) -> Iterator[Target]:
    with held(script) as child:
        kind, secret, ordinary = child.stdout.readline().split()
        assert kind == "secret"
        yield Target(child.pid, int(secret), int(ordinary), child)


def by_process_vm(pid: int, address: int) -> bytes | int:
    """What process_vm_readv gives: the bytes, or an error number."""
    buffer = ctypes.create_string_buffer(len(CANARY))
    here = struct.pack("QQ", ctypes.addressof(buffer), len(CANARY))
    there = struct.pack("QQ", address, len(CANARY))
    LIBC.process_vm_readv.restype = ctypes.c_ssize_t
    done = LIBC.process_vm_readv(pid, here, ctypes.c_ulong(1), there, ctypes.c_ulong(1), ctypes.c_ulong(0))
    return buffer.raw[:done] if done >= 0 else ctypes.get_errno()


def by_memory_file(pid: int, address: int) -> bytes | int:
    """What /proc/PID/mem gives."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        return os.pread(fd, len(CANARY), address)
    except OSError as problem:
        return problem.errno or 0
    finally:
        os.close(fd)


@needs_secret
@needs_root
@pytest.mark.parametrize("read", [by_process_vm, by_memory_file])
def test_direct_reads_by_root_fail_where_ordinary_memory_is_readable(held, read) -> None:
    with target(held) as found:
        # The reader works, and so would the attack on memory that is only locked.
        assert read(found.pid, found.ordinary) == CANARY
        assert isinstance(read(found.pid, found.secret), int)


@needs_secret
@needs_root
def test_nobody_can_map_it_elsewhere(held) -> None:
    # The memory has no descriptor left that could be taken over, and its mapping cannot be opened as a file.
    with target(held) as found:
        names = [os.readlink(f"/proc/{found.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{found.pid}/fd")]
        assert not [name for name in names if "secretmem" in name]
        place = next(e for e in os.listdir(f"/proc/{found.pid}/map_files") if e.startswith(f"{found.secret:x}-"))
        with pytest.raises(OSError, match=r"."):
            os.open(f"/proc/{found.pid}/map_files/{place}", os.O_RDONLY)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become two other users")
def test_another_process_of_the_same_user_reads_nothing_once_hardened(child) -> None:
    # One user, two processes: readable before harden(), not afterwards, whatever kind of memory.
    script = f"""
import ctypes, os, struct
{HOLD}
a = ctypes.addressof(ctypes.c_char.from_buffer(ordinary.view))
libc = ctypes.CDLL(None, use_errno=True)
def attempt():
    reader = os.fork()
    if reader == 0:
        b = ctypes.create_string_buffer(32)
        pid = os.getppid()
        got = libc.process_vm_readv(pid, struct.pack("QQ", ctypes.addressof(b), 32), 1, struct.pack("QQ", a, 32), 1, 0)
        os._exit(0 if got == 32 else ctypes.get_errno())
    return os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])
libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
libc.prctl(4, 1, 0, 0, 0)
before = attempt()
harden.harden()
print("result", before, attempt())
"""
    done = child(script, ordinary_user=True)
    assert done.stdout.splitlines()[-1:] == ["result 0 1"], done.stderr


# --- what it does not stop ------------------------------------------------------------------------------------------
class Tracer:
    """ptrace(2) on one stopped process of this architecture, as any debugger of root does it."""

    PEEK, POKE, STEP, GET, SET, ATTACH, DETACH = 1, 4, 9, 12, 13, 16, 17
    WORDS = 27
    RIP, RSP, RAX, ORIG_RAX, RDI, RSI, RDX = 16, 19, 10, 15, 14, 13, 12

    def __init__(self, pid: int) -> None:
        self.pid = pid
        LIBC.ptrace.restype = ctypes.c_long
        LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]

    def __enter__(self) -> Tracer:
        self._ask(self.ATTACH)
        os.waitpid(self.pid, 0)
        return self

    def __exit__(self, *_: object) -> None:
        self._ask(self.DETACH)

    def peek(self, address: int) -> int:
        ctypes.set_errno(0)
        word = LIBC.ptrace(self.PEEK, self.pid, address, None)
        if ctypes.get_errno():
            raise OSError(ctypes.get_errno(), "PTRACE_PEEKDATA")
        return word & (1 << 64) - 1

    def call(self, number: int, *arguments: int) -> int:
        """Have the target make one system call, and put everything back: code injection in its smallest form."""
        saved = (ctypes.c_ulonglong * self.WORDS)()
        self._ask(self.GET, None, ctypes.addressof(saved))
        registers = (ctypes.c_ulonglong * self.WORDS)(*saved)
        code = self.peek(saved[self.RIP])
        self._ask(self.POKE, saved[self.RIP], code & ~0xFFFF | 0x050F)
        registers[self.RAX], registers[self.ORIG_RAX] = number, (1 << 64) - 1
        for register, value in zip((self.RDI, self.RSI, self.RDX), arguments, strict=False):
            registers[register] = value
        self._ask(self.SET, None, ctypes.addressof(registers))
        self._ask(self.STEP)
        os.waitpid(self.pid, 0)
        self._ask(self.GET, None, ctypes.addressof(registers))
        result = ctypes.c_longlong(registers[self.RAX]).value
        self._ask(self.POKE, saved[self.RIP], code)
        self._ask(self.SET, None, ctypes.addressof(saved))
        return result

    def _ask(self, request: int, address: int | None = None, data: int | None = None) -> None:
        if LIBC.ptrace(request, self.pid, address, data) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), f"ptrace {request}")


@needs_secret
@needs_root
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the injector speaks x86_64")
def test_root_reads_it_by_injecting_code(held) -> None:
    # The honest half: hardened with all that there is, the process still gives its secret to root.
    hardened = HOLD.replace(
        "print(secret.kind", "found = harden.after_threads(harden.before_threads())\nprint(secret.kind"
    )
    with target(held, hardened) as found:
        try:
            tracer = Tracer(found.pid).__enter__()
        except PermissionError as problem:
            pytest.skip(f"this root may not trace: {problem}")
        with pytest.raises(OSError, match="PEEKDATA"):
            tracer.peek(found.secret)  # ptrace's own read fails ...
        assert tracer.peek(found.ordinary) == int.from_bytes(CANARY[:8], "little")
        # ... and a write(1, secret, 32) that the process is made to do does not.
        assert tracer.call(1, 1, found.secret, len(CANARY)) == len(CANARY)
        tracer.__exit__()
        assert os.read(found.process.stdout.fileno(), len(CANARY)) == CANARY
        found.process.send_signal(signal.SIGCONT)
        assert found.process.poll() is None


# --- the memory itself ----------------------------------------------------------------------------------------------
@needs_secret
def test_an_arena_in_secret_memory_has_all_that_an_arena_has() -> None:
    arena = Arena(3 * 4096 + 100)
    assert (arena.kind, arena.locked, arena.secret_bytes) == ("secret", True, 3 * 4096 + 100)
    assert arena.resident_bytes() == 0
    arena.low(10)[:] = b"0123456789"
    arena.high(5000)[-1:] = b"x"
    assert arena.resident_bytes() == 2 * 4096
    assert bytes(arena.view[:3]) + bytes(arena.view[4096 + 4999 :][:1]) == b"012x"
    arena.wipe()
    assert not any(arena.view)


@pytest.mark.parametrize("secret", [True, False])
def test_views_keep_the_memory_and_the_last_one_gives_it_back(secret: bool) -> None:
    before = mapped()
    block = Block(300_000, secret=secret)
    array = np.frombuffer(block.view, dtype=np.uint8)[100:]
    del block
    array[:] = 7
    assert array.sum() == 7 * 299_900
    assert mapped() != before
    del array
    assert mapped() == before


def mapped() -> int:
    """Bytes of address space that are mapped and not extended in steps, as the heap is."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        spans = [line.split()[0].split("-") for line in file if "secretmem" in line or line.endswith(" 0 \n")]
    return sum(int(high, 16) - int(low, 16) for low, high in spans if (int(high, 16) - int(low, 16)) == 303_104)


def test_secret_bytes_are_taken_wiped_and_never_shown() -> None:
    source = bytearray(b"0123456789abcdef")
    with SecretBytes.take(source) as secret:
        assert not any(source)
        assert bytes(secret.view) == b"0123456789abcdef"
        assert len(secret) == 16
        assert repr(secret) == f"<16 secret bytes in {secret.kind} memory>"
        with pytest.raises(TypeError, match="do not leave"):
            secret.__reduce__()
    assert not any(secret.view)
    assert len(SecretBytes.take(b"abc")) == 3


@needs_secret
@needs_root
def test_keys_fit_when_weights_have_used_up_the_limit(child) -> None:
    script = """
import resource
from motte.trusted.arena import Arena
from motte.trusted.secret_memory import SecretBytes
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
arenas = [Arena(400 << 10) for _ in range(4)]
keys = [SecretBytes(32) for _ in range(10)]
print(*(each.kind for each in arenas), *{each.kind for each in keys}, sum(a.secret_bytes for a in arenas) >> 10)
print(*(each.locked for each in arenas))
"""
    done = child(script, ordinary_user=True)
    assert done.stdout.split() == [
        "secret", "secret", "ordinary", "ordinary", "secret", "800", "True", "True", "False", "False",
    ], done.stderr  # fmt: skip


def test_a_kernel_without_it_gives_locked_or_ordinary_memory_and_says_so(monkeypatch) -> None:
    def refuse(number: int, *arguments: int) -> int:
        if number == 447:
            raise OSError(38, "Function not implemented")
        return system_call(number, *arguments)

    monkeypatch.setattr(secret_memory, "system_call", refuse)
    arena = Arena(8192)
    assert arena.kind in ("locked", "ordinary")
    assert arena.locked == (arena.kind == "locked")
    assert arena.secret_bytes == 0
    arena.view[:] = bytes(8192)
    assert "ENOSYS" in (why_no_secret_memory() or "")
    assert SecretBytes(32).kind == arena.kind
    with pytest.raises(ResourceError, match="ENOSYS") as caught:
        _harden_but_not_this_process(monkeypatch, SECRET_MEMORY)
    assert caught.value.expected == SECRET_MEMORY


def _harden_but_not_this_process(monkeypatch, measure: str) -> None:
    from motte.trusted import harden as module

    answers = {3: 0, 39: 1}
    monkeypatch.setattr(module, "process_control", lambda option, argument=0: answers.get(option, 0))
    monkeypatch.setattr(module.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(module.resource, "getrlimit", lambda *_: (0, 0))
    harden(require=(measure,))
