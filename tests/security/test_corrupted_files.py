"""Every file of an output, damaged: `verify` names it, or lists it as not looked at; it never hangs or breaks."""

from collections.abc import Callable
from pathlib import Path

import pytest
from damaged_files import NAMED, Made, expected, make_output, make_source, outcome

import fxquant
from fxquant.lowering.ascend.export.exported import write_exported
from fxquant.lowering.output_folder.manifest import FLOAT_GRAPH, MANIFEST, STAMPS

QUICK = [
    (MANIFEST, "cut in half", True), (MANIFEST, "a pipe", True), ("config.json", "a pipe", False),
    ("config.json", "a folder", True), (FLOAT_GRAPH, "middle byte", True), (FLOAT_GRAPH, "middle byte", False),
    ("fxquant_graph.json", "gone", False), ("fxquant_graph.json", "one byte more", False),
    ("quant_model_description.json", "a link to nothing", False), ("tokenizer.json", "empty", False),
    (STAMPS, "gone", True), ("quant_model_weight_w8a8.safetensors.index.json", "gone", False),
    ("optional/calibration.safetensors", "a pipe", False), ("optional/calibration.safetensors", "gone", False),
]  # fmt: skip


@pytest.fixture(scope="module")
def output_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """`made("onnx")`, once each."""
    known: dict[str, Made] = {}
    source = make_source(tmp_path_factory.mktemp("damaged"))

    def get(name: str) -> Made:
        if name not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fxquant.lowering.output.write_exported", write_exported)
                known[name] = make_output(name, source)
        return known[name]

    return get


def test_a_sound_output_is_verified(output_of: Callable[[str], Made]) -> None:
    output = output_of("ascend, sharded")
    assert fxquant.verify(output.folder).verdict == "verified"
    assert not {"config.json", "fxquant_graph.json", "model_ascend.py"} - set(output.files())


@pytest.mark.parametrize(("file", "damage", "manifest"), QUICK)
def test_a_damage_is_named_or_listed(
    output_of: Callable[[str], Made], file: str, damage: str, manifest: bool, tmp_path: Path
) -> None:
    kind, fact = outcome(output_of("ascend, sharded"), file, damage, manifest, tmp_path / "out")
    assert kind in expected(file, manifest), fact


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ascend", "onnx"])
def test_every_file_has_a_digest(output_of: Callable[[str], Made], name: str, tmp_path: Path) -> None:
    output = output_of(name)
    for file in set(output.files()) - {MANIFEST, STAMPS}:
        kind, fact = outcome(output, file, "middle byte", True, tmp_path / "out")
        assert kind == NAMED, f"{file}: {kind}: {fact}"


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["middle byte", "a pipe"])
def test_without_the_manifest_none_is_missed(output_of: Callable[[str], Made], damage: str, tmp_path: Path) -> None:
    output = output_of("ascend, sharded")
    for file in set(output.files()) - {MANIFEST}:
        kind, fact = outcome(output, file, damage, False, tmp_path / "out")
        assert kind in expected(file, False), f"{file}: {kind}: {fact}"
