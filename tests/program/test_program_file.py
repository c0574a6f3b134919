"""A program written and read back: the same bytes, the same numbers, and nothing but a program is accepted."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import equal, traced
from tiny import float_program, meta_model, random_ids, rewritten
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.models import DecoderLayer
from fxquant.program.program import Program
from fxquant.program.program_file import load_program, save_program
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.runtime.weight_providers import RecipeWeights

POLICIES = ["deepseek_w4a8", "deepseek_w4a8_per_channel", "deepseek_w4a8_shared_w4", "deepseek_w8a8", "float"]


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Checkpoint]) -> Checkpoint:
    return tiny()


@pytest.fixture(scope="module")
def document(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is written of the tiny model under deepseek_w4a8."""
    path = tmp_path_factory.mktemp("program") / "graph.json"
    save_program(rewritten(checkpoint, "deepseek_w4a8"), path)
    return json.loads(path.read_text())


def outputs(program: Program, checkpoint: Checkpoint) -> list[Tensor]:
    batch = prefill_inputs(program, random_ids(meta_model(checkpoint), 2, 5))
    return list(execute(program, RecipeWeights(program, checkpoint), [batch])[0])


def load_edited(document: dict[str, Any], tmp_path: Path) -> Program:
    (tmp_path / "graph.json").write_text(json.dumps(document))
    return load_program(tmp_path / "graph.json")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_round_trip_keeps_bytes_and_numbers(policy: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    program, (first, second) = rewritten(checkpoint, policy), (tmp_path / "first", tmp_path / "second")
    save_program(program, first)
    loaded = load_program(first)
    save_program(loaded, second)
    assert first.read_bytes() == second.read_bytes()
    assert (loaded.recipes, loaded.rules, loaded.parameters) == (program.recipes, program.rules, program.parameters)
    assert (loaded.config, loaded.dtype) == (program.config, program.dtype)
    assert equal(outputs(loaded, checkpoint), outputs(program, checkpoint))


@pytest.mark.parametrize(
    "options",
    [{"fp8": True, "num_nextn_predict_layers": 1}, {"dtype": torch.float16, "attention_bias": True}],
    ids=["fp8 with mtp", "float16 with bias"],
)
def test_other_models_make_the_round_trip(
    options: dict[str, Any], tiny: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint = tiny(**options)
    program, (first, second) = rewritten(checkpoint, "deepseek_w4a8"), (tmp_path / "first", tmp_path / "second")
    save_program(program, first)
    loaded = load_program(first)
    save_program(loaded, second)
    assert first.read_bytes() == second.read_bytes()
    assert (loaded.recipes, loaded.rules) == (program.recipes, program.rules)
    assert equal(outputs(loaded, checkpoint), outputs(program, checkpoint))


class SizesAndConstants(DecoderLayer):
    """Arithmetic on sizes, infinities, keyword arguments, a dtype and a slice."""

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        x = x * (x.shape[1] - 2) + x[:, :1]
        x = torch.clamp(x, min=-float("inf"), max=1e30)
        y, present = super().forward(x.to(torch.float32), *rest)
        return torch.where(torch.isnan(y), torch.zeros_like(y), y), present


def test_a_subclass_makes_the_round_trip(checkpoint: Checkpoint, tmp_path: Path) -> None:
    program, (first, second) = traced(checkpoint, SizesAndConstants), (tmp_path / "first", tmp_path / "second")
    save_program(program, first)
    loaded = load_program(first)
    save_program(loaded, second)
    assert first.read_bytes() == second.read_bytes()
    assert equal(outputs(loaded, checkpoint), outputs(program, checkpoint))


def test_two_traces_give_the_same_bytes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    first, second = (tmp_path / name for name in ("first", "second"))
    save_program(traced(checkpoint, DecoderLayer), first)
    save_program(float_program(checkpoint), second)
    assert first.read_bytes() == second.read_bytes()


def test_one_node_a_line(document: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path) -> None:
    program = load_edited(document, tmp_path)
    save_program(program, tmp_path / "again.json")
    lines = (tmp_path / "again.json").read_text().splitlines()
    names = [json.loads(line.rstrip(","))["name"] for line in lines[2:-1]]
    assert names == [node.name for node in program.graph.graph.nodes]


# what is refused


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "not a program"),
        (b"graph", "not a program"),
        (b"[]", "not a program"),
        (b"{}", "not a program"),
        (b"\xff\xfe", "not a program"),
        (b'{"format": 3}', "format 3"),
        (b'{"format": "1"}', "format 1"),
        (b'{"format": 2}', "not a program"),
        (b"[" * 100_000, "not a program"),
    ],
    ids=["empty", "text", "list", "object", "binary", "newer", "string", "format alone", "deep"],
)
def test_another_file_is_refused(content: bytes, fact: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_bytes(content)
    with pytest.raises(FxquantError, match=fact) as caught:
        load_program(path)
    assert caught.value.place == str(path) and caught.value.remedy


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="is missing"):
        load_program(tmp_path / "graph.json")


def first_call(document: dict[str, Any]) -> dict[str, Any]:
    return next(node for node in document["nodes"] if node["op"] == "call_function")


