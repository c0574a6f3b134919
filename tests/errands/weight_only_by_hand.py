"""python weight_only_by_hand.py OUT: every linear with float inputs of a compiled folder, computed from its int4 bytes.

Prints JSON: module → the graph's largest error, in units of the rounding of its sums.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, fx

from fxquant import ops
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.program.operands import operand
from fxquant.program.program_file import load_program
from fxquant.runtime.execute import Values, execute, prefill_inputs

U = 2.0**-24
"""Half a step of float32 at 1."""


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def weight_by_hand(stored: dict[str, Tensor], module: str) -> Tensor:
    """float64 [n, k] of two's complement nibbles: of rows 2i in the low one, 2i + 1 in the high one."""
    unsigned = stored[f"{module}.weight"].to(torch.int64) & 0xFF
    nibbles = torch.stack((unsigned & 0xF, unsigned >> 4), 1).flatten(0, 1)
    weight = torch.where(nibbles > 7, nibbles - 16, nibbles).double() * stored[f"{module}.weight_scale"].double()
    second = stored.get(f"{module}.weight_scale_second")
    return (
        weight if second is None else weight * second.double().repeat_interleave(weight.shape[1] // second.shape[1], 1)
    )


def main(folder: Path) -> None:
    program, stored, found = load_program(folder / "fxquant_graph.json"), stored_tensors(folder), {}

    def observe(node: fx.Node, values: list[Any], inputs: Values) -> None:
        weight = operand(node, "weight") if node.target == ops.linear else None
        if weight is None or weight.op == "get_attr":
            return
        module = program.parameter(operand(weight, "weight")).module
        x, by_hand = inputs[operand(node, "x")][0].double(), weight_by_hand(stored, module)
        error = (values[0].double() - x @ by_hand.T).abs()
        bound = (by_hand.shape[1] + 4) * U * (x.abs() @ by_hand.abs().T)
        found[module] = float((error / bound).max())

    ids = torch.randint(0, program.config["vocab_size"], (1, 16), generator=torch.Generator().manual_seed(0))
    execute(program, WeightFiles(folder).read, [prefill_inputs(program, ids)], observe)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
