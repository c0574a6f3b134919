"""A program run on tensors: node by node, or block by block with weights that are read once."""
