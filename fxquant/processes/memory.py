"""Memory of this process, as Linux counts it."""

import os
from pathlib import Path


def resident_bytes() -> int:
    """What is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Its maximum so far; `ru_maxrss` would count the process that started this one."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
