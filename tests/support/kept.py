"""Results that the processes of a run share: a file each in one folder, which ends with the run."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fxquant.storage.hashing import hash_text


class Kept(NamedTuple):
    """The results of one function. Two processes that ask at once both compute, and write the same."""

    folder: Path

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """What `compute` gave for this key first, in whichever process."""
        path = self.folder / hash_text(key)
        try:
            return pickle.loads(path.read_bytes())
        except FileNotFoundError:
            result = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(f".{os.getpid()}")
        written.write_bytes(pickle.dumps(result))
        written.replace(path)
        return result
