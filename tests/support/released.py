"""Released packages of engines and peers: downloaded without what they need, unpacked, imported apart."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path


def unpacked(name: str, version: str) -> Path:
    """Folder with the contents of a package's wheel, downloaded once a machine; the package is not installed."""
    return _once(f"{name}-{version}", lambda inside, scratch: _unzip(_wheel(f"{name}=={version}", scratch), inside))


def unpacked_sources(name: str, version: str, package: str) -> Path:
    """Folder with `package`'s Python files and metadata from a source archive: where wheels are large, or not built."""
    return _once(
        f"{name}-{version}-sources", lambda inside, scratch: _untar(_archive(name, version, scratch), inside, package)
    )


def installed(name: str, version: str) -> Path:
    """Folder with a package and all that it needs, installed once a machine, to put before everything on the path.

    numpy stays at the version here, for which compiled packages outside of the folder are made.
    """
    return _once(f"{name}-{version}-installed", lambda inside, scratch: _install(f"{name}=={version}", inside, scratch))


def installed_node(name: str, version: str) -> Path:
    """Folder whose `node_modules` have a package of npm and all that it needs; no script of theirs is run."""
    return _once(
        f"{name}-{version}-node", lambda inside, scratch: _npm("install", "--prefix", str(inside), f"{name}@{version}")
    )


def _npm(*arguments: str) -> str:
    quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"]
    return subprocess.run(["npm", *arguments, *quiet], check=True, capture_output=True, text=True).stdout


def _install(requirement: str, inside: Path, scratch: Path) -> None:
    constraint = scratch / "constraint.txt"
    constraint.write_text(f"numpy=={metadata.version('numpy')}\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*pip, "--constraint", str(constraint), "--target", str(inside), requirement], check=True)


def _once(folder_name: str, fill: Callable[[Path, Path], None]) -> Path:
    folder = _cache() / folder_name
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
            inside = Path(scratch) / "inside"
            inside.mkdir()
            fill(inside, Path(scratch))
            _place(inside, folder)
    return folder


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fxquant-tests" / "released"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _wheel(requirement: str, scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--only-binary", ":all:", "-d", str(scratch / "wheel"), requirement], check=True)
    return next((scratch / "wheel").glob("*.whl"))


def _unzip(wheel: Path, inside: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(inside)


def _archive(name: str, version: str, scratch: Path) -> Path:
    """The source archive, found by pip's own finder: `pip download` would build the package to read its metadata."""
    from pip._internal.commands.download import DownloadCommand
    from pip._vendor.packaging.specifiers import SpecifierSet

    command = DownloadCommand("download", "source archives")
    with command.main_context():
        options, _ = command.parse_args(["--quiet", "--no-deps", "--no-binary", ":all:", name])
        session = command.get_default_session(options)
        finder = command._build_package_finder(options=options, session=session)
        best = finder.find_best_candidate(name, SpecifierSet(f"=={version}")).best_candidate
        if best is None:
            raise FileNotFoundError(f"{name} {version}: no source archive in the index")
        answer = session.get(best.link.url_without_fragment)
        answer.raise_for_status()
    if best.link.hash_name and hashlib.new(best.link.hash_name, answer.content).hexdigest() != best.link.hash:
        raise ValueError(f"{best.link.filename}: not the bytes of which the index has the hash")
    path = scratch / best.link.filename
    path.write_bytes(answer.content)
    return path


def _untar(archive: Path, inside: Path, package: str) -> None:
    """The package's `*.py` and metadata, without the folder that holds everything in an archive."""
    with tarfile.open(archive) as opened:
        for member in opened:
            path = Path(*Path(member.name).parts[1:])
            described = path.parts[:1] == (f"{package}.egg-info",)
            if member.isfile() and (described or (path.parts[:1] == (package,) and path.suffix == ".py")):
                member.name = str(path)
                opened.extract(member, inside, filter="data")


def newest(name: str) -> str:
    """The newest version of a package that pip finds; release candidates are left out."""
    pip = [sys.executable, "-m", "pip", "index", "versions", name, "--disable-pip-version-check"]
    first = subprocess.run(pip, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    return first.partition("(")[2].rstrip(")")


def newest_node(name: str) -> str:
    """The version of a package that npm installs by default."""
    return _npm("view", name, "version").strip()


def _place(inside: Path, folder: Path) -> None:
    """One rename, so that a folder is whole; another process may have been first."""
    try:
        inside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(inside)
