"""Compile plan: output sizes to the byte, time and memory estimated from a benchmark of the host."""
