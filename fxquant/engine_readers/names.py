"""Module paths as engines parse them: which modules are fused, and which projection of which expert one is."""

from dataclasses import dataclass

from fxquant.errors import FxquantError

GATE_UP = ("gate_proj", "up_proj")
QKV_A = ("q_a_proj", "kv_a_proj_with_mqa")
_FUSED = (GATE_UP, QKV_A)
"""gate_up_proj and fused_qkv_a_proj of vllm-ascend's ModelSlim configuration."""

DOWN = "down_proj"
PROJECTIONS = (*GATE_UP, DOWN)


@dataclass(frozen=True)
class ExpertPath:
    """`<parent>.<index>.<projection>`; `stored`: the path under which its tensors are stored."""

    parent: str
    index: int
    projection: str
    stored: str

    def module(self, projection: str) -> str:
        """The path of another projection of this expert."""
        return f"{self.stored}.{projection}"


def expert_path(module: str) -> ExpertPath:
    """Raises FxquantError for a path that is not a projection of a routed expert."""
    parent, _, rest = module.rpartition(".experts.")
    index, _, projection = rest.partition(".")
    if not parent or not index.isdecimal() or projection not in PROJECTIONS:
        remedy = f"Routed experts are <mlp>.experts.<number>.{{{', '.join(PROJECTIONS)}}}."
        raise FxquantError(module, "is not a projection of a routed expert.", remedy)
    return ExpertPath(f"{parent}.experts", int(index), projection, f"{parent}.experts.{index}")


def part_of_layer(module: str) -> str:
    """`self_attn`, `mlp` or another part of a decoder layer, `model.layers.<number>.<part>…`; "" outside of layers."""
    model, _, path = module.partition(".")
    layers, _, path = path.partition(".")
    number, _, path = path.partition(".")
    return path.partition(".")[0] if (model, layers) == ("model", "layers") and number.isdecimal() else ""


def ranks_of(module: str, ranks: int) -> int:
    """Over how many of `ranks` a linear is split: every rank holds all of what makes the latents (vLLM deepseek_v2)."""
    return 1 if module.rpartition(".")[2] in QKV_A else ranks


def fused_group(module: str) -> tuple[str, ...]:
    """The modules that an engine loads into one with this one, itself included; empty if it is not fused."""
    parent, _, name = module.rpartition(".")
    return next((tuple(f"{parent}.{shard}" for shard in group) for group in _FUSED if name in group), ())
