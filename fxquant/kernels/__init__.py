"""Weights and activation ranges to integers: the arithmetic of every scheme.

`weight.py` quantizes a float weight, `activation.py` turns an observed range into static parameters, `recipe.py` makes
all tensors that a recipe owns. W[n, k] is the weight in float32, rne is round half to even.
"""
