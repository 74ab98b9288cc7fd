"""Doctor: what this machine offers for protection and speed, and what the absence of each thing means.

    finding.py    one finding: present, absent or unknown
    subjects.py   what is looked for, and what its presence and absence mean
    system.py     where findings look: files below a root, environment, packages, a few system calls
    probe.py      the system calls themselves, tried in a process of their own
    hardware.py   enclaves, TPM, GPU
    kernel.py     what the kernel gives a process to protect itself
    compute.py    processor features, engines, cores, memory
    examine.py    all of them, in order
    tcb.py        apart from these: which files a worker of each engine really loads

Nothing here is a verification: whoever owns the machine can fake every file and answer. Only attestation, checked
somewhere else, tells an owner what is on the other side.
"""
