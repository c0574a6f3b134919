"""Kernel version, in a module of its own so that reading it does not load numba."""

KERNEL_VERSION = 1
"""Increases when a kernel writes other bytes for the same weight."""
