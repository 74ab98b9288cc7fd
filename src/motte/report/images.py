"""Pictures of an audit as data addresses; the page carries them along, up to a bound."""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path

from motte.limits import MAX_REPORT_IMAGE_BYTES, MAX_REPORT_IMAGES_BYTES

_PNG = b"\x89PNG\r\n\x1a\n"


class Inlined:
    """Reads PNG files of one folder of results, **unverified**, until the bound on all of them is reached."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._left = MAX_REPORT_IMAGES_BYTES

    def address(self, name: str) -> str | None:
        """``data:image/png;base64,...``; None when it is no PNG within the folder, too large, or there is no room."""
        path = self._folder / name
        # A link in a folder from elsewhere must not carry another file of this machine into a page that is sent on.
        if not path.resolve().is_relative_to(self._folder):
            return None
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            return None
        with os.fdopen(handle, "rb") as file:
            data = file.read(MAX_REPORT_IMAGE_BYTES + 1)
        if not data.startswith(_PNG) or len(data) > min(MAX_REPORT_IMAGE_BYTES, self._left):
            return None
        self._left -= len(data)
        return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
