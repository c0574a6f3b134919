"""Every file of an output damaged in every way that a disk, a copy or a person damages files; does `verify` name it?"""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType

from fuzzing.seeds import SHAPE, write_texts, write_tokenizer
from tiny import write_checkpoint

import fxquant
from fxquant import CompileOptions, FxquantError
from fxquant.engines.table import Target
from fxquant.lowering.output_folder.manifest import MANIFEST, STAMPS
from fxquant.storage.safetensors import read_header
from fxquant.verification.report import VerifyReport

NAMED, UNREAD, MISSED, TRACEBACK, HANG = "named", "not looked at", "missed", "traceback", "hang"
SECONDS = 60
GROUPS = """
description: static attention, int4 experts in groups
extends: deepseek_w4a8
rules: [{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 64}]
"""
PER_CHANNEL = "deepseek_w4a8_per_channel_static"


def flip(place: Callable[[int], int]) -> Callable[[Path], None]:
    """One bit of the byte at `place(size)`."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        if data:
            data[place(len(data))] ^= 1
        path.write_bytes(data)

    return change


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """The file is gone, and something else lies in its place."""

    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": flip(lambda size: 0),
    "ninth byte": flip(lambda size: min(8, size - 1)),
    "middle byte": flip(lambda size: size // 2),
    "last byte": flip(lambda size: size - 1),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a megabyte of zeros": lambda path: path.write_bytes(b"\0" * (1 << 20)),
    "gone": lambda path: path.unlink(),
    "a folder": replaced(lambda path: path.mkdir()),
    "a pipe": replaced(os.mkfifo),
    "a link to nothing": replaced(lambda path: path.symlink_to("nothing")),
}


@dataclass(frozen=True)
class Made:
    """A sound output and its source."""

    name: str
    source: Path
    folder: Path
    target: Target

    def files(self) -> list[str]:
        """All of them, by their path in the folder."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())


OUTPUTS: dict[str, dict] = {
    "ascend": {"target": Target.ASCEND, "policy": GROUPS, "export": True},
    "ascend, sharded": {"target": Target.ASCEND, "policy": GROUPS, "max_shard_size": 60_000, "export": False},
    "mindie": {"target": Target.MINDIE, "policy": GROUPS, "export": False},
    "mindie-2.1rc1": {"target": Target.MINDIE_2_1RC1, "policy": GROUPS, "export": False},
    "vllm-ascend": {"target": Target.VLLM_ASCEND, "policy": PER_CHANNEL, "export": False},
    "sglang-npu": {"target": Target.SGLANG_NPU, "policy": PER_CHANNEL, "export": False},
    "onnx": {"target": Target.ONNX, "policy": GROUPS},
}
"""All calibrated."""


def make_source(base: Path) -> Path:
    """A tiny checkpoint with a tokenizer, and text beside it."""
    source = write_checkpoint(base / "checkpoint", **SHAPE)
    write_tokenizer(source)
    write_texts(base / "texts", source)
    (base / "groups.yaml").write_text(GROUPS)
    return source


def make_output(name: str, source: Path) -> Made:
    """The output of that name, beside its source."""
    options = dict(OUTPUTS[name])
    policy = str(source.parent / "groups.yaml") if options["policy"] is GROUPS else options["policy"]
    text, out = source.parent / "texts" / "text.safetensors", source.parent / name.replace(", ", "-")
    options |= {"policy": policy, "out": out, "calib": text, "verify": False}
    fxquant.compile(source, CompileOptions(**options))
    return Made(name, source, out, options["target"])


def outcome(output: Made, file: str, damage: str, manifest: bool, folder: Path) -> tuple[str, str]:
    """What `verify` says of a copy at `folder` with this damage: a kind, and its words.

    `manifest`: whether the output has it; without, the source is given, and the target.
    """
    shutil.copytree(output.folder, folder)
    if not manifest:
        (folder / MANIFEST).unlink(missing_ok=True)
    DAMAGES[damage](folder / file)
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    try:
        report = fxquant.verify(folder, None if manifest else output.source, target=None if manifest else output.target)
    except FxquantError as error:
        return _named(str(error), output, file)
    except TimeoutError as error:
        return HANG, str(error)
    except Exception as error:
        return TRACEBACK, repr(error)[:300]
    finally:
        signal.alarm(0)
        shutil.rmtree(folder)
    return _said(report, output, file)


def _alarm(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def _said(report: VerifyReport, output: Made, file: str) -> tuple[str, str]:
    misses = "; ".join(f"{check.name}: {miss}" for check in report.checks for miss in check.misses)
    if misses:
        return _named(misses, output, file)
    return (UNREAD, "listed") if file in unread(report) else (MISSED, report.verdict)


def unread(report: VerifyReport) -> list[str]:
    """Files that the report says it did not look at."""
    return list(report.unread)


def _named(text: str, output: Made, file: str) -> tuple[str, str]:
    """Named is the file, or a tensor in it; or the pattern of all weight files, where none is left."""
    names = [file]
    if file.endswith(".safetensors"):
        names += read_header(output.folder / file)
        names += [word for word in map(_word, text.split()) if "*" in word and fnmatch(file, word)]
    return (NAMED if any(name in text for name in names) else MISSED), text[:300]


def _word(text: str) -> str:
    return text.strip(".,:;()")


def expected(file: str, manifest: bool) -> tuple[str, ...]:
    """The outcomes that are right. Stamps serve the next compile alone, and the manifest has no digest of itself."""
    free = file in (STAMPS, MANIFEST) or not manifest
    return (NAMED, UNREAD) if free else (NAMED,)
