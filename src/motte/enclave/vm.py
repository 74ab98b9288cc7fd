"""The same worker in a confidential VM (TDX, SEV-SNP): units for its init, a recipe for its disk, and for the policy.

In such a guest everything is trusted that boots in it: firmware, kernel, init and this image. So it holds nothing
else, its root is read-only and part of the kernel's command line (dm-verity), and the launch measurement covers all of
it. Evidence comes from the kernel's configfs TSM interface. Texts only: nothing here was started on such hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from motte.enclave.image import ROOT, ImageRecord
from motte.enclave.workers import image_arguments, image_environment

PORT: Final = 7443
"""Of vsock: the host reaches the worker there, and nobody else can."""
_PLACE: Final = "/opt/motte/root"
_TSM: Final = "/sys/kernel/config/tsm/report"
FOLDER: Final = "vm"


def files(record: ImageRecord, *, threads: int, precision: str) -> Mapping[str, str]:
    """Name -> text of every file."""
    return {
        "motte-worker.socket": socket_unit(),
        "motte-worker@.service": service_unit(record, threads=threads, precision=precision),
        "mkosi.conf": disk_recipe(),
        "expected-snp.sh": snp_recipe(),
    }


def socket_unit() -> str:
    """Listens on vsock; each connection gets a worker of its own, one bundle and one life."""
    return (
        "[Unit]\n"
        "Description=Link to a trusted worker\n\n"
        "[Socket]\n"
        f"ListenStream=vsock::{PORT}\n"
        "Accept=yes\n"
        "MaxConnections=1\n\n"
        "[Install]\n"
        "WantedBy=sockets.target\n"
    )


def service_unit(record: ImageRecord, *, threads: int, precision: str) -> str:
    """The worker: its standard input is the connection, its root the image."""
    command = " ".join(image_arguments(threads=threads, engine=record.engine, precision=precision, enclave="vm"))
    variables = "".join(f'Environment="{name}={value}"\n' for name, value in sorted(image_environment(threads).items()))
    return (
        "[Unit]\n"
        f"Description=Trusted worker ({record.engine})\n"
        "CollectMode=inactive-or-failed\n\n"
        "[Service]\n"
        f"ExecStart={command}\n"
        f"RootDirectory={_PLACE}\n"
        "MountAPIVFS=yes\n"
        f"BindPaths=-{_TSM}\n"
        f"{variables}"
        "StandardInput=socket\n"
        "StandardOutput=null\n"
        "StandardError=null\n"
        "LimitCORE=0\n"
        "LimitMEMLOCK=infinity\n"
        "NoNewPrivileges=yes\n"
        "PrivateNetwork=yes\n"
        "PrivateTmp=yes\n"
        "ProtectSystem=strict\n"
        "ProtectHome=yes\n"
        "ProtectKernelModules=yes\n"
        "RestrictNamespaces=yes\n"
        "RestrictSUIDSGID=yes\n"
        "CapabilityBoundingSet=CAP_IPC_LOCK\n"
        "SystemCallArchitectures=native\n"
    )


def disk_recipe() -> str:
    """A configuration for mkosi: a unified kernel image whose command line names the digest of a read-only root."""
    return (
        "# mkosi build; the same inputs give the same disk (SourceDateEpoch). Pin a snapshot of the distribution.\n"
        "[Distribution]\n"
        "Distribution=debian\n"
        "Release=trixie\n\n"
        "[Output]\n"
        "Format=disk\n"
        "ImageId=motte-worker\n\n"
        "[Build]\n"
        "SourceDateEpoch=0\n\n"
        "[Content]\n"
        "Packages=linux-image-cloud-amd64,systemd,systemd-boot-efi\n"
        "Bootable=yes\n"
        "Bootloader=uki\n"
        f"ExtraTrees=../{ROOT}:{_PLACE},motte-worker.socket:/etc/systemd/system/motte-worker.socket,"
        "motte-worker@.service:/etc/systemd/system/motte-worker@.service\n"
        "KernelCommandLine=quiet panic=1 systemd.volatile=overlay lockdown=confidentiality\n"
        "# No shell, no login, no ssh: whoever may log in is part of what is trusted.\n"
        "RootPassword=!\n"
        "Ssh=no\n\n"
        "[Validation]\n"
        "SecureBoot=no\n"
    )


def snp_recipe() -> str:
    """A shell script that prints the launch measurement to allow, from the firmware and kernel that will boot."""
    return (
        "#!/bin/sh\n"
        "# Prints the expected launch measurement of a SEV-SNP guest: sev-snp-measure (pip install sev-snp-measure).\n"
        "# usage: expected-snp.sh OVMF.fd UKI.efi VCPUS [VCPU_TYPE]\n"
        "set -eu\n"
        "ovmf=$1 kernel=$2 vcpus=$3 type=${4:-EPYC-v4}\n"
        'command -v sev-snp-measure >/dev/null || { echo "pip install sev-snp-measure" >&2; exit 1; }\n'
        'sev-snp-measure --mode snp --vcpus "$vcpus" --vcpu-type "$type" --ovmf "$ovmf" --kernel "$kernel"\n'
    )
