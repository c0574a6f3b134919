"""vLLM's surroundings of a model: its configuration, and the groups of one rank of many, without processes."""

import collections
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """One rank. With expert parallelism experts are whole, and dealt out; everything else is still split."""

    ranks: int
    rank: int
    expert_parallel: bool = False


class Settings(SimpleNamespace):
    """Settings of which the unset are None, so that what an engine needs and we forgot fails by name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


class _DeviceGroup:
    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def _get_backend(self, device: torch.device) -> Any:
        return SimpleNamespace(get_hccl_comm_name=lambda rank: "")


class _Group:
    """A GroupCoordinator that says its size and rank, and sends nothing."""

    is_first_rank = is_last_rank = True

    def __init__(self, size: int, rank: int) -> None:
        self.world_size, self.rank_in_group, self.rank, self.local_rank = size, rank, rank, rank
        self.ranks = list(range(size))
        self.device_group = self.cpu_group = _DeviceGroup(size, rank)


def enter(place: Place, *modules: ModuleType) -> None:
    """Set the groups in the parallel states of vLLM and the plugin: of tensors and experts all ranks, others of one."""
    whole, alone = _Group(place.ranks, place.rank), _Group(1, 0)
    for module in modules:
        for name in [name for name in vars(module) if name.startswith("_") and name[1:2].isupper()]:
            if getattr(module, name) is None or isinstance(getattr(module, name), _Group):
                setattr(module, name, whole if name in ("_TP", "_EP", "_WORLD", "_MC2", "_EPLB") else alone)
    torch.distributed.get_rank = lambda group=None: group.rank() if group else place.rank  # type: ignore[assignment]
    torch.distributed.get_world_size = (  # type: ignore[assignment]
        lambda group=None: group.size() if group else place.ranks
    )


def configure(folder: Path, place: Place, mtp: bool) -> Settings:
    """What `VllmConfig` would hold for `vllm serve FOLDER --quantization ascend`."""
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    fixed = {"hidden_act": "silu", "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
    hf = SimpleNamespace(**fixed | config | {"rope_parameters": rope, "tie_word_embeddings": False})
    hf.to_dict = lambda: {name: value for name, value in vars(hf).items() if name != "to_dict"}
    model = Settings(
        hf_config=hf, hf_text_config=hf, dtype=getattr(torch, config["torch_dtype"]), use_mla=True, model=str(folder),
        is_deepseek_mla=True, enforce_eager=True, quantization="ascend", max_model_len=64,
        get_num_layers=lambda parallel: config["num_hidden_layers"], hf_overrides={},
    )  # fmt: skip
    return Settings(
        model_config=model,
        parallel_config=_parallel(place),
        compilation_config=_compilation(),
        cache_config=Settings(cache_dtype="auto", block_size=128),
        scheduler_config=Settings(max_num_batched_tokens=64, max_num_seqs=8, decode_max_num_seqs=0),
        device_config=Settings(device="cpu", device_type="cpu"),
        load_config=Settings(
            load_format="safetensors",
            model_loader_extra_config={},
            use_tqdm_on_load=False,
            device="cpu",
            safetensors_load_strategy="lazy",
        ),
        speculative_config=_speculation(model) if mtp else None,
        kernel_config=Settings(
            moe_backend="auto", ir_op_priority=Settings(rms_norm=["native"], fused_add_rms_norm=["native"])
        ),
        attention_config=Settings(),
        additional_config={},
        compute_hash=str,
        instance_id="tests",
    )


def _speculation(target: Settings) -> Settings:
    """With the draft's configuration as vLLM rewrites it; the model's own stays beside it."""
    hf = SimpleNamespace(**vars(target.hf_config) | {"model_type": "deepseek_mtp", "n_predict": 1})
    draft = Settings(**vars(target) | {"hf_config": hf, "hf_text_config": hf})
    return Settings(
        draft_model_config=draft, target_model_config=target, num_speculative_tokens=1, method="deepseek_mtp"
    )


def _parallel(place: Place) -> Settings:
    return Settings(
        tensor_parallel_size=place.ranks, tensor_parallel_rank=place.rank, rank=place.rank, world_size=place.ranks,
        world_size_across_dp=place.ranks, data_parallel_size=1, data_parallel_rank=0, data_parallel_index=0,
        pipeline_parallel_size=1, prefill_context_parallel_size=1, decode_context_parallel_size=1,
        enable_expert_parallel=place.expert_parallel, expert_placement_strategy="linear", enable_eplb=False,
        num_redundant_experts=0, eplb_config=Settings(num_redundant_experts=0, use_async=False),
        use_sequence_parallel_moe=False, enable_dbo=False, all2all_backend="naive",
    )  # fmt: skip


def _compilation() -> Settings:
    return Settings(
        custom_ops=["all"], mode=0, level=0, cudagraph_mode=0, splitting_ops=[], pass_config=Settings(),
        static_forward_context={}, static_all_moe_layers=[], fast_moe_cold_start=False,
        enabled_custom_ops=collections.Counter(), disabled_custom_ops=collections.Counter(),
    )  # fmt: skip


def make_current(settings: Settings) -> None:
    """What `get_current_vllm_config()` returns."""
    holder = sys.modules.get("vllm.config.vllm") or sys.modules["vllm.config"]
    holder._current_vllm_config = settings  # type: ignore[attr-defined]
