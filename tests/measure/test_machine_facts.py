"""Machine and memory facts: other machines through planted files, this one against psutil."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from motte.errors import ResourceError
from motte.limits import MIB
from motte.measure.machine import cpu_info, examine_machine, memory_info
from motte.measure.memory import available_bytes, peak_rss_bytes, read_memory, reset_peak

X86 = """processor\t: {n}
model name\t: Example CPU @ 2.50GHz
physical id\t: 0
core id\t\t: {core}
flags\t\t: fpu aes avx512f{more}
"""
ARM = """processor\t: {n}
Features\t: fp asimd aes bf16
CPU implementer\t: 0x41
CPU part\t: 0xd4f
"""


def plant(root: Path, path: str, text: str) -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def test_an_x86_machine_with_two_threads_a_core(tmp_path: Path) -> None:
    blocks = [X86.format(n=n, core=n // 2, more=" hypervisor" if n else " hypervisor sgx") for n in range(4)]
    plant(tmp_path, "proc/cpuinfo", "\n".join(blocks))
    plant(tmp_path, "proc/meminfo", "MemTotal:  1024 kB\nMemAvailable:  512 kB\nHugePages_Total:  0\n")
    plant(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n")
    machine = examine_machine(tmp_path)
    assert machine.cpu_model == "Example CPU @ 2.50GHz"
    assert (machine.logical_cores, machine.physical_cores) == (4, 2)
    assert machine.memory_bytes == MIB
    assert machine.governor == "performance"
    assert machine.virtual
    assert cpu_info(tmp_path).flags == {"fpu", "aes", "avx512f", "hypervisor"}, "only what every processor has"


def test_memory_that_may_be_taken(tmp_path: Path) -> None:
    plant(tmp_path, "meminfo", "MemTotal:  1024 kB\nMemAvailable:  512 kB\n")
    assert available_bytes(tmp_path / "meminfo") == 512 * 1024
    plant(tmp_path, "meminfo", "MemTotal:  1024 kB\n")
    for place in (tmp_path / "meminfo", tmp_path / "nothing"):
        with pytest.raises(ResourceError):
            available_bytes(place)


def test_an_arm_machine(tmp_path: Path) -> None:
    plant(tmp_path, "proc/cpuinfo", "\n".join(ARM.format(n=n) for n in range(2)))
    info = cpu_info(tmp_path)
    assert info.model == "ARM implementer 0x41 part 0xd4f"
    assert "bf16" in info.flags
    assert info.physical_cores is None


def test_what_is_not_told_is_none_or_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="processor"):
        cpu_info(tmp_path)
    with pytest.raises(ResourceError, match="memory"):
        memory_info(tmp_path)
    plant(tmp_path, "proc/meminfo", "MemFree: 1 kB\n")
    with pytest.raises(ResourceError, match="memory"):
        memory_info(tmp_path)


def test_this_machine_against_psutil() -> None:
    machine = examine_machine()
    assert machine.logical_cores == psutil.cpu_count()
    assert machine.memory_bytes == psutil.virtual_memory().total
    assert machine.usable_cores == len(psutil.Process().cpu_affinity() or [])


# --- memory of a process -------------------------------------------------------------------------------------------
STATUS = """Name:\tx
VmHWM:\t    2048 kB
VmLck:\t       4 kB
VmRSS:\t    1024 kB
RssAnon:\t     512 kB
RssFile:\t     256 kB
RssShmem:\t     256 kB
VmSwap:\t       0 kB
"""


def test_a_planted_process(tmp_path: Path) -> None:
    plant(tmp_path, "7/status", STATUS)
    memory = read_memory(7, proc=tmp_path)
    assert (memory.rss_bytes, memory.peak_rss_bytes) == (MIB, 2 * MIB)
    assert (memory.anonymous_bytes, memory.file_bytes, memory.shared_bytes) == (MIB // 2, MIB // 4, MIB // 4)
    assert (memory.swapped_bytes, memory.locked_bytes) == (0, 4096)
    assert memory.pss_bytes is None, "not readable is not zero"
    plant(tmp_path, "7/smaps_rollup", "00400000-7fff0000 ---p 00000000 00:00 0   [rollup]\nRss: 1024 kB\nPss: 768 kB\n")
    assert read_memory(7, proc=tmp_path).pss_bytes == 768 * 1024


@pytest.mark.parametrize("field", ["VmRSS", "VmHWM", "RssAnon", "VmSwap"])
def test_a_missing_field_is_an_error_and_not_a_zero(tmp_path: Path, field: str) -> None:
    plant(tmp_path, "7/status", STATUS.replace(field, "Other"))
    with pytest.raises(ResourceError, match=f"no {field}"):
        read_memory(7, proc=tmp_path)


def test_this_process_against_psutil() -> None:
    block = mmap.mmap(-1, 64 * MIB)
    block.write(b"\1" * (64 * MIB))
    ours, theirs = read_memory(), psutil.Process().memory_full_info()
    assert ours.rss_bytes == pytest.approx(theirs.rss, abs=16 * MIB)
    assert ours.pss_bytes == pytest.approx(theirs.pss, abs=16 * MIB)
    assert ours.peak_rss_bytes >= 64 * MIB
    block.close()


def test_the_peak_of_another_process_outlives_its_memory() -> None:
    script = "import sys\nblock = bytearray(96 << 20)\ndel block\nprint('ready', flush=True)\nsys.stdin.readline()\n"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        before = read_memory(child.pid)
        assert before.peak_rss_bytes >= before.rss_bytes + 64 * MIB
        assert peak_rss_bytes(child.pid) >= 96 * MIB
        reset_peak(child.pid)
        assert peak_rss_bytes(child.pid) < 96 * MIB
        child.communicate("\n")


def test_a_process_that_ended_is_an_error() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    # A zombie, until it is waited for: its status file exists, its memory does not.
    while (Path("/proc") / str(child.pid) / "status").read_text().find("State:\tZ") < 0:
        time.sleep(0.01)
    with pytest.raises(ResourceError, match="no memory of its own"):
        read_memory(child.pid)
    child.wait()
    with pytest.raises(ResourceError):
        read_memory(child.pid)
    with pytest.raises(ResourceError):
        reset_peak(child.pid)


def test_resetting_a_wrong_place_writes_no_file(tmp_path: Path) -> None:
    (tmp_path / str(os.getpid())).mkdir()
    with pytest.raises(ResourceError):
        reset_peak(proc=tmp_path)
    assert list((tmp_path / str(os.getpid())).iterdir()) == []
