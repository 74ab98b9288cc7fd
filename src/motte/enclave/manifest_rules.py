"""What is wrong with a Gramine manifest, key by key, for Gramine v1.9: one table, each row with its reason.

For any manifest, not only for ours. Three grades: *unsafe*: the host gains something over the enclave, or its
measurement says less than it seems to; *obsolete*: Gramine ignores or refuses it, or it never existed; *missing*:
something that production needs is left to a default. A key that nobody knows is unsafe: a misspelt one silently leaves
a protection off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Grade = Literal["unsafe", "obsolete", "missing"]
Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding: the key, its grade, what stands there, and why that is wrong."""

    key: str
    grade: Grade
    got: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """JSON values."""
        return {"key": self.key, "grade": self.grade, "got": self.got, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Rule:
    """A key, ``*`` for any one part of it, that is a problem where ``wrong(value)``."""

    key: str
    grade: Grade
    wrong: Callable[[Any], bool]
    reason: str

    def matches(self, key: str) -> bool:
        """Whether this rule is about ``key``, written with dots."""
        return re.fullmatch(re.escape(self.key).replace(r"\*", r"[^.]+"), key) is not None


def _there(_: Any) -> bool:
    return True


def _not_false(value: Any) -> bool:
    return value is not False


def _not_zero(value: Any) -> bool:
    return type(value) is not int or value != 0


def _not_error(value: Any) -> bool:
    return value not in ("error", "none")


def _power_of_two(value: Any) -> bool:
    return size_bytes(value) is not None and (size_bytes(value) or 0).bit_count() == 1


def size_bytes(value: object) -> int | None:
    """Bytes of one of Gramine's sizes, such as ``512M``; None: not one."""
    match = re.fullmatch(r"(\d{1,15})([KMG]?)", value) if isinstance(value, str) else None
    if match is None:
        return None
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def _not_ours(value: Any) -> bool:
    """Anything but shared memory, which is no file and is copied out of before it is checked."""
    uris = value if isinstance(value, list) else [value]
    return not all(isinstance(uri, str) and re.fullmatch(r"dev:/dev/shm/[A-Za-z0-9_-]+", uri) for uri in uris)


def _leads_out(mount: Any) -> bool:
    uri = mount.get("uri") if isinstance(mount, Mapping) else None
    kind = mount.get("type", "chroot") if isinstance(mount, Mapping) else None
    wide = (
        "file:/",
        "file:.",
        "file:./",
        "file:/usr",
        "file:/usr/",
        "file:/lib",
        "file:/etc",
        "file:/home",
        "file:/tmp",
    )
    return kind == "chroot" and isinstance(uri, str) and (uri.rstrip("/") or uri) in {u.rstrip("/") or u for u in wide}


_HOST: Final = "the host would choose it, and nothing would measure it"
UNSAFE: Final = (
    Rule("sgx.debug", "unsafe", _not_false, "the host can read and write the memory of a debug enclave"),
    Rule("loader.log_level", "unsafe", _not_error, "above 'error' Gramine's log tells the host what the program does"),
    Rule("loader.log_file", "unsafe", _there, "Gramine's log is written to a file of the host"),
    Rule("loader.insecure__use_cmdline_argv", "unsafe", _not_false, f"arguments: {_HOST}"),
    Rule("loader.insecure__use_host_env", "unsafe", _not_false, f"variables, LD_PRELOAD among them: {_HOST}"),
    Rule(
        "loader.insecure__disable_aslr", "unsafe", _not_false, "addresses become known, which helps every other attack"
    ),
    Rule("loader.env.*.passthrough", "unsafe", _there, f"a variable: {_HOST}"),
    Rule(
        "loader.argv_src_file",
        "unsafe",
        _there,
        "arguments from a file: state them in loader.argv, where one sees them",
    ),
    Rule("loader.env_src_file", "unsafe", _there, "variables from a file: state them in loader.env"),
    Rule("sgx.allowed_files", "unsafe", _not_ours, "an allowed file is read unchecked: the host writes what it likes"),
    Rule("sgx.file_check_policy", "unsafe", lambda value: value != "strict", "every file of the host would be allowed"),
    Rule("fs.insecure__keys.*", "unsafe", _there, "a key that stands in the manifest is known to everybody"),
    Rule("fs.root.type", "unsafe", lambda value: value != "tmpfs", "the host's files would be the root: take tmpfs"),
    Rule("fs.root.uri", "unsafe", _there, "the host's files would be the root: take tmpfs"),
    Rule(
        "sgx.insecure__rpc_thread_num", "unsafe", _not_zero, "reads untrusted memory in a way open to known CPU flaws"
    ),
    Rule("sgx.insecure__allow_memfaults_without_exinfo", "unsafe", _not_false, "the host can forge memory faults"),
    Rule("sgx.enable_stats", "unsafe", _not_false, "opens the enclave to profiling; refused without debug"),
    Rule("sgx.profile.enable", "unsafe", lambda value: value != "none", "opens the enclave to profiling"),
    Rule("sgx.vtune_profile", "unsafe", _not_false, "opens the enclave to profiling"),
    Rule("sys.insecure__allow_eventfd", "unsafe", _not_false, "the host emulates it"),
    Rule("sys.enable_sigterm_injection", "unsafe", _not_false, "the host could end a step at any moment it likes"),
    Rule("sys.enable_extra_runtime_domain_names_conf", "unsafe", _not_false, "names would resolve as the host says"),
    Rule("sys.debug__mock_syscalls", "unsafe", _there, "system calls would only seem to succeed"),
    Rule(
        "sys.disallow_subprocesses",
        "unsafe",
        lambda value: value is not True,
        "each process would be an enclave of its own",
    ),
    Rule("libos.check_invalid_pointers", "unsafe", lambda value: value is not True, "bad pointers would not be caught"),
)
OBSOLETE: Final = (
    Rule("loader.preload", "obsolete", _there, "gone; it is loader.entrypoint.uri"),
    Rule("loader.entrypoint", "obsolete", lambda value: isinstance(value, str), "a table now: loader.entrypoint.uri"),
    Rule("loader.pal_internal_mem_size", "obsolete", _there, "gone: Gramine takes what it needs"),
    Rule("loader.exec", "obsolete", _there, "gone; it is libos.entrypoint"),
    Rule("fs.mount.*", "obsolete", _there, "gone; mounts are the list fs.mounts"),
    Rule("fs.experimental__enable_sysfs_topology", "obsolete", _there, "gone; always on"),
    Rule("sgx.nonpie_binary", "obsolete", _there, "gone"),
    Rule("sgx.thread_num", "obsolete", _there, "gone; it is sgx.max_threads"),
    Rule("sgx.rpc_thread_num", "obsolete", _there, "gone, and unsafe under its new name"),
    Rule("sgx.enable_ra", "obsolete", _there, "gone; it is sgx.remote_attestation"),
    Rule("sgx.protected_files", "obsolete", _there, "gone; mounts of type encrypted"),
    Rule("sgx.insecure__protected_files_key", "obsolete", _there, "gone"),
    Rule("sgx.trusted_children", "obsolete", _there, "gone"),
    Rule("sgx.trusted_files.*", "obsolete", _there, "a list now: sgx.trusted_files"),
    Rule("sgx.allowed_files.*", "obsolete", _there, "a list now: sgx.allowed_files"),
    Rule("sgx.trusted_checksum", "obsolete", _there, "gone"),
    Rule("sgx.preheat_enclave_size", "obsolete", _there, "never existed: sgx.preheat_enclave is true or false"),
    Rule("sgx.zero_heap_on_demand", "obsolete", _there, "gone"),
    Rule("sgx.ra_client_spid", "obsolete", _there, "EPID is gone: DCAP needs none"),
    Rule("sgx.ra_client_linkable", "obsolete", _there, "EPID is gone: DCAP needs none"),
    Rule("sgx.require_*", "obsolete", _there, "gone; it is sgx.cpu_features, and sgx.use_exinfo"),
    Rule("sgx.support_exinfo", "obsolete", _there, "gone; it is sgx.use_exinfo"),
    Rule("sys.brk.size", "obsolete", _there, "gone; it is sys.brk.max_size"),
    Rule(
        "sgx.remote_attestation",
        "obsolete",
        lambda value: value in ("epid", True, False),
        "EPID is gone: 'dcap' or 'none'",
    ),
)
REQUIRED: Final = (
    Rule("libos.entrypoint", "missing", lambda value: not isinstance(value, str), "the program that runs"),
    Rule("loader.entrypoint.uri", "missing", lambda value: not isinstance(value, str), "Gramine's own library"),
    Rule("loader.argv", "missing", lambda value: not isinstance(value, list), "with it, what a host adds is dropped"),
    Rule("fs.root.type", "missing", lambda value: value is None, "without it the folder where one starts is the root"),
    Rule("fs.mounts", "missing", lambda value: not isinstance(value, list), "without mounts there is no program"),
    Rule("sgx.debug", "missing", lambda value: value is None, "say it: sgx.debug = false"),
    Rule("sgx.remote_attestation", "missing", lambda value: value != "dcap", "no quote without it"),
    Rule("sgx.enclave_size", "missing", lambda value: not _power_of_two(value), "a power of two, such as 512M"),
    Rule("sgx.max_threads", "missing", lambda value: type(value) is not int or value < 4,
         "at least 4: three are Gramine's own"),
    Rule("sgx.trusted_files", "missing", lambda value: not (isinstance(value, list) and value), "every file"),
    Rule("sys.disallow_subprocesses", "missing", lambda value: value is None, "say it: = true"),
)  # fmt: skip
_KNOWN_TEXT: Final = """
    fs.mounts fs.root.type fs.root.uri fs.start_dir libos.entrypoint libos.check_invalid_pointers loader.entrypoint.uri
    loader.entrypoint.sha256 loader.argv loader.env.* loader.env.*.value loader.uid loader.gid loader.log_level
    sgx.allowed_files sgx.trusted_files sgx.cpu_features.avx sgx.cpu_features.avx512 sgx.cpu_features.amx
    sgx.cpu_features.mpx sgx.cpu_features.pkru sgx.debug sgx.edmm_enable sgx.enclave_size sgx.isvprodid sgx.isvsvn
    sgx.max_threads sgx.preheat_enclave sgx.remote_attestation sgx.use_exinfo sgx.trusted_files_cache_size
    sgx.seal_key.flags_mask sgx.seal_key.xfrm_mask sgx.seal_key.misc_mask sgx.profile.mode sgx.profile.with_stack
    sgx.profile.frequency sys.stack.size sys.brk.max_size sys.fds.limit sys.disallow_subprocesses sys.allowed_ioctls
    sys.experimental__enable_flock
"""
_KNOWN: Final = tuple(_KNOWN_TEXT.split())
_TYPES: Final = frozenset({"chroot", "encrypted", "tmpfs", "untrusted_shm"})


def check(manifest: Values) -> tuple[Problem, ...]:
    """Every problem of a manifest that was read, the unsafe ones first. An empty answer is the good one."""
    values = dict(_flat("", manifest))
    found = [
        Problem(key, rule.grade, _shown(value), rule.reason)
        for key, value in values.items()
        for rule in (*UNSAFE, *OBSOLETE)
        if rule.matches(key) and rule.wrong(value)
    ]
    blamed = {problem.key for problem in found}
    found += [Problem(key, "unsafe", _shown(value), "Gramine v1.9 knows no such key: misspelt, it protects nothing")
              for key, value in values.items() if key not in blamed and not _known(key)]  # fmt: skip
    found += _mounts(values.get("fs.mounts"))
    found += _files(values.get("sgx.trusted_files"))
    if values.get("sgx.preheat_enclave") and values.get("sgx.edmm_enable"):
        found.append(Problem("sgx.preheat_enclave", "obsolete", "true", "with EDMM there are no pages to touch first"))
    found += [
        Problem(rule.key, rule.grade, _shown(values.get(rule.key)), rule.reason)
        for rule in REQUIRED
        if rule.key not in blamed and rule.wrong(values.get(rule.key))
    ]
    order = ("unsafe", "obsolete", "missing")
    return tuple(sorted(found, key=lambda problem: (order.index(problem.grade), problem.key)))


def _known(key: str) -> bool:
    rules = any(rule.matches(key) for rule in (*UNSAFE, *OBSOLETE))
    return rules or any(re.fullmatch(re.escape(each).replace(r"\*", r"[^.]+"), key) for each in _KNOWN)


def _flat(prefix: str, table: Values) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(f"{name}.", value)
        else:
            yield name, value


def _mounts(value: Any) -> Iterator[Problem]:
    for mount in value if isinstance(value, list) else ():
        kind = mount.get("type", "chroot") if isinstance(mount, Mapping) else None
        if kind not in _TYPES:
            yield Problem("fs.mounts", "unsafe", _shown(mount), "not a kind of mount that Gramine v1.9 knows")
        elif _leads_out(mount):
            reason = "a folder of the host, with files that no list has: mount a closed image, or single files"
            yield Problem("fs.mounts", "unsafe", _shown(mount), reason)


def _files(value: Any) -> Iterator[Problem]:
    uris = [item.get("uri") if isinstance(item, Mapping) else item for item in value] if isinstance(value, list) else []
    for uri in uris:
        if not isinstance(uri, str) or not uri.startswith("file:"):
            yield Problem("sgx.trusted_files", "unsafe", _shown(uri), "not the URI of a file")
        elif uri.endswith("/"):
            reason = "a folder: whatever lies in it when one signs is trusted; list its files"
            yield Problem("sgx.trusted_files", "unsafe", uri, reason)
    if len(set(map(str, uris))) != len(uris):
        yield Problem("sgx.trusted_files", "unsafe", "a file twice", "which digest counts is Gramine's choice")


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:120]
