"""ONNX Runtime: an ONNX graph over weight files in the common Ascend format."""

from dataclasses import replace

from fxquant.engines import ascend
from fxquant.engines.engine import Engine
from fxquant.engines.onnx.serving import serve

ENGINE: Engine = replace(
    ascend.ENGINE,
    open_reader=None,
    serve=serve,
    where="in Python",
    model_code=False,
    npu_graph=False,
    reads_tokenizer=False,
)
