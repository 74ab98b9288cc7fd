"""Evidence -> verdict: what a trusted process proves about itself before any key is released to it."""
