"""Engine: names and headers of its weight files, their reader, and how to start it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxquant.engines.serving import RankLayout, Serving
from fxquant.schemes.weight_formats import WeightFormat

if TYPE_CHECKING:
    from fxquant.engine_readers import EngineReader
    from fxquant.program.program import Program

JsonObject = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Names, and functions of the rewritten program. What the engine refuses is in the contract.yaml beside it.

    weight_format    group size of the int4 linears (0: per channel, or there are none) → format on disk
    int4_group_size  the group size of rules that say `auto`: the largest that its newest release loads; 0: per channel
    stem             beginning of the names of weight files
    numbered         a single weight file has a part number and an index too
    description      name of the description file
    header           keys of the description before those of the tensors
    config           keys to add to config.json
    mtp_files        float multi-token prediction layers are in weight files of their own, `mtp_float-…`
    open_reader      folder, tensor-parallel ranks, group size → the engine's reader of the files; raises FxquantError
                     if the engine refuses the whole folder. None: no Ascend engine reads them
    serve            how to start the engine on an output: a command or a setting, as one line
    where            where that line goes, unless it is a shell command
    model_code       it runs model code of its own on the weights, not the graph beside them
    npu_graph        the graph beside the weights calls NPU operators; else it is ONNX
    reads_sections   it takes the types of linears from config.json, one for each section, not from the description
    reads_tokenizer  it needs tokenizer files in the folder
    """

    weight_format: Callable[[int], WeightFormat]
    stem: str
    description: str
    header: Callable[["Program"], JsonObject]
    config: Callable[["Program"], JsonObject]
    open_reader: Callable[[Path, int, int], "EngineReader"] | None
    serve: Callable[[Serving], str]
    int4_group_size: int = 256
    where: str = ""
    model_code: bool = True
    numbered: bool = False
    mtp_files: bool = True
    npu_graph: bool = True
    reads_sections: bool = False
    reads_tokenizer: bool = True

    def read(self, folder: Path, layout: RankLayout, group_size: int) -> "EngineReader | None":
        """Its reader of `folder` on these ranks, with whole experts if they are expert parallel."""
        if self.open_reader is None:
            return None
        reader = self.open_reader(folder, layout.tp, group_size)
        return reader if layout.ep == 1 else reader.with_whole_experts(self.open_reader(folder, 1, group_size))

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
