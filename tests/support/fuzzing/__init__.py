"""Damaged and hostile files for everything that fxquant reads: mutators, targets, and a campaign over them.

`tests/security/test_fuzz.py` runs a bounded part, `benchmarks/fuzz.py` as many cases as asked for.
"""
