"""Measure: every figure that motte states comes from here.

    clock.py     named segments that say from where to where
    compare.py   two or more callables in turn: median, spread, ratio with a bootstrap interval
    machine.py   what this computer is: processor, cores, governor, memory
    memory.py    resident, proportional and peak memory of a process
    record.py    one line of JSON per figure, with everything that is needed to judge it (docs/spec/records.md)

Nothing here loads torch.
"""
