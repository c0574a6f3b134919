"""A graph file is data: every field of it, spoiled in every way, is refused or read as it says, and runs nothing."""

import copy
import gc
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_attacks import ATTACKS, Attack, attacked, attribute_chain, placeholder_target
from safetensors.torch import save_file
from spoiled_documents import Text, pattern, places, spoiled
from tiny import FEW_MODULES, rewritten
from typer.testing import CliRunner
from watching import watched

import fxquant
from fxquant import CompileOptions, FxquantError
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.table import Target
from fxquant.frontend.source import open_source
from fxquant.frontend.traced import Traced
from fxquant.lowering.output_folder.manifest import GRAPH
from fxquant.program.bounded_shapes import BoundedRules
from fxquant.program.program_file import dump_program, parse_program
from fxquant.tools.main import app

GROUPED = {"n_routed_experts": 4, "n_group": 2}
CODE = "__import__('os').system('exit 1')"
HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 10**12, 10**30, 0.5, 1e308, "", "x", "w", "torch", "output", "__class__", "a.__class__.b",
    CODE, f"past_1={CODE}", f"x\n{CODE}", '"""', "é", "\x1b[2J", "x" * 5000, "aten::__init__.__getattribute__",
    "aten::__setattr__.__call__", "aten::chr", "aten::from_file.default", "fxq::linear.__class__", "python::exec",
    "python::mul", "aten::repeat.default", "aten::add.Tensor", "FLOAT", "I64", [], {}, [[]], [10**12], [None],
    {"node": "x"}, {"node": "output"}, {"node": "input_ids"}, {"node": []}, {"dtype": "__dict__"}, {"dtype": "float32"},
    {"float": CODE}, {"float": "nan"}, {"map": {}}, {"map": {CODE: 1}}, {"map": {"device": "cuda"}}, {"a": 1, "b": 2},
    json.loads("[" * 60 + "]" * 60),
]  # fmt: skip


@pytest.fixture(scope="module")
def document(tiny: Callable[..., Checkpoint]) -> dict[str, Any]:
    """What is written of a model with both kinds of layers and a quantized MTP layer."""
    return written(tiny)


@pytest.fixture(scope="module")
def one_layer(tiny: Callable[..., Checkpoint]) -> dict[str, Any]:
    """Of a model with one layer, of experts, beside the MTP layer: a second has the same fields once more."""
    return written(tiny, num_hidden_layers=1, first_k_dense_replace=0)


def written(tiny: Callable[..., Checkpoint], **changes: Any) -> dict[str, Any]:
    """With as many experts as groups need."""
    checkpoint = tiny(fp8=True, num_nextn_predict_layers=1, **FEW_MODULES | GROUPED | changes)
    return json.loads(dump_program(rewritten(checkpoint, "deepseek_w4a8")))


def normal(document: dict[str, Any]) -> dict[str, Any]:
    """Without what says nothing: keys of null, and the default algorithm."""
    plain = copy.deepcopy(document)
    for node in plain["nodes"]:
        for key in ("kwargs", "dtype", "shape"):
            if node.get(key, ...) in (None, {"map": {}}):
                node.pop(key, None)
    for recipe in [*plain["recipes"].values(), *plain["mtp"]["recipes"].values()]:
        for key, default in (("algorithm", "min_max"), ("activation", None)):
            if recipe.get(key) == default:
                recipe.pop(key, None)
    return plain


def check(document: dict[str, Any]) -> bool:
    """`check_text` of its own text."""
    return check_text(json.dumps(document))


def check_text(text: str) -> bool:
    """Refused, or read as what it says; nothing runs. → whether it was refused."""
    with watched() as events:
        try:
            program = parse_program(text, "graph")
        except FxquantError as error:
            assert error.place in ("graph", "config.json") and len(str(error)) < 6000, error
            program = None
        stored = None if program is None else json.loads(dump_program(program))
    assert not events
    assert stored is None or stored == normal(json.loads(text))
    return stored is None


def test_the_document_itself_is_read(document: dict[str, Any]) -> None:
    assert not check(document)


def test_every_sort_of_place_spoiled(document: dict[str, Any]) -> None:
    """Each field of the document, and of a node of each operator, in one way."""
    generator, seen, refused = random.Random(0), set(), 0
    for path in list(places(document)):
        if (sort := pattern(document, path)) not in seen and sort[0] != "config":
            seen.add(sort)
            selected = generator.choice((0, 0, 1, 2))
            for number, changed in enumerate(spoiled(document, path, generator.choice(HOSTILE))):
                refused += number == selected and check(changed)
    assert len(seen) > 150 and refused > 100


def test_the_text_of_a_spoiled_document_is_its_own(document: dict[str, Any]) -> None:
    """Pieced together of what did not change, at each sort of place."""
    text, seen = Text(document), set()
    for path in list(places(document)):
        if (sort := pattern(document, path)) not in seen:
            seen.add(sort)
            for changed in spoiled(document, path, CODE):
                assert text.changed(changed, path) == json.dumps(changed)


class KnownShapes(BoundedRules):
    """What a call of a signature gives is known from the documents before; one that raises is made again."""

    known: defaultdict[int, dict[Any, Any]] = defaultdict(dict)

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._results = self.known[limit]


