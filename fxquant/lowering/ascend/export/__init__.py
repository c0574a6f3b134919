"""Export of the NPU graph to torch.export files (.pt2)."""
