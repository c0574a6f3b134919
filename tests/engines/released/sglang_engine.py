"""A released SGLang in this process: it makes its model for one rank, loads a folder into it, and says what it skipped.

Model classes, quantization config, layers, loaders and post-load processing are its own.
"""

import dataclasses
import importlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from sglang_operators import stand_in_operators, swiglu_quant
from sglang_stand_ins import empty_package, stand_in
from torch import Tensor, nn

NOT_LOADED = 85
"""Filled into every integer parameter before loading, as NaN into float ones."""


@dataclass(frozen=True)
class Place:
    """One rank of `size`; `whole`: experts are whole on their rank (expert parallel)."""

    rank: int
    size: int
    whole: bool


@dataclass(frozen=True)
class Loaded:
    """A model in the engine's hands, the checkpoint tensors it warned about, and parameters that got nothing."""

    model: nn.Module
    skipped: list[str]
    not_loaded: list[str]


class _Group:
    """What layers ask a group of ranks for."""

    device_group = cpu_group = None
    is_first_rank = is_last_rank = True

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self.world_size, self.rank_in_group, self.rank, self.local_rank = size, rank, rank, rank
        self.ranks = list(range(size))


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        name, found, _ = record.getMessage().partition(" not found in params_dict")
        if found:
            self.names.append(name)


class SGLang:
    """One release, imported from `package`; `beside`: packages that its own code computes with."""

    def __init__(self, package: Path, beside: list[Path]) -> None:
        stand_in()
        sys.path[:0] = [str(package)]
        sys.path += [str(path) for path in beside]
        self.operators = stand_in_operators()
        module = importlib.import_module
        self._model = module("sglang.srt.models.deepseek_v2").DeepseekV3ForCausalLM
        self._draft = module("sglang.srt.models.deepseek_nextn").DeepseekV3ForCausalLMNextN
        self._loader = module("sglang.srt.model_loader.loader")
        self._loader.get_model_architecture = lambda _: (self._model, "DeepseekV3ForCausalLM")
        self._arguments = module("sglang.srt.server_args")
        self._groups = module("sglang.srt.distributed.parallel_state")
        self._attention = module("sglang.srt.layers.dp_attention")
        layouts: Any = empty_package("torch_npu")
        layouts.npu_format_cast = lambda tensor, *_, **__: tensor
        fused: Any = empty_package("sgl_kernel_npu.activation.swiglu_quant")
        fused.swiglu_quant = swiglu_quant

    def load(self, folder: Path, place: Place, draft: bool = False, quantized: bool = True) -> Loaded:
        """The model, or with `draft` its multi-token-prediction layer; without `quantized` as a float one.

        Raises whatever the engine does.
        """
        self._serve(folder, place)
        config = importlib.import_module("transformers").AutoConfig.from_pretrained(folder)
        dtype = getattr(torch, str(config.dtype).removeprefix("torch."))
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            quant_config = self._quantization(folder, config, dtype, draft) if quantized else None
            model = (self._draft if draft else self._model)(config, quant_config)
            return self._fill(model, folder)
        finally:
            torch.set_default_dtype(before)

    def _fill(self, model: nn.Module, folder: Path) -> Loaded:
        for name, parameter in model.named_parameters():
            if name.endswith("norm.bias"):  # zero unless loaded
                continue
            parameter.data.fill_(float("nan") if parameter.is_floating_point() else NOT_LOADED)
        warnings = _Warnings()
        log = logging.getLogger("sglang")
        log.addHandler(warnings)
        try:
            model.load_weights(_tensors(folder))
            empty = [name for name, parameter in model.named_parameters() if _untouched(parameter)]
            self._loader.DefaultModelLoader.load_weights_and_postprocess(_Filled(model), iter(()), torch.device("cpu"))
        finally:
            log.removeHandler(warnings)
        return Loaded(model, warnings.names, empty)

    def _quantization(self, folder: Path, config: Any, dtype: torch.dtype, draft: bool) -> Any:
        model_config = SimpleNamespace(
            hf_config=config, hf_text_config=config, quantization="modelslim", model_path=str(folder), dtype=dtype,
            is_draft_model=draft, is_draft_quantization_explicit=draft, is_fp4_experts=False, nvfp4_moe_meta=None,
        )  # fmt: skip
        load_config = SimpleNamespace(model_loader_extra_config={}, download_dir=None)
        return self._loader._get_quantization_config(model_config, load_config)

    def _serve(self, folder: Path, place: Place) -> None:
        """Publish server arguments and ranks, as its launcher does."""
        kind = self._arguments.ServerArgs
        if dataclasses.is_dataclass(kind):  # its own initializer looks for hardware
            arguments: Any = object.__new__(kind)
            for field in dataclasses.fields(kind):
                if field.default is not dataclasses.MISSING:
                    setattr(arguments, field.name, field.default)
                elif field.default_factory is not dataclasses.MISSING:
                    setattr(arguments, field.name, field.default_factory())
        else:
            arguments = kind(model_path=str(folder))
        arguments.model_path = arguments.speculative_draft_model_path = str(folder)
        arguments.tp_size, arguments.ep_size = place.size, place.size if place.whole else 1
        arguments.device, arguments.quantization = "npu", "modelslim"
        self._arguments.set_global_server_args_for_scheduler(arguments)
        self._place(place)

    def _place(self, place: Place) -> None:
        one, all_ranks = _Group(), _Group(place.size, place.rank)
        groups = {
            "world": all_ranks, "tp": all_ranks, "attn_tp": all_ranks, "shared_experts_tp": all_ranks,
            "attn_cp": one, "pp": one, "moe_dp": one, "dcp": one,
            "moe_ep": all_ranks if place.whole else one, "moe_tp": one if place.whole else all_ranks,
        }  # fmt: skip
        for name, group in groups.items():
            setattr(self._groups, f"_{name.upper()}", group)
        attention = self._attention
        attention._ATTN_DP_RANK, attention._ATTN_DP_SIZE, attention._ENABLE_DP_ATTENTION_FLAG = 0, 1, False
        try:
            context = importlib.import_module("sglang.srt.runtime_context")
        except ModuleNotFoundError:  # 0.5.9 has none
            return
        parallel = context.get_parallel()
        if hasattr(parallel, "override_permanently"):
            values = {f"{name}_group": group for name, group in groups.items()}
            values |= {f"{name}_size": group.world_size for name, group in groups.items()}
            values |= {f"{name}_rank": group.rank_in_group for name, group in groups.items()}
            values |= {"attn_dp_size": 1, "attn_dp_rank": 0}
            known = context._parallel_fields()
            parallel.clear_stamp()
            parallel.override_permanently(**{name: value for name, value in values.items() if name in known})


class _Filled:
    """A model whose weights are in: its loader has only the processing left to do."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def load_weights(self, weights: Any) -> None: ...


def _untouched(parameter: Tensor) -> bool:
    if parameter.is_floating_point():
        return bool(parameter.isnan().any())
    return bool((parameter == NOT_LOADED).all())


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, not a mapping
                yield name, opened.get_tensor(name)
