"""The verbs that write, each with the folder it starts from, its command, and what its output has to be."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fuzzing.seeds import SHAPE, write_texts, write_tokenizer
from output_folders import files_of
from tiny import write_checkpoint

from fxquant.lowering.output_folder.manifest import STAMPS

SMALL = ("--no-verify", "--no-export", "--quiet", "--jobs", "1")
W8A8 = "deepseek_w8a8"
GPTQ = """\
extends: deepseek_w8a8
smooth: []
unseen_experts: all_tokens
rules:
  - {kind: routed_expert, scheme: W8A8_DYNAMIC, algorithm: gptq}
  - {kind: attention, path: "*.kv_b_proj", scheme: FLOAT}
  - {kind: attention, scheme: W8A8_DYNAMIC, algorithm: gptq}
"""
DATA_FREE = """\
extends: deepseek_w8a8
smooth: []
rules:
  - {kind: attention, path: "*.kv_b_proj", scheme: FLOAT}
  - {kind: [attention, shared_expert, dense_mlp], scheme: W8A8_DYNAMIC, optional: true}
"""
OTHER = DATA_FREE + "  - {kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 64}\n"
CALIB = ("--calib", "text.safetensors")
COMPILE = ("compile", "checkpoint", "-o", "work/out")


@dataclass
class Scenario:
    """One command in a folder that has `checkpoint`, policies, `work/` with a user's files, and what `needs` makes.

    share      of the rounds
    command    arguments of `fxquant`, whose output is `work/out`
    needs      commands that make what it starts from: an earlier output, for example
    reference  file → bytes of its output; `before`: those of `work/out` at the start
    """

    name: str
    share: int
    command: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...] = ()
    folder: Path = Path()
    reference: dict[str, bytes] = field(default_factory=dict)
    before: dict[str, bytes] = field(default_factory=dict)
    operations: list[str] = field(default_factory=list)


def scenarios() -> list[Scenario]:
    """All of them, not prepared."""
    free = ("-p", "data_free.yaml", *SMALL)
    earlier = (*COMPILE[:3], "earlier", *free)
    over = (*COMPILE, "-p", "other.yaml", *SMALL)
    return [
        Scenario("compile", 10, (*COMPILE, *free)),
        Scenario("compile, calibrated", 12, (*COMPILE, "-p", W8A8, *CALIB, *SMALL)),
        Scenario("compile, gptq", 8, (*COMPILE, "-p", "gptq.yaml", *CALIB, *SMALL)),
        Scenario("compile --reuse", 10, (*COMPILE, *free, "--reuse", "earlier"), (earlier,)),
        Scenario("compile --force", 14, (*COMPILE, *free, "--force"), (over,)),
        Scenario("compile --jobs 2, shards", 10, (*COMPILE, *free[:-1], "2", "--max-shard-size", "40KB")),
        Scenario("compile for onnx", 8, (*COMPILE, *free, "-t", "onnx")),
        Scenario("compile, verified, exported", 2, (*COMPILE, *free[:2], "--quiet")),
        Scenario("convert", 10, ("convert", "earlier", "-t", "onnx", "-o", "work/out", *SMALL), (earlier,)),
        Scenario(
            "convert --force",
            6,
            ("convert", "earlier", "-t", "onnx", "-o", "work/out", *SMALL, "--force"),
            (earlier, over),
        ),
    ]


def write_template(folder: Path) -> Path:
    """What every scenario starts from."""
    source = write_checkpoint(folder / "checkpoint", **SHAPE)
    write_tokenizer(source)
    texts = write_texts(folder / "texts", source)
    shutil.copy(texts / "text.safetensors", folder)
    shutil.rmtree(texts)
    for name, text in (("gptq", GPTQ), ("data_free", DATA_FREE), ("other", OTHER)):
        (folder / f"{name}.yaml").write_text(text)
    work = folder / "work"
    (work / "notes").mkdir(parents=True)
    (work / "notes" / "mine.txt").write_text("a user's own\n")
    (work / "out.txt").write_text("a user's own\n")
    return folder


def prepare(
    scenario: Scenario, template: Path, folder: Path, run: Callable[[Path, tuple[str, ...]], list[str]]
) -> None:
    """Make what it starts from, and its reference, by `run`, which gives the kinds of its operations."""
    shutil.copytree(template, folder)
    for command in scenario.needs:
        run(folder, command)
    scenario.folder = folder
    scenario.before = output_files(folder)
    done = Path(shutil.copytree(folder, folder.with_name(folder.name + "-reference")))
    scenario.operations = run(done, scenario.command)
    scenario.reference = output_files(done)
    shutil.rmtree(done)


def output_files(folder: Path) -> dict[str, bytes]:
    """The files of `work/out`, without the one that knows times."""
    return files_of(folder / "work" / "out", (STAMPS,)) if (folder / "work" / "out").is_dir() else {}
