"""A process that reads an ONNX model: `python onnx_reader_process.py WAY MODEL SCRATCH`, WAY a function of WAYS.

Runs the steps of SCRATCH/feeds.json, the caches of one into the next, and writes the logits of all to
SCRATCH/logits.bin. The last line on stdout is the version of what has read the model.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

FILE, FEEDS, LOGITS = "model.onnx", "feeds.json", "logits.bin"
OPSET = 23
Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
"""Feeds by name → all outputs, the logits first."""


def onnxruntime(model: Path, _: Path) -> Run:
    """With the option that x86 without VNNI needs for exact products."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)


def checker(model: Path, scratch: Path) -> Run:
    import onnx

    onnx.checker.check_model(str(model), full_check=True)
    return onnxruntime(model, scratch)


def shape_inference(model: Path, scratch: Path) -> Run:
    import onnx

    inferred = scratch / FILE
    onnx.shape_inference.infer_shapes_path(str(model), str(inferred), check_type=True, strict_mode=True, data_prop=True)
    return onnxruntime(inferred, scratch)


def reference_evaluator(model: Path, _: Path) -> Run:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(model))
    return lambda feeds: evaluator.run(None, feeds)


def version_converter(model: Path, scratch: Path) -> Run:
    import onnx

    converted = onnx.version_converter.convert_version(onnx.load(model, load_external_data=False), OPSET)
    onnx.save(converted, scratch / FILE)
    return onnxruntime(scratch / FILE, scratch)


def saved_again(model: Path, scratch: Path) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.optimized_model_filepath = str(scratch / FILE)
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return onnxruntime(scratch / FILE, scratch)


def links(model: Path, scratch: Path) -> Run:
    """As the cache of the Hugging Face hub: a folder of links, each to a file named by a digest."""
    for folder in ("blobs", "snapshot"):
        (scratch / folder).mkdir()
    for index, path in enumerate([model, *model.parent.glob("*.safetensors")]):
        blob = scratch / "blobs" / f"{index:040x}"
        shutil.copy(path, blob)
        (scratch / "snapshot" / path.name).symlink_to(Path("..") / "blobs" / blob.name)
    return onnxruntime(scratch / "snapshot" / FILE, scratch)


def onnxslim(model: Path, scratch: Path) -> Run:
    import onnx
    import onnxslim as slimmer

    onnx.save(slimmer.slim(str(model)), scratch / "slim.onnx")
    return onnxruntime(scratch / "slim.onnx", scratch)


def openvino(model: Path, _: Path) -> Run:
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(core.read_model(str(model)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda feeds: list(compiled(feeds).to_tuple())


def inlined(way: Callable[[Path, Path], Run]) -> Callable[[Path, Path], Run]:
    """`way` on the model whose local functions were inlined by onnx."""

    def read(model: Path, scratch: Path) -> Run:
        import onnx
        from onnx import inliner

        flat = inliner.inline_local_functions(onnx.load(model, load_external_data=False))
        onnx.save(flat, scratch / "inlined.onnx")
        return way(scratch / "inlined.onnx", scratch)

    return read


WAYS: dict[str, tuple[str, Callable[[Path, Path], Run]]] = {
    "onnxruntime": ("onnxruntime", onnxruntime),
    "checker": ("onnx", checker),
    "shape_inference": ("onnx", shape_inference),
    "reference_evaluator": ("onnx", reference_evaluator),
    "version_converter": ("onnx", version_converter),
    "inliner": ("onnx", inlined(onnxruntime)),
    "inlined_version_converter": ("onnx", inlined(version_converter)),
    "saved_again": ("onnxruntime", saved_again),
    "links": ("onnxruntime", links),
    "onnxslim": ("onnxslim", onnxslim),
    "inlined_onnxslim": ("onnxslim", inlined(onnxslim)),
    "openvino": ("openvino", openvino),
    "inlined_openvino": ("openvino", inlined(openvino)),
}
"""Name → the distribution whose version is printed, and its function: model file, a folder for files → Run."""


def run_steps(run: Run, described: dict[str, Any]) -> np.ndarray:
    """float32, the logits of all steps in one dimension."""
    caches = [np.zeros((2, 0, width), dtype=np.float32) for width in described["widths"]]
    logits = []
    for step in described["steps"]:
        feeds = {name: np.array(entry["data"], np.int64).reshape(entry["dims"]) for name, entry in step.items()}
        feeds |= {f"past_key_values.{layer}.latent": cache for layer, cache in enumerate(caches)}
        first, *caches = [np.array(value) for value in run(feeds)]
        logits.append(first.ravel())
    return np.concatenate(logits)


def main() -> None:
    """A new folder with copies of the weights takes the models that a way writes."""
    way, model, scratch = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    package, read = WAYS[way]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for weights in model.glob("*.safetensors"):
            shutil.copy(weights, folder)
        logits = run_steps(read(model / FILE, Path(folder)), json.loads((scratch / FEEDS).read_text()))
    logits.astype(np.float32).tofile(scratch / LOGITS)
    print(metadata.version(package))


if __name__ == "__main__":
    main()
