"""What a hardened process can no longer do, each thing tried for real in a child; and what it still must do."""

from __future__ import annotations

import os
import re
import signal
import struct
from pathlib import Path

import pytest

from motte.errors import FrameError, ResourceError, SettingError
from motte.trusted import harden, landlock, seccomp
from motte.trusted.harden import LANDLOCK, MEASURES, NO_CORE_FILES, SECCOMP, Hardening

HEADERS = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


def landlock_abi() -> int:
    try:
        return landlock.abi()
    except OSError:
        return 0


ABI = landlock_abi()
NO_FILTER = seccomp.unsupported()
needs_landlock = pytest.mark.skipif(ABI == 0, reason="this kernel has no Landlock, or it is switched off")
needs_filter = pytest.mark.skipif(NO_FILTER is not None, reason=f"no filter of system calls: {NO_FILTER}")

FILTERED = """
import ctypes, errno, os, signal, socket, struct, subprocess, threading
from motte.trusted import harden
from motte.trusted.kernel import system_call
here, far = socket.socketpair()
listener = socket.create_server(("127.0.0.1", 0))
dialer = socket.socket()
found = harden.after_threads(harden.harden())
"""
LOCKED_IN = """
import os, socket, sys, tempfile, threading
from pathlib import Path
from motte.errors import ResourceError
from motte.trusted import harden
"""

# Each is one line of Python in a filtered process; the second column is how the process ends.
KILLED = {
    "ptrace": "system_call(101, 0, 0, 0, 0)",
    "process_vm_readv": "system_call(310, os.getppid(), 0, 0, 0, 0, 0)",
    "process_vm_writev": "system_call(311, os.getppid(), 0, 0, 0, 0, 0)",
    "execve": "os.execv('/bin/true', ['true'])",
    "fork": "os.fork()",
    "subprocess": "subprocess.Popen(['/bin/true'])",
    "socket": "socket.socket()",
    "connect": "dialer.connect(listener.getsockname())",
    "bind": "dialer.bind(('127.0.0.1', 0))",
    "bpf": "system_call(321, 0, 0, 0)",
    "mount": "system_call(165, 0, 0, 0, 0, 0)",
    "kexec_load": "system_call(246, 0, 0, 0, 0)",
    "io_uring_setup": "system_call(425, 0, 0)",
    "unshare": "system_call(272, 0)",
    "an x32 call": "system_call(0x40000000 + 39)",
}
REFUSED = {
    "open for write": "open('/tmp/motte-hardening-test', 'w')",
    "open for append": "os.open('/dev/null', os.O_WRONLY | os.O_APPEND)",
    "a file without a name": "os.open('/tmp', os.O_RDWR | os.O_TMPFILE)",
    "unlink": "os.unlink('/tmp/motte-hardening-test')",
    "rename": "os.rename('/tmp/motte-a', '/tmp/motte-b')",
    "mkdir": "os.mkdir('/tmp/motte-hardening-test')",
    "chmod": "os.chmod('/tmp', 0o1777)",
    "to be dumpable again": "harden.process_control(4, 1)",
    "a larger limit": "__import__('resource').setrlimit(4, (0, 0))",
    "a signal to the parent": "os.kill(os.getppid(), 0)",
    "a request of a terminal": "__import__('fcntl').ioctl(here, 0x5412, b'x')",
    "another user": "os.setuid(os.getuid())",
    "no such call": "system_call(2000)",
}


@needs_filter
def test_what_only_an_attacker_tries_ends_the_process(child) -> None:
    # One process a call, started before the filter: it ends by a signal, or says that it went on.
    script = FILTERED.replace("found = harden.after_threads(harden.harden())\n", "")
    for name, line in {**KILLED, "nothing": "pass"}.items():
        script += f"""
if (pid := os.fork()) == 0:
    harden.after_threads(harden.harden())
    {line}
    os._exit(0)
print({name!r}, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), sep=": ")
"""
    done = child(script)
    expected = [f"{name}: {-signal.SIGSYS}" for name in KILLED] + ["nothing: 0"]
    assert done.stdout.splitlines() == expected, done.stderr


@needs_filter
def test_what_else_is_not_listed_is_refused_and_the_process_goes_on(child) -> None:
    script = FILTERED
    for name, line in REFUSED.items():
        script += f"\ntry:\n    {line}\n    print({name!r}, 'done')\n"
        script += "except (PermissionError, ValueError) as problem:\n    pass\n"
        script += f"except OSError as problem:\n    print({name!r}, problem)\n"
    done = child(script + "\nprint('went on')")
    assert (done.stdout, done.returncode) == ("went on\n", 0), done.stderr


