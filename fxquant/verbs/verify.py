"""Verify: an output, or a folder that others wrote, against its model; and the end of an output that differs."""

from pathlib import Path

from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.engines.table import Target
from fxquant.errors import FxquantError
from fxquant.foreign.found import is_foreign
from fxquant.frontend.source import open_source
from fxquant.lowering.destination import Destination
from fxquant.lowering.output import Output
from fxquant.lowering.output_folder.manifest import MANIFEST, find_manifest
from fxquant.progress import Reporter, silent
from fxquant.verification import Rebuild, VerifyReport, verify_foreign, verify_output


def verify(
    out: str | Path,
    against: str | Path | None = None,
    full: bool = False,
    report: Reporter = silent,
    tp: int | None = None,
    target: Target | None = None,
    rebuild: Rebuild | None = None,
    ep: int | None = None,
) -> VerifyReport:
    """Check `out` against MODEL (default: the manifest's source), its own graph, and its engine's reader.

    A folder that others wrote, without a file of ours, is checked tensor by tensor, within its schemes.

    `tp`, `ep`: ranks that the reader splits over; None: those that `out` was compiled for.
    `target`: for a folder without a manifest; None: as the files show. `against` must then be given.
    `rebuild`: quantize that many units again from the source with the kernels, and compare bytes.
    """
    folder = Path(out)
    if is_foreign(folder):
        return _verify_foreign(folder, against, full, report, tp, target, rebuild, ep)
    manifest = find_manifest(folder)
    checkpoint = None
    if against is not None:
        checkpoint = open_source(Path(against)).checkpoint
    elif manifest is None:
        raise FxquantError(folder, f"has no {MANIFEST} to say what it was made from.", "Pass --against MODEL.")
    elif manifest.foreign and manifest.checkpoint == manifest.source:
        checkpoint = None  # converted without its model
    elif manifest.checkpoint_path(folder).is_dir():
        checkpoint = open_checkpoint(manifest.checkpoint_path(folder))
    if rebuild is not None and checkpoint is None:
        raise FxquantError(folder, "the source to rebuild it from is missing.", "Pass --against MODEL.")
    return verify_output(folder, checkpoint, full, report, tp, target, rebuild, ep)


def _verify_foreign(
    folder: Path,
    against: str | Path | None,
    full: bool,
    report: Reporter,
    tp: int | None,
    target: Target | None,
    rebuild: Rebuild | None,
    ep: int | None,
) -> VerifyReport:
    if rebuild is not None:
        raise FxquantError("--rebuild", f"{folder} was not written by fxquant.", "Leave it out.")
    source = None if against is None else open_source(Path(against))
    return verify_foreign(folder, source, full, report, tp, target, ep)


def refuse_unverified(output: Output, destination: Destination, verification: VerifyReport) -> None:
    """Raise FxquantError if verification found a difference."""
    if verification.ok:
        return
    if output.folder == destination.named:
        fact = "is complete, but is not as it was written: " + first_miss(verification)
        raise FxquantError(destination.named, fact, "Pass --force to write it again.")
    fact = "verification failed, nothing was kept: " + first_miss(verification)
    raise FxquantError(destination.named, fact, "Report it.")


def first_miss(verification: VerifyReport) -> str:
    """The first difference that verification found, with its check."""
    return next(f"{check.name}: {check.misses[0]}" for check in verification.checks if check.misses)
