"""Ascend target: the module that an NPU engine loads, and a CPU reference of the operators it calls."""
