"""The rules for Gramine's manifests, row by row, and the writer of our own."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.enclave.manifest import Choices, dumps, loads
from motte.enclave.manifest_rules import OBSOLETE, REQUIRED, UNSAFE, Rule, check, size_bytes
from motte.errors import FormatError, SettingError

BAD: dict[str, Any] = {
    "loader.log_level": "debug",
    "sgx.allowed_files": ["file:/etc/hosts"],
    "sgx.file_check_policy": "allow_all_but_log",
    "fs.root.type": "chroot",
    "sgx.insecure__rpc_thread_num": 2,
    "sgx.profile.enable": "all",
    "sys.disallow_subprocesses": False,
    "libos.check_invalid_pointers": False,
    "loader.entrypoint": "file:/libsysdb.so",
    "sgx.remote_attestation": "epid",
    "libos.entrypoint": 3,
    "loader.entrypoint.uri": 3,
    "loader.argv": "python3",
    "fs.mounts": 3,
    "sgx.enclave_size": "500M",
    "sgx.max_threads": 3,
    "sgx.trusted_files": [],
}
# From the notes on Gramine v1.9: what is gone, what never existed, and what is warned about at start.
GONE = (
    "loader.preload",
    "loader.entrypoint",
    "loader.pal_internal_mem_size",
    "fs.mount.*",
    "sgx.nonpie_binary",
    "sgx.thread_num",
    "sgx.preheat_enclave_size",
)
WARNED = (
    "sgx.debug",
    "loader.log_level",
    "loader.insecure__use_cmdline_argv",
    "loader.insecure__use_host_env",
    "loader.insecure__disable_aslr",
    "sgx.allowed_files",
    "fs.insecure__keys.*",
)


def put(manifest: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(manifest)
    *folders, last = key.replace("*", "planted").split(".")
    table = changed
    for folder in folders:
        inner = table.get(folder)
        table[folder] = inner if isinstance(inner, dict) else {}
        table = table[folder]
    table[last] = value
    return changed


def test_the_manifest_of_ours_breaks_no_rule(clean: dict[str, Any]) -> None:
    assert check(clean) == ()


def test_every_key_of_the_notes_is_in_the_table() -> None:
    assert set(GONE) <= {rule.key for rule in OBSOLETE}
    assert set(WARNED) <= {rule.key for rule in UNSAFE}


@pytest.mark.parametrize("rule", [*UNSAFE, *OBSOLETE], ids=lambda rule: rule.key)
def test_a_bad_value_is_found_with_its_reason(rule: Rule, clean: dict[str, Any]) -> None:
    found = check(put(clean, rule.key, BAD.get(rule.key, True)))
    own = [problem for problem in found if problem.reason == rule.reason]
    assert [problem.key for problem in own] == [rule.key.replace("*", "planted")]
    assert own[0].grade == rule.grade
    assert len(rule.reason) > 3


@pytest.mark.parametrize("rule", REQUIRED, ids=lambda rule: rule.key)
def test_a_key_that_is_missing_is_found(rule: Rule, clean: dict[str, Any]) -> None:
    changed = copy.deepcopy(clean)
    *folders, last = rule.key.split(".")
    table = changed
    for folder in folders:
        table = table[folder]
    del table[last]
    assert [(p.key, p.grade, p.reason) for p in check(changed)] == [(rule.key, "missing", rule.reason)]
    if rule.key in BAD and rule.key not in {each.key for each in UNSAFE}:
        assert rule.key in {problem.key for problem in check(put(clean, rule.key, BAD[rule.key]))}


@pytest.mark.parametrize("key", ["sgx.debgu", "loader.insecure__use_host_environment", "planted", "sgx.trusted_file"])
def test_a_key_that_nobody_knows_is_unsafe(key: str, clean: dict[str, Any]) -> None:
    assert [(p.key, p.grade) for p in check(put(clean, key, True))] == [(key, "unsafe")]


@pytest.mark.parametrize(
    "mount",
    [
        {"path": "/usr", "uri": "file:/usr"},
        {"path": "/", "uri": "file:."},
        {"path": "/etc", "uri": "file:/etc", "type": "chroot"},
        {"path": "/x", "type": "bind", "uri": "file:x"},
        "file:/usr",
    ],
)
def test_a_mount_of_the_host_is_unsafe(mount: Any, clean: dict[str, Any]) -> None:
    changed = copy.deepcopy(clean)
    changed["fs"]["mounts"].append(mount)
    assert [(p.key, p.grade) for p in check(changed)] == [("fs.mounts", "unsafe")]


@pytest.mark.parametrize("item", ["file:root/usr/", {"uri": "dev:tty"}, 3, "file:root/usr/bin/python3"])
def test_a_trusted_folder_or_a_file_twice_is_unsafe(item: Any, clean: dict[str, Any]) -> None:
    changed = copy.deepcopy(clean)
    changed["sgx"]["trusted_files"].append(item)
    assert [(p.key, p.grade) for p in check(changed)] == [("sgx.trusted_files", "unsafe")]


def test_shared_memory_of_the_link_is_the_one_thing_allowed(clean: dict[str, Any]) -> None:
    assert check(put(clean, "sgx.allowed_files", ["dev:/dev/shm/motte-link"])) == ()
    for uri in ("dev:/dev/shm/../sda", "file:/dev/shm/x", "dev:/dev/shm/", "dev:tty"):
        assert [p.key for p in check(put(clean, "sgx.allowed_files", [uri]))] == ["sgx.allowed_files"]


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SCALAR = st.one_of(st.booleans(), st.integers(-(1 << 62), 1 << 62), TEXT)
KEY = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
TABLE = st.recursive(
    st.dictionaries(KEY, st.one_of(SCALAR, st.lists(SCALAR, max_size=3)), min_size=1, max_size=4),
    lambda inner: st.dictionaries(KEY, inner, min_size=1, max_size=3),
    max_leaves=6,
)


@given(TABLE)
def test_what_is_written_is_read_back(table: dict[str, Any]) -> None:
    text = dumps(table)
    assert loads(text.encode()) == table
    assert dumps(tomllib.loads(text)) == text


def test_values_that_toml_does_not_have_are_refused() -> None:
    for value in (None, 1.5, b"x", "\ud800", {1, 2}):
        with pytest.raises(SettingError):
            dumps({"key": value})


@pytest.mark.parametrize("data", [b"{{ gramine.libos }}", b"a = 1\na = 2\n", b"\xff", b"x" * ((16 << 20) + 1)])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        loads(data)


@pytest.mark.parametrize(
    "choice",
    [
        {"threads": 0},
        {"product": 70_000},
        {"svn": -1},
        {"shared_memory": "../x"},
        {"shared_memory": ""},
        {"gramine": "relative"},
        {"gramine": "/a/../b"},
    ],
)
def test_choices_out_of_bounds_are_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        Choices(**choice)


def test_sizes_of_gramine() -> None:
    assert [size_bytes(text) for text in ("512", "4K", "1M", "2G", "1T", "", 5)] == [
        512,
        4096,
        1 << 20,
        2 << 30,
        None,
        None,
        None,
    ]


def test_the_verb_says_what_is_wrong(tmp_path: Path, clean: dict[str, Any]) -> None:
    from typer.testing import CliRunner

    from motte.cli.root import app

    (tmp_path / "worker.manifest").write_text(dumps(clean), encoding="utf-8")
    good = CliRunner().invoke(app, ["enclave", "check", str(tmp_path)])
    assert good.exit_code == 0, good.output
    (tmp_path / "bad.manifest").write_text(dumps(put(clean, "sgx.debug", True)), encoding="utf-8")
    bad = CliRunner().invoke(app, ["enclave", "check", str(tmp_path / "bad.manifest")])
    assert bad.exit_code == 1
    assert "debug enclave" in bad.output
