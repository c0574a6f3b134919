"""Packed int4 reader: the header decides between integer group scales and one scale per output channel."""

from pathlib import Path

from fxquant.engine_readers.folder import WeightFolder, stated_group_size
from fxquant.engine_readers.linear_loader import LinearRules
from fxquant.engine_readers.packed_experts import PackedExperts
from fxquant.engine_readers.reader import EngineReader
from fxquant.errors import FxquantError

PACKED_VERSION = "1.0.0"


def open_packed(name: str, folder: Path, ranks: int, description: str, rules: LinearRules) -> EngineReader:
    """The reader of an engine that follows the header: group_size above 0: integer group scales; 0 or none: one scale
    per output channel.

    Raises FxquantError for a header with a group_size and the version of unpacked weights.
    """
    files = WeightFolder(folder, description)
    group_size = stated_group_size(folder / description, files.description)
    if group_size:
        check_packed(files)
    return EngineReader(name, files, ranks, rules, PackedExperts(files, ranks, group_size).load)


def check_packed(files: WeightFolder) -> None:
    """Raises FxquantError unless the header's version says that two int4 share a byte."""
    version = files.description.get("version", "0")
    if version != PACKED_VERSION:
        fact = f"version {version}: the engine reads the weights as unpacked."
        raise FxquantError(files.path / files.description_name, fact, f'Write version "{PACKED_VERSION}".')
