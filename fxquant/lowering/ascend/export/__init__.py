"""The NPU graph as torch.export files (.pt2)."""
