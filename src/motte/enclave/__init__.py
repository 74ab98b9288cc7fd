"""How a trusted process is started. One kind so far: ``process``, a separate process without hardware protection."""
