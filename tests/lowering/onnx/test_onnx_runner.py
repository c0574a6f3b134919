"""The runner takes names, order, dtypes and shapes of caches from the session."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from fxquant.errors import FxquantError
from fxquant.lowering.onnx.runner import OnnxRunner

INT, HALF = TensorProto.INT64, TensorProto.FLOAT16
HEADS, WIDTH = 2, 4


def write(folder: Path, cache: list[str | int], dtype: int = HALF) -> Path:
    """Caches of keys and values that take each token's id, and -id; the logits of a token are its id and what was
    asked to be kept. Outputs are in another order than inputs."""
    present = ["total" if size == "past" else size for size in cache]
    tokens = {"input_ids": ["b", "s"], "attention_mask": ["b", "total"], "position_ids": ["b", "s"]}
    inputs = [helper.make_tensor_value_info(name, INT, shape) for name, shape in tokens.items()]
    inputs += [helper.make_tensor_value_info(f"past_key_values.0.{part}", dtype, cache) for part in ("key", "value")]
    inputs.append(helper.make_tensor_value_info("num_logits_to_keep", INT, []))
    outputs = [helper.make_tensor_value_info(f"present.0.{part}", dtype, present) for part in ("value", "key")]
    outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", 2]))
    constants = {"last": [2], "ones": [1, 3], "of_head": [1, HEADS, 1, WIDTH], "of_logits": [1, 1, 1]}
    nodes = [
        helper.make_node("Unsqueeze", ["input_ids", "last"], ["ids"]),
        helper.make_node("Add", ["ids", "num_logits_to_keep"], ["kept"]),
        helper.make_node("Concat", ["ids", "kept"], ["both"], axis=2),
        helper.make_node("Cast", ["both"], ["logits"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["input_ids", "ones"], ["wide"]),
        helper.make_node("Expand", ["wide", "of_head"], ["new"]),
        helper.make_node("Cast", ["new"], ["key"], to=dtype),
        helper.make_node("Neg", ["key"], ["value"]),
        *(
            helper.make_node("Concat", [f"past_key_values.0.{part}", part], [f"present.0.{part}"], axis=2)
            for part in ("key", "value")
        ),
    ]
    stored = [onnx.numpy_helper.from_array(np.array(values), name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )
    return folder


@pytest.mark.parametrize("last", [False, True])
def test_caches_of_heads_in_half_precision(last: bool, tmp_path: Path) -> None:
    runner = OnnxRunner(write(tmp_path, ["b", HEADS, "past", WIDTH]), last_logits=last)
    past = runner.empty_cache(3)
    assert [(tuple(cache.shape), cache.dtype) for cache in past] == [((3, HEADS, 0, WIDTH), torch.float16)] * 2
    assert runner.past_axes == [2, 2]
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    for step in (1, 2):
        mask = torch.ones(3, 2 * step, dtype=torch.int64)
        logits, past = runner(ids, mask, ids, past)
    assert torch.equal(logits, torch.stack([ids, ids + last], -1).float())
    key, value = past
    assert torch.equal(value, -key) and torch.equal(key[:, 1, :, 3], ids.repeat(1, 2).half())


@pytest.mark.parametrize("cache", [["b", HEADS, 7, WIDTH], [1, HEADS, "past", WIDTH]], ids=str)
def test_a_cache_without_batch_or_past_is_refused(cache: list[str | int], tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="past_key_values.0.key: is a cache tensor"):
        OnnxRunner(write(tmp_path, cache))


def test_a_cache_of_integers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="is a cache tensor.int64"):
        OnnxRunner(write(tmp_path, ["b", HEADS, "past", WIDTH], INT))
