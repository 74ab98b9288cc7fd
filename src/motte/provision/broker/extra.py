"""The packages that only a broker needs, and a clear word where they are missing."""

from __future__ import annotations

import importlib.util
from typing import Final

from motte.errors import ResourceError

_NEEDED: Final = ("sqlalchemy", "fastapi", "uvicorn")


def require_broker_packages() -> None:
    """Return only if the packages of the extra ``broker`` are installed.

    Raises:
        ResourceError: they are not.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ResourceError(
            "the key broker needs packages that are not installed",
            got=f"without {', '.join(missing)}",
            hint="pip install 'motte[broker]'",
        )
