"""Attacks on what leaves, one file each; :mod:`motte.audit.attacks.registry` lists them and loads one when asked."""
