"""Measure: every figure that motte states comes from here.

    clock.py             named segments that say from where to where
    compare.py           two or more callables in turn: median, spread, ratio with a bootstrap interval
    workloads.py         named, seeded inputs that lie in memory before a clock runs
    machine.py           what this computer is: processor, cores, governor, memory
    memory.py            resident, proportional and peak memory of a process
    self_report.py       what a hardened process says of itself
    sampler.py           traces: the recorder of a case, and the sampler process beside it (sampling_process.py)
    sampling.py          what that process reads, of the named processes alone; energy.py and gpu.py likewise
    traces.py            samples and marks, and how they become rows
    gate.py              named bounds; missing data fails them
    record.py            one line of JSON per figure, with everything that is needed to judge it (docs/spec/records.md)

Nothing here loads torch.
"""
