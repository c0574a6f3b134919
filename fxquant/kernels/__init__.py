"""Weights and activation ranges to integers: the arithmetic of every scheme.

`int8.py` and `int4.py` convert a weight from checkpoint bytes to weight-file bytes, row by row so that a row stays in
cache: `decode.py` decodes it to float32, `rounding.py` rounds it to integers. They are compiled by numba and need no
torch. `module_tensors.py` makes all tensors of a recipe from `source_rows.py`, `activation.py` turns an observed range
into static parameters, `pack_int4.py` packs existing codes. W[n, k] is the weight in float32, rne is round half to
even.
"""
