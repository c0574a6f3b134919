"""Block check: whether onnxruntime's own operators can multiply the int4 weights of every recipe."""

from fxquant.errors import FxquantError
from fxquant.passes.base import Pass, PassResult
from fxquant.program.experts import expert_recipes
from fxquant.program.program import Program
from fxquant.schemes.schemes import BLOCK_SIZES, Recipe, block_size
from fxquant.schemes.weight_formats import WeightFormat

OTHER_PROFILE = "Pass --onnx-profile qdq"


class CheckBlocks(Pass):
    """Raises FxquantError for recipes in the format BLOCKS that MatMulNBits and QMoE can't take; the graph stays."""

    name = "check-blocks"

    def apply(self, program: Program) -> PassResult:
        recipes = [recipe for recipe in program.recipes.values() if recipe.weight_format is WeightFormat.BLOCKS]
        for recipe in recipes:
            if recipe.int4 and block_size(recipe) is None:
                raise FxquantError(f"layer {recipe.module}", _no_block(recipe), f"{OTHER_PROFILE}.")
        stacked = {recipe.module for recipe in recipes if recipe.int4 and recipe.modules != (recipe.module,)}
        for experts in expert_recipes(program):
            four = [recipe.module in stacked for recipe in experts.all]
            if any(four) and not all(four):
                fact = "is int4, other projections of its experts are not: QMoE has one number of bits."
                first = next(recipe for recipe in experts.all if recipe.module in stacked)
                raise FxquantError(f"layer {first.module}", fact, f"{OTHER_PROFILE}, or one scheme for experts.")
            stacked -= {recipe.module for recipe in experts.all}
        if stacked:
            fact = "is an int4 weight of experts whose other projections stay float, or that are no gated MLPs."
            raise FxquantError(f"layer {min(stacked)}", fact, f"{OTHER_PROFILE}.")
        return PassResult(self.name)


def _no_block(recipe: Recipe) -> str:
    width, what = recipe.group_size or recipe.in_features, "group_size" if recipe.group_size else "in_features"
    return f"{what} {width} is no multiple of {BLOCK_SIZES[-1]}, the smallest block that onnxruntime multiplies."
