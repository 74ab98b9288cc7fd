"""What the doctor looks for, and what the presence and the absence of each thing mean: its words, and no code."""

from __future__ import annotations

from typing import Final

from motte.doctor.finding import Subject

_HARDWARE: Final = "trusted hardware"
_PROTECTION: Final = "process protection"
_COMPUTE: Final = "compute"
_NO_PROOF: Final = "Root on this machine can fake this; only verified evidence proves it to somebody else."
_READABLE: Final = "whoever runs the host underneath can read this machine's memory."

SGX: Final = Subject(
    "SGX",
    _HARDWARE,
    "An enclave can be started within one process; the host's root cannot read its memory. Whether it is the right "
    f"enclave, not in debug mode and up to date, only attestation tells. {_NO_PROOF}",
    "No enclave within one process: the worker is of the `process` kind, SIMULATED, and the host's root can read it.",
)
SGX_PROVISION: Final = Subject(
    "SGX provisioning",
    _HARDWARE,
    "This user may start the enclaves that make quotes; a quoting service has to be running too.",
    "Without a quoting service that may, no quotes are made: nobody far away can verify an SGX enclave here.",
)
TDX: Final = Subject(
    "TDX guest",
    _HARDWARE,
    "This system says that it is a TDX trust domain: its memory is hidden from the host, but not from root inside of "
    f"this guest. {_NO_PROOF}",
    f"This is no TDX trust domain: {_READABLE}",
)
SEV_SNP: Final = Subject(
    "SEV-SNP guest",
    _HARDWARE,
    "This system says that it is an SEV-SNP guest: its memory is hidden from the host, but not from root inside of "
    f"this guest. {_NO_PROOF}",
    f"This is no SEV-SNP guest: {_READABLE}",
)
CONFIGFS_TSM: Final = Subject(
    "configfs TSM reports",
    _HARDWARE,
    "The kernel has its uniform way to ask for evidence. It serves only where TDX, SEV-SNP or the like is behind it.",
    "Evidence, where there is any, has to be asked for through the device of its kind.",
)
TPM: Final = Subject(
    "TPM 2.0",
    _HARDWARE,
    "Boot measurements can be quoted and keys bound to them. A TPM hides no memory: root reads the worker all the "
    "same. A virtual one is as honest as its host.",
    "How this machine booted cannot be quoted, and no key can be bound to that.",
)
GPU: Final = Subject(
    "NVIDIA GPU",
    _HARDWARE,
    "An accelerator for what may leave the trusted side. It is untrusted: the host sees every tensor that it is sent, "
    "unless it runs in confidential mode and its evidence was verified.",
    "There is no accelerator to send work to: everything runs on the processor.",
)
GPU_CONFIDENTIAL: Final = Subject(
    "GPU confidential mode",
    _HARDWARE,
    f"The driver says that the GPU's memory and its traffic are protected from the host. {_NO_PROOF}",
    "Whatever a GPU here is sent, the host can read.",
)

