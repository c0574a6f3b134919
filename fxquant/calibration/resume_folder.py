"""Resume folder `<out>.calibrating`: the state that a calibration needs to resume, saved after each graph block.

<out>.calibrating/fxquant_work.json   marker: the folder is ours
<out>.calibrating/state.safetensors   the latest state only
<out>.calibrating/codes/              GPTQ codes, one file per module
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fxquant.calibration.resume_state import DISCARD, Key, State, load_key, load_state, save_state
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.stamped_bytes import checkpoint_files, stamp_files
from fxquant.errors import FxquantError, StoppedError
from fxquant.storage.hashing import hash_text
from fxquant.storage.system_errors import stopping
from fxquant.storage.work_folder import Kind, WorkFolder
from fxquant.version import __version__

STATE = "state.safetensors"


@dataclass
class CalibrationFolder:
    """The folder during its calibration.

    restart  discard an existing state
    origin   the part of the key that the calibration itself does not know
    owned    this process created or resumed its content
    running  the calibration has started and not finished
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
        """The state of an interrupted calibration with this key, or None and the name of a key entry that differs.

        Raises FxquantError for a file that is not a state, and leaves it in place.
        """
        self.locks.enter_context(self.work.held())  # until the calibration ends, not just this call
        if self.restart:
            self.work.clear()
        path, state, other = self.folder / STATE, None, ""
        self._key = self.origin | key
        if path.is_file():
            earlier = load_key(path)
            other = next((name for name, value in self._key.items() if earlier.get(name) != value), "")
            state = None if other else load_state(path)
        if state is None:
            with stopping(path, "cannot be removed"):
                path.unlink(missing_ok=True)
        self.owned = self.running = True
        return state, other

    def save(self, state: State) -> None:
        """Replace the previous state. Raises StoppedError if it cannot be written.

        If the file format lacks a value's dtype, the previous state stays: a kill then costs one more block.
        """
        save_state(state, self.folder / STATE, self._key)

    def damaged(self) -> FxquantError:
        """The error for a state that does not match this graph."""
        self.owned = self.running = False  # so that it is not deleted: --restart is the user's decision
        return FxquantError(self.folder / STATE, "unfinished calibration is damaged.", DISCARD)

    def remove(self) -> None:
        """Delete the folder, whoever left it there, unless another process is using it."""
        if not self.folder.is_dir():
            return
        if self.owned:
            self.owned = self.running = False
            self.work.remove()
            return
        with suppress(FxquantError), self.work.held():
            self.work.remove()

    def leave(self) -> None:
        """Delete the folder if it holds no state."""
        if self.owned and not (self.folder / STATE).is_file():
            with suppress(FxquantError):
                self.work.remove()


@contextmanager
def calibration_folder(out: Path, restart: bool, checkpoint: Checkpoint) -> Iterator[CalibrationFolder]:
    """The resume folder of `out`; it is created when a calibration starts.

    After a StoppedError or an interrupt the folder stays, and the same command resumes. It is deleted when the work is
    done, and after an input error: the same command would fail in the same way.
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
                resumable = f"Finished work is kept in {folder.folder}: the same command resumes it."
                raise StoppedError(error.place, error.fact, f"{error.remedy} {resumable}") from None
            raise
        folder.remove()


def _origin(checkpoint: Checkpoint) -> Key:
    """Versions that determine the sums, and the state of the files that weights are read from."""
    stamps = stamp_files(checkpoint_files(checkpoint))
    sources = [(file.name, stamp.header, stamp.size, stamp.mtime_ns) for file, stamp in sorted(stamps.items())]
    return {"fxquant": __version__, "torch": torch.__version__, "source": hash_text(repr(sources))}
