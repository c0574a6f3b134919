"""Calibration pass: runs text through the float graph, smooths pairs, records the inputs of static linears, those of
multi-token prediction layers too."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fxquant.calibration.batches import batched
from fxquant.calibration.calibration_file import Calibration, Seen, pairs_hash, rounded_by, text_hash
from fxquant.calibration.gptq import solved_modules
from fxquant.calibration.gptq_codes import SolvedCodes
from fxquant.calibration.observers import combine, observer_of
from fxquant.calibration.prediction import prediction
from fxquant.calibration.resume_folder import CalibrationFolder
from fxquant.calibration.run import CalibrationRun
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import parse_config
from fxquant.checkpoint.rotated import rotation_transforms
from fxquant.checkpoint.stamped_bytes import checkpoint_files, stamp_files
from fxquant.errors import FxquantError
from fxquant.kernels.activation import static_parameters
from fxquant.passes.base import Pass, PassResult
from fxquant.policy.policy import CalibrationWeights, Policy
from fxquant.program.linears import linear_sites
from fxquant.program.operands import operand_node
from fxquant.program.program import Program
from fxquant.program.structural_hash import structural_hash
from fxquant.progress import Reporter, silent
from fxquant.runtime.weight_providers import CPU
from fxquant.schemes.schemes import Recipe
from fxquant.tracing import trace_predictors

REMEDY = "Pass --calib FILE, put calibration.jsonl beside the model, or use deepseek_w4a8_dynamic."


@dataclass
class Calibrate(Pass):
    """Sets `activation` in the recipe of each static linear, and finds the scales of `program.pairs`; the graph stays.

    The forward runs in float32 on the weights that the policy names, those of `source` or the rounded ones; after a
    pair, on the smoothed ones. `batches` returns documents, token ids int64 [1, length]; it is called, and None is an
    error, only if a static scheme, a pair or GPTQ needs text and no `given` calibration replaces it. `batch_size`
    documents run together, padded with the id `pad`. `earlier`: calibrations of other runs, one of the same inputs
    saves the forward. `used` has the ranges and the transforms. `folder` keeps observations block by block, so that an
    interrupted calibration resumes; None: it starts from the beginning. `solved` has the codes of GPTQ, `predictors`
    the graph of the prediction layers if one of them is static.
    """

    policy: Policy
    source: Checkpoint
    batches: Callable[[], list[Tensor] | None]
    report: Reporter = silent
    given: Calibration | None = None
    earlier: Sequence[Calibration] = ()
    used: Calibration | None = None
    batch_size: int = 1
    pad: int = 0
    device: torch.device = CPU
    folder: CalibrationFolder | None = None
    solved: SolvedCodes | None = None
    predictors: Program | None = None
    name = "calibrate"

    def apply(self, program: Program) -> PassResult:
        inputs = static_inputs(program)
        self.predictors = self._traced_predictors(program)
        if self.predictors is not None:
            inputs |= static_inputs(self.predictors)
        if not inputs and not program.pairs and not program.added and not any(solved_modules(program)):
            if program.rotations:
                self.used = self._rotation_alone(program)
            return PassResult(self.name)
        self.used = self._given(program, inputs) if self.given else self._calibrated(program, inputs)
        for module in inputs:
            activation = combine(*self.used.ranges[module], self.policy.activation_statistic, program.dtype)
            recipes = program.recipes if module in program.recipes else program.mtp.recipes
            recipes[module] = replace(recipes[module], activation=activation)
            _check_range(recipes[module])
        return PassResult(self.name, tuple(inputs))

    def _traced_predictors(self, program: Program) -> Program | None:
        """The graph of the prediction layers, with their recipes; None unless one of them is static."""
        if not program.mtp.static:
            return None
        config = parse_config(program.config, self.source.folder)
        return replace(trace_predictors(config, self.source), recipes=dict(program.mtp.recipes))

    def _given(self, program: Program, inputs: dict[str, list[fx.Node]]) -> Calibration:
        """The `given` calibration, if it is of this graph and these weights, and has every module."""
        assert self.given is not None
        graph, weights = structural_hash(program), self._weights(program)
        statistic, _ = observer_of(self.policy)
        seen, missing = self.given.seen, sorted(set(inputs) - set(self.given.ranges))
        facts = {
            f"is of graph {seen.graph[:12]}, the model's is {graph[:12]}": seen.graph == graph,
            f"is of {seen.weights} weights, policy {self.policy.name} needs {weights}": seen.weights == weights,
            f"has other smoothing than policy {self.policy.name}": seen.smooth == pairs_hash(program),
            f"has {seen.statistic} of each input, policy {self.policy.name} needs {statistic}": seen.statistic
            == statistic,
            f"has no range of {missing[0] if missing else ''}": not missing,
        }
        facts["has no GPTQ codes"] = not any(solved_modules(program))
        wrong = next((fact for fact, holds in facts.items() if not holds), None)
        if wrong is not None:
            raise FxquantError("--calibration", f"the file {wrong}.", "Calibrate again: pass --calib TEXT.")
        return self.given

    def _calibrated(self, program: Program, inputs: dict[str, list[fx.Node]]) -> Calibration:
        documents = self.batches()
        if not documents:
            fact = f"{_what_needs_text(program, inputs)} calibration text, none given."
            raise FxquantError(f"policy {self.policy.name}", fact, REMEDY)
        batches = batched(documents, self.batch_size, self.pad)
        statistic, observer = observer_of(self.policy)
        seen = Seen(
            structural_hash(program), self._weights(program), text_hash(batches), pairs_hash(program), statistic
        )
        for known in self.earlier if not any(solved_modules(program)) else ():
            if known.seen == seen and set(inputs) <= set(known.ranges):
                return known
        rounded = self.policy.calibration_weights is CalibrationWeights.ROUNDED
        run = CalibrationRun(program, self.source, batches, observer, rounded, self.device)
        if any(solved_modules(program)):
            self.solved = SolvedCodes(self.folder.folder / "codes") if self.folder else SolvedCodes.temporary()
            run.solve(self.solved, self._solver_key(seen), self.policy.unseen_experts)
        if self.predictors is not None:
            run.predict(prediction(program, self.predictors, batches))
        run.observe({node for nodes in inputs.values() for node in nodes}, self.report, self.folder, vars(seen))
        tokens = torch.tensor([batch.tokens for batch in batches])
        ranges = {module: run.extremes(nodes) for module, nodes in inputs.items()}
        return Calibration(seen, tokens, ranges, run.experts, run.smoother.transforms)

    def _rotation_alone(self, program: Program) -> Calibration:
        """A calibration without text, if there is nothing to observe."""
        seen = Seen(structural_hash(program), CalibrationWeights.FLOAT, text_hash([]), pairs_hash(program))
        transforms = rotation_transforms(program.rotations, self.source)
        return Calibration(seen, torch.empty(0, dtype=torch.int64), {}, transforms=transforms)

    def _solver_key(self, seen: Seen) -> str:
        """Key of codes found on this text with these weights: the stamps of their files, in whatever folder."""
        stamps = stamp_files(checkpoint_files(self.source)).items()
        return repr((seen, [(file.name, stamp) for file, stamp in stamps], self.policy.unseen_experts))

    def _weights(self, program: Program) -> str:
        rounded = self.policy.calibration_weights is CalibrationWeights.ROUNDED
        return rounded_by(program) if rounded else self.policy.calibration_weights.value


def static_inputs(program: Program) -> dict[str, list[fx.Node]]:
    """Module of each static linear → the values that it reads, one for each call."""
    inputs: dict[str, list[fx.Node]] = {}
    for site in linear_sites(program):
        recipe = program.recipes.get(site.module)
        if recipe is not None and recipe.scheme.static:
            inputs.setdefault(site.module, []).append(operand_node(site.node, "x"))
    return inputs


def _what_needs_text(program: Program, inputs: dict[str, list[fx.Node]]) -> str:
    if program.mtp.static:
        also = "smoothing and " if program.pairs else ""
        return f"{also}static schemes, those of {', '.join(program.mtp.layers)} too, need"
    return "smoothing needs" if program.pairs else "static schemes need" if inputs else "GPTQ needs"


def _check_range(recipe: Recipe) -> None:
    """Scale and offset must be finite in the model's dtype; float16 ends at 65504."""
    observed = recipe.activation
    assert observed is not None
    if not all(torch.isfinite(value.to(recipe.dtype)) for value in static_parameters(observed)):
        fact = f"its input, {observed.low:g} … {observed.high:g}, does not fit {recipe.dtype} arithmetic."
        raise FxquantError(recipe.module, fact, "Use activation_statistic: min_max, or W8A8_DYNAMIC for it.")
