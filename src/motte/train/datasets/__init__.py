"""Readers of data sets: none of them unpickles, and each refuses what its format does not say."""
