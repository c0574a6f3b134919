"""GPTQ during the calibration run: codes of each linear from its inputs, of each expert from its own tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.calibration.gptq_codes import SolvedCodes
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.kernels.gptq import carry_matrix, feedback_codes, hessian
from fxquant.kernels.module_tensors import code_limits, fitted
from fxquant.policy.policy import UnseenExperts
from fxquant.program.linears import PROJECTIONS, WEIGHTS
from fxquant.program.operands import operand_node
from fxquant.program.program import Program
from fxquant.program.program_file import recipe_arguments
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe
from fxquant.storage.hashing import hash_text

Live = Mapping[fx.Node, Sequence[Any]]
Rows = Callable[[Sequence[Tensor]], Tensor]
"""Values [batch, length, k] per batch → [tokens, k] without padding."""
Carry = tuple[Tensor, Tensor]


class Solver:
    """Observes a run and writes the GPTQ codes of every linear whose recipe uses GPTQ to `solved`.

    `key` identifies the inputs of the run: codes stored under the same key are reused. `checkpoint` is the smoothed
    one; its weights are final by the time a linear reads them.
    """

    def __init__(
        self, program: Program, checkpoint: Checkpoint, solved: SolvedCodes, key: str, rows: Rows, unseen: UnseenExperts
    ) -> None:
        self._program, self._checkpoint, self._solved = program, checkpoint, solved
        self._key, self._rows, self._unseen = key, rows, unseen
        self._carry: tuple[fx.Node, Carry] | None = None

    def sites(self) -> Iterator[fx.Node]:
        """The calls at which codes are computed."""
        for node in self._program.graph.graph.nodes:
            if any(self._recipe(operand_node(node, name)) for name in WEIGHTS.get(node.target, ())):
                yield node

    def observe(self, node: fx.Node, live: Live) -> None:
        """`live` maps the inputs of `node` to their values, one per batch."""
        if node.target == ops.linear:
            recipe = self._recipe(operand_node(node, "weight"))
            if recipe is not None and not self._has(recipe, recipe.module):
                self._solve(recipe, recipe.module, self._shared_carry(operand_node(node, "x"), live))
        elif node.target == ops.moe_experts:
            recipes = {name: self._recipe(operand_node(node, name)) for name in PROJECTIONS}
            if any(recipes.values()):
                self._experts(node, recipes, live)

    def _recipe(self, weight: fx.Node) -> Recipe | None:
        if weight.op != "get_attr":
            return None
        recipe = self._program.recipes.get(self._program.parameter(weight).module)
        return recipe if recipe is not None and recipe.algorithm.from_inputs else None

    def _shared_carry(self, value: fx.Node, live: Live) -> Carry:
        """The carry matrix for the inputs of a linear, shared by consecutive linears that read the same value."""
        if self._carry is None or self._carry[0] is not value:
            self._carry = value, carry_matrix(hessian(self._rows(live[value])))
        return self._carry[1]

    def _experts(self, node: fx.Node, recipes: Mapping[str, Recipe | None], live: Live) -> None:
        x, ids = (self._rows(live[operand_node(node, name)]) for name in ("x", "ids"))
        paths = {name: self._program.parameter(operand_node(node, name)).modules for name in PROJECTIONS}
        for expert in range(len(paths["gate_proj"])):
            modules = {name: paths[name][expert] for name in PROJECTIONS}
            asked = {
                name: recipe for name, recipe in recipes.items() if recipe and not self._has(recipe, modules[name])
            }
            if asked:
                self._expert(asked, modules, x, (ids == expert).any(-1))

    def _expert(self, recipes: Mapping[str, Recipe], modules: Mapping[str, str], x: Tensor, chose: Tensor) -> None:
        rows = x[chose]
        if not len(rows):
            if self._unseen is UnseenExperts.ERROR:
                fact = "no token of the calibration text was routed to it, and GPTQ needs tokens."
                way_out = "Calibrate on more text, or set unseen_experts: all_tokens or least_squares in the policy."
                raise FxquantError(f"layer {modules['gate_proj'].rpartition('.')[0]}", fact, way_out)
            rows = x if self._unseen is UnseenExperts.ALL_TOKENS else rows
        inputs = {"gate_proj": rows, "up_proj": rows}
        if "down_proj" in recipes:
            gate, up = (self._weight(modules[name]).float().to(x.device) for name in ("gate_proj", "up_proj"))
            inputs["down_proj"] = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
        carries: dict[int, Carry] = {}  # gate_proj and up_proj read the same rows: one factorization for both
        for name, recipe in recipes.items():
            seen = inputs[name]
            if len(seen) and id(seen) not in carries:
                carries[id(seen)] = carry_matrix(hessian(seen))
            self._solve(recipe, modules[name], carries.get(id(seen)))

    def _solve(self, recipe: Recipe, module: str, carry: Carry | None) -> None:
        """Store the codes of a module; without inputs (`carry` None) they are those of least squares."""
        weight = self._weight(module)
        codes, scale, second = fitted(recipe, weight, tensor_name(module, "weight"))
        if carry is not None:
            wide = spread(second, recipe).expand(weight.shape)
            device, (lowest, highest) = carry[0].device, code_limits(recipe, wide)
            rows, steps = weight.float().to(device), (scale.unsqueeze(1) * wide).to(device)
            codes = feedback_codes(rows, steps, lowest.to(device), highest.to(device), carry).cpu()
        self._solved.write(module, self._key_of(recipe), codes)

    def _weight(self, module: str) -> Tensor:
        return self._checkpoint.read(tensor_name(module, "weight"))

    def _has(self, recipe: Recipe, module: str) -> bool:
        return self._solved.has(module, self._key_of(recipe))

    def _key_of(self, recipe: Recipe) -> str:
        return hash_text(repr((self._key, recipe_arguments(recipe))))


def spread(second: Tensor, recipe: Recipe) -> Tensor:
    """Second scales [n, G] → [n, k]; ones [n, 1] where there are none."""
    return second.repeat_interleave(recipe.group_size, 1) if second.shape[1] else torch.ones(len(second), 1)


def solved_modules(program: Program) -> Iterator[str]:
    """Every module whose codes a run must compute."""
    for recipe in program.recipes.values():
        if recipe.algorithm.from_inputs:
            yield from recipe.modules
