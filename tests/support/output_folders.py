"""Output folders to compare, and a model with enough units to be killed in."""

from pathlib import Path

from tiny import write_checkpoint

from fxquant import CompileOptions, compile
from fxquant.lowering.finish import Places
from fxquant.lowering.output_folder.manifest import MANIFEST
from fxquant.lowering.weights import Workers

POLICY = "deepseek_w4a8_dynamic"


def wide_model(folder: Path, experts: int = 64) -> Path:
    """An FP8 checkpoint of one dense and one expert layer, of a little more than 3 x `experts` modules."""
    shape = {"n_routed_experts": experts, "n_group": 1, "topk_group": 1}
    return write_checkpoint(folder, fp8=True, **shape)


def compile_weights(model: Path, out: Path, jobs: int | None = None, policy: str = POLICY) -> Path:
    """`out`, compiled without a look back."""
    workers = Workers() if jobs is None else Workers(jobs=jobs)
    compile(model, CompileOptions(policy=policy, out=out, verify=False, export=False, workers=workers))
    return out


def files_of(folder: Path, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Path in `folder` → bytes."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(files.items()) if name not in without}


def same_files(folder: Path, other: Path) -> bool:
    """The same files with the same bytes; of the manifest all but the paths, which are relative to the folder."""
    same = files_of(folder, (MANIFEST,)) == files_of(other, (MANIFEST,))
    return same and _without_paths(folder) == _without_paths(other)


def _without_paths(folder: Path) -> list[str]:
    lines = (folder / MANIFEST).read_text().splitlines()
    return [line for line in lines if not line.startswith(('  "source": ', '  "checkpoint": '))]


def finished(out: Path) -> int:
    """Units in the journal of unfinished work on `out`."""
    path = Places(out).journal
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(line.startswith('{"unit"') for line in lines)
