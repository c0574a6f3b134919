"""GPTQ codes on disk, one file per module, kept until the weight files are written."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fxquant.errors import FxquantError, StoppedError
from fxquant.storage.hashing import hash_bytes
from fxquant.storage.safetensors import build_header, read_header, read_metadata
from fxquant.storage.system_errors import stopping

CODES, KEY, DIGEST = "codes", "key", "digest"


class SolvedCodes:
    """A folder of GPTQ codes. Picklable: the path is absolute, as other processes may have another working folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._temporary: TemporaryDirectory[str] | None = None

    @classmethod
    def temporary(cls) -> "SolvedCodes":
        """Codes in a temporary folder that is deleted with the object. Raises FxquantError if it cannot be created."""
        try:
            folder = TemporaryDirectory(prefix="fxquant-codes-")
        except OSError as error:
            fact = f"cannot be created: {error.strerror}."
            raise FxquantError("temporary folder", fact, "Set TMPDIR to a writable folder.") from None
        solved = cls(Path(folder.name))
        solved._temporary = folder
        return solved

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_temporary": None}

    def __call__(self, module: str) -> Tensor:
        file = self._file(module)
        with stopping(file, "cannot be read"):
            codes = read_header(file)[CODES].read()
        if hash_bytes(codes.numpy().tobytes()) != self.digest(module):
            raise StoppedError(file, "its codes are damaged.", "Start over with --restart.")
        return codes

    def has(self, module: str, key: str) -> bool:
        """Whether codes of the module are stored under the same `key`."""
        file = self._file(module)
        return file.is_file() and read_metadata(file).get(KEY) == key

    def digest(self, module: str) -> str:
        """XXH3-128 of the module's codes, in hex."""
        digest = read_metadata(self._file(module)).get(DIGEST)
        if digest is None:
            raise FxquantError(self._file(module), "holds no codes.", "Start over with --restart.")
        return digest

    def write(self, module: str, key: str, codes: Tensor) -> None:
        """Store `codes` int8 [n, k]; a kill leaves all of them or none."""
        data = codes.contiguous().view(torch.uint8).numpy().tobytes()
        metadata = {KEY: key, DIGEST: hash_bytes(data)}
        header, _ = build_header([(CODES, torch.int8, tuple(codes.shape))], metadata=metadata)
        file = self._file(module)
        whole = file.with_name(file.name + ".new")
        with stopping(whole, "cannot be written"):
            self.folder.mkdir(exist_ok=True)
            whole.write_bytes(header + data)
            whole.replace(file)

    def _file(self, module: str) -> Path:
        return self.folder / f"{module}.safetensors"
