"""Faults on purpose: real daemons and workers, one thing that goes wrong in each trial, and an audit.

    places.py   named places of the cycle, and what can be done to a process that comes by
    power.py    what a power cut leaves: only what was fsynced
    warm.py     processes that start in milliseconds, so that a fault costs seconds
    bench.py    the tiny bot of a trial, and what must hold when it is over
    kinds.py    the kinds of fault, and what each one's trial does
    __main__.py the run: python -m tests.faults --help

Trial n of seed s is always the same. The daemon knows nothing of this.
"""
