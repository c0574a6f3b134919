"""Proof: the graph of a model.py against the file's own eager forward, on copies with random weights.

copies.py   the configs of two copies, wide and deep, and their weights
eager.py    the model's own forward, row by row, and what its layers give
traced.py   the graph on the same tokens, padded to one batch, in one piece and in chunks
layers.py   the deep copy, layer by layer
logits.py   the wide copy's logits
rotary.py   rotary tables at far positions
prove.py    all of them
"""
