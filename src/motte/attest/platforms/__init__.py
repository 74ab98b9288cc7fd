"""One file for each kind of evidence: how it is issued inside, and how it is verified outside."""
