"""The version of the kernels' bytes, apart from the kernels: who asks for it need not load a compiler."""

KERNEL_VERSION = 1
"""Rises when a kernel gives other bytes for the same weight."""
