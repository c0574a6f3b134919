"""Quantization schemes, and the dtype and shape of every tensor that they store."""
