"""The pipeline: every pass that a program goes through, in order, and those of the graphs that targets run."""

from torch import fx

from fxquant.engines.onnx_cache import OnnxCache
from fxquant.passes.assign_mtp import AssignMtp
from fxquant.passes.assign_schemes import AssignSchemes
from fxquant.passes.base import Pass
from fxquant.passes.check_blocks import CheckBlocks
from fxquant.passes.check_contract import CheckContract
from fxquant.passes.check_coverage import CheckCoverage
from fxquant.passes.find_rotation import FindRotation
from fxquant.passes.npu.absorb_latents import AbsorbLatents
from fxquant.passes.npu.fuse_norm_quantize import FuseNormQuantize
from fxquant.passes.npu.fuse_swiglu_quantize import FuseSwigluQuantize
from fxquant.passes.npu.page_latents import PageLatents
from fxquant.passes.npu.prefill_per_token import PrefillPerToken
from fxquant.passes.npu.share_quantize import ShareQuantize
from fxquant.passes.onnx.attend_halves import AttendHalves
from fxquant.passes.onnx.attend_latents import AttendLatents
from fxquant.passes.onnx.expand_caches import ExpandCaches
from fxquant.passes.onnx.fuse_experts import FuseExperts
from fxquant.passes.onnx.halve_caches import HalveCaches
from fxquant.passes.onnx.join_linears import JoinLinears
from fxquant.passes.onnx.multiply_blocks import MultiplyBlocks
from fxquant.passes.pair_smoothing import PairSmoothing
from fxquant.passes.quantize_experts import QuantizeExperts
from fxquant.passes.quantize_linear import QuantizeLinear


def pipeline(
    schemes: AssignSchemes,
    calibrate: Pass,
    *,
    mtp: AssignMtp | None = None,
    rotation: FindRotation | None = None,
    smoothing: PairSmoothing | None = None,
    contract: CheckContract | None = None,
) -> list[Pass]:
    """Float program → quantized program. Passes that need more than the graph are passed in."""
    passes = [
        schemes,  # a recipe for every linear to quantize, a rule for every parameter
        CheckBlocks(),  # before a weight is read
        mtp,  # the same for multi-token prediction layers, which are in no graph
        rotation,  # which weights are rotated, and how
        smoothing,  # norm/linear pairs to smooth, and the biases that shifts need
        contract,  # before a weight is read
        calibrate,  # ranges of static linears, smoothing scales, GPTQ's codes
        contract,  # again: static linears have their ranges now
        QuantizeLinear(),
        QuantizeExperts(),
        CheckCoverage(),
    ]
    return [program_pass for program_pass in passes if program_pass is not None]


def npu_fusions(float32: frozenset[fx.Node], widest_swiglu: int) -> list[Pass]:
    """Quantized program → the program that `model_ascend.py` is emitted from, with the fused operators of engines.

    float32: values that stay in float32. widest_swiglu: most features that the fused operator takes.
    """
    return [ShareQuantize(), FuseNormQuantize(float32), FuseSwigluQuantize(widest_swiglu)]


def npu_prefill() -> list[Pass]:
    """Fused program → prefill over a cache in pages."""
    return [PageLatents(), PrefillPerToken()]


def npu_decode() -> list[Pass]:
    """Fused program → decoding over the pages themselves, where kv_b_proj can be absorbed."""
    return [PageLatents(), AbsorbLatents()]


def onnx_fusions(*, join_linears: bool, cache: OnnxCache, blocks: int | None = None) -> list[Pass]:
    """Quantized program → the program that `model.onnx` is emitted from, with such a cache.

    join_linears: for a graph that says a quantized linear in operators of its own, and not step by step.
    blocks: the accuracy level of int4 products in onnxruntime's own operators; None: in those of the standard.
    """
    caches: dict[OnnxCache, list[Pass]] = {
        OnnxCache.LATENT: [AttendLatents()],
        OnnxCache.HALVES: [HalveCaches(), AttendLatents(), AttendHalves()],
        OnnxCache.EXPANDED: [ExpandCaches()],
    }
    contrib = [] if blocks is None else [FuseExperts(blocks), MultiplyBlocks(blocks)]
    return [*caches[cache], *contrib, *([JoinLinears()] if join_linears else [])]
