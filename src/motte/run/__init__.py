"""The client's side of an answer: start a worker, release keys to it, give inputs, read outputs."""
