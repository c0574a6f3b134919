"""Engine readers: weight folders read as Ascend engines read them, on CPU, from the format descriptions alone.

What several engines have in common is here; each engine's own reader is `fxquant/engines/<name>/reader.py`. No reader
knows how a folder was written: readers import nothing of fxquant but its errors and each other, so that writer and
reader can only agree on bytes that mean the same.
"""

from fxquant.engine_readers.arithmetic import Arithmetic
from fxquant.engine_readers.ranks import Loaded
from fxquant.engine_readers.reader import EngineReader

__all__ = ["Arithmetic", "EngineReader", "Loaded"]
