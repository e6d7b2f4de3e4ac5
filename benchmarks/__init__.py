"""Slow evidence: what finfluence costs and how right it is, measured. `python -m benchmarks` lists the commands."""
