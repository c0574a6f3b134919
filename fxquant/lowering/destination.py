"""`-o`: what has to be true of it, and of what the command reads, before any work begins."""

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
    """What the command reads: the option or argument that names it, and where it is; `replaced`: it may be the output
    that is replaced."""

    label: str
    path: Path
    replaced: bool = False


@dataclass
class Destination:
    """Where an output goes.

    named         as the user has it; it may be a link
    out           the folder itself: work goes on beside it, so that one rename on its disk gives it its name
    force         an earlier output there is replaced
    made_folders  parents that were missing
    finished      this command gave the name
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
        """What the user did not ask for and should know."""
        return [f"made the folder {self.made_folders[-1]} for the output"] if self.made_folders else []

    def refuse_inputs(self, inputs: Sequence[Input]) -> None:
        """Raise FxquantError where replacing `out`, or clearing a work folder, would delete an input, and where these
        would come to lie in a folder that is read."""
        for input_ in inputs:
            if input_.label.startswith("--") and not os.path.lexists(input_.path):
                raise FxquantError(
                    input_.path, f"no such file or folder, and {input_.label} names it.", "Correct the path."
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
                        folder, f"contains {input_.label} ({input_.path}).", f"Move that, or {_lower(OTHER)}"
                    )
                if real in goal.parents and real.is_dir():
                    raise FxquantError(
                        folder, f"lies in {input_.label} ({input_.path}).", "Choose an -o outside of it."
                    )

    @contextmanager
    def telling(self) -> Iterator[None]:
        """An error, an interrupt too, leaves with a `state`: one sentence on what is true of the output now."""
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
        """It is only asked whether `out` can be made: what was made to find out goes."""
        self._remove_parents()

    def prepare(self) -> None:
        """Make missing parents, and try whether a folder can be made beside `out`. Raises FxquantError."""
        parent = self.out.parent
        missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        self.made_folders = missing
        try:
            with stopping(parent, "cannot be made"):
                parent.mkdir(parents=True, exist_ok=True)
            self._try()
        except FxquantError:
            self._remove_parents()
            raise

    def _try(self) -> None:
        WorkFolder(self.out, Kind.CALIBRATING).check()
        work = self.places.work
        if not work.check():
            with stopping(work.path, "cannot be made"):
                work.path.mkdir()
                work.path.rmdir()
        if self.out.is_dir() and not os.access(self.out, os.W_OK | os.X_OK):
            raise FxquantError(self.out, "cannot be replaced: it may not be written.", OTHER)

    def _remove_parents(self) -> None:
        """Those that hold nothing."""
        for folder in self.made_folders:
            with suppress(OSError):
                folder.rmdir()


def open_destination(out: Path, force: bool, inputs: Sequence[Input]) -> Destination:
    """`out`, ready to be worked on. Raises FxquantError for what would be found out only later, or destroy something.

    It is absent, empty, with `force` an earlier output of fxquant that holds nothing else, or an output whose command
    was stopped before it had cleaned up.
    """
    with stopping(out, "cannot be looked at"):
        try:
            destination = Destination(out, _followed(out), force)
            _refuse_place(destination)
            destination.refuse_inputs(inputs)
            _refuse_contents(destination)
        except ValueError as error:  # a zero byte in the name
            raise FxquantError(repr(str(out)), f"no name of a folder: {error}.", OTHER) from None
    destination.prepare()
    return destination


def _followed(out: Path) -> Path:
    """Where `out` is, if it is a link or has no name of its own; a `..` may lead past a folder that is to be made."""
    if not out.is_symlink() and out.name and ".." not in out.parts:
        return out
    real = Path(os.path.realpath(out))
    if out.is_symlink() and not real.exists():
        raise FxquantError(
            out, f"a link to what is not there: {out.readlink()}.", "Make that folder, or remove the link."
        )
    return real


def _refuse_place(destination: Destination) -> None:
    """What can't be replaced by a rename, and a parent that is no folder."""
    named, real = destination.named, Path(os.path.realpath(destination.out))
    here = Path.cwd()
    inside = f"Choose a folder in it: -o {named / 'NAME'}"
    if real == here or real in here.parents:
        raise FxquantError(named, "is the current folder, or one around it: it can't be replaced.", inside)
    if os.path.ismount(real):
        raise FxquantError(named, "is a mount point: no folder can get this name when it is finished.", inside)
    above = next((folder for folder in real.parents if os.path.lexists(folder)), real)
    if not above.is_dir():
        raise FxquantError(above, f"is a file, {named} can't lie in it.", OTHER)


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
    """A command that was stopped in its very last steps leaves an empty work folder beside its output."""
    with suppress(FxquantError):
        if destination.places.state is State.NONE and destination.places.work.check():
            with destination.places.work.held():
                destination.places.work.release()


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
