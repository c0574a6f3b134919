"""The ONNX target: torch operators that blocks may be written with."""

import functools
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx_calls import floats
from torch import Tensor, nn
from torch.export import Dim

from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.lowering.onnx.runner import session_options
from fxquant.lowering.onnx.writer import build_model
from fxquant.program.graph import ProgramGraph
from fxquant.program.program import Program
from fxquant.tracing.canonical import canonicalize


def expressions(x: Tensor) -> dict[str, Tensor]:
    """x [batch, 11, 6] after positive parts: what a block may be written with, by name."""
    positive, other = x.abs() + 0.5, x * 0.5 + 0.25
    parts, pieces = x.split([2, 4], -1), x.chunk(3, -1)
    first, second = x.split(4, -1)
    values, indices = x.topk(3, -1)
    return {
        "add": x + other, "add_scalar": x + 1.5, "add_alpha": torch.add(x, other, alpha=2), "sub": x - other,
        "rsub": 1 - x, "mul": x * other, "mul_scalar": x * 3, "div": x / positive, "div_scalar": x / 3, "neg": -x,
        "pow": positive**1.5, "square": x**2, "power_of_scalar": 2**x, "sqrt": positive.sqrt(),
        "rsqrt": positive.rsqrt(),
        "exp": x.exp(), "log": positive.log(), "tanh": x.tanh(), "sigmoid": x.sigmoid(), "abs": x.abs(),
        "silu": nn.functional.silu(x), "gelu": nn.functional.gelu(x), "softplus": nn.functional.softplus(x),
        "gelu_tanh": nn.functional.gelu(x, approximate="tanh"), "relu": x.relu(), "sin": x.sin(), "cos": x.cos(),
        "erf": x.erf(), "reciprocal": positive.reciprocal(), "round": (x * 4).round(), "floor": x.floor(),
        "clamp": x.clamp(-0.5, 0.5), "clamp_min": x.clamp(min=0.1), "clamp_max": x.clamp_max(0.3),
        "maximum": torch.maximum(x, other), "minimum": torch.minimum(x, other), "mean": x.mean(-1),
        "mean_keep": x.mean((1, 2), keepdim=True), "sum": x.sum(-1, keepdim=True), "sum_two": x.sum((0, 2)),
        "amax": x.amax(-1), "amin": x.amin(1), "softmax": x.softmax(-1), "log_softmax": x.log_softmax(1),
        "cumsum": x.cumsum(1), "cat": torch.cat((x, other), -1), "stack": torch.stack((x, other), 1),
        "split_sizes": parts[1], "split": first * second.sum(-1, keepdim=True), "chunk": pieces[0] - pieces[2],
        "slice": x[:, 2:5], "slice_step": x[..., ::2], "select": x[:, -1], "unsqueeze": x.unsqueeze(1),
        "squeeze": x.unsqueeze(1).squeeze(1), "squeeze_kept": x.squeeze(-1),
        "view": x.view(x.shape[0], x.shape[1], 2, 3),
        "reshape": x.reshape(-1, 6), "flatten": x.flatten(1), "flatten_front": x.flatten(0, 1),
        "unflatten": x.unflatten(-1, (3, -1)), "permute": x.permute(2, 0, 1), "transpose": x.transpose(-1, -2),
        "expand": x.unsqueeze(1).expand(-1, 4, -1, -1), "repeat": x.repeat(1, 2, 1), "unbind": x.unbind(-1)[3],
        "matmul": x @ other.transpose(-1, -2), "bmm": torch.bmm(x, other.transpose(1, 2)),
        "einsum": torch.einsum("bsh,bth->bts", x, other),
        "mm": torch.mm(x[0], x[0].t()), "layer_norm": nn.functional.layer_norm(x, (6,)), "size": x * x.shape[0],
        "bfloat16": x.bfloat16().float(), "int": (x * 10).int(), "to": x.to(torch.float32),
        "where": torch.where(x > 0, x, 0.0),
        "masked_fill": x.masked_fill(other < 0.3, -1.0), "logical": ((x > 0) & (other <= 0.5)) | ~(x == 0),
        "ones_like": torch.ones_like(x) + torch.zeros_like(x), "full": torch.full_like(x, 2.5), "topk": values,
        "topk_indices": indices, "argmax": x.argmax(-1), "gather": x.gather(-1, indices), "type_as": indices.type_as(x),
        "int_add": indices + 2, "int_div": indices / 2, "compare_int": indices > 1.5,
    }  # fmt: skip


class Expressions(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Tensor) -> list[Tensor]:
        return list(expressions(past).values())


@functools.cache
def expression_program() -> Program:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    batch, sequence, total = Dim("batch"), Dim("sequence"), Dim("total")
    shapes = ({0: batch, 1: sequence}, {0: batch, 1: total}, {0: batch, 1: sequence}, {0: batch, 1: Dim("past", min=5)})
    arguments = (ids, torch.zeros(2, 8, dtype=torch.int64), ids.clone(), floats(2, 11, 6))
    graph = torch.export.export(Expressions(), arguments, dynamic_shapes=shapes, strict=False).graph
    program = Program(ProgramGraph(graph), {}, torch.float32)
    canonicalize(program.graph.graph)
    return program


def test_aten_operators(tmp_path: Path):
    program = expression_program()
    onnx.save(ir.to_proto(build_model(program, {}, OnnxForm(OnnxProfile.INTEGER))), tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    x = floats(3, 11, 6, seed=5)
    ids = torch.zeros(3, 1, dtype=torch.int64)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", session_options())
    feeds = {"input_ids": ids, "attention_mask": ids, "position_ids": ids, "past_key_values.0.latent": x}
    emitted = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    for (name, expected), value in zip(expressions(x).items(), emitted, strict=True):
        converted = torch.from_numpy(value)
        assert converted.dtype == expected.dtype and converted.shape == expected.shape, name
        # Values are below ten, sums have at most 77 terms; functions are within a few units of their result.
        assert (
            torch.allclose(converted, expected, rtol=1e-6, atol=3e-6)
            if converted.is_floating_point()
            else torch.equal(converted, expected)
        ), name