@needs_filter
@pytest.mark.parametrize("ordinary_user", [False, pytest.param(True, marks=pytest.mark.skipif(
    os.geteuid() != 0, reason="this is an ordinary user already"))])  # fmt: skip
def test_what_a_worker_does_still_works(child, ordinary_user: bool) -> None:
    early = """early = threading.Event()
waiting = threading.Thread(target=early.wait, daemon=True)
waiting.start()
found = """
    script = (
        FILTERED.replace("found = ", early)
        + """
far.sendall(b"link")
assert here.recv(4) == b"link"
seen = []
late = threading.Thread(target=lambda: seen.append(harden.seccomp.mode()))
late.start(); late.join()
early.set(); waiting.join()
from motte.trusted.arena import Arena
from motte.trusted.secret_memory import SecretBytes
Arena(1 << 20).view[:4] = b"part"; SecretBytes(32)
import motte.measure.memory
assert motte.measure.memory.read_memory().rss_bytes
assert threading.Thread(target=lambda: None).start() is None
try: system_call(435, 0, 0)
except OSError as problem: assert problem.errno == errno.ENOSYS
os.kill(os.getpid(), 0)
print(found.seccomp_mode, seen, found.lacking)
"""
    )  # fmt: skip
    done = child(script, ordinary_user=ordinary_user)
    expected = "2 [2] {'Landlock': 'not asked for'}\n"
    assert (done.stdout, done.returncode) == (expected, 0), done.stderr


@needs_filter
@pytest.mark.skipif(not HEADERS.exists(), reason=f"no kernel headers: {HEADERS}")
def test_numbers_are_those_of_the_kernels_headers() -> None:
    known = {m[1]: int(m[2]) for m in re.finditer(r"#define __NR_(\w+) (\d+)", HEADERS.read_text(encoding="ascii"))}
    listed = {**seccomp.ALLOWED, **seccomp.FATAL, **seccomp.ABSENT}
    assert len(listed) == len(seccomp.ALLOWED) + len(seccomp.FATAL) + len(seccomp.ABSENT)
    assert len(set(listed.values())) == len(listed)
    assert {name: known.get(name, number) for name, number in listed.items()} == listed


def test_the_program_never_runs_off_its_end() -> None:
    # Every jump stays inside, and every path ends in a return: the last step is one.
    code = seccomp.program(1)
    steps = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]
    assert len(steps) <= 4096
    assert steps[-1][0] == 6
    for at, (operation, if_true, if_false, _) in enumerate(steps):
        if operation & 7 == 5:
            assert at + 1 + max(if_true, if_false) < len(steps)


# --- Landlock -------------------------------------------------------------------------------------------------------
@needs_landlock
@pytest.mark.parametrize("ordinary_user", [False, pytest.param(True, marks=pytest.mark.skipif(
    os.geteuid() != 0, reason="this is an ordinary user already"))])  # fmt: skip
def test_files_are_out_of_reach_but_for_what_the_interpreter_reads(child, tmp_path: Path, ordinary_user: bool) -> None:
    secret, given = tmp_path / "secret", tmp_path / "given"
    secret.write_text("not for you")
    given.write_text("for you")
    if ordinary_user:
        # pytest's folders are their owner's alone.
        for folder in (tmp_path, *tmp_path.parents):
            if folder.name.startswith(("pytest-", "popen-", "test_")):
                folder.chmod(0o755)
    script = (
        LOCKED_IN
        + f"""
open_before = os.open({str(secret)!r}, os.O_RDONLY)
found = harden.before_threads(readable=[Path({str(given)!r})], require=("Landlock", "no core files"))
assert Path({str(given)!r}).read_text() == "for you"
assert os.read(open_before, 3) == b"not"
assert "VmRSS" in Path("/proc/self/status").read_text()
assert Path("/proc/cpuinfo").read_text()
for attempt in (
    lambda: open({str(secret)!r}), lambda: open("/etc/passwd"), lambda: os.listdir("/"),
    lambda: open({str(given)!r}, "a"), lambda: open({str(tmp_path / "new")!r}, "w"), lambda: os.unlink({str(secret)!r}),
    lambda: os.mkdir({str(tmp_path / "folder")!r}), lambda: os.execv("/bin/true", ["true"]),
    lambda: os.truncate({str(given)!r}, 0), lambda: open("/proc/1/status"),
):
    try:
        attempt()
        print("went through")
    except PermissionError:
        pass
print(found.landlock_abi)
"""
    )
    if not ordinary_user:
        script += "import email.mime.text\n"  # a module that was not imported before
    done = child(script, ordinary_user=ordinary_user)
    assert (done.stdout, done.returncode) == (f"{min(ABI, 7)}\n", 0), done.stderr
    assert (secret.read_text(), given.read_text()) == ("not for you", "for you")


