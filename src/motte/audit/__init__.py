"""Attacks on what left the trusted side, each between a floor and a ceiling."""
