"""The same closed image for hosts that want a container: a file for podman or docker, made from the image's record."""

from __future__ import annotations

import json
from typing import Final

from motte.enclave.image import ROOT, ImageRecord
from motte.enclave.workers import image_arguments, image_environment

CONTAINERFILE: Final = "Containerfile"
IGNORE: Final = ".containerignore"
_USER: Final = "65534:65534"


def containerfile(record: ImageRecord, *, threads: int, precision: str) -> str:
    """Text of a Containerfile of nothing but the image, with its one command, as nobody."""
    command = image_arguments(threads=threads, engine=record.engine, precision=precision, enclave="process")
    variables = " \\\n    ".join(
        f"{name}={json.dumps(value)}" for name, value in sorted(image_environment(threads).items())
    )
    return (
        f"# {len(record.files)} files, {record.bytes} bytes; the image of a worker with {record.engine}.\n"
        "# A container is no enclave: whoever runs it reads its memory. Run it without network and without a writable\n"
        "# file system; the link is its standard input and output:\n"
        "#   podman run --rm -i --network=none --read-only --cap-drop=all --security-opt=no-new-privileges IMAGE\n"
        "FROM scratch\n"
        f"COPY {ROOT}/ /\n"
        f"ENV {variables}\n"
        f"USER {_USER}\n"
        "WORKDIR /\n"
        f"ENTRYPOINT {json.dumps(list(command))}\n"
    )


def ignore_file() -> str:
    """What of the folder a build does not read: all but the image."""
    return f"*\n!{ROOT}\n"
