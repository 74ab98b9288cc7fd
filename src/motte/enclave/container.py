"""The same closed image for hosts that want a container: a file for podman or docker, made from the image's record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from motte.enclave.image import ROOT, ImageRecord
from motte.enclave.workers import image_arguments, image_environment

CONTAINERFILE: Final = "Containerfile"
IGNORE: Final = ".containerignore"
_USER: Final = "65534:65534"
_RUN: Final = "podman run --rm -i --network=none --read-only --cap-drop=all --security-opt=no-new-privileges"


def containerfile(record: ImageRecord, *, threads: int, precision: str) -> str:
    """Text of a Containerfile of nothing but the image, with its one command, as nobody."""
    command = image_arguments(threads=threads, engine=record.engine, precision=precision, enclave="process")
    about = (
        f"the image of a worker with {record.engine}.",
        "A container is no enclave: whoever runs it reads its memory. Run it without network and without a writable",
        "file system; the link is its standard input and output:",
        f"  {_RUN} IMAGE",
    )
    return _text(record, about, command, threads)


def script_containerfile(record: ImageRecord, command: Sequence[str], *, name: str, threads: int) -> str:
    """The same of a script ``name``, which is started by ``command``: what its owner signed is its standard input."""
    about = (
        f"the image of the script {name}.",
        "A container is no enclave: whoever runs it reads its memory. What the owner signed is its standard input:",
        f"  {_RUN} --tmpfs=/tmp IMAGE < run.json",
        "With other ranks, a broker or an accelerator on TCP it needs a network in place of none.",
    )
    return _text(record, about, command, threads)


def _text(record: ImageRecord, about: Sequence[str], command: Sequence[str], threads: int) -> str:
    variables = " \\\n    ".join(
        f"{name}={json.dumps(value)}" for name, value in sorted(image_environment(threads).items())
    )
    first, *others = about
    return "".join(
        (
            f"# {len(record.files)} files, {record.bytes} bytes; {first}\n",
            *(f"# {line}\n" for line in others),
            "FROM scratch\n",
            f"COPY {ROOT}/ /\n",
            f"ENV {variables}\n",
            f"USER {_USER}\n",
            "WORKDIR /\n",
            f"ENTRYPOINT {json.dumps(list(command))}\n",
        )
    )


def ignore_file() -> str:
    """What of the folder a build does not read: all but the image."""
    return f"*\n!{ROOT}\n"
