"""Statements of the operators that fusion passes make."""

from torch import fx

from fxquant import ops
from fxquant.lowering.ascend.emitter.segment_text import NPU, Call, Emitter, Writer
from fxquant.program.operands import operands


def _add_rms_norm(writer: Writer, node: fx.Node) -> Call:
    x1, x2, weight, eps, *bias = operands(node)
    summands = (*(writer.floating(arg) for arg in (x1, x2)), writer.floating(weight))
    if bias and bias[0] is not None:
        return writer.call("add_rms_norm_bias", *summands, writer.value(bias[0], "float32"), repr(eps))
    return Call(f"{NPU}npu_add_rms_norm", (*summands, repr(eps)), outputs=(0, None, 1))


def _add_rms_norm_quantize_static(writer: Writer, node: fx.Node) -> Call:
    x1, x2, weight, eps, scale, offset, *bias = operands(node)
    sources = [writer.floating(arg) for arg in (x1, x2, weight)]
    sources += [writer.weight(scale, "norm_scale", (weight,)), writer.weight(offset, "norm_offset", (weight,))]
    keywords = (*_beta(writer, bias), f"epsilon={eps!r}", "div_mode=True")
    return Call(f"{NPU}npu_add_rms_norm_quant", (*sources, *keywords), outputs=(0, None, 1))


def _add_rms_norm_quantize_per_token(writer: Writer, node: fx.Node) -> Call:
    x1, x2, weight, eps, *bias = operands(node)
    sources = (writer.floating(arg) for arg in (x1, x2, weight))
    keywords = (*_beta(writer, bias), f"epsilon={eps!r}", "output_mask=[True, False]")
    return Call(f"{NPU}npu_add_rms_norm_dynamic_quant", (*sources, *keywords), outputs=(0, None, 2, 1, None))


def _beta(writer: Writer, bias: list[fx.Node | None]) -> tuple[str, ...]:
    return tuple(f"beta={writer.floating(one)}" for one in bias if one is not None)


def _swiglu_quantize_per_token(writer: Writer, node: fx.Node) -> Call:
    gate, up = (writer.floating(arg) for arg in operands(node))
    sources = (f"torch.cat(({gate}, {up}), -1)", "activate_left=True", "quant_mode=1")
    return Call(f"{NPU}npu_dequant_swiglu_quant", sources)


FUSED_EMITTERS: dict[object, Emitter] = {
    ops.add_rms_norm: _add_rms_norm,
    ops.add_rms_norm_quantize_static: _add_rms_norm_quantize_static,
    ops.add_rms_norm_quantize_per_token: _add_rms_norm_quantize_per_token,
    ops.swiglu_quantize_per_token: _swiglu_quantize_per_token,
}
