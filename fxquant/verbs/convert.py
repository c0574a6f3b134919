"""Convert: an output, or a folder that others wrote → the form of another target."""

from dataclasses import dataclass
from pathlib import Path

from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.compilation.onnx_options import OnnxOptions
from fxquant.engines.contract import load_contract
from fxquant.engines.table import Target
from fxquant.errors import FxquantError
from fxquant.foreign.contents import foreign_contents
from fxquant.foreign.found import is_foreign
from fxquant.frontend.source import open_source
from fxquant.lowering.convert import ConvertOptions, converted_contents
from fxquant.lowering.destination import Input, open_destination
from fxquant.lowering.output import Contents, Output, Work, write_output
from fxquant.lowering.output_folder.serving_page import serve_line
from fxquant.lowering.weights import Workers
from fxquant.passes import CheckContract
from fxquant.passes.check_blocks import CheckBlocks
from fxquant.progress import Reporter, silent
from fxquant.storage.system_errors import stopping
from fxquant.verbs.verify import refuse_unverified
from fxquant.verification import VerifyReport, verify_output


@dataclass(kw_only=True)
class ConvertReport:
    """What `convert` did."""

    out: Path
    target: Target
    policy: str
    output: Output
    serve: str
    verification: VerifyReport | None = None

    @property
    def notes(self) -> list[str]:
        """Unrequested events."""
        return self.output.notes


def convert(
    out: str | Path,
    target: Target,
    into: str | Path | None = None,
    tp: int | None = None,
    verify: bool = True,
    force: bool = False,
    report: Reporter = silent,
    export: bool = True,
    workers: Workers | None = None,
    restart: bool = False,
    ep: int | None = None,
    graph_only: bool = False,
    against: str | Path | None = None,
    onnx: OnnxOptions = OnnxOptions(),
) -> ConvertReport:
    """Write the weights of `out` in another target's format, integers unchanged, and the matching graph.

    `against`: the model that a folder of others was made from; None: its config.json says what the model is.
    Raises FxquantError if that format cannot hold them, with the command that quantizes again.
    """
    folder, target = Path(out), Target(target)
    form = onnx.form_for(target)
    new = Path(into) if into else Path(f"{folder.resolve().name}-{target}")
    with stopping():
        destination = open_destination(new, force, [Input("the folder to convert", folder)])
        with destination.telling():
            contents = _convertible(folder, target, new, against, ConvertOptions(tp, ep, graph_only, export, form))
            CheckBlocks()(contents.program)
            if contents.serving is not None:
                CheckContract(contents.policy, load_contract(target), tp, ep)(contents.program)
            there = contents.origin.is_dir() and contents.origin != folder
            source = open_checkpoint(contents.origin) if there else None
            with write_output(contents, destination, Work(workers or Workers(), None, restart), report) as output:
                verification = verify_output(output.folder, source, full=False, report=report) if verify else None
                if verification is not None:
                    refuse_unverified(output, destination, verification)
    return ConvertReport(
        out=new,
        target=target,
        policy=contents.policy,
        output=output,
        serve=serve_line(target, contents.serving, str(new)),
        verification=verification,
    )


def _convertible(
    folder: Path, target: Target, into: Path, against: str | Path | None, options: ConvertOptions
) -> Contents:
    if is_foreign(folder):
        source = None if against is None else open_source(Path(against))
        return foreign_contents(folder, target, source, options)
    if against is not None:
        fact = f"applies only to folders that others wrote; {folder} names its model."
        raise FxquantError(f"--against {against}", fact, "Leave it out.")
    return converted_contents(folder, target, into, options)
