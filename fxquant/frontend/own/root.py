"""Own root: the forward of a whole model that is no published one, as (input_ids, attention_mask, position_ids, past).

The model's own forward runs, with its layers bridged and its parts under the checkpoint's names.
"""

import ast
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from fxquant import ops
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.frontend.assemble import assemble
from fxquant.frontend.own.source import compiled, syntax_tree
from fxquant.frontend.recognition.source_code import unwrapped
from fxquant.frontend.slot import Slot
from fxquant.models import rotary

Call = Callable[[Callable[..., Any], Tensor, Tensor, int, tuple[Tensor, Tensor]], Tensor]
"""(forward of the model, input_ids, position_ids, length of the past, (cos, sin)) → logits [B, S, vocabulary]."""


class OwnDecoder(nn.Module):
    """Holds embedding, layers and norm under the checkpoint's names; the model's own forward calls them."""

    inv_freq: list[float]
    attention_factor: float

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rotary table of the new positions."""
        return ops.rope_table(position_ids, self.inv_freq, self.attention_factor)


class OwnRoot(nn.Module):
    """A model whose own forward runs.

    config, model (an OwnDecoder), lm_head; run: calls the own forward; slots: what each layer is passed
    """

    config: DeepseekV3Config
    model: OwnDecoder
    run: Callable[..., Tensor]
    slots: list[Slot]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """As `fxquant.models.DeepseekV3`."""
        cos, sin = self.model(position_ids)
        for slot, own in zip(self.slots, past, strict=False):
            slot.cos, slot.sin, slot.attention_mask, slot.past, slot.present = cos, sin, attention_mask, own, None
        logits = self.run(input_ids, position_ids, past[0].shape[1], (cos, sin))
        if logits.dim() != 3:
            raise ValueError("it returns the logits of one position in a way that fxquant does not know")
        return logits, [slot.present for slot in self.slots[: len(past)]]  # type: ignore[misc]


def own_root(
    model: nn.Module, config: DeepseekV3Config, parts: dict[str, nn.Module], slots: list[Slot], call: Call
) -> OwnRoot:
    """`model` with `parts` embed_tokens, layers, norm and lm_head, converted."""
    forward = every_position(model)
    angles = {"inv_freq": rotary.frequencies(config), "attention_factor": rotary.attention_factor(config)}
    decoder = assemble(OwnDecoder, **{name: parts[name] for name in ("embed_tokens", "layers", "norm")}, **angles)
    root = assemble(OwnRoot, config=config, model=decoder, lm_head=parts["lm_head"])
    root.slots = slots
    root.run = lambda ids, positions, start, table: call(forward, ids, positions, start, table)
    return root


def every_position(model: nn.Module) -> Callable[..., Any]:
    """The forward of `model` for the logits of every position: without `[:, -1]` and without a causal mask of its own,
    which layers are not passed."""
    function = unwrapped(type(model).forward)
    tree = _EveryPosition().visit(syntax_tree(function))
    return MethodType(compiled(tree, function), model)


class _EveryPosition(ast.NodeTransformer):
    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        return node.value if ast.unparse(node.slice).strip("()") == ":, -1" else node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        self.generic_visit(node)
        one_token = isinstance(node.test, ast.Compare) and ast.unparse(node.test).endswith("> 1")
        masks = all(isinstance(each, ast.Assign) and "triu" in ast.unparse(each.value) for each in node.body)
        return ast.copy_location(ast.Pass(), node) if one_token and masks and not node.orelse else node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        one_token = isinstance(node.test, ast.Compare) and ast.unparse(node.test).endswith("> 1")
        return node.orelse if one_token and "triu" in ast.unparse(node.body) else node
