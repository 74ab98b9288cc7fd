"""Frames between the two sides: what crosses, bounded and numbered, and the one place that can record all of it."""
