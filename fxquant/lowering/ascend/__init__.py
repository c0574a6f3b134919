"""The Ascend target: what an NPU engine loads, and a CPU reference of the operators it calls."""
