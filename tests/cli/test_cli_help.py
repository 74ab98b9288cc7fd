"""The help of every verb, what starting costs, and the documents: every option documented, no other one named."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer

from motte.cli import root

REPOSITORY = Path(__file__).resolve().parents[2]
CLI_PAGE = REPOSITORY / "docs" / "cli.md"
DOCUMENTS = [CLI_PAGE, *(path for path in (REPOSITORY / "README.md", REPOSITORY / "docs" / "zoo.md") if path.exists())]
SHARED = {
    "compare": ("Naming a model", "`motte bench`"),
    "plan": ("Naming a model", "Where to cut"),
    "seal": ("Naming a model", "Where to cut", "`motte plan`"),
}
EVERYWHERE = "What every verb keeps to"
Options = Mapping[str, frozenset[str]]


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command below ``command`` by its words, groups and the root ("") included."""
    yield " ".join(words), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))


COMMANDS = dict(commands(typer.main.get_command(root.app)))
VERBS = sorted(name for name, command in COMMANDS.items() if name and not getattr(command, "commands", {}))

GROUPS = (
    "zoo", "keys", "recipients", "accelerator", "broker", "broker policy", "broker audit", "broker run", "enclave",
    "attest", "attest tpm", "attest simulated", "bench", "audit",
)  # fmt: skip


def options_of(command: Any) -> frozenset[str]:
    named = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    return frozenset(name for name in named if name.startswith("-")) | {"--help"}


OPTIONS: Options = {name: options_of(command) for name, command in COMMANDS.items()}
COMMON = frozenset({"--quiet", "-q", "--json", "--debug", "--help"})


def test_these_are_the_verbs() -> None:
    assert set(VERBS) == {
        "zoo list",
        "zoo show",
        "zoo pull",
        "accelerator serve",
        "accelerator cert",
        *(f"broker {verb}" for verb in ("init", "serve", "add", "revoke", "rotate", "backup", "restore")),
        *(f"enclave {verb}" for verb in ("build", "check", "measure", "configure", "run")),
        *(f"attest {verb}" for verb in ("evidence", "verify", "simulated new-key", "simulated measure")),
        *(f"attest tpm {verb}" for verb in ("request", "enroll", "activate")),
        "broker policy check",
        "broker policy set",
        "broker run enroll",
        "broker audit verify",
        "broker audit show",
        "seal-data",
        "train",
        "train-log",
        "train-weights",
        "privacy",
        *(f"bench {verb}" for verb in ("infer", "train", "split", "open", "link", "start")),
        "audit run",
        "audit observe",
        "compare",
        "report",
        "plan",
        "seal",
        "run",
        "inspect",
        "unseal",
        "doctor",
        "version",
        "keys new",
        "keys show",
        "keys rotate",
        "recipients add",
        "recipients remove",
    }


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_the_common_options(verb: str) -> None:
    assert OPTIONS[verb] >= COMMON


@pytest.mark.parametrize("verb", ["", *VERBS, *GROUPS])
def test_the_help_fits_80_columns_and_names_every_option(motte: Any, verb: str) -> None:
    found = motte(*verb.split(), "--help")
    assert (found.code, found.err) == (0, "")
    assert max(len(line) for line in found.out.splitlines()) <= 80
    assert f"motte {verb}".strip() in found.out
    assert [name for name in OPTIONS[verb] if name not in found.out] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_does(verb: str) -> None:
    silent = [each.name for each in COMMANDS[verb].params if not each.help]
    assert silent == []
    assert COMMANDS[verb].help


@pytest.mark.parametrize("words", ["--help", "plan --help", "seal --help", "run --help", "--version", "keys show"])
def test_starting_loads_nothing_heavy(words: str, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom motte.cli import main\n"
        f"assert main({words.split()!r}) == 0\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'transformers', 'PIL', 'safetensors', 'sympy'}\n"
        "print(*sorted(heavy & {name.split('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=60
    )
    assert done.returncode == 0, done.stderr
    loaded = [line for line in done.stderr.splitlines() if not line.startswith("no keys in")]
    assert loaded in ([], [""])


def test_the_root_stays_small() -> None:
    assert len(Path(root.__file__).read_text().splitlines()) < 60


