"""Runner of a compiled folder: ONNX Runtime where it has an ONNX graph, else its fx graph on CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fxquant.errors import FxquantError
from fxquant.program.program import Program
from fxquant.runtime.program_runner import ProgramRunner
from fxquant.runtime.weight_providers import Read


class Runner(Protocol):
    """Tokens and caches to logits and caches.

    past_axes  of each cache, the axis of the tokens so far; axis 0 is the batch
    """

    past_axes: list[int]

    def __call__(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """ids, positions int64 [B, S]; mask int64 [B, T], 0 on padding; past: caches of T - S tokens.

        → logits [B, S, vocabulary], or of the last tokens alone; caches of T tokens.
        """

    def empty_cache(self, batch: int) -> list[Tensor]:
        """`past` for the first call."""


def has_onnx(folder: Path) -> bool:
    """Whether ONNX Runtime runs it."""
    return (folder / "model.onnx").is_file()


def check_runnable(folder: Path, program: Program) -> None:
    """Raise FxquantError for a model.onnx that is not what `program` emits: a session would follow its paths."""
    if has_onnx(folder):
        from fxquant.lowering.onnx.required import require_emitted
        from fxquant.lowering.output_folder.weight_files import WeightFiles

        require_emitted(program, WeightFiles(folder).infos, folder)


def prepack_weights(folder: Path, program: Program, prepack: Path) -> None:
    """Write the prepacked form of an ONNX graph, if it is not there yet."""
    check_runnable(folder, program)
    if has_onnx(folder):
        from fxquant.lowering.onnx.prepacked import prepacked
        from fxquant.lowering.onnx.runner import FILE, session_options

        prepacked(folder / FILE, prepack, session_options)


def open_runner(folder: Path, program: Program, read: Read, threads: int = 0, prepack: Path | None = None) -> Runner:
    """What runs `folder`, which `check_runnable` has looked at.

    threads  of ONNX Runtime; 0: one per core
    prepack  folder where its packed weights are kept, for ONNX Runtime to map. Raises FxquantError for an fx graph
    """
    if has_onnx(folder):
        from fxquant.lowering.onnx.runner import OnnxRunner

        return OnnxRunner(folder, threads, last_logits=True, prepack=prepack)
    if prepack is not None:
        raise FxquantError(
            "--prepack", f"{folder} has no ONNX graph.", "Leave it out: an fx graph maps weights as they are."
        )
    return ProgramRunner(program, read)
