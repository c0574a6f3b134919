"""A fault at the N-th operation on files of everything that writes: what lies there then, and after the same command.

`tests/security/test_faults.py` runs a bounded part, `benchmarks/faults.py` as many rounds as asked for.
"""
