"""Own forwards: what a class that no adapter knows is handed, so that its own forward can be traced.

latent_cache.py   its cache, without writes in place
rotary_pairs.py   complex rotations as pairs of real tensors
position_mask.py  the mask, for rows of unequal length
expert_loop.py    a loop over the experts that some token chose, as one call
"""
