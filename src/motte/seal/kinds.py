"""What a sealed file holds: said in its encrypted manifest, so that a file of one kind is never taken for another.

The manifest of every kind is one JSON object. A model's, the first kind, has no ``kind`` field.
"""

from __future__ import annotations

from typing import Final

from motte.errors import BundleError
from motte.strict_json import Fields

MODEL: Final = "model"
DATA: Final = "data"
CHECKPOINT: Final = "checkpoint"
_WHAT: Final = {MODEL: "a model", DATA: "a data set", CHECKPOINT: "a checkpoint of a training run"}
_USE: Final = {
    MODEL: "a sealed model is for `motte run`; data is sealed with `motte seal-data`",
    DATA: "sealed data is for `motte train --data sealed:FILE`; a model is sealed with `motte seal`",
    CHECKPOINT: "a checkpoint is for `motte train --resume`; `motte train-weights` writes its weights for `motte seal`",
}


def check_kind(fields: Fields, wanted: str) -> None:
    """Take the kind out of a **decrypted and authenticated** manifest, and refuse another than ``wanted``.

    Raises:
        BundleError: check K-1.
    """
    found = fields.any("kind") if fields.has("kind") else MODEL
    if found != wanted:
        known = isinstance(found, str)
        raise BundleError(
            "the sealed file holds something else",
            check="K-1",
            where="manifest.kind",
            expected=_WHAT.get(wanted, repr(wanted)),
            got=_WHAT.get(found, repr(found)[:80]) if known else repr(found)[:80],
            hint=_USE.get(found) if known else None,
        )
