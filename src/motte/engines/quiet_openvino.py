"""The one place that imports openvino, and the reason for that.

Importing openvino imports its model converter, whose first act is to report that import to a server, from a process of
its own, and to write an identity below the home directory. The converter is not needed to run models, openvino does
without it, and it is kept out here. (In a process that had imported openvino before, that has happened already.)
"""

from __future__ import annotations

import sys
from typing import Any, cast

# None makes the import system answer "no such module", which openvino allows for.
cast("dict[str, Any]", sys.modules).setdefault("openvino.tools.ovc", None)

import openvino as ov  # noqa: E402 - only behind the line above
from openvino.frontend import FrontEndManager  # noqa: E402 - the same

__all__ = ["FrontEndManager", "ov"]