@pytest.mark.skipif(ABI < 4, reason=f"Landlock ABI {ABI} says nothing about TCP (4)")
def test_no_tcp_port_is_bound_or_connected_to(child) -> None:
    script = (
        LOCKED_IN
        + """
listener = socket.create_server(("127.0.0.1", 0))
harden.before_threads(require=("Landlock",))
for attempt in (lambda: socket.create_connection(listener.getsockname()), lambda: socket.create_server(("", 0))):
    try:
        attempt()
        print("went through")
    except PermissionError:
        print("denied")
"""
    )
    assert child(script).stdout == "denied\ndenied\n"


@pytest.mark.skipif(ABI < 6, reason=f"Landlock ABI {ABI} says nothing about signals and abstract sockets (6)")
def test_no_signal_and_no_abstract_socket_of_others(child) -> None:
    script = (
        LOCKED_IN
        + """
here, far = socket.socketpair()
other = os.fork()
if other == 0:
    here.close()  # so that it ends with its parent, whatever happens
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("\\0motte-test-%d" % os.getpid())
    listening.listen()
    far.send(b"x")
    far.recv(1)
    os._exit(0)
far.close()
here.recv(1)
harden.before_threads(require=("Landlock",))
for attempt in (lambda: os.kill(other, 0), lambda: socket.socket(socket.AF_UNIX).connect("\\0motte-test-%d" % other)):
    try:
        attempt()
        print("went through")
    except PermissionError:
        print("denied")
os.kill(os.getpid(), 0)
here.send(b"y")
os.waitpid(other, 0)
"""
    )
    done = child(script)
    assert done.stdout == "denied\ndenied\n", done.stderr


@needs_landlock
def test_landlock_refuses_when_it_would_leave_a_thread_out(child) -> None:
    script = (
        LOCKED_IN
        + """
stop = threading.Event()
threading.Thread(target=stop.wait).start()
try:
    harden.before_threads()
except ResourceError as problem:
    print(problem)
stop.set()
"""
    )
    assert child(script).stdout == "Landlock comes before other threads: expected 1 thread, got 2\n"


# --- what is said about it ------------------------------------------------------------------------------------------
LACKING = Hardening(False, 0, True, False, lacking={"secret memory": "no memfd_secret", "seccomp": "not asked for"})


def test_what_is_demanded_and_missing_is_named_with_its_reason() -> None:
    LACKING.demand((NO_CORE_FILES, LANDLOCK))
    with pytest.raises(ResourceError, match="secret memory: no memfd_secret; seccomp: not asked for") as caught:
        LACKING.demand(MEASURES)
    assert caught.value.expected == "secret memory, seccomp"
    with pytest.raises(SettingError, match="secomp"):
        LACKING.demand(("secomp",))
    assert LACKING.lines()[0] == "not hardened: secret memory: no memfd_secret"


def test_what_the_kernel_refuses_is_said_and_can_be_demanded(monkeypatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(harden, "harden", lambda **_: LACKING)
    monkeypatch.setattr(landlock, "restrict", refuse)
    assert "not switched on at boot" in harden.before_threads().lacking[LANDLOCK]
    with pytest.raises(ResourceError, match="EOPNOTSUPP"):
        harden.before_threads(require=(LANDLOCK,))
    monkeypatch.setattr(seccomp, "load", refuse)
    assert harden.after_threads(LACKING).lacking[SECCOMP].startswith(("seccomp: ", "no list"))
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "aarch64")
    found = harden.after_threads(LACKING)
    assert found.lines()[-1] == "not hardened: seccomp: no list of system calls for aarch64 (64 bit)"
    with pytest.raises(ResourceError, match="aarch64"):
        harden.after_threads(LACKING, require=(SECCOMP,))


def test_facts_round_trip_and_malformed_ones_are_refused() -> None:
    said = LACKING.to_json()
    assert Hardening.from_json(said) == LACKING
    bad = [
        {**said, "seccomp_mode": 3},
        {**said, "dumpable": 0},
        {**said, "lacking": {"other": "x"}},
        {**said, "lacking": []},
        {**said, "lacking": {"seccomp": 1}},
        {**said, "more": 1},
        {name: value for name, value in said.items() if name != "landlock_abi"},
    ]
    for each in bad:
        with pytest.raises(FrameError):
            Hardening.from_json(each)
