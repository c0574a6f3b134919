"""Coverage check, the last pass: every recipe is applied, every call has a shape, every parameter an owner."""

from torch import fx

from fxquant.errors import FxquantError, InternalError
from fxquant.passes.base import Pass, PassResult
from fxquant.program.linears import WEIGHTS, is_parameter
from fxquant.program.operands import operand_node
from fxquant.program.program import Program, made_parameters


class CheckCoverage(Pass):
    """Raises FxquantError for a parameter that no rule covers, InternalError for a recipe that was not applied."""

    name = "check-coverage"

    def apply(self, program: Program) -> PassResult:
        quantized = {target for recipe in program.recipes.values() for target in made_parameters(recipe)}
        for module, recipe in program.recipes.items():
            if recipe.weight_target not in program.parameters:
                raise InternalError(module, "has a recipe, but no node reads its integers.")
        for target, parameter in program.parameters.items():
            if target not in quantized and parameter.module not in program.rules:
                raise FxquantError(target, "is neither rewritten nor kept by a rule.", "Add a rule to the policy.")
        for node in program.graph.graph.nodes:
            self._check(node, program)
        return PassResult(self.name)

    def _check(self, node: fx.Node, program: Program) -> None:
        for name in WEIGHTS.get(node.target, ()):
            weight = operand_node(node, name)
            module = program.parameter(weight).module if is_parameter(weight) else None
            if module in program.recipes:
                way_out = (
                    "Quantize all three projections of experts, or none; for other linears this is a fault of a pass."
                )
                raise FxquantError(module, "has a recipe, but is still float.", way_out)
        if node.op == "call_function" and "val" not in node.meta:
            raise InternalError(node.name, "has no checked shape.")
