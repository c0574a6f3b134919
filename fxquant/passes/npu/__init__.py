"""NPU passes, over the graph that NPUs run: fused operators, shared quantization, paged latent caches."""
