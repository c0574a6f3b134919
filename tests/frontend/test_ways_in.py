"""Six ways to hand over one model, one graph: see the table in docs/model-file.md."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from places import MODEL_FILES
from tiny import YARN

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.checkpoint.config import parse_config
from fxquant.errors import FxquantError
from fxquant.frontend.adapt import adapted
from fxquant.frontend.build import build_model, build_program, trace_file
from fxquant.frontend.proof.copies import fill, named_tensors, wide_config
from fxquant.frontend.proof.logits import rounding_bound
from fxquant.frontend.source import open_source
from fxquant.frontend.user_file import open_user_file
from fxquant.models import DeepseekV3
from fxquant.program.operands import operand_node
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program, parse_program
from fxquant.program.structural_hash import structural_hash
from fxquant.runtime.execute import execute

WAYS = {
    "own model.py": "own.py",
    "transformers 5": "hugging_face.py",
    "DeepSeek's classes": "deepseek_style.py",
    "own MoE in LEAVES": "researcher.py",
}
"""Those that this environment can import; the folder itself and transformers 4 are the other two."""

CONFIGS = {
    "plain": {"num_nextn_predict_layers": 1},
    "yarn": {"rope_scaling": YARN | {"original_max_position_embeddings": 4096}, "max_position_embeddings": 163840},
    "no q_lora_rank, all MoE": {"q_lora_rank": None, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
}


def traced(name: str, folder: Path) -> Program:
    with open_user_file(MODEL_FILES / name) as file:
        return build_program(file, open_checkpoint(folder)).program


@pytest.mark.parametrize(
    "changes",
    [pytest.param(changes, id=name, marks=[pytest.mark.slow][name == "plain" :]) for name, changes in CONFIGS.items()],
)
@pytest.mark.parametrize("name", WAYS.values(), ids=WAYS.keys())
def test_every_way_in_gives_the_graph_of_the_folder(name: str, changes: dict, tiny_folder: Callable[..., Path]) -> None:
    """Byte for byte, and so the structural hash. On the way, a small copy is run against the file's own forward."""
    folder = tiny_folder(**changes)
    expected, program = open_source(folder).program(), traced(name, folder)
    assert structural_hash(program) == structural_hash(expected)
    assert dump_program(program) == dump_program(expected)


def test_another_model_has_another_hash(tiny_folder: Callable[..., Path]) -> None:
    hashes = [structural_hash(open_source(tiny_folder(**changes)).program()) for changes in CONFIGS.values()]
    assert len(set(hashes)) == len(hashes)


def test_a_program_comes_back_from_text_with_its_hash(tiny_folder: Callable[..., Path]) -> None:
    program = open_source(tiny_folder()).program()
    assert structural_hash(parse_program(dump_program(program), "here")) == structural_hash(program)


