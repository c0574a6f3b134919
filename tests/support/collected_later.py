"""The garbage collector, off from here: imports are what a test session makes most of, and they stay."""

import gc

gc.disable()