@pytest.mark.parametrize(
    ("words", "cursor", "wanted"),
    [("motte pl", 1, {"plan"}), ("motte keys r", 2, {"rotate"}), ("motte plan --max", 2, {"--max-part-memory"})],
)
def test_the_shell_completes(words: str, cursor: int, wanted: set[str]) -> None:
    asked = {"_MOTTE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(cursor)}
    done = subprocess.run(
        [sys.executable, "-m", "motte"], env={**environment(), **asked}, capture_output=True, text=True, timeout=60
    )
    assert set(done.stdout.split()) == wanted


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")])}


# --- documents ------------------------------------------------------------------------------------------------------
def sections(text: str) -> dict[str, str]:
    """The text below each second-level heading."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def undocumented(verb: str, options: frozenset[str], text: str) -> list[str]:
    """Options of ``verb`` that its own section and those that it shares do not name."""
    found = sections(text)
    name = verb.split(maxsplit=1)[0]
    page = "".join(found[title] for title in (f"`motte {name}`", *SHARED.get(name, ()), EVERYWHERE))
    return sorted(option for option in options if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", page))


def spans(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is code: lines of a code block, inline code, lines of prose."""
    for index, piece in enumerate(re.split(r"^```.*$", text, flags=re.MULTILINE)):
        if index % 2:
            yield from ((line, True) for line in piece.replace("\\\n", " ").splitlines())
            continue
        for place, part in enumerate(re.split(r"`([^`\n]+)`", piece)):
            yield from [(part, True)] if place % 2 else ((line, False) for line in part.splitlines())


def unknown_options(text: str, options: Options) -> list[str]:
    """Options in ``text`` that are not ours: on a command line of motte those of its verb, elsewhere those of any verb.

    Code that is neither a command line of motte nor an option alone is another program's, and not ours to judge.
    """
    every = frozenset().union(*options.values())
    groups = {name.split()[0] for name in options if " " in name}
    found = []
    for span, is_code in spans(text):
        line = span.strip().removeprefix("$ ").split("  #")[0]
        given = re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", line)
        allowed = every
        if is_code and line.startswith("motte "):
            words = list(takewhile(re.compile("[a-z][a-z-]*").fullmatch, line.split()[1:4]))
            verb = next((name for n in (3, 2, 1) if (name := " ".join(words[:n])) in options), None)
            if verb is None and "".join(words[:1]) not in groups and words:
                found.append(f"motte {words[0]}")
                continue
            allowed = options[verb] if verb is not None and words else every
        elif is_code and not line.startswith("-"):
            continue
        found += [each for each in given if each not in allowed]
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_on_the_page(verb: str) -> None:
    assert undocumented(verb, OPTIONS[verb], CLI_PAGE.read_text(encoding="utf-8")) == []


def test_the_options_of_the_root_are_on_the_page() -> None:
    text = CLI_PAGE.read_text(encoding="utf-8")
    assert [option for option in OPTIONS[""] if f"`{option}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_document_names_another_option(document: Path) -> None:
    assert unknown_options(document.read_text(encoding="utf-8"), OPTIONS) == []


def command_lines(text: str) -> Iterator[list[str]]:
    """The arguments of every line of a code block that calls motte."""
    for index, piece in enumerate(re.split(r"^```.*$", text, flags=re.MULTILINE)):
        if index % 2:
            lines = [line.strip().removeprefix("$ ") for line in piece.replace("\\\n", " ").splitlines()]
            yield from (shlex.split(line, comments=True)[1:] for line in lines if line.startswith("motte "))


def parsed(words: list[str]) -> dict[str, Any]:
    """What the real parser makes of a command line; raises what it raises. Nothing is run."""
    command = COMMANDS[""]
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    made: dict[str, Any] = command.make_context("motte", list(words)).params
    return made


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_line_of_a_document_is_accepted(document: Path) -> None:
    lines = list(command_lines(document.read_text(encoding="utf-8")))
    assert lines or document != CLI_PAGE
    for words in lines:
        assert parsed(words)


# --- the gates themselves can fail ------------------------------------------------------------------------------------
KNOWN: Options = {"": frozenset({"--version"}), "plan": frozenset({"--parts"}), "keys new": frozenset({"--kind"})}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("use `--parts 3` or `--kind`", []),
        ("use `--party`", ["--party"]),
        ("use --party here", ["--party"]),
        ("```\n$ motte plan x --parts 3\n```", []),
        ("```\nmotte plan x --kind a\n```", ["--kind"]),
        ("```\nmotte keys new x --kind a   # not --fancy\n```", []),
        ("```\nmotte plan x \\\n  --kind a\n```", ["--kind"]),
        ("`motte plan --kind`", ["--kind"]),
        ("motte knows `--parts`, and `motte keys` too", []),
        ("`motte keys frob --parts`", []),
        ("```\nmotte fly --parts 3\n```", ["motte fly"]),
        ("```\npip install --index-url x\n```", []),
        ("`pip install --index-url x`", []),
        ("a -- b, and a table |---|---|", []),
    ],
)
def test_an_unknown_option_is_found(text: str, wrong: list[str]) -> None:
    assert unknown_options(text, KNOWN) == wrong


def test_an_undocumented_option_is_found() -> None:
    page = f"## {EVERYWHERE}\n`--json`\n## `motte run`\n`--mode` and `--input-shape`\n## `motte zoo`\n`--all`\n"
    assert undocumented("run", frozenset({"--mode", "--json"}), page) == []
    assert undocumented("run", frozenset({"--input", "--all"}), page) == ["--all", "--input"]


def test_a_wrong_command_line_of_a_document_is_found() -> None:
    (words,) = command_lines("```\n$ motte plan x \\\n  --parts 0   # none\n```")
    with pytest.raises(typer.BadParameter):
        parsed(words)
