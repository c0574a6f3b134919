"""What pyproject.toml can't say: a build installs what the sources hold now, and nothing of an earlier build."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPackages(build_py):
    """Without what an earlier build left in the same place: removed modules would be installed."""

    def run(self) -> None:
        """Copy the packages."""
        left = Path(self.build_lib) / "fxquant"
        if not self.editable_mode and left.is_dir():
            shutil.rmtree(left)
        super().run()


setup(cmdclass={"build_py": BuildPackages})
