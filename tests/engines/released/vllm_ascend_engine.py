"""A released vllm-ascend, with the vLLM of the same number: its own model, loader and post-load processing on one rank.

Everything from the description file to the tensors that `apply` reads is the engine's code. Stand-ins are: torch_npu
(our reference operators), compiled extensions, distributed groups, third parties, attention itself, and layers of other
models. One process can hold one release.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import npu_operators
import torch
import vllm_world
from released import unpacked, unpacked_sources
from stand_ins import stand_in_for
from torch import nn

_THIRD_PARTIES = """
PIL acl aiohttp anthropic arctic_inference blake3 cachetools cbor2 cloudpickle compressed_tensors cpuinfo cv2 depyf
diskcache einops fastapi flashinfer gguf ijson lark llguidance mcp memcache_hybrid memfabric_hybrid mistral_common
model_hosting_container_standards mooncake msgpack msgspec openai openai_harmony opentelemetry outlines outlines_core
pandas partial_json_parser prometheus_client pybase64 pydantic_settings quart scipy sentencepiece setproctitle starlette
tiktoken torchair torchvision transformers uvicorn uvloop watchfiles xgrammar zmq
"""
COMPILED = [
    "torch_npu",
    "vllm._C",
    "vllm._moe_C",
    "vllm.vllm_flash_attn",
    "vllm_ascend.vllm_ascend_C",
    "vllm.env_override",
]
OTHER_MODELS = [
    f"vllm_ascend.ops.{name}"
    for name in (
        "rel_pos_attention", "mm_encoder_attention", "conv", "gdn", "bailing_moe_linear_attn", "qwen2_decoder",
    )
]  # fmt: skip

CONFIG_MODULES = tuple(
    f"vllm_ascend.quantization.{name}" for name in ("configs.modelslim_config", "modelslim_config", "quant_config")
)
"""Where the quantization config is, the newest place first."""
PATCHES = ("patch_deepseek", "patch_weight", "patch_process_weights")
"""Beginnings of the names of the plugin's patches of vLLM, of those that a worker applies, that concern weights."""
UNSET = 77
"""In every parameter before it is loaded."""


