"""Graph -> Plan: which nodes stand in which part, and which large operations are tiled. Needs no torch.

``costs`` counts, ``planner`` chooses, ``tile`` rewrites, ``text`` writes and reads, ``rules`` checks, ``table`` shows.
The objectives, the text format and why the result is optimal: docs/spec/plan.md.
"""
