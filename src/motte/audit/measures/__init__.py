"""Measures of what leaves that need no attacker. Each says what it bounds, or that it bounds nothing."""
