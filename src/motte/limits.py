"""Every bound on untrusted input, unit in the name. A reader that meets a larger value refuses before it allocates."""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# --- data sets and inputs -----------------------------------------------------------------------------------------
MAX_DATASET_BYTES: Final = 2 * GIB
"""One file of a data set, decompressed."""
MAX_IMAGE_PIXELS: Final = 64 * MIB
"""One input image; larger ones are refused before they are decoded."""
MAX_INPUT_TEXT_BYTES: Final = 1 * MIB
"""One text given to an encoder."""
MAX_INPUT_ARRAY_BYTES: Final = 1 * GIB
"""One .npy input."""
MAX_INPUT_FILES: Final = 65_536
"""Inputs of one run, a folder's files counted one by one."""
MAX_WEIGHTS_FILE_BYTES: Final = 16 * GIB
"""One file of published weights, while it is downloaded."""

# --- graphs and plans ---------------------------------------------------------------------------------------------
MAX_GRAPH_TEXT_BYTES: Final = 64 * MIB
MAX_GRAPH_NODES: Final = 200_000
MAX_GRAPH_WEIGHTS: Final = 100_000
MAX_GRAPH_DIMS: Final = 16
"""Dimensions of one tensor."""
MAX_DIM_SIZE: Final = 1 << 31
"""Largest value of a named dynamic dimension, and of a bound of a weight's slice."""
MAX_NAME_BYTES: Final = 512
MAX_LIST_ITEMS: Final = 4096
"""Items of one list argument of an op (``cat`` of a dense block, an index list)."""
MAX_TENSOR_BYTES: Final = 64 * GIB
MAX_PLAN_TEXT_BYTES: Final = 16 * MIB
MAX_PARTS: Final = 4096
MAX_TILES: Final = 4096

# --- bundles (docs/spec/bundle.md) --------------------------------------------------------------------------------
CHUNK_BYTES: Final = 1 * MIB
"""Plaintext bytes of every chunk of a section but its last."""
MAX_HEADER_BYTES: Final = 4 * MIB
MAX_RECIPIENTS: Final = 1024
MAX_SECTION_BYTES: Final = 64 * GIB
"""Plaintext bytes of one section: 65,536 chunks."""
MAX_MANIFEST_BYTES: Final = 256 * MIB
MAX_RELEASE: Final = (1 << 53) - 1
"""Largest release number: the largest integer that every JSON reader keeps exact."""

# --- link ---------------------------------------------------------------------------------------------------------
MAX_FRAME_BYTES: Final = 1 * GIB
MAX_FRAME_META_BYTES: Final = 1 * MIB
MAX_FRAME_TENSORS: Final = 1024

# --- records (docs/spec/records.md) -------------------------------------------------------------------------------
MAX_RECORD_BYTES: Final = 4 * MIB
"""One line of a file of records."""
MAX_RECORD_FILE_BYTES: Final = 1 * GIB
MAX_RECORD_SAMPLES: Final = 100_000
MAX_RECORD_TEXT_BYTES: Final = 4 * KIB
"""Any one text of a record, an argument of its command line included."""
MAX_RECORD_ENTRIES: Final = 256
"""Packages, parameters or arguments of one record."""
