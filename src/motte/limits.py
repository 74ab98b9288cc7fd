"""Every bound on untrusted input, unit in the name. A reader that meets a larger value refuses before it allocates."""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# --- data sets and inputs -----------------------------------------------------------------------------------------
MAX_DATASET_BYTES: Final = 2 * GIB
"""One file of a data set, decompressed."""
MAX_DATASET_RECORDS: Final = 1 << 24
"""Records of one split of a data set."""
MAX_DATASET_CLASSES: Final = 1 << 16
MAX_PHOTO_FILE_BYTES: Final = 256 * MIB
"""One encoded photo of a data set."""
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
MAX_RUN_PEERS: Final = 64
"""Accelerators that a bundle names."""
MAX_RECIPIENTS: Final = 1024
MAX_SECTION_BYTES: Final = 64 * GIB
"""Plaintext bytes of one section: 65,536 chunks."""
MAX_MANIFEST_BYTES: Final = 256 * MIB
MAX_RELEASE: Final = (1 << 53) - 1
"""Largest release number: the largest integer that every JSON reader keeps exact."""

# --- lowered programs (docs/spec/bundle.md) -------------------------------------------------------------------------
MAX_LOWERED_BYTES: Final = 64 * MIB
"""One message of a lowered program, in base64."""
MAX_LOWERED_CHECKS: Final = 64
"""Comparisons with the reference that a bundle states."""

# --- evidence (docs/spec/evidence.md) -------------------------------------------------------------------------------
MAX_EVIDENCE_BYTES: Final = 4 * MIB
"""One piece of evidence as it travels, certificates and collateral included."""
MAX_EVIDENCE_DOCUMENTS: Final = 32
MAX_GPU_REPORT_BYTES: Final = 64 * KIB
"""A GPU's attestation report, request and answer together."""
MAX_GPU_REFERENCE_BYTES: Final = 1 * MIB
"""Good measurements of one GPU driver with one firmware, as its verifier's owner states them."""
MAX_GPU_MEASUREMENTS: Final = 255
MAX_POLICY_TEXT_BYTES: Final = 1 * MIB
"""One policy as text."""
MAX_COLLATERAL_BYTES: Final = 1 * MIB
"""Collateral of one SGX or TDX platform: certificates, revocation lists, signed statements."""
MAX_TPM_STRUCTURE_BYTES: Final = 4 * KIB
"""One structure of a TPM: a public area, a quote, a signature, a challenge."""
MAX_TPM_ENROLMENT_BYTES: Final = 512 * KIB
"""One enrolled TPM's record, or the request for one, certificates included."""
MAX_TPM_CERTIFICATES: Final = 4
"""Certificates between a TPM's endorsement key and its maker's root, the key's own included."""

# --- key broker (docs/spec/broker.md) -------------------------------------------------------------------------------
MAX_BROKER_REQUEST_BYTES: Final = 8 * MIB
"""One request to a key broker: a proof with its evidence, or a bundle's header to register."""
MAX_BROKER_ANSWER_BYTES: Final = 8 * MIB
MAX_BROKER_CONFIGURATIONS: Final = 64
"""Run configurations that an owner signs for one bundle."""
MAX_AUDIT_PAGE: Final = 4096
"""Entry digests in one answer."""
MAX_AUDIT_ENTRY_BYTES: Final = 64 * KIB
MAX_KEY_WORD_BYTES: Final = 4 * KIB
"""A file with a passphrase, a PIN, a wrapping key, a signed head or a broker's address."""
MAX_RUN_CHARGE: Final = 1 << 40
"""Releases that one training run may be charged for."""

# --- enclave images (docs/spec/image.md) ----------------------------------------------------------------------------
MAX_GRAMINE_MANIFEST_BYTES: Final = 16 * MIB
"""One manifest of Gramine; one with ten thousand files takes 2 MB."""
MAX_SCRIPT_RUN_BYTES: Final = 8 * MIB
"""What an owner signed for one process of a script."""
MAX_SCRIPT_ARGUMENTS: Final = 1024
MAX_SCRIPT_BYTES: Final = 16 * MIB
"""Source of one script."""

