"""CPU time of every test: user and system, of its process and of the children that it has waited for.

Wall time says little on a machine that does other work. The table at the end of a run has the tests above two seconds,
fixtures included, and the sum over all workers. It is a budget to look at: nothing fails by it.
"""

import os
from collections import defaultdict
from collections.abc import Generator
from typing import Any

import pytest

LARGE = 2.0
"""CPU seconds above which a test is in the table."""


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


class CpuBudget:
    """In the process of a test, time is taken and put into its reports; where reports are shown, it is summed.

    spent     test → seconds of setup, call and teardown
    starting  seconds before the first test, imports and collection, one for each process that ran tests
    """

    def __init__(self) -> None:
        self.last: float | None = None
        self.before = 0.0
        self.spent: dict[str, float] = defaultdict(float)
        self.starting: list[float] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        """Whatever was before the first test is no test's."""
        if self.last is None:
            self.before = self.last = cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        """One phase of a test has ended."""
        report = yield
        now = cpu_seconds()
        report.cpu, report.cpu_before, self.last = now - (self.last or now), self.before, now
        self.before = 0.0
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add a phase."""
        self.spent[report.nodeid] += getattr(report, "cpu", 0.0)
        if getattr(report, "cpu_before", 0.0):
            self.starting.append(report.cpu_before)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The table."""
        if not self.spent:
            return
        large = sorted((-seconds, name) for name, seconds in self.spent.items() if seconds > LARGE)
        terminalreporter.section("CPU seconds", sep="-")
        for seconds, name in large:
            terminalreporter.line(f"{-seconds:7.1f}  {name}")
        above = f"{len(large)} above {LARGE:g} s with {-sum(seconds for seconds, _ in large):.1f} s"
        terminalreporter.line(f"{sum(self.spent.values()):7.1f}  {len(self.spent)} tests, {above}")
        terminalreporter.line(f"{sum(self.starting):7.1f}  imports and collection, {len(self.starting)} processes")


def pytest_configure(config: pytest.Config) -> None:
    """One for each process."""
    config.pluginmanager.register(CpuBudget())
