"""past_i [B, T, width]  →  past_i_key, past_i_value [B, 1, T, width / 2]: a cache of latents in two halves

cat(past, new)  →  cat(past_key, new[…, :half]), cat(past_value, new[…, half:]), joined where they are read
"""

from torch import fx

from fxquant.errors import FxquantError
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.onnx.caches import ATEN, PARTS, Appended, add_inputs, appended_caches, return_instead
from fxquant.program.node_builder import Surgery
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules

CACHE = "halves"


class HalveCaches(Pass):
    """Rewrites the cache of every layer. Raises FxquantError for latents of an odd width."""

    name = "halve-caches"

    def apply(self, program: Program) -> PassResult:
        caches, rules = appended_caches(program, CACHE), ShapeRules()
        return_instead(program, {cache.present: _halved(program, cache, rules) for cache in caches})
        return PassResult(self.name, tuple(cache.present.name for cache in caches))


def _halved(program: Program, cache: Appended, rules: ShapeRules) -> list[fx.Node]:
    batch, past, width = cache.past.meta["val"].shape
    if width % 2:
        fact = f"latents of layer {cache.index} have {width} numbers, which have no halves."
        raise FxquantError(f"--onnx-cache {CACHE}", fact, "Pass --onnx-cache latent or --onnx-cache expanded.")
    inputs = add_inputs(program, cache, ((batch, 1, past, width // 2),) * 2)
    name, surgery = cache.present.name, Surgery(program, cache.present, rules)
    split = surgery.call(ATEN.split_with_sizes.default, (cache.new, [width // 2] * 2, -1), f"{name}_halves")
    halves = surgery.outputs(split, [f"{name}_new_{part}" for part in PARTS])
    grown = []
    for part, before, half in zip(PARTS, inputs, halves, strict=True):
        row = surgery.call(ATEN.unsqueeze.default, (half, 1), f"{name}_row_{part}")
        grown.append(surgery.call(ATEN.cat.default, ([before, row], 2), f"{name}_{part}"))
    joined = surgery.call(ATEN.cat.default, (grown, -1), f"{name}_joined")
    latents = surgery.call(ATEN.squeeze.dim, (joined, 1), f"{name}_latents")
    cache.present.replace_all_uses_with(latents, lambda user: user.op != "output")
    return grown
