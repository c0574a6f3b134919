"""Multi-token prediction (MTP) layers: left out, kept in float or quantized, as the policy or the user says."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.models.deepseek_v3 import mtp_paths
from fxquant.models.mtp import MtpLinear, mtp_gate_biases, mtp_linears, mtp_tensors
from fxquant.passes.base import Pass, PassResult
from fxquant.policy.kinds import Kind
from fxquant.policy.policy import LEAVE_OUT, Policy
from fxquant.program.program import MtpLayers, Program
from fxquant.program.rotary_buffers import frequency_name_of_layer
from fxquant.schemes.roles import module_and_role
from fxquant.schemes.schemes import Recipe, Scheme
from fxquant.schemes.weight_formats import WeightFormat

REMEDY = "Use --mtp none, or complete the checkpoint."
CHOICES = (LEAVE_OUT, Scheme.FLOAT, Scheme.W8A8_DYNAMIC, Scheme.W8A8)
"""Schemes that a rule may give to such a layer."""


@dataclass
class AssignMtp(Pass):
    """Fills `program.mtp` by the rules of its layers; no graph runs these layers, so the graph stays.

    In a quantized layer, each linear that the policy quantizes in decoder layers gets W8A8_DYNAMIC, int4 experts too.
    Where the layer's rule says W8A8, linears with a static scheme in decoder layers get it: calibration runs these
    layers.
    """

    policy: Policy
    config: DeepseekV3Config
    checkpoint: Checkpoint
    weight_format: Callable[[int], WeightFormat]
    name = "assign-mtp"

    def apply(self, program: Program) -> PassResult:
        self._check(program)
        for path in program.mtp.layers:
            rule = program.rules[path]
            if rule.scheme not in CHOICES:
                fact, way_out = f"rule “{rule}” gives {rule.scheme} to {path}.", f"Use one of {', '.join(CHOICES)}."
                raise FxquantError(f"policy {self.policy.name}", fact, way_out)
            if rule.quantizes:
                self._quantize(program, path, rule.static)
            if rule.scheme != LEAVE_OUT:
                self._keep(program.mtp, path)
        return PassResult(self.name, tuple(program.mtp.recipes))

    def _quantize(self, program: Program, path: str, static: bool) -> None:
        weight_format = self.weight_format(max((recipe.group_size for recipe in program.recipes.values()), default=0))
        for linear in mtp_linears(self.config, path):
            rule = self.policy.rule_for(linear.module, linear.kind, True)
            if linear.kind is not Kind.MTP and rule is not None and rule.quantizes:
                alike = static and rule.static and linear.kind is not Kind.ROUTED_EXPERT
                scheme = Scheme(rule.scheme) if alike else Scheme.W8A8_DYNAMIC
                program.mtp.recipes[linear.module] = _recipe(linear, scheme, program, weight_format)
        if static and not program.mtp.static:
            fact = f"rule “{program.rules[path]}” finds no linear of {path} with a static scheme in decoder layers."
            raise FxquantError(f"policy {self.policy.name}", fact, "Use W8A8_DYNAMIC for kind mtp.")

    def _check(self, program: Program) -> None:
        """Raise FxquantError unless all layers that config.json announces are kept, or none is, and those that are kept
        have every tensor in its shape: engines would serve the rest from memory that nobody wrote."""
        kept = [path for path in program.mtp.layers if program.rules[path].scheme != LEAVE_OUT]
        absent = [path for path in mtp_paths(self.config) if path not in kept]
        if kept and absent:
            fact = f"{absent[0]} is not in the checkpoint or left out, {kept[0]} is kept; config.json announces both."
            raise FxquantError(self.checkpoint.folder, fact, REMEDY)
        for path in kept:
            for names, shape in mtp_tensors(self.config, path):
                for name in names:
                    info = self.checkpoint.tensors.get(name)
                    if info is None or info.shape != shape:
                        found = "missing" if info is None else list(info.shape)
                        fact = f"tensor {name} is {found}, expected {list(shape)}."
                        raise FxquantError(self.checkpoint.folder, fact, REMEDY)

    def _keep(self, mtp: MtpLayers, path: str) -> None:
        """Keep every tensor of the layer that no recipe reads and config.json does not give."""
        quantized = {name for recipe in mtp.recipes.values() for name in recipe.source_names}
        quantized.add(frequency_name_of_layer(path))
        names = sorted(name for name in self.checkpoint.tensors if name.startswith(f"{path}."))
        mtp.float_tensors |= {name: module_and_role(name)[0] for name in names if name not in quantized}
        biases = (name for name in mtp_gate_biases(self.config, path) if name in mtp.float_tensors)
        mtp.gate_biases = (*mtp.gate_biases, *biases)


def _recipe(linear: MtpLinear, scheme: Scheme, program: Program, weight_format: WeightFormat) -> Recipe:
    return Recipe(
        module=linear.module,
        modules=linear.modules,
        scheme=scheme,
        group_size=0,
        out_features=linear.out_features,
        in_features=linear.in_features,
        bias=linear.bias,
        row_parallel=False,
        dtype=program.dtype,
        weight_format=weight_format,
        scale_dtype=program.dtype if weight_format.model_dtype_scales else torch.float32,
    )
