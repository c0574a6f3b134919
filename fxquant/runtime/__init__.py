"""Program execution on tensors: node by node, or block by block with each weight read once."""
