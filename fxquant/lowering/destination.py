"""Output destination, `-o`: the checks of it, and of the command's inputs, before any work begins."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fxquant.errors import FxquantError
from fxquant.lowering.finish import Places, State, filled, sentence
from fxquant.lowering.output_folder.manifest import MANIFEST
from fxquant.lowering.own_files import refuse_others
from fxquant.storage.system_errors import stopping, told
from fxquant.storage.work_folder import Kind, WorkFolder

OTHER = "Choose another -o."


@dataclass(frozen=True)
class Input:
    """A file or folder that the command reads: the option or argument that names it, and its path; `replaced`: it may
    be the output that is replaced."""

    label: str
    path: Path
    replaced: bool = False


@dataclass
class Destination:
    """Where an output goes.

    named         as the user wrote it; it may be a link
    out           the folder itself: work is done beside it, on the same disk, so that one rename finishes it
    force         an earlier output there is replaced
    made_folders  parents that were missing
    finished      this command has done the final rename
    """

    named: Path
    out: Path
    force: bool
    made_folders: list[Path] = field(default_factory=list)
    finished: bool = False

    @property
    def places(self) -> Places:
        return Places(self.out)

    @property
    def work_folders(self) -> list[WorkFolder]:
        return [WorkFolder(self.out, kind) for kind in Kind]

    @property
    def notes(self) -> list[str]:
        """Side effects that the user did not ask for."""
        return [f"made the folder {self.made_folders[-1]} for the output"] if self.made_folders else []

    def refuse_inputs(self, inputs: Sequence[Input]) -> None:
        """Raise FxquantError if replacing `out`, or clearing a work folder, would delete an input, or if one of them
        would be inside a folder that is read."""
        for input_ in inputs:
            if input_.label.startswith("--") and not os.path.lexists(input_.path):
                raise FxquantError(
                    input_.path, f"no such file or folder, but {input_.label} names it.", "Correct the path."
                )
            real = Path(os.path.realpath(input_.path))
            for folder in (self.out, *(work.path for work in self.work_folders)):
                goal = Path(os.path.realpath(folder))
                if real == goal:
                    if input_.replaced and folder == self.out:
                        continue
                    raise FxquantError(folder, f"is {input_.label} itself.", OTHER)
                if goal in real.parents:
                    raise FxquantError(
                        folder, f"contains {input_.label} ({input_.path}).", f"Move the input, or {_lower(OTHER)}"
                    )
                if real in goal.parents and real.is_dir():
                    raise FxquantError(
                        folder, f"is inside {input_.label} ({input_.path}).", "Choose an -o outside of it."
                    )

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Give every exception, an interrupt included, a `state`: one sentence on the current state of the output."""
        try:
            yield
        except BaseException as raised:
            error = told(raised, self.out)
            self._remove_parents()
            vars(error)["state"] = f"The output is complete: {self.out}." if self.finished else sentence(self.places)
            if error is raised:
                raise
            raise error from None

    def forget(self) -> None:
        """Remove the parents again that `prepare` created, for a command that only checks whether `out` is usable."""
        self._remove_parents()

    def prepare(self) -> None:
        """Create missing parents, and try to create a folder beside `out`. Raises FxquantError."""
        parent = self.out.parent
        missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        self.made_folders = missing
        try:
            with stopping(parent, "cannot be created"):
                parent.mkdir(parents=True, exist_ok=True)
            self._try()
        except FxquantError:
            self._remove_parents()
            raise

    def _try(self) -> None:
        WorkFolder(self.out, Kind.CALIBRATING).check()
        work = self.places.work
        if not work.check():
            with stopping(work.path, "cannot be created"):  # tried: permissions do not show a full disk
                work.path.mkdir()
                work.path.rmdir()
        if self.out.is_dir() and not os.access(self.out, os.W_OK | os.X_OK):
            raise FxquantError(self.out, "cannot be replaced: it is not writable.", OTHER)

    def _remove_parents(self) -> None:
        """Remove the created parents that are empty."""
        for folder in self.made_folders:
            with suppress(OSError):
                folder.rmdir()


def open_destination(out: Path, force: bool, inputs: Sequence[Input]) -> Destination:
    """`out`, ready to be worked on. Raises FxquantError for anything that would fail only later, or destroy something.

    `out` is absent, or empty, or with `force` an earlier output of fxquant that holds nothing else, or an output whose
    command was stopped before it had cleaned up.
    """
    with stopping(out, "cannot be examined"):
        try:
            destination = Destination(out, _followed(out), force)
            _refuse_place(destination)
            destination.refuse_inputs(inputs)
            _refuse_contents(destination)
        except ValueError as error:  # a zero byte in the name
            raise FxquantError(repr(str(out)), f"not a valid folder name: {error}.", OTHER) from None
    destination.prepare()
    return destination


def _followed(out: Path) -> Path:
    """The real path of `out` if it is a link or has no name of its own; a `..` may follow a folder not yet created."""
    if not out.is_symlink() and out.name and ".." not in out.parts:
        return out
    real = Path(os.path.realpath(out))
    if out.is_symlink() and not real.exists():
        raise FxquantError(
            out, f"is a link to {out.readlink()}, which does not exist.", "Create that folder, or remove the link."
        )
    return real


def _refuse_place(destination: Destination) -> None:
    """Raise FxquantError for a folder that a rename cannot replace, and for a parent that is not a folder."""
    named, real = destination.named, Path(os.path.realpath(destination.out))
    here = Path.cwd()
    inside = f"Choose a folder in it: -o {named / 'NAME'}"
    if real == here or real in here.parents:
        raise FxquantError(named, "is the current folder, or a parent of it: it cannot be replaced.", inside)
    if os.path.ismount(real):
        raise FxquantError(named, "is a mount point: no finished folder can be renamed to it.", inside)
    above = next((folder for folder in real.parents if os.path.lexists(folder)), real)
    if not above.is_dir():
        raise FxquantError(above, f"is a file, so {named} cannot be in it.", OTHER)


def _refuse_contents(destination: Destination) -> None:
    out, named = destination.out, destination.named
    for work in destination.work_folders:
        if out.parent.is_dir():
            work.check()
    if os.path.lexists(out) and not out.is_dir():
        raise FxquantError(named, "exists and is a file.", OTHER)
    if not filled(out):
        return
    if not (out / MANIFEST).is_file() or (out / MANIFEST).is_symlink():
        raise FxquantError(named, f"is not empty and not an output of fxquant (no {MANIFEST}).", OTHER)
    if not destination.force and destination.places.state is not State.NAMED:
        _sweep(destination)
        raise FxquantError(named, "exists and is not empty.", "Pass --force to replace it, or choose another -o.")
    if destination.force:
        refuse_others(out)


def _sweep(destination: Destination) -> None:
    """Remove the empty work folder that a command leaves beside its output if it was stopped in its very last steps."""
    with suppress(FxquantError):
        if destination.places.state is State.NONE and destination.places.work.check():
            with destination.places.work.held():
                destination.places.work.release()


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
