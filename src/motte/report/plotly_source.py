"""The library that draws the page's figures: plotly.js as the installed plotly package ships it, packed."""

from __future__ import annotations

import base64
import gzip
import hashlib
from dataclasses import dataclass
from importlib import metadata, resources

from motte.errors import ResourceError


@dataclass(frozen=True, slots=True)
class Library:
    """``packed``: gzip in base64. ``digest``: SHA-256 of the unpacked script as a content security policy takes it."""

    packed: str
    digest: str
    version: str


def library() -> Library:
    """plotly.js of the installed package; none of plotly's Python is imported.

    Raises:
        ResourceError: plotly is not installed, or ships no script.
    """
    try:
        source = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
        version = metadata.version("plotly")
    except (ImportError, OSError) as problem:
        raise ResourceError(
            "interactive figures need plotly", got=str(problem), hint="pip install 'motte[report]'"
        ) from problem
    # What the browser hashes is the text that the decoder gives it: line ends as they are, no byte order mark.
    packed = base64.b64encode(gzip.compress(source, compresslevel=9, mtime=0)).decode("ascii")
    return Library(packed, digest(source), version)


def digest(script: bytes) -> str:
    """``sha256-...`` of an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script).digest()).decode("ascii")