@pytest.mark.parametrize(
    "target",
    [
        "profiler::_record_function_enter.default", "python::exec", "python::__import__",
        "os::system.default", "aten::no_such_operator.default", "aten::add.no_such_overload", "fxq::linear.__class__",
        "aten::add", "add", "", "aten::from_file.default",
    ],
)  # fmt: skip
def test_an_unknown_operator_is_refused(target: str, document: dict[str, Any], tmp_path: Path) -> None:
    edited = copy.deepcopy(document)
    first_call(edited)["target"] = target
    with pytest.raises(FxquantError, match="not a program"):
        load_edited(edited, tmp_path)


def test_an_operator_of_another_namespace_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    """Though it would compute the same."""
    edited = copy.deepcopy(document)
    next(node for node in edited["nodes"] if node["target"] == "aten::add.Tensor")["target"] = "prims::add.default"
    with pytest.raises(FxquantError, match=r"operator \'prims::add\.default"):
        load_edited(edited, tmp_path)


def test_reading_touches_no_other_file(document: dict[str, Any], tmp_path: Path) -> None:
    """aten::from_file makes the file that it names."""
    edited, touched = copy.deepcopy(document), tmp_path / "made"
    index = document["nodes"].index(first_call(document))
    node = {"name": "made", "op": "call_function", "target": "aten::from_file.default", "args": [str(touched), True, 8]}
    edited["nodes"].insert(index, node | {"module": "", "kind": "other", "block": ""})
    with pytest.raises(FxquantError):
        load_edited(edited, tmp_path)
    assert not touched.exists()


@pytest.mark.parametrize("operator", ["call_module", "call_method", "exec"])
def test_an_unknown_sort_of_node_is_refused(operator: str, document: dict[str, Any], tmp_path: Path) -> None:
    edited = copy.deepcopy(document)
    first_call(edited)["op"] = operator
    with pytest.raises(FxquantError, match="not a program"):
        load_edited(edited, tmp_path)


def test_shapes_are_checked_when_read(document: dict[str, Any], tmp_path: Path) -> None:
    edited = copy.deepcopy(document)
    edited["parameters"]["model.layers.0.mlp.up_proj.weight"]["shape"] = [256, 255]
    with pytest.raises(FxquantError, match="has 256 features, the weight 255"):
        load_edited(edited, tmp_path)


def test_an_unknown_size_of_an_input_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    edited = copy.deepcopy(document)
    next(node for node in edited["nodes"] if node["op"] == "placeholder")["shape"] = ["batch", "width"]
    with pytest.raises(FxquantError, match="width"):
        load_edited(edited, tmp_path)


def test_a_node_before_its_inputs_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    edited = copy.deepcopy(document)
    edited["nodes"].reverse()
    with pytest.raises(FxquantError, match="not a program"):
        load_edited(edited, tmp_path)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of everything inside a document but its config."""
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = [(key, child) for key, child in value.items() if (path, key) != ((), "config")]
    elif isinstance(value, list):
        children = list(enumerate(value))
    return [path + (key,) for key, _ in children] + [p for key, child in children for p in places(child, (*path, key))]


Q_A = "model.layers.0.self_attn.q_a_proj"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["recipes", Q_A, "activation"], [0.0, 1.0]),
        (["recipes", Q_A, "scheme"], "W3A3"),
        (["recipes", Q_A, "dtype"], "F8"),
        (["parameters", f"{Q_A}.weight", "shape"], [64]),
        (["parameters", f"{Q_A}.weight", "kind"], "linear"),
        (["parameters", f"{Q_A}.weight", "module"], "model.layers.1.self_attn.q_a_proj"),
        (["parameters", f"{Q_A}.weight", "dtype"], "I4"),
        (["rules", Q_A], {"scheme": "W8A8"}),
        (["nodes", -1, "op"], None),
        (["nodes", -1, "args"], [[{"node": "absent"}]]),
        (["nodes", -2, "args"], []),
        (["dtype"], "F12"),
    ],
    ids=lambda value: ".".join(map(str, value[-2:])) if isinstance(value, list) else "",
)
def test_a_damaged_place_is_refused(path: list[Any], value: Any, document: dict[str, Any], tmp_path: Path) -> None:
    edited = copy.deepcopy(document)
    owner = edited
    for key in path[:-1]:
        owner = owner[key]
    assert path[-1] in owner if isinstance(owner, dict) else owner
    owner[path[-1]] = value
    with pytest.raises(FxquantError, match="not a program") as caught:
        load_edited(edited, tmp_path)
    assert caught.value.place == str(tmp_path / "graph.json")


@pytest.mark.parametrize("seed", range(16))
def test_a_damaged_program_is_refused_or_read(seed: int, document: dict[str, Any], tmp_path: Path) -> None:
    """Anything but the one exception would reach the user as a traceback."""
    generator, edited = random.Random(seed), copy.deepcopy(document)
    *path, last = generator.choice(places(document))
    owner = edited
    for key in path:
        owner = owner[key]
    if generator.random() < 0.3:
        del owner[last]
    else:
        owner[last] = generator.choice([None, -1, 10**30, 0.5, "", "x", [], [[]], {}, {"node": "x"}, {"a": 1, "b": 2}])
    try:
        load_edited(edited, tmp_path)
    except FxquantError as error:
        assert error.place == str(tmp_path / "graph.json")