# --- link ---------------------------------------------------------------------------------------------------------
MAX_FRAME_BYTES: Final = 1 * GIB
MAX_FRAME_META_BYTES: Final = 1 * MIB
MAX_FRAME_TENSORS: Final = 1024
MAX_SENT_BUNDLE_BYTES: Final = 16 * GIB
"""Of a bundle that is sent to such a worker, whose memory holds it."""
MAX_BUNDLE_FRAME_BYTES: Final = 16 * MIB
"""Of ciphertext, in one frame to a worker that shares no kernel with its client."""
MAX_TCB_FILES: Final = 16_384
"""Files that a worker lists as loaded."""
MAX_CALL_META_BYTES: Final = 64 * KIB
"""Descriptors and other fields of one frame to or from an accelerator, without its header and tensors."""
MAX_CALL_TENSORS: Final = 8
"""Tensors of one such frame, and places for answers."""
MAX_REGION_BYTES: Final = 64 * GIB
"""Memory that is shared with one accelerator."""
MAX_ACCELERATOR_CLIENTS: Final = 16
"""Connections that one accelerator serves at a time, those that have not said who they are included."""
MAX_TOKEN_BYTES: Final = 4 * KIB
"""A file with the token that lets a client in."""
MAX_CERTIFICATE_BYTES: Final = 64 * KIB
MAX_RECORDING_BYTES: Final = 1 << 40
"""One file of recorded frames."""

# --- linear operators and the accelerator ---------------------------------------------------------------------------
MAX_OPERATION_CHANNELS: Final = 1 << 20
"""Input or output channels (features) of one linear operator."""
MAX_KERNEL_EXTENT: Final = 4096
"""Kernel extent, stride, padding or dilation along one axis."""
MAX_ACCELERATOR_LAYERS: Final = 65_536
MAX_HELD_INPUTS: Final = 65_536
"""Inputs that one accelerator keeps for the backward pass at a time."""

# --- checkpoints and logs of a training run -----------------------------------------------------------------------
MAX_CHECKPOINT_TENSORS: Final = 1_000_000
MAX_CHECKPOINT_EPOCHS: Final = 1_000_000
"""Epochs in the history that a checkpoint carries."""
MAX_LOG_HEADER_BYTES: Final = 1 * MIB
MAX_LOG_ENTRY_BYTES: Final = 1 * MIB
"""One entry of a sealed log, encrypted."""
MAX_LOG_FILE_BYTES: Final = 4 * GIB

# --- records (docs/spec/records.md) -------------------------------------------------------------------------------
MAX_RECORD_BYTES: Final = 4 * MIB
"""One line of a file of records."""
MAX_RECORD_FILE_BYTES: Final = 1 * GIB
MAX_RECORD_SAMPLES: Final = 100_000
MAX_RECORD_TEXT_BYTES: Final = 4 * KIB
"""Any one text of a record, an argument of its command line included."""
MAX_RECORD_ENTRIES: Final = 256
"""Packages, parameters or arguments of one record."""

# --- folders of results (docs/spec/records.md) ---------------------------------------------------------------------
MAX_RESULTS_FILE_BYTES: Final = 256 * MIB
"""One JSON file of a folder of results: what was asked and found, a plan, an audit."""
MAX_TABLE_BYTES: Final = 1 * GIB
"""One CSV file of a folder of results."""
MAX_TABLE_ROWS: Final = 5_000_000
MAX_RESULT_CASES: Final = 4096
"""Cases of one folder of results."""
MAX_PLAN_LAYERS: Final = 65_536
"""Layers of one part that a drawing of a plan names as outside."""
MAX_TRACE_BYTES: Final = 256 * MIB
"""Samples that a sampler keeps; one takes a few hundred bytes."""

# --- audits (docs/spec/audit.md) ----------------------------------------------------------------------------------
MAX_AUDIT_TEXT_BYTES: Final = 4 * KIB
"""Any one text of an audit."""
MAX_AUDIT_ITEMS: Final = 100_000
"""Findings, figures, checks or points of one list of an audit."""

# --- the report ---------------------------------------------------------------------------------------------------
MAX_REPORT_IMAGE_BYTES: Final = 1 * MIB
"""One picture of an audit that the page carries."""
MAX_REPORT_IMAGES_BYTES: Final = 2 * MIB
"""All pictures of an audit that the page carries; the page itself stays below 6 MB with them."""
