"""Work on an output that has come to its last steps."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
from output_folders import POLICY
from remembered import remembering
from stops import watched
from tiny import write_checkpoint

from fxquant import CompileOptions
from fxquant.compilation.prepare import prepare
from fxquant.engines.serving import RankLayout
from fxquant.frontend.source import open_source
from fxquant.lowering.ascend import writer
from fxquant.lowering.destination import Destination, open_destination
from fxquant.lowering.output import Contents, Work, write_output
from fxquant.lowering.weights.journal import go_on
from fxquant.lowering.weights.work import Workers
from fxquant.lowering.workspace import Workspace
from fxquant.policy.policy import load_policy
from fxquant.program.program_file import dump_program
from fxquant.progress import silent
from fxquant.verbs.compile import _contents

ONE = Work(Workers(jobs=1))
Made = tuple[Contents, Path, Path]


class Stopped(BaseException):
    """An end just before the last steps."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """What an output is made of, the output, and an earlier one of other contents. The graph is fused once."""
    base = tmp_path_factory.mktemp("finish")
    shape = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_hidden_layers": 1}
    source = open_source(write_checkpoint(base / "model", **shape))
    options = CompileOptions(policy=POLICY, export=False)
    contents = _contents(prepare(source, load_policy(POLICY), options), options)
    with patch.object(writer, "deployment", remembering(writer.deployment, dump_program)):
        written(contents, base / "whole")
        written(replace(contents, layout=RankLayout(2)), base / "earlier")
        yield contents, base / "whole", base / "earlier"


def written(contents: Contents, out: Path, force: bool = False, work: Work = ONE) -> Path:
    """What a command does with `out`."""
    destination = open_destination(out, force, [])
    with destination.telling(), write_output(contents, destination, work, silent):
        pass
    return out


def complete(case: Made, out: Path, replaced: bool) -> Callable[[], object]:
    """Work on `out` that is complete and has no name yet; call what is given to have the last steps done."""
    contents, _, earlier = case
    if replaced:
        shutil.copytree(earlier, out)
    destination = open_destination(out, replaced, [])
    with pytest.raises(Stopped), write_output(contents, destination, ONE, silent):
        raise Stopped
    return partial(last_steps, contents, destination)


def last_steps(contents: Contents, destination: Destination) -> None:
    with destination.telling(), destination.places.work.held():
        journal = go_on(destination.places.journal)
        space = Workspace(destination, owned=True, resumable=True)
        space.finish(journal, contents.identity(destination.out), lambda: None)


def steps(case: Made, folder: Path, replaced: bool) -> list[str]:
    """The operations of the last steps."""
    folder.mkdir()
    end = complete(case, folder / "out", replaced)
    with watched(lambda number, name: None) as done:
        end()
    return done


def selected(done: list[str]) -> list[int]:
    """The first, the last and every rename, with what comes after it: the states change there."""
    around = {at + more for at, name in enumerate(done) if name in ("rename", "rmdir") for more in (0, 1)}
    return sorted({0, len(done) - 1, *around} & set(range(len(done))))
