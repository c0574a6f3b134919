"""Text generation from a compiled folder: prompts, batches with a cache, sampling, streamed text, rates."""
