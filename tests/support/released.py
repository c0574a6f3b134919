"""Released packages of engines and peers: downloaded without what they need, unpacked, imported apart."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def unpacked(name: str, version: str) -> Path:
    """Folder with the contents of a package's wheel, downloaded once a machine; the package is not installed."""
    folder = _cache() / f"{name}-{version}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
            wheel = _download(f"{name}=={version}", Path(scratch) / "wheel")
            inside = Path(scratch) / "inside"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(inside)
            _place(inside, folder)
    return folder


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fxquant-tests" / "released"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _download(requirement: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--only-binary", ":all:", "-d", str(folder), requirement], check=True)
    return next(folder.glob("*.whl"))


def _place(inside: Path, folder: Path) -> None:
    """One rename, so that a folder is whole; another process may have been first."""
    try:
        inside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(inside)
