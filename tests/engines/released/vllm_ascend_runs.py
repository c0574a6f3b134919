"""Runs of released vllm-ascend on folders: which ranks, in which processes, and one outcome of all ranks looked at."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outcome import Outcome, Verdict

RELEASES = ("0.11.0", "0.13.0", "0.18.0", "0.23.0")
RANKS = (1, 2, 4, 8, 16)
COMPUTED_ON = (1, 4)
"""Numbers of ranks on which `apply` is run too."""
SEVERITY = (Verdict.EQUAL, Verdict.LOADED, Verdict.WRONG, Verdict.REFUSED)
ENGINE = "vllm-ascend"


@dataclass(frozen=True)
class Run:
    """A folder on `ranks`: all that is asked of a release. The last rank answers, on two ranks both do."""

    name: str
    folder: Path
    ranks: int
    parallel: str
    mtp: bool = False
    graph: Path | None = None

    def requests(self) -> list[dict[str, Any]]:
        """One for each rank looked at."""
        common = {"folder": str(self.folder), "graph": str(self.graph or self.folder), "ranks": self.ranks}
        common |= {"expert_parallel": self.parallel == "ep", "mtp": self.mtp, "compute": self.ranks in COMPUTED_ON}
        return [common | {"rank": rank} for rank in (range(2) if self.ranks == 2 else [self.ranks - 1])]


def every_way(name: str, folder: Path, mtp: bool = False, ranks: Sequence[int] = RANKS) -> list[Run]:
    """A folder on every number of ranks: experts split, and, on more than one, dealt out."""
    split = [Run(name, folder, count, "tp", mtp) for count in ranks]
    return split + [Run(name, folder, count, "ep", mtp) for count in ranks if count > 1]


def outcomes(releases: Sequence[str], runs: Sequence[Run]) -> list[Outcome]:
    """All runs on all releases, a process each, as many at a time as there are processors for."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [outcome for found in pool.map(lambda release: _outcomes(release, runs), releases) for outcome in found]


def _outcomes(release: str, runs: Sequence[Run]) -> list[Outcome]:
    requests = [run.requests() for run in runs]
    answers = iter(ask(release, [request for of_run in requests for request in of_run]))
    found = []
    for run, of_run in zip(runs, requests, strict=True):
        ranked = [(Verdict(verdict), words) for verdict, words in (next(answers) for _ in of_run)]
        verdict, words = max(ranked, key=lambda answer: SEVERITY.index(answer[0]))
        found.append(
            Outcome(
                engine=ENGINE, release=release, policy=run.name, ranks=run.ranks, parallel=run.parallel,
                verdict=verdict, words=words,
            )
        )  # fmt: skip
    return found


def ask(release: str, requests: list[dict[str, Any]]) -> list[list[str]]:
    """Answers of one process."""
    command = [sys.executable, str(Path(__file__).with_name("vllm_ascend_process.py")), release]
    # that of setuptools was once not found there, beside other work
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SETUPTOOLS_USE_DISTUTILS": "stdlib"}
    given = json.dumps(requests)
    done = subprocess.run(command, check=False, input=given, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"vllm-ascend {release}: {done.stderr[-3000:]}")
    return json.loads(done.stdout)
