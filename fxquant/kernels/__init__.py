"""Weights and activation ranges to integers: the arithmetic of every scheme.

`int8.py` and `int4.py` take a weight from the bytes of a checkpoint to the bytes of the weight file, a row at a time,
so that a row stays in cache: `decode.py` makes it float32, `rounding.py` turns it to integers. They are compiled by
numba and need no torch. `recipe.py` makes all tensors that a recipe owns from `source_rows.py`, `activation.py` turns
an observed range into static parameters, `weight.py` packs codes that exist. W[n, k] is the weight in float32, rne is
round half to even.
"""
