"""Engine table: engines a model can be compiled for, by name. All other code asks it; it imports no torch."""

from enum import StrEnum
from pathlib import Path

from fxquant.engines import ascend, mindie, mindie_2_1rc1, onnx, sglang_npu, vllm_ascend
from fxquant.engines.engine import Engine


class Target(StrEnum):
    """Values of `--target`, and of `target` in manifests and contracts."""

    ASCEND = "ascend"
    MINDIE = "mindie"
    MINDIE_2_1RC1 = "mindie-2.1rc1"
    VLLM_ASCEND = "vllm-ascend"
    SGLANG_NPU = "sglang-npu"
    ONNX = "onnx"

    @property
    def package(self) -> str:
        """Name of its package in `fxquant.engines`: that of "some-1.name" is `some_1_name`."""
        return self.value.replace("-", "_").replace(".", "_")


ENGINES: dict[Target, Engine] = {
    Target.ASCEND: ascend.ENGINE,
    Target.MINDIE: mindie.ENGINE,
    Target.MINDIE_2_1RC1: mindie_2_1rc1.ENGINE,
    Target.VLLM_ASCEND: vllm_ascend.ENGINE,
    Target.SGLANG_NPU: sglang_npu.ENGINE,
    Target.ONNX: onnx.ENGINE,
}
DEFAULT = Target.ASCEND


def weight_stems() -> tuple[str, ...]:
    """Beginnings of the names of weight files, of all engines."""
    return tuple(sorted({engine.stem for engine in ENGINES.values()}))


def description_stems() -> tuple[str, ...]:
    """Names of description files without their suffix, of all engines."""
    return tuple(sorted({Path(engine.description).stem for engine in ENGINES.values()}))


def onnx_targets() -> list[Target]:
    """Targets whose graph is ONNX."""
    return [target for target, engine in ENGINES.items() if not engine.npu_graph]
