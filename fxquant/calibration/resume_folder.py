"""`<out>.calibrating`: where a calibration keeps what it needs to go on, after each block of the graph.

<out>.calibrating/fxquant_work.json   says that the folder is ours
<out>.calibrating/state.safetensors   the last one alone
<out>.calibrating/codes/              what GPTQ found, one file a module
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fxquant.calibration.resume_state import DISCARD, Key, State, load_key, load_state, save_state
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.stamped_reader import checkpoint_files, stamp_files
from fxquant.errors import FxquantError, StoppedError
from fxquant.storage.hashing import hash_text
from fxquant.storage.system_errors import stopping
from fxquant.storage.work_folder import Kind, WorkFolder
from fxquant.version import __version__

STATE = "state.safetensors"


@dataclass
class CalibrationFolder:
    """The folder while its calibration goes on.

    restart  what lies there is discarded
    origin   the part of the key that the calibration itself does not know
    owned    this process made what is in it, or goes on with it
    running  the calibration has begun and not ended
    """

    work: WorkFolder
    restart: bool
    origin: Key
    locks: ExitStack
    owned: bool = False
    running: bool = False
    _key: Key = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.work.path

    def begin(self, key: Key) -> tuple[State | None, str]:
        """The state of a killed calibration with this key, if there is one; else what another's differs in.

        Raises FxquantError for a file that holds no state, and leaves it there.
        """
        self.locks.enter_context(self.work.held())
        if self.restart:
            self.work.clear()
        path, found, other = self.folder / STATE, None, ""
        self._key = self.origin | key
        if path.is_file():
            kept = load_key(path)
            other = next((name for name, value in self._key.items() if kept.get(name) != value), "")
            found = None if other else load_state(path)
        if found is None:
            with stopping(path, "cannot be removed"):
                path.unlink(missing_ok=True)
        self.owned = self.running = True
        return found, other

    def save(self, state: State) -> None:
        """Put it in the place of the last one. Raises StoppedError where the disk does not take it.

        Where the file format has no name for a value's dtype, the last one stays: a kill costs one block more.
        """
        save_state(state, self.folder / STATE, self._key)

    def damaged(self) -> FxquantError:
        """What to raise for a state that is not one of this graph."""
        self.owned = self.running = False
        return FxquantError(self.folder / STATE, "unfinished calibration that is damaged.", DISCARD)

    def remove(self) -> None:
        """Forget it, whoever left it there, unless another process is at work in it."""
        if not self.folder.is_dir():
            return
        if self.owned:
            self.owned = self.running = False
            self.work.remove()
            return
        with suppress(FxquantError), self.work.held():
            self.work.remove()

    def leave(self) -> None:
        """A folder with no state in it is of no use to anybody."""
        if self.owned and not (self.folder / STATE).is_file():
            with suppress(FxquantError):
                self.work.remove()


@contextmanager
def calibration_folder(out: Path, restart: bool, checkpoint: Checkpoint) -> Iterator[CalibrationFolder]:
    """The folder of the work on `out`; it is made when a calibration begins.

    What the world stopped stays there, for the same command to go on with. It is removed when the work is done, and
    after a fault of the input: the same command would find it again.
    """
    with ExitStack() as locks:
        folder = CalibrationFolder(WorkFolder(out, Kind.CALIBRATING), restart, _origin(checkpoint), locks)
        try:
            yield folder
        except BaseException as error:
            if isinstance(error, FxquantError) and not isinstance(error, StoppedError) and folder.owned:
                with suppress(FxquantError):
                    folder.remove()
            folder.leave()
            if isinstance(error, StoppedError) and folder.running and folder.folder.is_dir():
                kept = f"What is finished is kept in {folder.folder}: the same command goes on with it."
                raise StoppedError(error.place, error.fact, f"{error.remedy} {kept}") from None
            raise
        folder.remove()


def _origin(checkpoint: Checkpoint) -> Key:
    """Whose sums they are, and the states of the files that weights are read from."""
    stamps = stamp_files(checkpoint_files(checkpoint))
    sources = [(file.name, stamp.header, stamp.size, stamp.mtime_ns) for file, stamp in sorted(stamps.items())]
    return {"fxquant": __version__, "torch": torch.__version__, "source": hash_text(repr(sources))}
