"""Description of an emitted model, for those who open it: what it is, what it came from, what its values mean."""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir

POLICY, SOURCE = "policy", "source"
MODEL = (
    "Decoder written by fxquant: one graph for prompts and steps. Weights lie in the safetensors files beside it. "
    "Of the metadata, `profile` and `numerics` say in which operators it multiplies and what is exact, `policy` and "
    "`source` what it was made from."
)
VALUES = {
    "input_ids": "The new tokens of each row: those of a prompt, or the one that was chosen last.",
    "attention_mask": "1 for each token so far and each new one, 0 for padding, which stands before a text.",
    "position_ids": "Of each new token, how many tokens of its row stand before it; padding does not count.",
    "num_logits_to_keep": "How many of the last tokens have logits; 0: all.",
    "logits": "Of the token after each new token, before the softmax.",
}
PAST, PRESENT = "past_key_values.", "present."


@dataclass(frozen=True)
class Provenance:
    """What a model was made from; "" where nobody says.

    policy  name of the policy
    source  name of the checkpoint's folder
    """

    policy: str = ""
    source: str = ""

    @property
    def notes(self) -> dict[str, str]:
        """Its entries in the metadata."""
        return {key: text for key, text in ((POLICY, self.policy), (SOURCE, self.source)) if text}


def stored_provenance(model: onnx.ModelProto) -> Provenance:
    """What the metadata of a model say."""
    notes = {prop.key: str(prop.value) for prop in model.metadata_props}
    return Provenance(notes.get(POLICY, ""), notes.get(SOURCE, ""))


def described(model: ir.Model, provenance: Provenance) -> ir.Model:
    """`model` with descriptions of itself, its inputs and its outputs."""
    model.doc_string = MODEL
    model.metadata_props.update(provenance.notes)
    for value in _ends(model.graph):
        value.doc_string = _meaning(str(value.name))
    return model


def _ends(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.outputs


def _meaning(name: str) -> str:
    if name.startswith(PAST):
        rest = name.removeprefix(PAST)
        layer = rest.partition(".")[0]
        return f"What attention of layer {layer} keeps of each token so far; at first none, then {PRESENT}{rest}."
    if name.startswith(PRESENT):
        rest = name.removeprefix(PRESENT)
        return f"{PAST}{rest} and what is kept of the new tokens: for the next call."
    return VALUES.get(name, "")
