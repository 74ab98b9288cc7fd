"""The doctor on planted machines, rich and poor, and on this one."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from motte.doctor import probe, subjects
from motte.doctor.examine import examine
from motte.doctor.finding import STATES, Finding, Subject
from motte.doctor.probe import Answer, ask
from motte.doctor.system import System
from motte.errors import ResourceError, SettingError
from motte.limits import GIB, MIB

RICH_FLAGS = "fpu aes vaes vpclmulqdq avx512f avx512_bf16 amx_tile amx_bf16 sgx tdx_guest sev_snp"
CPU = "processor\t: {n}\nmodel name\t: Planted CPU\nphysical id\t: 0\ncore id\t: {n}\nflags\t: {flags}\n"
RICH_FILES = {
    "proc/cpuinfo": "\n".join(CPU.format(n=n, flags=RICH_FLAGS) for n in range(4)),
    "proc/meminfo": "MemTotal:  16777216 kB\nMemAvailable:  8388608 kB\n",
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n",
    "proc/self/status": "CapEff:\t0000000000000000\n",
    "proc/sys/kernel/core_pattern": "core\n",
    "proc/sys/kernel/yama/ptrace_scope": "1\n",
    "proc/sys/kernel/seccomp/actions_avail": "kill_process errno allow\n",
    "dev/sgx_enclave": "",
    "dev/sgx_provision": "",
    "dev/tdx_guest": "",
    "dev/sev-guest": "",
    "dev/tpmrm0": "",
    "dev/nvidia0": "",
    "dev/nvidiactl": "",
    "sys/class/tpm/tpm0/tpm_version_major": "2\n",
    "sys/kernel/config/tsm/report/.keep": "",
}
RICH_ANSWERS = {"memfd_secret": "ok", "landlock": "4", "seccomp": "0"}
RICH_OUTPUT = {"--query-gpu": "NVIDIA H100, 81559 MiB, 570.1\n", "conf-compute": "CC status: ON\n"}
POOR_FILES = {
    "proc/cpuinfo": CPU.format(n=0, flags="fpu"),
    "proc/meminfo": "MemTotal:  1048576 kB\nMemAvailable:  524288 kB\n",
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/dev/sda2\tpartition\t1\t0\t-2\n",
    "proc/sys/kernel/core_pattern": "|/usr/lib/systemd/systemd-coredump %P\n",
    "proc/sys/kernel/yama/ptrace_scope": "0\n",
}
POOR_ANSWERS = {"memfd_secret": "ENOSYS", "landlock": "EOPNOTSUPP", "seccomp": "EINVAL"}


def planted(root: Path, files: Mapping[str, str], answers: Mapping[str, str], **changes: Any) -> System:
    for name, text in files.items():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    output = changes.pop("outputs", {})
    settings: dict[str, Any] = {
        "root": root,
        "architecture": "x86_64",
        "environment": {},
        "ask": lambda which, machine: Answer(answers[which]),
        "version": lambda name: None,
        "output": lambda words: next(
            (text for key, text in output.items() if any(key in word for word in words)), None
        ),
        "memlock_limit_bytes": lambda: 64 * 1024,
        "usable_cores": lambda: 1,
    }
    return System(**(settings | changes))


def rich(
    root: Path, files: Mapping[str, str] | None = None, answers: Mapping[str, str] | None = None, **changes: Any
) -> System:
    settings: dict[str, Any] = {
        "environment": {"OMP_WAIT_POLICY": "passive"},
        "version": {"torch": "2.13.0", "onnxruntime-gpu": "1.23", "openvino": "2026.1"}.get,
        "memlock_limit_bytes": lambda: None,
        "usable_cores": lambda: 4,
        "outputs": RICH_OUTPUT,
    }
    return planted(root, RICH_FILES | dict(files or {}), RICH_ANSWERS | dict(answers or {}), **(settings | changes))


def look(system: System, name: str) -> Finding:
    found = [finding for finding in examine(system) if finding.name == name]
    assert len(found) == 1, f"{name}: {len(found)} findings"
    return found[0]


def test_a_machine_that_has_everything(tmp_path: Path) -> None:
    findings = examine(rich(tmp_path))
    assert {finding.name: finding.state for finding in findings if finding.state != "present"} == {}


def test_a_machine_that_has_nothing(tmp_path: Path) -> None:
    findings = examine(planted(tmp_path, POOR_FILES, POOR_ANSWERS))
    assert {finding.name: finding.state for finding in findings if finding.state != "absent"} == {}


def test_both_show_the_same_subjects_in_the_same_order(tmp_path: Path) -> None:
    everything, nothing = examine(rich(tmp_path / "a")), examine(planted(tmp_path / "b", POOR_FILES, POOR_ANSWERS))
    names = [finding.name for finding in everything]
    assert names == [finding.name for finding in nothing]
    assert len(set(names)) == len(names)
    declared = {value.name for value in vars(subjects).values() if isinstance(value, Subject)}
    assert set(names) == declared, "every subject is examined"
    groups = [finding.group for finding in everything]
    assert groups == sorted(groups, key=groups.index), "groups are not torn apart"


def test_every_finding_says_what_its_state_means(tmp_path: Path) -> None:
    for finding in [*examine(rich(tmp_path / "a")), *examine(planted(tmp_path / "b", POOR_FILES, POOR_ANSWERS))]:
        assert (
            finding.meaning == {"present": finding.subject.presence, "absent": finding.subject.absence}[finding.state]
        )
        assert finding.subject.presence != finding.subject.absence
        assert finding.detail
        assert json.loads(json.dumps(finding.to_json()))["meaning"] == finding.meaning


@pytest.mark.parametrize("name", ["SGX", "TDX guest", "SEV-SNP guest", "GPU confidential mode"])
def test_what_root_can_fake_says_so(tmp_path: Path, name: str) -> None:
    assert "can fake this; only verified evidence proves it" in look(rich(tmp_path), name).meaning


def test_unknown_counts_as_absent() -> None:
    finding = subjects.SWAP_OFF.found("unknown", "not readable")
    assert finding.meaning == f"Could not be found out, so count it as absent. {subjects.SWAP_OFF.absence}"
    with pytest.raises(SettingError):
        subjects.SWAP_OFF.found("maybe", "")  # type: ignore[arg-type]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every file")
def test_a_device_that_this_user_may_not_open_is_absent(tmp_path: Path) -> None:
    system = rich(tmp_path)
    (tmp_path / "dev/sgx_enclave").chmod(0)
    finding = look(system, "SGX")
    assert (finding.state, "may not open" in finding.detail) == ("absent", True)


def test_a_device_that_may_not_be_opened_is_absent_for_root_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(System, "usable", lambda self, path: False)
    for name in ("SGX", "SGX provisioning", "TDX guest", "SEV-SNP guest", "TPM 2.0"):
        finding = look(rich(tmp_path), name)
        assert (finding.state, "may not open" in finding.detail) == ("absent", True)


def test_a_processor_flag_alone_is_no_enclave(tmp_path: Path) -> None:
    system = rich(tmp_path)
    (tmp_path / "dev/sgx_enclave").unlink()
    finding = look(system, "SGX")
    assert finding.state == "absent"
    assert "the processor lists sgx" in finding.detail


def test_an_old_tpm_is_not_a_tpm_2(tmp_path: Path) -> None:
    assert look(rich(tmp_path, {"sys/class/tpm/tpm0/tpm_version_major": "1\n"}), "TPM 2.0").state == "absent"


def test_gpu_nodes_and_driver_may_disagree(tmp_path: Path) -> None:
    only_nodes = rich(tmp_path / "a", outputs={})
    assert look(only_nodes, "NVIDIA GPU").state == "present"
    assert look(only_nodes, "GPU confidential mode").state == "absent"
    only_driver = rich(tmp_path / "b")
    (tmp_path / "b/dev/nvidia0").unlink()
    assert look(only_driver, "NVIDIA GPU").state == "unknown"


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("CC status: ON", "present"),
        ("CC status: OFF", "absent"),
        ("cc status:  off\n", "absent"),
        ("mystery", "unknown"),
    ],
)
def test_confidential_mode_of_a_gpu(tmp_path: Path, text: str, state: str) -> None:
    assert look(rich(tmp_path, outputs=RICH_OUTPUT | {"conf-compute": text}), "GPU confidential mode").state == state


@pytest.mark.parametrize(
    ("name", "call", "answer", "state", "words"),
    [
        ("memfd_secret", "memfd_secret", Answer("ENOSYS"), "absent", "switched off"),
        ("memfd_secret", "memfd_secret", Answer("EPERM"), "absent", "forbidden"),
        ("memfd_secret", "memfd_secret", Answer("page EAGAIN"), "absent", "limit on locked memory"),
        ("memfd_secret", "memfd_secret", Answer("wrong"), "absent", "wrong"),
        ("memfd_secret", "memfd_secret", Answer("SIGSYS", killed=True), "absent", "a sandbox forbids it"),
        ("memfd_secret", "memfd_secret", Answer("unnumbered"), "unknown", "architecture"),
        ("memfd_secret", "memfd_secret", Answer("failed"), "unknown", "failed"),
        ("Landlock", "landlock", Answer("7"), "present", "ABI 7"),
        ("Landlock", "landlock", Answer("ENOSYS"), "absent", "ENOSYS"),
        ("Landlock", "landlock", Answer("EOPNOTSUPP"), "absent", "at boot"),
        ("Landlock", "landlock", Answer("failed"), "unknown", "failed"),
        ("seccomp", "seccomp", Answer("2"), "present", "a filter is on"),
        ("seccomp", "seccomp", Answer("EINVAL"), "absent", "built without"),
        ("seccomp", "seccomp", Answer("SIGKILL", killed=True), "absent", "SIGKILL"),
    ],
)
def test_each_answer_of_the_kernel_has_its_meaning(
    tmp_path: Path, name: str, call: str, answer: Answer, state: str, words: str
) -> None:
    def answering(which: str, machine: str) -> Answer:
        return answer if which == call else Answer(RICH_ANSWERS[which])

    finding = look(rich(tmp_path, ask=answering), name)
    assert finding.state == state
    assert words in finding.detail


def test_seccomp_without_its_list_of_actions_is_unknown(tmp_path: Path) -> None:
    system = rich(tmp_path)
    (tmp_path / "proc/sys/kernel/seccomp/actions_avail").unlink()
    assert look(system, "seccomp").state == "unknown"


@pytest.mark.parametrize(
    ("limit", "capabilities", "state"),
    [
        (None, "0", "present"),
        (64 * MIB, "0", "present"),
        (64 * MIB - 1, "0", "absent"),
        (0, "0000000000004000", "present"),
        (0, "0000000000002000", "absent"),
        (0, "garbage", "absent"),
        (0, "", "absent"),
    ],
)
def test_locked_memory(tmp_path: Path, limit: int | None, capabilities: str, state: str) -> None:
    files = {"proc/self/status": f"Name:\tx\nCapEff:\t{capabilities}\nSeccomp:\t0\n"}
    assert look(rich(tmp_path, files, memlock_limit_bytes=lambda: limit), "locked memory").state == state


@pytest.mark.parametrize(("scope", "state"), [("0", "absent"), ("1", "present"), ("3", "present"), ("9", "absent")])
def test_ptrace_scope(tmp_path: Path, scope: str, state: str) -> None:
    assert look(rich(tmp_path, {"proc/sys/kernel/yama/ptrace_scope": scope}), "ptrace restricted").state == state


def test_files_that_cannot_be_read_are_unknown_and_not_present(tmp_path: Path) -> None:
    system = rich(tmp_path)
    for name in ("proc/swaps", "proc/sys/kernel/core_pattern", "proc/meminfo"):
        (tmp_path / name).unlink()
    for name in ("swap off", "core files without a handler", "memory for large models"):
        assert look(system, name).state == "unknown"


def test_without_proc_nothing_is_claimed(tmp_path: Path) -> None:
    with pytest.raises(ResourceError):
        examine(planted(tmp_path, {}, RICH_ANSWERS))


@pytest.mark.parametrize(
    ("file", "text", "state"),
    [
        ("sys/fs/cgroup/cpu.max", "max 100000", "present"),
        ("sys/fs/cgroup/cpu.max", "200000 100000", "present"),
        ("sys/fs/cgroup/cpu.max", "100000 100000", "absent"),
        ("sys/fs/cgroup/cpu.max", "nonsense", "present"),
        ("sys/fs/cgroup/cpu.max", "1 0", "present"),
    ],
)
def test_a_control_group_bounds_the_cores(tmp_path: Path, file: str, text: str, state: str) -> None:
    assert look(rich(tmp_path, {file: text}), "several cores").state == state


def test_an_older_control_group_bounds_the_cores_too(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/cpu"
    one = {f"{folder}/cpu.cfs_quota_us": "50000", f"{folder}/cpu.cfs_period_us": "100000"}
    finding = look(rich(tmp_path / "a", one), "several cores")
    assert (finding.state, "at most 0.5 at a time" in finding.detail) == ("absent", True)
    free = {f"{folder}/cpu.cfs_quota_us": "-1", f"{folder}/cpu.cfs_period_us": "100000"}
    assert look(rich(tmp_path / "b", free), "several cores").state == "present"


@pytest.mark.parametrize(
    ("file", "text", "state"),
    [
        ("sys/fs/cgroup/memory.max", "max", "present"),
        ("sys/fs/cgroup/memory.max", str(GIB), "absent"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", str(GIB), "absent"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712", "present"),
    ],
)
def test_a_control_group_bounds_the_memory(tmp_path: Path, file: str, text: str, state: str) -> None:
    assert look(rich(tmp_path, {file: text}), "memory for large models").state == state


def test_an_arm_machine_is_asked_for_its_own_features(tmp_path: Path) -> None:
    text = "processor\t: 0\nFeatures\t: fp asimd aes pmull bf16\nCPU part\t: 0xd4f\n"
    system = rich(tmp_path, {"proc/cpuinfo": text}, architecture="aarch64")
    assert look(system, "AES instructions").state == "present"
    assert look(system, "bfloat16").state == "present"
    assert "AVX-512" not in [finding.name for finding in examine(system)]


def test_a_family_of_features_is_listed_whole(tmp_path: Path) -> None:
    assert look(rich(tmp_path), "AMX").detail == "the processor lists amx_bf16, amx_tile"


# --- this machine --------------------------------------------------------------------------------------------------
def test_this_machine_is_examined_without_loading_an_engine() -> None:
    script = (
        "import json, sys\nfrom motte.doctor.examine import examine\n"
        "print(json.dumps([finding.to_json() for finding in examine()]))\n"
        "loaded = {'torch', 'numpy', 'onnxruntime', 'openvino'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert all(finding["state"] in STATES for finding in findings.values())
    assert findings["engine torch"]["state"] == "present"
    assert findings["core files without a handler"]["state"] != "unknown", "a sysctl was read"
    assert str(os.cpu_count()) in findings["several cores"]["detail"]


def test_the_probes_agree_with_the_kernel() -> None:
    machine = platform.machine()
    assert ask("seccomp", machine).text in ("0", "2", "EINVAL")
    landlock, secret = ask("landlock", machine), ask("memfd_secret", machine)
    for answer in (landlock, secret):
        assert answer.text != "failed"
    modules = Path("/sys/kernel/security/lsm")
    if modules.exists() and "landlock" in modules.read_text().split(","):
        assert landlock.text.isdecimal()


def test_an_unnumbered_architecture_is_not_guessed() -> None:
    assert ask("memfd_secret", "pdp11") == Answer("unnumbered")
    assert ask("landlock", "pdp11") == Answer("unnumbered")


def test_a_probe_that_is_killed_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_SCRIPT", "import os, signal\nos.kill(os.getpid(), signal.SIGSYS)\n")
    assert ask("memfd_secret", "x86_64") == Answer("SIGSYS", killed=True)


@pytest.mark.parametrize("script", ["print('nonsense')", "print('[1]')", "raise SystemExit(3)", "print('9' * 10000)"])
def test_a_probe_that_answers_nonsense_is_unknown(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(probe, "_SCRIPT", script)
    assert ask("memfd_secret", "x86_64") == Answer("failed")


def test_a_command_that_is_missing_or_fails_gives_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    system = System()
    assert system.output(("surely-no-such-program",)) is None
    for name, text in (("good", "#!/bin/sh\necho said $1\n"), ("bad", "#!/bin/sh\necho said\nexit 1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    assert system.output(("good", "this")) == "said this\n"
    assert system.output(("bad",)) is None
