"""What compile would cost: sizes to the byte, time and memory from a benchmark of the host."""
