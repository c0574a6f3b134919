"""Weight files of a plan, filled outside of an output folder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.stamped_bytes import checkpoint_files, stamp_files
from fxquant.lowering.output_folder.layout import FileLayout
from fxquant.lowering.weights import CheckpointProducer, Filled, Workers, write_weights
from fxquant.lowering.weights.journal import begin
from fxquant.lowering.weights.reserve import reserve
from fxquant.lowering.weights.work import plan_weights


def fill_folder(
    files: list[FileLayout],
    checkpoint: Checkpoint,
    folder: Path,
    advance: Callable[[int], object] = lambda amount: None,
    jobs: int = 1,
) -> dict[str, Filled]:
    """Reserve and fill `files` in `folder`, which is there; the finished units. `advance` counts output bytes."""

    @contextmanager
    def report(stage: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        yield advance

    producer = CheckpointProducer(checkpoint, stamp_files(checkpoint_files(checkpoint)))
    reserve(files, folder)
    with (journal := begin(folder.with_name(folder.name + ".journal"), {})).stream:
        plan = plan_weights(files, producer)
        write_weights(plan, producer, journal, folder, Workers(jobs=jobs), None, report)
    return journal.done