MEMFD_SECRET: Final = Subject(
    "memfd_secret",
    _PROTECTION,
    "Opened weights can lie in pages that the kernel takes out of its own map: direct reads (process_vm_readv, "
    "/proc/PID/mem, PTRACE_PEEKDATA) do not reach them, and they are never swapped. Root who injects code does.",
    "Keys lie in ordinary memory: whoever may trace the worker, or reads kernel memory, reads them.",
)
LOCKED_MEMORY: Final = Subject(
    "locked memory",
    _PROTECTION,
    "64 MiB or more can be kept out of the swap. Suspending the machine to disk still writes them.",
    "Below 64 MiB only keys can be locked and weights may reach the swap: raise `ulimit -l`.",
)
SWAP_OFF: Final = Subject(
    "swap off",
    _PROTECTION,
    "Nothing of the worker's memory is written to a swap area.",
    "Memory that is not locked may be written to the swap, in plaintext unless the swap is encrypted.",
)
CORE_PATTERN: Final = Subject(
    "core files without a handler",
    _PROTECTION,
    "A core file, if a process may dump one at all, goes to a plain file, and a core limit of 0 prevents it.",
    "The memory of a crashed process is piped to a program of the host, whatever the core limit says. The worker makes "
    "itself non-dumpable, which prevents that; other programs that hold your model do not.",
)
PTRACE: Final = Subject(
    "ptrace restricted",
    _PROTECTION,
    "Another process of the same user cannot simply attach and read memory. Root can, below scope 3.",
    "Any process of the same user may read another one's memory, unless that one is non-dumpable, as the worker is.",
)
SECCOMP: Final = Subject(
    "seccomp",
    _PROTECTION,
    "A process can give up system calls for good, so that a flaw in it reaches less. That protects the host from the "
    "worker, not the worker from the host.",
    "A flaw in a worker can use every system call of its user.",
)
LANDLOCK: Final = Subject(
    "Landlock",
    _PROTECTION,
    "A process can give up the file system without being root, and TCP ports from ABI 4 on. That protects the host "
    "from the worker, not the worker from the host.",
    "A flaw in a worker reads and writes every file of its user.",
)

CORES: Final = Subject(
    "several cores",
    _COMPUTE,
    "The next part can be opened while the current one runs. Two logical processors of one core share its arithmetic.",
    "Opening the next part and running the current one take turns: streaming costs its full time.",
)
MEMORY: Final = Subject(
    "memory for large models",
    _COMPUTE,
    "At least 2 GiB are available: the published models fit with their engine, resident.",
    "Less than 2 GiB are available: stream the weights of large models under a bound.",
)
AES: Final = Subject(
    "AES instructions",
    _COMPUTE,
    "Opening and sealing run at gigabytes a second on each core, in constant time.",
    "AES runs in software: opening and sealing are many times slower.",
)
VECTOR_AES: Final = Subject(
    "vector AES",
    _COMPUTE,
    "AES-GCM can work on several blocks at once, where the library uses it.",
    "AES-GCM works on one block at a time, which is still fast with AES instructions.",
)
AVX512: Final = Subject(
    "AVX-512",
    _COMPUTE,
    "Wide vectors for float32. Heavy use may lower the processor's frequency.",
    "Float32 runs on 256-bit vectors or narrower ones.",
)
AMX: Final = Subject(
    "AMX",
    _COMPUTE,
    "Matrix tiles for bfloat16 and int8. Float32 gains nothing from them.",
    "Matrix products use vector instructions only.",
)
BFLOAT16: Final = Subject(
    "bfloat16",
    _COMPUTE,
    "bfloat16 is computed natively. Its results differ from float32 in the third digit.",
    "bfloat16 is emulated and may be slower than float32: do not convert to it for speed.",
)
TORCH: Final = Subject(
    "engine torch",
    _COMPUTE,
    "Installed; whether it starts was not tried.",
    "Nothing can be captured, sealed or trained here; bundles that lower run on onnxruntime.",
)
ONNXRUNTIME: Final = Subject(
    "engine onnxruntime",
    _COMPUTE,
    "Installed; whether it starts was not tried. The default for bundles that lower: the smallest worker.",
    "Every bundle runs with torch, in a worker of four times the size that takes longer to start.",
)
OPENVINO: Final = Subject(
    "engine openvino",
    _COMPUTE,
    "Installed; whether it starts was not tried. Runs bundles that lower with --engine openvino, also in bf16.",
    "No bf16. In f32 nothing is lost: the other engines run the same bundles.",
)
WAIT_POLICY: Final = Subject(
    "OMP_WAIT_POLICY=PASSIVE",
    _COMPUTE,
    "Idle OpenMP threads of this process sleep and leave the cores to the worker.",
    "Idle OpenMP threads of this process may spin and slow the worker beside it. The worker sets it for itself.",
)
