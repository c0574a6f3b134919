"""Order of files among the processes of a run: those of few tests that take long are begun first.

xdist begins with the files of most tests, and a process takes its next files before it has ended its last: what is
short by number and long by time would come last, in one process, while the others have ended.
"""

import os

import pytest

DEAR = (
    "security/test_graph_attacks.py",
    "kernels/test_weight_algorithms.py",
    "errands/test_errands.py",
    "security/test_faults.py",
    "kernels/test_kernels_process.py",
    "lowering/test_resume.py",
    "commands/test_work_errors.py",
    "calibration/test_calibration_memory.py",
    "security/test_fuzz.py",
    "errands/test_add_engine.py",
    "engines/test_targets.py",
    "lowering/weights/test_workers.py",
    "lowering/weights/test_ray.py",
    "lowering/ascend/test_exported.py",
    "commands/test_ways_in_compiled.py",
    "commands/test_user_model.py",
    "tools/test_command_line.py",
)
"""The first is the dearest: see the seconds that a run ends with (cpu_budget.py)."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort by file: those of DEAR, then by number of tests. The order within a file stays, and all of it with -n 0."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    counts: dict[str, int] = {}
    for item in items:
        counts[file_of(item)] = counts.get(file_of(item), 0) + 1
    places = {file: place for place, file in enumerate(DEAR)}
    items.sort(key=lambda item: (places.get(file_of(item), len(DEAR)), -counts[file_of(item)], file_of(item)))


def file_of(item: pytest.Item) -> str:
    """The path of its file below `tests`."""
    return item.nodeid.split("::")[0].removeprefix("tests/")
