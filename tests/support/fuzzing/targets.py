"""What reads foreign files: each target has the files that are mutated, and the function that reads them."""

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from unittest.mock import patch

import fxquant
from fuzzing import hostile
from fuzzing.mutators import (
    JsonMutator,
    LinesMutator,
    Mutator,
    NpyMutator,
    SafetensorsMutator,
    TextMutator,
)
from fuzzing.seeds import GROUP_SIZE, open_seed
from fxquant.api import open_graph
from fxquant.calibration.calibration_file import CALIBRATION, load_calibration
from fxquant.calibration.resume_state import load_state
from fxquant.checkpoint.checkpoint import block_size, open_checkpoint, open_config
from fxquant.checkpoint.config import parse_config, read_config
from fxquant.engines.table import ENGINES
from fxquant.engines.table import Target as Engine
from fxquant.lowering.output_folder.manifest import (
    FLOAT_GRAPH,
    GRAPH,
    LEDGER,
    MANIFEST,
    STAMPS,
    find_manifest,
    read_manifest,
)
from fxquant.lowering.weights.journal import go_on, read_fingerprint
from fxquant.lowering.weights.reuse import open_earlier
from fxquant.lowering.workspace import made_of
from fxquant.policy.policy import load_policy
from fxquant.processes.bounded_worker import BoundedWorker
from fxquant.program.program_file import load_program
from fxquant.program.structural_hash import structural_hash
from fxquant.program.text import format_program
from fxquant.progress import silent
from fxquant.storage.hashing import hash_bytes
from fxquant.storage.safetensors import read_header, read_metadata
from fxquant.text.documents import read_documents
from fxquant.text.load import load_batches
from fxquant.verification.file_checks import check_digests, check_sizes

Read = Callable[[Path], object]


@dataclass(frozen=True)
class Target:
    """`seed`: the folder whose `files` are mutated, one a case; `read`: what is done with a copy of it.

    cases    of a million, how many are its
    allowed  audit events, or names of code, that are part of what it does
    """

    name: str
    seed: str
    files: tuple[str, ...]
    read: Read
    cases: int
    allowed: tuple[str, ...] = ()

    def mutators(self, base: Path) -> dict[str, Mutator]:
        """File → its mutator, on the files under `base`."""
        return {name: mutator(base / self.seed / name) for name in self.files}


def mutator(path: Path) -> Mutator:
    """By the suffix."""
    data = path.read_bytes()
    makers: dict[str, Callable[[bytes], Mutator]] = {
        ".json": JsonMutator, ".jsonl": LinesMutator, ".safetensors": SafetensorsMutator, ".npy": NpyMutator,
        ".yaml": lambda text: TextMutator(text, hostile.YAML), ".jinja": lambda text: TextMutator(text, hostile.JINJA),
        ".txt": lambda text: TextMutator(text, hostile.TEXTS),
    }  # fmt: skip
    return makers[path.suffix](data)


def make_case(mutators: dict[str, Mutator], random: Random) -> tuple[str, bytes]:
    """A file's name and its damaged bytes."""
    name = random.choice(list(mutators))
    return name, mutators[name](random)


def _header(folder: Path) -> None:
    read_metadata(folder / "model.safetensors")
    read_header(folder / "model.safetensors")


def _config(folder: Path) -> None:
    config = read_config(folder)
    parse_config(config, folder)
    block_size(folder / "config.json", config)


def _model_args(folder: Path) -> None:
    parse_config(open_config(folder).config, folder)


def _text(name: str) -> Read:
    def read(folder: Path) -> None:
        with (
            patch("fxquant.text.tokenizer.BoundedWorker", _worker),
            patch("fxquant.text.chat_template.BoundedWorker", _worker),
        ):
            load_batches(folder / name, open_seed(folder), 4, 16)

    return read


def _worker(what: str, memory: int, seconds: float, **content_of: str) -> BoundedWorker:
    """One for all cases that open the same: their text is what differs."""
    content = hash_bytes(Path(content_of["file"]).read_bytes()) if "file" in content_of else content_of["text"]
    key = (what, seconds, content, os.getpid())  # the file of another process may be gone
    if key not in WORKERS:
        WORKERS[key] = BoundedWorker(what, memory, seconds, **content_of)
        for old in list(WORKERS)[:-4]:
            del WORKERS[old]
    return WORKERS[key]


WORKERS: dict[tuple[str, float, str, int], BoundedWorker] = {}


def _documents(name: str) -> Read:
    return lambda folder: list(read_documents(folder / name))


def _calibration(folder: Path) -> None:
    load_calibration(folder / CALIBRATION)


def _graph(name: str) -> Read:
    def read(folder: Path) -> None:
        program = load_program(folder / name)
        for _ in format_program(program, None):
            pass
        structural_hash(program)

    return read


def _manifest(folder: Path) -> None:
    find_manifest(folder)
    manifest = read_manifest(folder)
    check_sizes(manifest, folder)
    check_digests(manifest, folder, silent)
    manifest.checkpoint_path(folder).is_dir()
    open_earlier(folder)


def _stamps(folder: Path) -> None:
    made_of(folder, {})
    open_earlier(folder)


