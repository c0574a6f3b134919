"""Prepacked weights: a model as ONNX Runtime keeps it in memory, saved once and mapped from then on.

Loading a `model.onnx` optimizes its graph, unpacks int4, and packs every weight for this processor's kernels, into
memory of its own. Saved, the optimized graph and the packed weights are files that sessions map: `FOLDER/KEY/`, where
KEY hashes all that they depend on. A folder serves any number of models and processors; nothing in it is deleted.
"""

import os
import platform
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import onnx

from fxquant.errors import FxquantError
from fxquant.lowering.onnx.runtime import onnxruntime
from fxquant.storage.hashing import hash_text
from fxquant.storage.work_folder import remove_tree

MODEL, WEIGHTS = "model.onnx", "weights.bin"
SMALLEST = "1024"
"""Bytes of a weight below which it stays in the model file."""
KEY_LETTERS = 24


def prepacked(model: Path, folder: Path, options: Callable[[], onnxruntime.SessionOptions]) -> Path:
    """The prepacked form of `model` in `folder`, written if it is not there yet; `options` of sessions that read it.

    Load it with `mapped_options`. Whoever can write `folder` decides what sessions compute. Raises FxquantError where
    it cannot be written.
    """
    kept = folder / _key(model)
    if kept.is_dir():
        return kept / MODEL
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{kept.name}.", dir=folder))
    except OSError as error:
        raise FxquantError(
            folder, f"cannot hold prepacked weights: {error.strerror}.", "Pass another folder."
        ) from None
    try:
        _write(model, partial, options())
        with suppress(OSError):  # another process was faster
            partial.rename(kept)
    except Exception as error:
        fact = f"onnxruntime {onnxruntime.__version__} cannot save it prepacked: {error}"
        raise FxquantError(model, fact, f"See that {folder} has room, or leave out --prepack.") from error
    finally:
        if partial.is_dir():
            remove_tree(partial)
    return kept / MODEL


def _write(model: Path, partial: Path, options: onnxruntime.SessionOptions) -> None:
    options.optimized_model_filepath = str(partial / MODEL)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", SMALLEST)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    for file in partial.iterdir():
        with file.open("rb") as stream:  # after a power cut, a name must not stand for bytes that are not there
            os.fsync(stream.fileno())


def _key(model: Path) -> str:
    """Everything that the packed form depends on: the graph, the weight files as they lie there, ONNX Runtime and the
    processor's kernels."""
    graph = onnx.load(model, load_external_data=False)
    names = {
        entry.value for tensor in graph.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    about = [(name, (status := (model.parent / name).stat()).st_size, status.st_mtime_ns) for name in sorted(names)]
    content = graph.SerializeToString(deterministic=True).hex()
    return hash_text(repr((content, about, onnxruntime.__version__, _processor())))[:KEY_LETTERS]


def _processor() -> tuple[str, ...]:
    """Architecture and instruction sets, by which ONNX Runtime chooses kernels and their layouts."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    flags = {line.partition(":")[2].strip() for line in lines if line.startswith(("flags", "Features", "model name"))}
    return platform.machine(), platform.processor(), *sorted(flags)


def mapped_options(options: onnxruntime.SessionOptions) -> onnxruntime.SessionOptions:
    """`options` for a model that is optimized already."""
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options
