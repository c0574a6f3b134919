"""Perplexity, KL divergence and sensitivity of the integer graph."""