class _Same(str):
    """A digest that is the right one."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


def _state(folder: Path) -> None:
    """As if whoever wrote the file had made its digest, too."""
    with patch("fxquant.calibration.resume_state._digest", lambda tensors, metadata: _Same()):
        load_state(folder / "state.safetensors")


def _journal(folder: Path) -> None:
    path = folder / "journal.jsonl"
    read_fingerprint(path)
    go_on(path).stream.close()


def _reader(folder: Path) -> None:
    engine = ENGINES[Engine.ASCEND]
    assert engine.open_reader is not None
    reader = engine.open_reader(folder, 1, GROUP_SIZE)
    for module in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_proj"):
        reader.linear(module)
        reader.fused_with(module)
    reader.expert_linear("model.layers.1.mlp.experts.1.up_proj")


def _verify(folder: Path) -> None:
    fxquant.verify(folder, against=folder.parent / "checkpoint", target=Engine.ASCEND)


def _show(folder: Path) -> None:
    from fxquant.lowering.ascend.deployment import deployment

    deployment(open_graph(folder))


def _evaluate(folder: Path) -> None:
    text = folder.parent / "texts" / "text.safetensors"
    fxquant.evaluate(folder, text, samples=1, seq_len=12)  # on the float graph that it carries


def _run(folder: Path) -> None:
    for _ in itertools.islice(fxquant.run(folder, "ab c", 2), 2):
        pass


def _convert(folder: Path) -> None:
    fxquant.convert(folder, Engine.ONNX, folder.parent / "converted", verify=False, export=False, force=True)


INDEX, DESCRIPTION = "quant_model_weight_w8a8.safetensors.index.json", "quant_model_description.json"
OUTPUT = (MANIFEST, GRAPH, FLOAT_GRAPH, LEDGER, STAMPS, "config.json", DESCRIPTION, INDEX, CALIBRATION)
CHECKPOINT = "checkpoint"
WORKER = ("subprocess.Popen", "os.posix_spawn", "os.fork")
"""A tokenizer or a template runs in a process of its own; it costs some 0.1 s, and its time limit where it hangs."""
EMITTED = ("model_ascend.py",)
"""Its text runs where it is, byte for byte, what the graph emits."""
TEXTS = "texts"
TARGETS = (
    Target("safetensors header", CHECKPOINT, ("model.safetensors",), _header, 200_000),
    Target("checkpoint", CHECKPOINT, ("model.safetensors", "config.json"), open_checkpoint, 60_000),
    Target("index", "sharded", ("model.safetensors.index.json",), open_checkpoint, 80_000),
    Target("config.json", CHECKPOINT, ("config.json",), _config, 200_000),
    Target("config.json of ModelArgs", "model_args", ("config.json",), _model_args, 100_000),
    Target("policy", TEXTS, ("policy.yaml",), lambda folder: load_policy(str(folder / "policy.yaml")), 40_000),
    Target("documents .json", TEXTS, ("text.json",), _documents("text.json"), 40_000),
    Target("documents .jsonl", TEXTS, ("text.jsonl",), _documents("text.jsonl"), 40_000),
    Target("text .npy", TEXTS, ("text.npy",), _text("text.npy"), 60_000),
    Target("text .safetensors", TEXTS, ("text.safetensors",), _text("text.safetensors"), 60_000),
    Target("text .txt", TEXTS, ("text.txt",), _text("text.txt"), 20_000, WORKER),
    Target("text .json", TEXTS, ("text.json",), _text("text.json"), 20_000, WORKER),
    Target("text .jsonl", TEXTS, ("text.jsonl",), _text("text.jsonl"), 20_000, WORKER),
    Target("tokenizer", TEXTS, ("tokenizer.json",), _text("text.txt"), 2_000, WORKER),
    Target("tokenizer config, template", TEXTS, ("tokenizer_config.json",), _text("chat.jsonl"), 1_500, WORKER),
    Target("chat template", "chat", ("chat_template.jinja",), _text("chat.jsonl"), 600, WORKER),
    Target("graph", Engine.ASCEND, (GRAPH,), _graph(GRAPH), 24_000),
    Target("float graph", Engine.ASCEND, (FLOAT_GRAPH,), _graph(FLOAT_GRAPH), 16_000),
    Target("manifest", Engine.ASCEND, (MANIFEST,), _manifest, 25_000),
    Target("stamps", Engine.ASCEND, (STAMPS,), _stamps, 25_000),
    Target("calibration.safetensors", Engine.ASCEND, (CALIBRATION,), _calibration, 40_000),
    Target("calibration state", "unfinished", ("state.safetensors",), _state, 40_000),
    Target("engine's reader", Engine.ASCEND, ("config.json", DESCRIPTION, INDEX), _reader, 20_000),
    Target("journal", "unfinished", ("journal.jsonl",), _journal, 40_000),
    Target("verify OUT", Engine.ASCEND, OUTPUT, _verify, 500, EMITTED),
    Target("show OUT --fused", Engine.ASCEND, (GRAPH,), _show, 500),
    Target("eval OUT", Engine.ASCEND, (GRAPH, FLOAT_GRAPH, MANIFEST, CALIBRATION), _evaluate, 500),
    Target("run OUT", Engine.ASCEND, (GRAPH, MANIFEST, "tokenizer.json"), _run, 500, WORKER),
    Target("convert OUT", Engine.ASCEND, OUTPUT, _convert, 500),
)


def targets(names: Iterable[str]) -> list[Target]:
    """Those of these names; all where none is named."""
    selected = set(names)
    return [target for target in TARGETS if not selected or target.name in selected]
