"""Enclaves, TPM and GPU: read from device nodes and processor flags; no device is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator

from motte.doctor import subjects
from motte.doctor.finding import Finding, State
from motte.doctor.system import System


def examine_hardware(system: System) -> Iterator[Finding]:
    """Findings on enclaves, TPM and GPU, in the order in which they are shown."""
    flags = system.cpu().flags
    for subject, path, flag in (
        (subjects.SGX, "dev/sgx_enclave", "sgx"),
        (subjects.SGX_PROVISION, "dev/sgx_provision", None),
        (subjects.TDX, "dev/tdx_guest", "tdx_guest"),
        (subjects.SEV_SNP, "dev/sev-guest", None),
    ):
        state, detail = _node(system, path)
        if flag is not None:
            detail += f"; the processor {'lists' if flag in flags else 'does not list'} {flag}"
        yield subject.found(state, detail)
    yield _configfs_tsm(system)
    yield _tpm(system)
    yield _gpu(system)
    yield _gpu_confidential(system)


def _node(system: System, path: str) -> tuple[State, str]:
    """A device node counts as present only when this user may open it: otherwise it is of no use to motte."""
    if not system.exists(path):
        return "absent", f"no /{path}"
    if not system.usable(path):
        return "absent", f"/{path} exists, but this user may not open it"
    return "present", f"/{path} may be opened"


def _configfs_tsm(system: System) -> Finding:
    path = "sys/kernel/config/tsm/report"
    if system.exists(path):
        return subjects.CONFIGFS_TSM.found("present", f"/{path} exists")
    return subjects.CONFIGFS_TSM.found("absent", f"no /{path} (needs kernel 6.7 and a mounted configfs)")


def _tpm(system: System) -> Finding:
    state, detail = _node(system, "dev/tpmrm0")
    version = system.text("sys/class/tpm/tpm0/tpm_version_major")
    if version is not None:
        detail += f"; TPM {version[:10]}"
        if version != "2":
            state = "absent"
    return subjects.TPM.found(state, detail)


def _gpu(system: System) -> Finding:
    nodes = [f"/dev/{name}" for name in system.names("dev") if re.fullmatch(r"nvidia\d+", name)]
    text = system.output(("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"))
    listed = "; ".join(line.strip() for line in (text or "").splitlines() if line.strip())
    if nodes:
        # A container may have the nodes without the driver's programs.
        return subjects.GPU.found("present", f"{', '.join(nodes)}; {listed or 'nvidia-smi is missing or fails'}")
    if listed:
        return subjects.GPU.found("unknown", f"nvidia-smi lists {listed}, but there is no /dev/nvidia0")
    return subjects.GPU.found("absent", "no /dev/nvidia0, and nvidia-smi lists none")


def _gpu_confidential(system: System) -> Finding:
    text = system.output(("nvidia-smi", "conf-compute", "-f"))
    if text is None:
        return subjects.GPU_CONFIDENTIAL.found("absent", "nvidia-smi does not tell")
    match = re.search(r"CC status:\s*(ON|OFF)\b", text, re.IGNORECASE)
    if match is None:
        return subjects.GPU_CONFIDENTIAL.found("unknown", "nvidia-smi answers something that is not understood")
    state: State = "present" if match[1].upper() == "ON" else "absent"
    return subjects.GPU_CONFIDENTIAL.found(state, f"nvidia-smi says: CC status {match[1].upper()}")
