"""Checkpoints: config, index, tensor names of each source format, and tensors read one by one."""
