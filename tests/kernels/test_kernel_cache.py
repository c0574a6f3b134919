"""Where compiled kernels are kept, whom that folder must belong to, and what damaged files do."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit

from fxquant.kernels import cache
from fxquant.kernels.cache import CachedCode
from fxquant.kernels.cache_folder import CACHED_KEYS, MARKER, MARKER_TEXT, folder_of
from fxquant.kernels.rounding import kernel, round_row


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, which is not there yet."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_is_the_users_alone(root: Path) -> None:
    folder = folder_of("sources")
    assert folder and folder.parent == root / "fxquant" / "kernels" and folder == folder_of("sources")
    assert folder != folder_of("others")
    assert [path.stat().st_mode & 0o777 for path in (root, *root.rglob("*/"))] == [0o700] * 5
    assert [path.name for path in folder.iterdir()] == [MARKER]


def test_without_a_name_it_is_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for nothing in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        folder = folder_of("sources")
        assert folder and folder.parents[2] == tmp_path / ".cache"
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    assert folder_of("sources") is None and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("level", (0, 1, 2))
def test_nothing_is_kept_where_others_can_write(root: Path, level: int) -> None:
    folder = folder_of("sources")
    assert folder
    path = (folder, *folder.parents)[level]
    for mode in (0o770, 0o702):
        path.chmod(mode)
        assert folder_of("sources") is None
    path.chmod(0o700)
    assert folder_of("sources") == folder


def test_nothing_is_kept_below_a_folder_open_to_all(root: Path) -> None:
    root.mkdir()
    root.chmod(0o777)
    assert folder_of("sources") is None and not list(root.iterdir())
    root.chmod(0o1777)  # as /tmp: only owners rename
    assert folder_of("sources")


def test_nothing_is_kept_in_the_folder_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder_of("sources")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert folder_of("sources") is None


def test_links_are_not_followed_below_the_cache_folder(root: Path, tmp_path: Path) -> None:
    folder = folder_of("sources")
    assert folder
    elsewhere = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(elsewhere)
    assert folder_of("sources") is None
    folder.unlink()
    folder.write_text("a file")
    assert folder_of("sources") is None


def test_the_cache_folder_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    root.symlink_to(tmp_path / "disk")
    folder = folder_of("sources")
    assert folder and tmp_path / "disk" in folder.parents


def test_folders_used_last_stay_and_what_is_not_ours_too(root: Path) -> None:
    folders = [folder_of("version", number) for number in range(CACHED_KEYS)]
    for age, folder in enumerate(reversed(folders)):
        assert folder
        (folder / f"{'0' * 32}.code").touch()
        os.utime(folder / MARKER, (age * 100.0, age * 100.0))
    oldest, second = folders[-1], folders[-2]
    assert oldest and second
    (second / "notes.txt").touch()
    (second / f"{'0' * 32}.code.x7_").touch()
    others = [root / "fxquant/kernels" / name for name in ("mine", "0" * 24, "1" * 24)]
    for other in others[:2]:
        other.mkdir()
    others[2].symlink_to(others[0])
    (others[0] / MARKER).write_text(MARKER_TEXT)
    new = [folder_of("version", "new", number) for number in range(2)]
    assert not oldest.exists() and [path.name for path in second.iterdir()] == ["notes.txt"]
    assert all(folder and folder.exists() for folder in (*folders[:-2], *new))
    assert all(other.exists() for other in others) and (others[0] / MARKER).exists()


def test_use_is_remembered(root: Path) -> None:
    folder = folder_of("sources")
    assert folder
    os.utime(folder / MARKER, (0, 0))
    folder_of("sources")
    assert (folder / MARKER).stat().st_mtime > 0


def _double(x: int) -> int:
    return 2 * x


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A kernel that no process has called."""
    folder = folder_of("sources")
    monkeypatch.setattr(cache, "code_folder", lambda: folder)

    def make() -> Any:
        function: Any = njit(_double)
        function._cache = CachedCode(_double)
        return function

    return make


def hits(function: Any) -> int:
    assert function(21) == 42
    return sum(function.stats.cache_hits.values())


def kept_file() -> Path:
    (file,) = cache.code_folder().glob("*.code")  # type: ignore[union-attr]
    return file


def test_code_is_kept_by_signature(fresh: Callable[[], Any]) -> None:
    assert [hits(fresh()), hits(fresh())] == [0, 1]
    function = fresh()
    assert function(1.5) == 3.0 and not function.stats.cache_hits
    assert Path(function.stats.cache_path) == cache.code_folder()
    function.recompile()
    assert hits(function) == 2


@pytest.mark.parametrize("damage", ("flipped", "cut", "empty", "open to others", "a pipe", "a link", "other code"))
def test_damaged_code_is_not_run(fresh: Callable[[], Any], damage: str, tmp_path: Path) -> None:
    hits(fresh())
    file = kept_file()
    data = file.read_bytes()
    changed = {"flipped": data[:-9] + b"?" + data[-8:], "cut": data[:-1], "empty": b"", "other code": data[:32] + b"."}
    if damage in changed:
        file.write_bytes(changed[damage])
    elif damage == "open to others":
        file.chmod(0o666)
    else:
        file.rename(tmp_path / "elsewhere")
        os.mkfifo(file) if damage == "a pipe" else file.symlink_to(tmp_path / "elsewhere")
    assert [hits(fresh()), hits(fresh())] == [0, 1]  # compiled, and kept in its place
    assert kept_file().is_file() and not kept_file().is_symlink()


def test_what_cannot_be_read_back_is_compiled(fresh: Callable[[], Any]) -> None:
    """A numba that writes other things under the same version."""
    hits(fresh())
    cache._write(kept_file(), b"no pickle")
    assert hits(fresh()) == 0


def test_kernels_work_where_nothing_can_be_kept(fresh: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    assert hits(fresh()) == 0
    monkeypatch.setattr(cache, "code_folder", lambda: None)
    function = fresh()
    assert hits(function) == 0 and function.stats.cache_path is None


def test_a_write_that_fails_leaves_nothing(fresh: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "rename", broken)
    assert hits(fresh()) == 0
    assert [path.name for path in cache.code_folder().iterdir()] == [MARKER]  # type: ignore[union-attr]


def test_only_kernels_of_the_package_are_kept() -> None:
    assert isinstance(round_row._cache, CachedCode)
    assert not isinstance(kernel(_double)._cache, CachedCode)
    assert kernel(_double)(np.int64(21)) == 42
