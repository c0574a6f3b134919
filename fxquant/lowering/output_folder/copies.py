"""Copied files: what an output has of the checkpoint's folder besides weights, byte for byte; nothing of it is run."""

from pathlib import Path
from typing import Any

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.table import description_stems
from fxquant.errors import FxquantError
from fxquant.inputs.json_file import read_json
from fxquant.inputs.limits import CONFIG_BYTES
from fxquant.lowering.output_folder.remote_code import AUTO_MAP, code_files
from fxquant.lowering.output_folder.remote_code import OWN as OWN_CODE
from fxquant.storage.hashing import hash_bytes
from fxquant.storage.system_errors import stopping

COPIED_SUFFIXES = (".json", ".jinja", ".model")
COPIED = ("merges.txt", "vocab.txt", "MODEL_CARD.md")
LEGAL = ("LICENSE", "LICENCE", "NOTICE")
"""Beginnings of names; DeepSeek has LICENSE-CODE and LICENSE-MODEL."""
CARD, README = "MODEL_CARD.md", "README.md"
"""The source's README.md is its model card. Under that name it would be taken for a description of the output."""
OWN = ("fxquant_", *description_stems())
GENAI_CONFIG = "genai_config.json"
"""Says how a model.onnx is run, which is not the source's."""
LARGEST_PAGE = 16 << 20
DAMAGED = "Copy the file again, or compile again with --force: damaged parts are made again from the source."


def copied_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Name in the output → file of the checkpoint's folder, sorted by name."""
    folder = checkpoint.folder
    files = {file.name: file for file in folder.iterdir() if is_copied(file.name) and _is_page(file)}
    if CARD not in files and _is_page(folder / README):
        files[CARD] = folder / README
    for document in (checkpoint.config, _tokenizer_config(folder)):
        files |= code_files(document, folder) or {}
    return dict(sorted(files.items()))


def left_out_code(checkpoint: Checkpoint) -> list[str]:
    """A line for the user if config.json names remote code that can't be copied, so that `auto_map` is left out."""
    if code_files(checkpoint.config, checkpoint.folder) is not None:
        return []
    return [f"{AUTO_MAP} of config.json was left out: not every file that it names is in {checkpoint.folder}"]


def is_copied(name: str) -> bool:
    """Whether it is a tokenizer file, a licence or the like: neither the config, which is rewritten, nor an index or
    our own. Remote code is known by `auto_map` alone."""
    own = name in ("config.json", GENAI_CONFIG) or name.endswith(".index.json") or name.startswith(OWN)
    return not own and (name.endswith(COPIED_SUFFIXES) or name in COPIED or name.startswith(LEGAL))


def may_be_copied(name: str) -> bool:
    """Whether a file of an output with that name may have been copied."""
    return is_copied(name) or (name.endswith(".py") and "/" not in name and not name.startswith(OWN_CODE))


def _is_page(file: Path) -> bool:
    """Texts are bounded; a tokenizer may have any size."""
    return file.is_file() and (file.name.endswith(COPIED_SUFFIXES) or file.stat().st_size <= LARGEST_PAGE)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """Empty if there is none, or none that can be read: it is copied as it is."""
    file = folder / "tokenizer_config.json"
    try:
        document = read_json(file, CONFIG_BYTES, lenient=True) if file.is_file() else {}
    except FxquantError:
        return {}
    return document if isinstance(document, dict) else {}


def write_copy(file: Path, target: Path, digest: str | None) -> None:
    """Copy a document. Raises FxquantError unless its bytes are those of `digest`."""
    with stopping(file, "cannot be copied"):
        data = file.read_bytes()
        if digest is not None and hash_bytes(data) != digest:
            raise damaged(file)
        target.write_bytes(data)


def damaged(file: Path, tensor: str = "") -> FxquantError:
    """The error for a file of an output that is not as it was written."""
    what = f"tensor {tensor} is" if tensor else "is"
    return FxquantError(file, f"{what} not as it was written: the manifest has another hash.", DAMAGED)
