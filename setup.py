"""The packages of fxquant: `passes`, `lowering` and `tools` lie beside it, and are taken from there.

So an installation needs no symbolic links: archives and some checkouts have none.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

BESIDE = ("passes", "lowering", "tools")


class BuildPackages(build_py):
    """Without what an earlier build left in the same place: removed modules would be installed."""

    def run(self) -> None:
        """Copy the packages."""
        left = Path(self.build_lib) / "fxquant"
        if not self.editable_mode and left.is_dir():
            shutil.rmtree(left)
        super().run()


def packages(folder: str, name: str) -> list[str]:
    """The package in `folder` and all below it, those that lie beside left out."""
    if not Path(folder, "__init__.py").is_file():
        raise SystemExit(f"{folder}/ of the fxquant repository is missing: build from a complete checkout or archive.")
    below = find_packages(folder, exclude=[pattern for part in BESIDE for pattern in (part, f"{part}.*")])
    return [name, *(f"{name}.{package}" for package in below)]


found = packages("fxquant", "fxquant")
for part in BESIDE:
    found += packages(part, f"fxquant.{part}")
setup(
    packages=found,
    package_dir={"fxquant": "fxquant", **{f"fxquant.{part}": part for part in BESIDE}},
    cmdclass={"build_py": BuildPackages},
)