@pytest.mark.parametrize("form", ["naive", "absorb"])
def test_both_forms_of_deepseek_attention(form: str, tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    text = (MODEL_FILES / "deepseek_style.py").read_text()
    (tmp_path / "model.py").write_text(text.replace('attn_impl = "absorb"', f'attn_impl = "{form}"'))
    traced_file = trace_file(tmp_path / "model.py", tiny_folder())
    assert traced_file.program == dump_program(open_source(tiny_folder()).program())
    assert traced_file.input_kind.startswith("model.py, DeepSeek's inference code, compared: ")


def test_deepseek_linears_may_be_declared_in_fp8(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    text = (MODEL_FILES / "deepseek_style.py").read_text() + (
        "\ndef build_model(config):\n"
        "    from fxquant.frontend.deepseek_args import hf_to_model_args\n"
        "    kind = 'fp8' if torch.get_default_device().type == 'meta' else 'bf16'\n"
        "    return Transformer(ModelArgs(**{**hf_to_model_args(config), 'dtype': kind}))\n"
    )
    (tmp_path / "model.py").write_text(text)
    folder = tiny_folder(fp8=True)
    assert trace_file(tmp_path / "model.py", folder).program == dump_program(open_source(folder).program())


# the model is left as it was


@pytest.mark.parametrize("name", ["hugging_face.py", "deepseek_style.py", "researcher.py"])
def test_adapting_is_undone(name: str, tiny: Callable[..., Checkpoint]) -> None:
    config = parse_config(tiny().config, "tiny")
    with open_user_file(MODEL_FILES / name) as file:
        model = build_model(file, config, "meta")

        def state() -> list:
            return [(path, id(module), sorted(vars(module)), list(module._modules), list(module._parameters))
                    for path, module in model.named_modules()]  # fmt: skip

        before = state()
        with adapted(model, config, file.leaves) as root:
            assert isinstance(root, DeepseekV3)
            assert state() != before
        assert state() == before
        with pytest.raises(ZeroDivisionError), adapted(model, config, file.leaves):
            raise ZeroDivisionError
        assert state() == before


def test_attributes_of_the_instance_count(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    """What a file sets on a known class (here the softmax scale) is in its graph, and the copy agrees."""
    text = (MODEL_FILES / "hugging_face.py").read_text().replace("    return ", "    model = ") + (
        "    for layer in model.model.layers:\n        layer.self_attn.scaling *= 0.5\n    return model\n"
    )
    (tmp_path / "model.py").write_text(text)
    program, plain = trace_file(tmp_path / "model.py", tiny_folder()).program, open_source(tiny_folder()).program()
    scale = [node.args[-1] for node in plain.nodes(ops.mla_attention)]
    halved = [node.args[-1] for node in parse_program(program, "here").nodes(ops.mla_attention)]
    assert halved == [value / 2 for value in scale]


TRANSFORMERS = """
import transformers
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

class Half(hf.DeepseekV3DecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return hidden_states + (super().forward(hidden_states, **kwargs) - hidden_states) * 0.5

class Mine(hf.DeepseekV3Attention):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs)

def build_model(config):
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config.model_dump()))
    for layer in model.model.layers:
        {change}
    return model
"""


def test_the_layers_of_a_foreign_model_stay_its_own(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    (tmp_path / "model.py").write_text(TRANSFORMERS.format(change="layer.__class__ = Half"))
    program = parse_program(trace_file(tmp_path / "model.py", tiny_folder()).program, "here")
    assert [node.meta["module"] for node in program.nodes(torch.ops.aten.mul.Tensor)] == [
        "model.layers.0", "model.layers.1",
    ]  # fmt: skip


def test_an_attention_of_its_own_runs_its_own_forward_or_is_declared(
    tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    change = "layer.self_attn.__class__ = Mine"
    (tmp_path / "model.py").write_text(TRANSFORMERS.format(change=change))
    program = parse_program(trace_file(tmp_path / "model.py", tiny_folder()).program, "here")
    assert not program.nodes(ops.mla_attention)
    declared = TRANSFORMERS.format(change=change) + (
        "from fxquant import adapters\nLEAVES = {Mine: adapters.Attention(softmax_scale='scaling')}\n"
    )
    (tmp_path / "model.py").write_text(declared)
    assert trace_file(tmp_path / "model.py", tiny_folder()).program == dump_program(
        open_source(tiny_folder()).program()
    )


def test_a_large_model_that_ignores_config_cannot_be_checked(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    text = (MODEL_FILES / "deepseek_style.py").read_text()
    text += "\ndef build_model():\n    return Transformer(ModelArgs())\n"
    (tmp_path / "model.py").write_text(text)
    with pytest.raises(
        FxquantError, match=r"Transformer cannot be checked: .* Use config, so that a small copy can be compared"
    ):
        trace_file(tmp_path / "model.py", tiny_folder())


def test_left_padding_in_one_batch_is_that_of_transformers(tiny: Callable[..., Checkpoint]) -> None:
    """Two rows of unequal length in transformers' own batch with its mask, prefill only; a length not traced."""
    config = wide_config(parse_config(tiny().config, "tiny"))
    with open_user_file(MODEL_FILES / "hugging_face.py") as file, torch.no_grad():
        program = build_program(file, Checkpoint(Path("tiny"), config.model_dump(), {})).program
        model = build_model(file, config, "cpu").float()
        fill(model, 0.0)
        with adapted(model, config) as root:
            tensors = dict(named_tensors(root))
        ids = torch.randint(config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(1))
        mask = torch.tensor([[1] * 11, [0] * 5 + [1] * 6])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    past = [torch.zeros(2, 0, config.kv_lora_rank + config.qk_rope_head_dim)] * config.num_hidden_layers
    logits = execute(program, tensors.__getitem__, [[ids, mask, positions, *past]])[0][0]
    difference = (logits - expected)[mask.bool()].abs().max()
    assert difference <= rounding_bound(config, expected)


@pytest.mark.parametrize("name", WAYS.values(), ids=WAYS.keys())
def test_small_copies_route_like_large_models(name: str, tiny: Callable[..., Checkpoint]) -> None:
    """Bias, groups by the sum of their best two, and scores in float32 all decide in the copy that is compared."""
    config = parse_config(tiny().config, "tiny")
    program = open_source(tiny().folder).program() if name == "own.py" else traced(name, tiny().folder)
    (gate,) = program.nodes(ops.moe_gate)
    assert operand_node(gate, "logits").target == ops.router_logits
    sizes = (config.num_experts_per_tok, config.n_group, config.topk_group, True, config.routed_scaling_factor)
    assert tuple(gate.args[2:]) == sizes
    copy = wide_config(config)
    assert copy.n_group == config.n_group and copy.topk_group == config.topk_group < config.n_group
    logits = torch.randn(512, copy.n_routed_experts, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(copy.n_routed_experts, generator=torch.Generator().manual_seed(1)) / 10
    arguments = (copy.num_experts_per_tok, copy.n_group, copy.topk_group, True, 2.5)
    ids = ops.moe_gate(logits, bias, *arguments)[0]
    without_bias = ops.moe_gate(logits, torch.zeros_like(bias), *arguments)[0]
    without_groups = ops.moe_gate(logits, bias, copy.num_experts_per_tok, 1, 1, True, 2.5)[0]
    assert (ids != without_bias).any() and (ids != without_groups).any()


RELU = """
from torch import nn

import transformers


def build_model(config):
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config.model_dump()))
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    return model
"""


def test_a_published_mlp_with_another_activation_runs_its_own_forward(
    tiny: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    (tmp_path / "model.py").write_text(RELU)
    with open_user_file(tmp_path / "model.py") as file:
        program = build_program(file, tiny()).program
    relu = [node.meta["module"] for node in program.graph.graph.nodes if node.target == torch.ops.aten.relu.default]
    assert relu == ["model.layers.0.mlp.act_fn"]


HALF = """
import transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE


class Half(DeepseekV3MoE):
    def forward(self, hidden_states):
        return super().forward(hidden_states) * 0.5


def build_model(config):
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config.model_dump()))
    for layer in model.model.layers:
        if isinstance(layer.mlp, DeepseekV3MoE):
            layer.mlp.__class__ = Half
    return model
"""


def test_published_experts_run_as_one_operator_inside_an_edited_moe(
    tiny: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    (tmp_path / "model.py").write_text(HALF)
    with open_user_file(tmp_path / "model.py") as file:
        program = build_program(file, tiny()).program
    plain = open_source(tiny().folder).program()
    assert len(list(program.nodes(ops.moe_experts))) == len(list(plain.nodes(ops.moe_experts)))
    assert structural_hash(program) != structural_hash(plain)
