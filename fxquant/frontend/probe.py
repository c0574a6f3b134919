"""Adapter probe: a small copy with random weights runs in its own forward and as the traced graph, and must agree.

No adapter is trusted by its name. The copy has two layers and few, narrow experts, but the width and the routing groups
of the real model; both sides run a prefill and cached steps, the graph in one padded batch.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.frontend.adapt import adapted
from fxquant.frontend.families import Family, family_of
from fxquant.frontend.user_file import UserFile, where
from fxquant.models.layers import Gate, RoutedExperts
from fxquant.program.program import Program
from fxquant.runtime.execute import cache_inputs, execute
from fxquant.schemes.roles import tensor_name
from fxquant.tracing import trace

Build = Callable[[DeepseekV3Config, str], nn.Module]
LENGTHS, STEPS = (7, 4), 3
"""Prompt tokens of each row, and tokens that follow them one at a time."""
LARGEST = 1 << 26
"""Maximum parameters of a model that is run although it ignores the config it is given."""


def small_config(config: DeepseekV3Config) -> DeepseekV3Config:
    """A copy that runs in a second: hidden_size, groups, the presence of a low rank and rotary scaling stay."""
    groups, selected = config.n_group, config.topk_group
    # two experts per group: a group's score is the sum of its two best
    experts = groups * max(2, -(-8 // groups)) if groups <= 8 else 2 * groups
    dense = min(config.first_k_dense_replace, 1)
    return config.model_copy(
        update={
            "vocab_size": 64, "num_hidden_layers": 2, "first_k_dense_replace": dense, "num_attention_heads": 2,
            "intermediate_size": 48, "moe_intermediate_size": 32, "n_routed_experts": experts,
            "num_experts_per_tok": min(config.num_experts_per_tok, selected * experts // groups, 4),
            "q_lora_rank": None if config.q_lora_rank is None else 24, "kv_lora_rank": 16,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "num_nextn_predict_layers": 0,
        }
    )  # fmt: skip


@torch.no_grad()
def probe(file: UserFile, config: DeepseekV3Config, build: Build) -> bool:
    """Return whether a copy was run; raises FxquantError if its logits differ from the graph's by more than rounding.

    A model that takes no config is run if it is small. A large one is refused, unless its classes are those of the
    installed transformers: then it is not checked.
    """
    config = small_config(config) if file.takes_config else config
    meta = build(config, "meta")  # its size must be known before it takes memory
    if _size(meta) > LARGEST:
        if type(meta).__module__.startswith("transformers."):
            return False
        fact = f"its {type(meta).__name__} cannot be checked: build_model does not take its sizes from config."
        raise FxquantError(file.path, fact, "Use config, so that a small copy can be compared with the graph.")
    with adapted(meta, config, file.leaves) as root:
        program = trace(root, Checkpoint(Path("probe"), config.model_dump() | {"torch_dtype": "float32"}, {}))
    model = build(config, "cpu").float()
    fill(model)
    with adapted(model, config, file.leaves) as root:
        tensors = dict(named_tensors(root))
    ids = torch.randint(config.vocab_size, (len(LENGTHS), LENGTHS[0] + STEPS), generator=_generator())
    try:
        expected = eager_logits(model, family_of(model), ids)
    except Exception as error:
        fact = f"the forward of {type(model).__name__} fails on a small copy: {where(error, file.path)}"
        raise FxquantError(
            file.path, fact, "It must run on CPU, with a cache, at any sizes given by config."
        ) from error
    traced = graph_logits(program, tensors, ids)
    _compare(file, type(meta).__name__, expected, traced, config)
    return True


def fill(model: nn.Module) -> None:
    """Random parameters that keep activations near one."""
    generator = _generator()
    for tensor in model.parameters():
        values = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + values / 10 if tensor.dim() < 2 else values / tensor.shape[-1] ** 0.5)


def named_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint name → value for an adapted model; correction biases, often buffers, are made random."""
    generator = _generator()
    for path, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, Gate):
            bias = module.e_score_correction_bias  # shares memory with the gate that the model's own forward reads
            bias.copy_(torch.randn(bias.shape, generator=generator) / 10)
        for name, tensor in module._parameters.items():
            if isinstance(module, RoutedExperts) and tensor is not None:
                yield from zip(module.checkpoint_names(path, name), tensor, strict=True)
            elif tensor is not None:
                yield tensor_name(path, name), tensor


def eager_logits(model: nn.Module, family: Family | None, ids: Tensor) -> Tensor:
    """The model's own forward, row by row without padding: float32 [rows, 1 + STEPS, vocabulary]."""
    step, rows = family.step if family else canonical_step, []
    for row, length in zip(ids, LENGTHS, strict=True):
        tokens = row[LENGTHS[0] - length :]
        logits, state = step(model, tokens[None, :length], None)
        steps = [logits]
        for token in tokens[length:]:
            logits, state = step(model, token.view(1, 1), state)
            steps.append(logits)
        rows.append(torch.cat(steps))
    return torch.stack(rows).float()


def canonical_step(model: nn.Module, ids: Tensor, past: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """A forward of (input_ids, attention_mask, position_ids, past)."""
    config: DeepseekV3Config = model.config  # type: ignore[assignment]
    width = config.kv_lora_rank + config.qk_rope_head_dim
    past = past or [torch.zeros(1, 0, width) for _ in range(config.num_hidden_layers)]
    start = past[0].shape[1]
    positions = torch.arange(start, start + ids.shape[1])[None]
    logits, past = model(ids, torch.ones(1, start + ids.shape[1], dtype=torch.int64), positions, past)
    return logits[:, -1], past


def graph_logits(program: Program, tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The traced graph on the same tokens, left-padded to one batch: float32 [rows, 1 + STEPS, vocabulary]."""
    longest, total = LENGTHS[0], ids.shape[1]
    mask = torch.ones(len(ids), total, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, : longest - length] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    widths = [node.meta["val"].shape[2] for node in cache_inputs(program)]
    past, steps, start = [torch.zeros(len(ids), 0, width) for width in widths], [], 0
    for stop in range(longest, total + 1):
        inputs = [ids[:, start:stop], mask[:, :stop], positions[:, start:stop], *past]
        logits, *past = execute(program, tensors.__getitem__, [inputs])[0]
        steps.append(logits[:, -1:])
        start = stop
    return torch.cat(steps, 1)


def rounding_bound(config: DeepseekV3Config, logits: Tensor) -> float:
    """For two forms of one function in float32: two blocks per layer each sum up to `width` products, whose rounding
    errors of 2**-24 of the sum add up like a random walk, differently in the two; times two for either side."""
    width = max(config.hidden_size, config.intermediate_size, config.num_attention_heads * config.v_head_dim)
    return 2 * 2 * config.num_hidden_layers * width**0.5 * 2.0**-24 * float(logits.abs().max())


def _compare(file: UserFile, name: str, expected: Tensor, traced: Tensor, config: DeepseekV3Config) -> None:
    error, bound = float((expected - traced).abs().max()), rounding_bound(config, expected)
    if not error <= bound:  # not `>`: NaN must fail
        fact = f"a small copy of {name} gives logits that differ from the traced graph's by {error:.2g}"
        fact += f" (rounding explains {bound:.2g})."
        way_out = "A class with a known name computes something else: declare your own in LEAVES, or rename it."
        raise FxquantError(file.path, fact, way_out)


def _size(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.parameters())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
