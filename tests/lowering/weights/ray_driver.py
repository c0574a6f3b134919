"""The `fxquant` command whose units take longer and leave word of who filled them: ray_driver.py SECONDS FOLDER …"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import ray

from fxquant.lowering.weights import Filled, Unit, work
from fxquant.lowering.weights.fill import FillJob
from fxquant.tools.main import run

SECONDS, FOLDER = float(sys.argv.pop(1)), sys.argv.pop(1)


@dataclass(frozen=True)
class SlowJob(FillJob):
    """In `notes`, a file `<node>.<process>` for each worker, with a line for each unit that it has begun."""

    seconds: float = SECONDS
    notes: Path = Path(FOLDER)

    def fill(self, unit: Unit) -> Filled:
        node = ray.get_runtime_context().get_node_id()
        with (self.notes / f"{node}.{os.getpid()}").open("a") as stream:
            stream.write(f"{unit.name}\n")
        time.sleep(self.seconds)
        return FillJob.fill(self, unit)


if __name__ == "__main__":
    work.FillJob = SlowJob  # type: ignore[misc]
    run()
