"""``python -m motte`` is ``motte``."""

from __future__ import annotations

import sys

from motte.cli import main

if __name__ == "__main__":
    sys.exit(main())
