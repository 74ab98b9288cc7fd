"""Findings as scalars and pictures for TensorBoard. Optional: it needs the package ``tensorboard``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from motte.audit.interface import Position
from motte.audit.pictures import grid
from motte.errors import ResourceError

if TYPE_CHECKING:
    from motte.audit.run import Audit


def write_tensorboard(audit: Audit, folder: Path) -> int:
    """Write event files below ``folder``; returns how many scalars and images there are in them.

    Raises:
        ResourceError: tensorboard is not installed, or the folder cannot be written to.
    """
    count = 0
    writer = _writer(folder)
    try:
        for finding in audit.document.findings:
            name = f"{finding.attack}/{finding.metric}/{finding.audited}/{finding.layer or 'all layers'}"
            for position in Position:
                writer.add_scalar(f"{name}/{position}", getattr(finding, position).value, 0)
                count += 1
        for figure in audit.document.figures:
            if figure.value is not None:
                writer.add_scalar("/".join(filter(None, (figure.name, figure.audited, figure.layer))), figure.value, 0)
                count += 1
        for described, picture in audit.shown:
            name = f"{described.title}/{described.audited}/{described.position or ''}"
            writer.add_image(name, np.asarray(grid(picture)), 0, dataformats="HWC")
            count += 1
    except OSError as problem:
        raise ResourceError("cannot write event files", where=str(folder), got=problem.strerror) from problem
    finally:
        writer.close()
    return count


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as problem:
        raise ResourceError("event files need tensorboard", hint="pip install 'motte[tensorboard]'") from problem
    try:
        return SummaryWriter(log_dir=str(folder))
    except OSError as problem:
        raise ResourceError("cannot write event files", where=str(folder), got=problem.strerror) from problem
