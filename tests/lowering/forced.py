"""Outputs to be replaced, and what is refused without a change to anything."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from output_folders import POLICY

from fxquant import FxquantError
from fxquant.lowering.destination import Input, open_destination
from fxquant.lowering.output_folder.manifest import MANIFEST, STAMPS, Manifest


def output(folder: Path, files: tuple[str, ...] = ("model_ascend.py", "optional/calibration.safetensors")) -> Path:
    """A folder with the manifest of an output, and the files that it lists."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    manifest = Manifest(
        fxquant="0.1.0", kernels=1, source="../model", checkpoint="../model", policy=POLICY, target="ascend",
        sources={}, files={name: len(name) for name in files}, digests=dict.fromkeys(files, "0" * 32), weights={},
        units={},
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    (folder / STAMPS).write_text("{}")
    return folder


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[None]:
    """Whatever the test put into `tmp_path` is there afterwards as it was: names, bytes, links, empty folders."""

    def everything() -> dict[str, object]:
        return {
            str(path): path.readlink() if path.is_symlink() else path.is_dir() or path.read_bytes()
            for path in tmp_path.rglob("*")
        }

    seen: list[dict[str, object]] = []
    yield lambda: seen.append(everything())  # type: ignore[misc]
    assert seen and everything() == seen[0]


Untouched = Callable[[], object]


def refused(out: Path, *words: str, force: bool = True, inputs: tuple[Input, ...] = ()) -> FxquantError:
    with pytest.raises(FxquantError) as caught:
        open_destination(out, force, inputs)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.remedy
    return caught.value
