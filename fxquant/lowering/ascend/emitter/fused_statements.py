"""Statements of fused operators, which the fusion passes create."""

from typing import Any

from torch import fx

from fxquant import ops
from fxquant.lowering.ascend.calls import NPU, Call, Emitter
from fxquant.lowering.ascend.emitter.segment_text import Writer


def _add_rms_norm(
    writer: Writer, node: fx.Node, x1: fx.Node, x2: fx.Node, weight: fx.Node, eps: float, bias: fx.Node | None
) -> Call:
    operand_texts = [writer.floating(arg) for arg in (x1, x2, weight)]
    if bias is not None:
        return writer.call("add_rms_norm_bias", *operand_texts, writer.value(bias, "float32"), repr(eps))
    return Call(f"{NPU}npu_add_rms_norm", (*operand_texts, repr(eps)), outputs=(0, None, 1))


def _add_rms_norm_quantize_static(writer: Writer, node: fx.Node, **given: Any) -> Call:
    weight, eps = given["weight"], given["eps"]
    operand_texts = [writer.floating(given[name]) for name in ("x1", "x2", "weight")]
    operand_texts.append(writer.weight(given["input_scale"], "norm_scale", (weight,)))
    operand_texts.append(writer.weight(given["input_offset"], "norm_offset", (weight,)))
    keywords = (*_beta(writer, given["bias"]), f"epsilon={eps!r}", "div_mode=True")
    return Call(f"{NPU}npu_add_rms_norm_quant", (*operand_texts, *keywords), outputs=(0, None, 1))


def _add_rms_norm_quantize_per_token(
    writer: Writer, node: fx.Node, x1: fx.Node, x2: fx.Node, weight: fx.Node, eps: float, bias: fx.Node | None
) -> Call:
    operand_texts = (writer.floating(arg) for arg in (x1, x2, weight))
    keywords = (*_beta(writer, bias), f"epsilon={eps!r}", "output_mask=[True, False]")
    return Call(f"{NPU}npu_add_rms_norm_dynamic_quant", (*operand_texts, *keywords), outputs=(0, None, 2, 1, None))


def _beta(writer: Writer, bias: fx.Node | None) -> tuple[str, ...]:
    return () if bias is None else (f"beta={writer.floating(bias)}",)


def _swiglu_quantize_per_token(writer: Writer, node: fx.Node, gate: fx.Node, up: fx.Node) -> Call:
    halves = f"torch.cat(({writer.floating(gate)}, {writer.floating(up)}), -1)"
    operand_texts = (halves, "activate_left=True", "quant_mode=1")
    return Call(f"{NPU}npu_dequant_swiglu_quant", operand_texts)


FUSED_EMITTERS: dict[object, Emitter] = {
    ops.add_rms_norm: _add_rms_norm,
    ops.add_rms_norm_quantize_static: _add_rms_norm_quantize_static,
    ops.add_rms_norm_quantize_per_token: _add_rms_norm_quantize_per_token,
    ops.swiglu_quantize_per_token: _swiglu_quantize_per_token,
}
