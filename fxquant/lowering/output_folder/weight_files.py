"""Weight files of an output folder, found under the names of any engine."""

from pathlib import Path

from torch import Tensor

from fxquant.engines.table import weight_stems
from fxquant.errors import FxquantError
from fxquant.lowering.output_folder.layout import MTP_STEM
from fxquant.storage.safetensors import TensorInfo, read_header

STEMS = (*weight_stems(), MTP_STEM)


class WeightFiles:
    """Reader of the weight files of an output folder, tensor by tensor; nothing is mapped into memory."""

    def __init__(self, folder: Path) -> None:
        files = sorted({file for stem in STEMS for file in folder.glob(f"{stem}*.safetensors")})
        if not files:
            names = ", ".join(f"{stem}*.safetensors" for stem in STEMS)
            raise FxquantError(folder, f"has no weight file: {names}.", "Compile again.")
        self.folder = folder
        self.infos: dict[str, TensorInfo] = {}
        for file in files:
            self.infos |= read_header(file)

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        return self.infos[name].read()
