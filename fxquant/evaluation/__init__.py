"""Perplexity, KL divergence, sensitivity and generation of the integer graph."""
