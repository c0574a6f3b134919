"""What one target's output looks like: the form of its weights, its file names, and what its JSON files say."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxquant.policy.kinds import Kind
from fxquant.program.program import Program
from fxquant.schemes.schemes import Recipe, Scheme
from fxquant.schemes.weight_formats import WeightFormat

if TYPE_CHECKING:
    from fxquant.engine_readers import EngineReader

JsonObject = dict[str, Any]
FORMAT_VERSION = "1.0.0"


@dataclass(frozen=True)
class Engine:
    """Functions of the rewritten program, and names.

    weight_format         group size of the int4 linears (0: per channel, or there are none) → form on disk
    stem            what the names of weight files begin with
    numbered        a single weight file has a part number and an index too
    description     name of the description file
    header          keys of the description before those of the tensors
    config          keys to add to config.json
    mtp_files       float multi-token prediction layers are in weight files of their own, `mtp_float-…`
    open_reader     folder, tensor-parallel ranks, group size → what the engine makes of the files; raises FxquantError
                    where it refuses the folder as a whole. None: no Ascend engine reads them
    npu_graph       the graph beside the weights calls NPU operators; else it is ONNX
    """

    weight_format: Callable[[int], WeightFormat]
    stem: str
    description: str
    header: Callable[[Program], JsonObject]
    config: Callable[[Program], JsonObject]
    open_reader: Callable[[Path, int, int], "EngineReader"] | None
    numbered: bool = False
    mtp_files: bool = True
    npu_graph: bool = True

    @property
    def index(self) -> str:
        """Name of the index of several weight files."""
        return f"{self.stem}.safetensors.index.json"

    def file_name(self, part: int, parts: int) -> str:
        """Name of weight file `part`, counted from 1."""
        return f"{self.stem}.safetensors" if parts == 1 and not self.numbered else numbered(self.stem, part, parts)


def numbered(stem: str, part: int, parts: int) -> str:
    """`<stem>-00001-of-00003.safetensors`."""
    return f"{stem}-{part:05d}-of-{parts:05d}.safetensors"


def group_size(program: Program) -> int:
    """The one group size of the int4 linears; 0 where they are per channel or there are none."""
    return max((recipe.group_size for recipe in program.recipes.values()), default=0)


def versioned_header(program: Program) -> JsonObject:
    """Version, model type and group size, as vllm-ascend and SGLang expect them."""
    return {
        "version": FORMAT_VERSION,
        "model_quant_type": model_quant_type(program),
        "group_size": group_size(program),
    }


def model_quant_type(program: Program) -> str:
    """Engines read it as the type of what is neither attention nor expert; they decide the rest tensor by tensor."""
    return (Scheme.W8A8_DYNAMIC if program.recipes else Scheme.FLOAT).value


def scheme_keys(program: Program) -> JsonObject:
    """`quantize`, and `mla_quantize`, `moe_quantize`, `mtp_quantize` where all linears of the kind have one scheme."""
    keys = {"quantize": model_quant_type(program).lower()} if program.recipes else {}
    kinds = {Kind.ATTENTION: "mla_quantize", Kind.ROUTED_EXPERT: "moe_quantize"}
    for kind, key in kinds.items():
        keys |= _scheme_key(key, [r for m, r in program.recipes.items() if _kind(program, m) is kind])
    return keys | _scheme_key("mtp_quantize", list(program.mtp.recipes.values()))


def _scheme_key(key: str, recipes: list[Recipe]) -> JsonObject:
    schemes = {recipe.scheme for recipe in recipes}
    return {key: schemes.pop().value.lower()} if len(schemes) == 1 else {}


def _kind(program: Program, module: str) -> Kind:
    return program.parameters[f"{module}.weight"].kind
