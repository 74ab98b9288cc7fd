"""The key broker: holds bundles' key-encryption keys, and gives data keys to enclaves that proved themselves.

In the order in which a question meets them: ``serve`` (TLS), ``app`` (HTTP), ``answers`` (nonce, evidence, release),
``training`` (what a run may release), on ``state`` (an opened broker: its keys and its store), ``policies``,
``enroll`` (what owners give it), ``log`` (the audit log), ``wrapping`` and ``pkcs11`` (keys at rest), ``tables`` and
``store`` (SQLite), ``backup``. Normative: docs/spec/broker.md. Needs the extra ``motte[broker]``; ``extra`` says so
where it is missing.
"""
