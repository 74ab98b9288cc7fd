"""Who gets keys: the grant from client to worker, and the key broker with its clients.

``grant`` seals a key-encryption key to a worker that the client started. A broker (``broker``, docs/spec/broker.md)
holds the key-encryption keys itself and releases data keys only, against verified evidence: ``messages`` and
``release`` are what crosses, ``handshake`` is the enclave's side of it as a state machine, ``runs`` counts what a
training run lets out, ``heads`` the signed heads of the audit log, ``address`` and ``client`` the way to a broker over
TLS.
"""
