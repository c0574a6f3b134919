"""Graph in, files out: one module per target, writer and reader together."""
