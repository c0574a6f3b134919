"""Eager side of a proof: the model's own forward, row by row without padding, and what each of its layers gives."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.frontend.families import Family
from fxquant.frontend.proof.copies import Tokens


def eager_logits(model: nn.Module, family: Family | None, tokens: Tokens) -> Tensor:
    """float32 [rows, 1 + steps, vocabulary]: after each row's prompt and after each token that follows."""
    step, rows = family.step if family else canonical_step, []
    for row, length in zip(tokens.ids, tokens.lengths, strict=True):
        own = row[tokens.lengths[0] - length :]
        logits, state = step(model, own[None, :length], None)
        steps = [logits]
        for token in own[length:]:
            logits, state = step(model, token.view(1, 1), state)
            steps.append(logits)
        rows.append(torch.cat(steps))
    return torch.stack(rows).float()


@contextmanager
def layer_outputs(layers: nn.ModuleList, count: int) -> Iterator[list[list[list[Tensor]]]]:
    """Within this context, what each layer gives: [layer][row] → its outputs of the row's calls, [S, hidden] each.

    `count` is the calls of a row: a prompt and its steps.
    """
    seen: list[list[list[Tensor]]] = [[] for _ in layers]

    def keep(index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple | list) else output
            calls = seen[index]
            if not calls or len(calls[-1]) == count:
                calls.append([])
            calls[-1].append(hidden.detach().float().clone()[0])

        return hook

    handles = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def canonical_step(model: nn.Module, ids: Tensor, past: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """A forward of (input_ids, attention_mask, position_ids, past)."""
    config: DeepseekV3Config = model.config  # type: ignore[assignment]
    width = config.kv_lora_rank + config.qk_rope_head_dim
    past = past or [torch.zeros(1, 0, width) for _ in range(config.num_hidden_layers)]
    start = past[0].shape[1]
    positions = torch.arange(start, start + ids.shape[1])[None]
    logits, past = model(ids, torch.ones(1, start + ids.shape[1], dtype=torch.int64), positions, past)
    return logits[:, -1], past
