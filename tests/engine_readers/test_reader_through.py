"""The whole graph with the arithmetic of an engine."""

import math
from pathlib import Path

import pytest
import torch
from open_readers import open_reader
from test_reader_engine import CASES, Compile, compiled
from torch import Tensor

from fxquant.engine_readers import Arithmetic
from fxquant.evaluation.divergence import evaluate_programs
from fxquant.evaluation.engine_perplexity import reader_perplexity, run_through_reader
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.verification.noise import last_bit_noise

__all__ = ["compiled"]
ENGINES = pytest.mark.parametrize("engine", ["vllm-ascend", "mindie"])
IDS = [torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(length)) for length in (12, 17)]


@ENGINES
def test_no_quantized_value_of_the_graph_is_left(compiled: Compile, engine: str) -> None:
    """With zeros for all weights the graph has, the result is the same: it is the reader's."""
    output = compiled(*CASES[engine])
    files, reader = WeightFiles(output.folder), open_reader(engine, output.folder)

    def spoiled(name: str) -> Tensor:
        tensor = files.read(name)
        return torch.zeros_like(tensor) if tensor.dtype is torch.int8 else tensor

    batches = [prefill_inputs(output.program, ids) for ids in IDS]
    for arithmetic in Arithmetic:
        right, wrong = (
            run_through_reader(output.program, reader, read, batches, arithmetic) for read in (files.read, spoiled)
        )
        for result, expected in zip(wrong, right, strict=True):
            assert torch.equal(result[0], expected[0])
    zeros = execute(output.program, spoiled, batches)
    assert not torch.equal(zeros[0][0], right[0][0])


@ENGINES
def test_perplexity_through_an_engine(compiled: Compile, engine: str) -> None:
    """EXACT: the graph's, up to what last-bit noise does to the logits of either; a token's log p moves twice that."""
    output = compiled(*CASES[engine])
    files, reader = WeightFiles(output.folder), open_reader(engine, output.folder)
    (graph,) = evaluate_programs((output.program, files.read), [(output.program, files.read)], IDS)
    exact, kernel = (
        reader_perplexity(output.program, reader, files.read, IDS, arithmetic) for arithmetic in Arithmetic
    )
    assert kernel != exact and math.isfinite(kernel)
    if engine == "vllm-ascend":  # its scales lose nothing on load; MindIE's are rounded
        noise = max(
            last_bit_noise(output.program, files.read, prefill_inputs(output.program, ids), 4).logit for ids in IDS
        )
        assert abs(math.log(exact / graph.quantized_perplexity)) <= 4 * noise


def test_batches_keep_their_order_and_shapes(compiled: Compile, tmp_path: Path) -> None:
    output = compiled(*CASES["vllm-ascend"])
    files, reader = WeightFiles(output.folder), open_reader("vllm-ascend", output.folder)
    batches = [prefill_inputs(output.program, ids) for ids in IDS]
    together = run_through_reader(output.program, reader, files.read, batches, Arithmetic.EXACT)
    for index, batch in enumerate(batches):
        alone = run_through_reader(output.program, reader, files.read, [batch], Arithmetic.EXACT)[0]
        assert torch.equal(alone[0], together[index][0]) and alone[0].shape[1] == IDS[index].shape[1]