class VllmAscend:
    """The release's modules, imported."""

    def __init__(self, release: str) -> None:
        self.release = release
        vllm = re.split(r"rc|\.post", release)[0]
        os.environ |= {"VLLM_VERSION": vllm, "VLLM_LOGGING_LEVEL": "CRITICAL"}
        self._plugin = _plugin(release)
        sys.path[:0] = [str(self._plugin), str(unpacked_sources("vllm", vllm, "vllm"))]
        npu_operators.install()
        stand_in_for([*_THIRD_PARTIES.split(), *COMPILED, *OTHER_MODELS])
        importlib.import_module("vllm").__version__ = vllm
        self._groups = [
            importlib.import_module(f"{package}.distributed.parallel_state") for package in ("vllm", "vllm_ascend")
        ]
        self._without_attention()
        self._utils = importlib.import_module("vllm_ascend.utils")
        if hasattr(self._utils, "_ascend_soc_version"):  # 0.11 asks the driver
            self._utils._ascend_soc_version = self._utils.AscendSocVersion.A2
        else:
            operators = importlib.import_module("vllm_ascend.ops.register_custom_ops")
            torch.ops.vllm.quantize = operators._quantize_impl  # registered for the device alone

        if self.release == "0.13.0":  # tries its two ways of computing a shared expert on the device
            experts = importlib.import_module("vllm_ascend.ops.fused_moe.fused_moe")
            experts.AscendSharedFusedMoE._validate_shared_expert_consistency = lambda experts: None
        context = importlib.import_module("vllm_ascend.ascend_forward_context")
        context._mc2_tokens_capacity = 64
        importlib.import_module("vllm.forward_context")._forward_context = vllm_world.Settings()
        self._utils._WEIGHT_PREFETCH_METHOD = MagicMock()  # moves weights into caches ahead of time
        self._patch()

    def _patch(self) -> None:
        """Patches one by one: their package imports the patches of all models and of the device's compiler."""
        folder = self._plugin / "vllm_ascend" / "patch" / "worker"
        package = ModuleType("vllm_ascend.patch.worker")
        package.__path__ = [str(folder)]
        sys.modules[package.__name__] = package
        for file in sorted(file for beginning in PATCHES for file in folder.glob(f"{beginning}*.py")):
            importlib.import_module(f"vllm_ascend.patch.worker.{file.stem}")

    def _without_attention(self) -> None:
        """Attention reads no weights of its own; it needs backends of the device."""
        place = importlib.import_module("vllm.model_executor.layers.mla")
        wrapper = getattr(place, "MultiHeadLatentAttentionWrapper", None) or place.MultiHeadLatentAttention

        class Attention(wrapper):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                nn.Module.__init__(self)

        name = "vllm_ascend.models.layers.mla" if self.release == "0.11.0" else "vllm_ascend.ops.mla"
        module = ModuleType(name)
        module.AscendMultiHeadLatentAttention = Attention  # type: ignore[attr-defined]
        sys.modules[name] = module

    def load(self, folder: Path, place: vllm_world.Place, mtp: bool = False) -> nn.Module:
        """`vllm serve FOLDER --quantization ascend` on one rank, up to the first token. Raises what the engine does.

        mtp: the draft model of multi-token prediction instead, as `--speculative-config` loads it.
        """
        vllm_world.enter(place, *self._groups)
        settings = vllm_world.configure(folder, place, mtp)
        vllm_world.make_current(settings)
        settings.quant_config = self._quant_config(settings)
        importlib.import_module("vllm_ascend.ascend_config").init_ascend_config(settings)
        self._utils.register_ascend_customop(settings)
        if self.release == "0.11.0":  # remembered at the start of a worker
            self._utils.is_enable_nz(vllm_config=settings)
        model = self._built(settings, mtp)
        self._fill(model, settings)
        finish = importlib.import_module("vllm.model_executor.model_loader.utils").process_weights_after_loading
        finish(model, settings.model_config, torch.device("cpu"))
        return model

    def _quant_config(self, settings: vllm_world.Settings) -> Any:
        """The engine's, of the folder's description, or of what it takes for one in config.json."""
        utilities = importlib.import_module("vllm.model_executor.model_loader.weight_utils")
        first_of(CONFIG_MODULES)  # registers it
        config = utilities.get_quant_config(settings.model_config, settings.load_config)
        if hasattr(config, "maybe_update_config"):
            config.maybe_update_config(settings.model_config.model)
        return config

    def _built(self, settings: vllm_world.Settings, mtp: bool) -> nn.Module:
        name, model = ("deepseek_mtp", "DeepSeekMTP") if mtp else ("deepseek_v2", "DeepseekV3ForCausalLM")
        module = importlib.import_module(f"vllm.model_executor.models.{name}")
        before = torch.get_default_dtype()
        torch.set_default_dtype(settings.model_config.dtype)
        try:
            return getattr(module, model)(vllm_config=settings, prefix="")
        finally:
            torch.set_default_dtype(before)

    def _fill(self, model: nn.Module, settings: vllm_world.Settings) -> None:
        """Parameters are uninitialised memory; here they hold what nobody would take for a weight."""
        for parameter in model.parameters():
            parameter.data.fill_(UNSET)
        module = importlib.import_module("vllm.model_executor.model_loader.default_loader")
        module.DefaultModelLoader(settings.load_config).load_weights(model, settings.model_config)


def first_of(names: tuple[str, ...]) -> Any:
    """The first module that there is."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    raise ModuleNotFoundError(" or ".join(names))


def _plugin(release: str) -> Path:
    """The plugin, from its wheel; from its sources where there is none, with what its build would have said."""
    try:
        return unpacked("vllm-ascend", release)
    except subprocess.CalledProcessError:
        built = ModuleType("vllm_ascend._build_info")
        built.__device_type__ = "A2"  # type: ignore[attr-defined]
        sys.modules[built.__name__] = built
        return unpacked_sources("vllm-ascend", release, "vllm_ascend")
