"""Hand-made weight folders of all weight_formats, written from the description of the formats with obvious loops.

Nothing of fxquant's writer is used: what a module holds is drawn as integers and scales first, and packed from them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

VLLM_DESCRIPTION = "quant_model_description.json"
UNPACKED_DESCRIPTION = "quant_model_description_w8a8_dynamic.json"
WEIGHTS = "quant_model_weight_w8a8_dynamic.safetensors"
EXPERTS = "model.layers.3.mlp.experts"


@dataclass(frozen=True)
class Truth:
    """What a module stands for: `Σ x8 * codes * scale * x_scale + bias`; codes int64 [n, k], scale float64 [n]."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None = None

    def result(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        """float64 [..., n] for a per-token linear."""
        y = (x8.double() @ self.codes.double().T) * self.scale * x_scale.double()
        return y if self.bias is None else y + self.bias.double()


@dataclass
class Draft:
    """A folder in the making: change `tensors`, `types`, `header` and `config`, then write it."""

    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    truths: dict[str, Truth] = field(default_factory=dict)
    header: dict[str, object] = field(default_factory=lambda: {"version": "1.0.0", "group_size": 0})
    config: dict[str, object] = field(default_factory=dict)
    description: str = VLLM_DESCRIPTION

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def put(self, module: str, kind: str, **tensors: Tensor) -> None:
        """Store tensors of a module; a bias is FLOAT whatever the module is."""
        for suffix, tensor in tensors.items():
            self.tensors[f"{module}.{suffix}"] = tensor
            self.types[f"{module}.{suffix}"] = "FLOAT" if suffix == "bias" else kind

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64, `high` included."""
        return torch.randint(low, high + 1, shape, generator=self._generator)

    def scales(self, n: int) -> Tensor:
        """float32 [n] around 2**-10, no two alike."""
        return 2.0**-10 * (0.5 + torch.rand(n, generator=self._generator))

    def per_token(self, module: str, n: int, k: int, biased: bool = False) -> None:
        """W8A8_DYNAMIC."""
        q, scale = self.integers(-127, 127, n, k), self.scales(n)
        bias = torch.randn(n, generator=self._generator).to(self.dtype) if biased else None
        self.truths[module] = Truth(q, scale.double(), bias)
        parts = {"weight": q.to(torch.int8), "weight_scale": scale.view(n, 1), "weight_offset": torch.zeros(n, 1)}
        self.put(module, "W8A8_DYNAMIC", **parts, **({} if bias is None else {"bias": bias}))

    def static(self, module: str, n: int, k: int, kind: str = "W8A8", short: bool = False) -> None:
        """W8A8 or W8A8_MIX with input_scale 0.03 and offset -5; `short`: `per_channel`, no weight_scale."""
        q, scale = self.integers(-127, 127, n, k), self.scales(n)
        stored = torch.float32 if short else self.dtype
        input_scale = torch.tensor([0.03], dtype=self.dtype)
        deq_scale = input_scale.float() * scale
        quant_bias = self.integers(-1000, 1000, n) + 5 * q.sum(1)
        self.truths[module] = Truth(q, scale.double(), None)
        bits = deq_scale.view(torch.int32).to(torch.int64) if self.dtype is torch.float16 else deq_scale
        parts = {"weight": q.to(torch.int8), "deq_scale": bits, "quant_bias": quant_bias.to(torch.int32)}
        parts |= {"input_scale": input_scale.to(stored), "input_offset": torch.tensor([-5.0], dtype=stored)}
        if not short:
            parts |= {"weight_scale": scale.view(n, 1), "weight_offset": torch.zeros(n, 1)}
        self.put(module, kind, **parts)

    def expert(self, module: str, n: int, k: int, group: int, columns: int, packed: bool = True) -> None:
        """One projection of W4A8_DYNAMIC: two levels, or one if `group` is 0. `columns` of scale_bias."""
        q, scale = self.integers(-8, 7, n, k), self.scales(n)
        second = self.integers(1, 17, n, k // group) if group else torch.ones(n, 1, dtype=torch.int64)
        codes = q * second.repeat_interleave(k // second.shape[1], 1)
        self.truths[module] = Truth(codes, scale.double())
        parts = {"weight": pack(q) if packed else q.to(torch.int8)}
        parts |= {"weight_scale": scale.view(n, 1), "weight_offset": torch.zeros(n, 1)}
        if group:
            parts |= {"weight_scale_second": second.float(), "weight_offset_second": torch.zeros_like(second)}
        if packed:
            rounded = scale.bfloat16() if group else scale
            parts["scale_bias"] = scale_bias(codes, rounded.double(), columns)
        self.put(module, "W4A8_DYNAMIC", **parts)

    def expert_layer(self, hidden: int, width: int, group: int, packed: bool = True, count: int = 2) -> None:
        """Experts of one layer, and the header or config that goes with them."""
        for expert in range(count):
            for name in ("gate_proj", "up_proj"):
                self.expert(f"{EXPERTS}.{expert}.{name}", width, hidden, group, 1, packed)
            self.expert(f"{EXPERTS}.{expert}.down_proj", hidden, width, group, 16, packed)
        self.header["group_size"] = group

    def for_mindie(self, group: int, **types: str) -> "Draft":
        """The names and keys MindIE looks for; `types` of its sections, w8a8_dynamic and w4a8_dynamic if not given."""
        self.header["group_size"] = group
        self.config |= {"quantize": "w8a8_dynamic", "moe_quantize": "w4a8_dynamic"} | types
        self.config |= {"model_type": "deepseekv2", "n_routed_experts": 2, "quantization_config": {"group_size": group}}
        return self

    def for_mindie_2_1rc1(self, group: int) -> "Draft":
        """The names and keys MindIE 2.1.RC1 looks for."""
        self.for_mindie(group)
        self.header, self.description = {"model_quant_type": "W8A8_DYNAMIC"}, UNPACKED_DESCRIPTION
        return self

    def for_engine(self, engine: str, group: int) -> "Draft":
        """As that engine looks for it."""
        fits = {"mindie": self.for_mindie, "mindie-2.1rc1": self.for_mindie_2_1rc1}
        return fits[engine](group) if engine in fits else self

    def write(self, folder: Path) -> Path:
        """All files."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / WEIGHTS)
        (folder / self.description).write_text(json.dumps(self.header | self.types))
        config = {"model_type": "deepseek_v3", "torch_dtype": str(self.dtype).removeprefix("torch.")} | self.config
        (folder / "config.json").write_text(json.dumps(config))
        return folder


def pack(q: Tensor) -> Tensor:
    """[n, k] in [-8, 7] → int8 [n/2, k]: byte by byte, the even row's nibble low."""
    rows = [[(low % 16) + 16 * (high % 16) for low, high in zip(*pair, strict=True)] for pair in _pairs(q.tolist())]
    return torch.tensor(rows, dtype=torch.uint8).view(torch.int8)


def _pairs(rows: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    return [(rows[i], rows[i + 1]) for i in range(0, len(rows), 2)]


def scale_bias(codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    """float32 [n, columns]: eight times each run of k, summed and scaled."""
    run = codes.shape[1] // columns
    return torch.stack([8 * scale * codes[:, i * run : (i + 1) * run].sum(1) for i in range(columns)], 1).float()