@pytest.fixture
def thousands(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Documents that differ in one place are read faster."""
    monkeypatch.setattr("fxquant.program.builder.BoundedRules", KnownShapes)
    gc.collect()
    gc.freeze()  # else collections walk all that torch has imported, again and again
    yield
    gc.unfreeze()
    KnownShapes.known.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("thousands")
def test_every_place_spoiled(one_layer: dict[str, Any], document: dict[str, Any]) -> None:
    """Every field of every node of a layer in one way, and each sort of place of all layers in a dozen."""
    generator, seen = random.Random(1), set()
    for whole, again in ((one_layer, 1), (document, 0)):
        text = Text(whole)
        for path in list(places(whole)):
            sort = pattern(whole, path)
            for number, value in enumerate(generator.sample(HOSTILE, again if sort in seen else 12)):
                for changed in spoiled(whole, path, value, gone=number == 0):
                    check_text(text.changed(changed, path))
            seen.add(sort)
    assert len(seen) > 470


# the attacks that once ran


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Path:
    """The tiny model for the Ascend target, and ids to measure it on beside it."""
    folder = tmp_path_factory.mktemp("attacks")
    save_file({"ids": torch.arange(24).view(2, 12)}, folder / "ids.safetensors")
    options = CompileOptions(policy="deepseek_w4a8_dynamic", out=folder / "out", verify=False)
    return fxquant.compile(tiny_folder(), options).out


USES: dict[str, Callable[[Path, Path], Any]] = {
    "show": lambda out, ids: fxquant.api.open_graph(out),
    "eval": fxquant.evaluate,
    "sensitivity": fxquant.api.sensitivity,
    "verify": lambda out, ids: fxquant.verify(out),
    "run": lambda out, ids: list(fxquant.run(out, "hello", 1)),
    "convert": lambda out, ids: fxquant.convert(out, Target.MINDIE, out.with_name("new"), export=False),
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_what_once_ran_is_refused_by_every_command(attack: Attack, compiled: Path, tmp_path: Path) -> None:
    out, touched = attacked(compiled, tmp_path, attack)
    for name, use in USES.items():
        with watched() as events, pytest.raises(FxquantError, match="not a program of fxquant"):
            use(out, compiled.with_name("ids.safetensors"))
        assert not events and not touched.exists(), name
        assert not out.with_name("new").exists()


def test_a_spoiled_float_graph_is_refused(compiled: Path, tmp_path: Path) -> None:
    out, touched = attacked(compiled, tmp_path, lambda document, command: None)
    document = json.loads((out / "fxquant_float_graph.json").read_text())
    placeholder_target(document, f"touch {touched}")
    (out / "fxquant_float_graph.json").write_text(json.dumps(document))
    with watched() as events, pytest.raises(FxquantError, match="not a program of fxquant"):
        fxquant.evaluate(out, compiled.with_name("ids.safetensors"))
    assert not events and not touched.exists()


@pytest.mark.parametrize("attack", [placeholder_target, attribute_chain], ids=lambda attack: attack.__name__)
def test_a_graph_beside_a_checkpoint_is_refused(
    attack: Attack, compiled: Path, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    out, touched = attacked(compiled, tmp_path, attack)
    checkpoint = shutil.copytree(tiny_folder(), tmp_path / "checkpoint")
    shutil.copyfile(out / GRAPH, checkpoint / GRAPH)
    with watched() as events:
        result = CliRunner().invoke(app, ["show", str(checkpoint)])
    assert isinstance(result.exception, FxquantError) and not events and not touched.exists()


def test_no_code_is_made_of_a_graph(compiled: Path, tmp_path: Path) -> None:
    """Of a good one: torch.fx would generate and execute the text of a forward."""
    ids = compiled.with_name("ids.safetensors")
    with watched() as events:
        copied = copy.deepcopy(fxquant.api.open_graph(compiled))
        assert fxquant.evaluate(compiled, ids).tokens == 22
        fxquant.api.sensitivity(compiled, ids)
        assert fxquant.verify(compiled).ok
        report = fxquant.convert(compiled, Target.MINDIE, tmp_path / "new", export=False)
    assert report.verification is not None and report.verification.ok and not events
    assert dump_program(copied) == (compiled / GRAPH).read_text()


def test_generated_code_is_seen() -> None:
    """By what the tests above watch with."""
    with watched() as events:
        torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    assert events


def test_a_graph_of_a_model_file_is_read_as_one_of_a_folder(
    document: dict[str, Any], tmp_path: Path, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its process gives back is text, and the same reader reads it."""
    touched = tmp_path / "made"
    spoiled_one = copy.deepcopy(document)
    placeholder_target(spoiled_one, f"touch {touched}")
    traced = Traced(json.dumps(spoiled_one), tiny_folder(), None, "model.py")
    monkeypatch.setattr("fxquant.frontend.source.trace_in_child", lambda *_: traced)
    (tmp_path / "model.py").write_text("")
    source = open_source(tmp_path / "model.py")
    with watched() as events, pytest.raises(FxquantError, match="not a program of fxquant"):
        source.program()
    assert not events and not touched.exists()
