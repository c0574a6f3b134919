"""Tensor names: joined from a module and a role in one place, and taken apart in one."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import fxquant
from fxquant.policy.kinds import Kind
from fxquant.program.program import Parameter
from fxquant.schemes.roles import module_and_role, tensor_name

SOURCE = Path(fxquant.__file__).parent
FOREIGN = ("checkpoint/*", "engine_readers/*", "engines/*/reader.py")
"""They read names that others gave."""
WRITTEN_OUT = {
    "schemes/roles.py": "the place",
    "frontend/adapters.py": "what the weights of a user's own classes are called",
    "frontend/families/deepseek.py": "what DeepSeek calls the weights of its own classes",
}
"""Files with a role in a dotted name → why."""
ROLES = ("weight", "bias")


@pytest.mark.parametrize("module, role", [("model.layers.3.self_attn.o_proj", "weight"), ("", "weight"), ("a", "b")])
def test_a_name_is_taken_apart_as_it_was_joined(module: str, role: str):
    assert module_and_role(tensor_name(module, role)) == (module, role)


def test_a_name_of_no_role_is_the_module():
    assert tensor_name("model.norm.weight", "") == "model.norm.weight"


def test_a_stacked_parameter_has_a_module_for_each_tensor():
    names = ("mlp.experts.0.up_proj.weight", "mlp.experts.1.up_proj.weight")
    parameter = Parameter(names, "mlp.experts.up_proj", Kind.ROUTED_EXPERT, "weight", stacked=True)
    assert parameter.modules == ("mlp.experts.0.up_proj", "mlp.experts.1.up_proj")


# the source


def dotted_roles(tree: ast.AST) -> Iterator[ast.AST]:
    """`"….weight"` and `f"{module}.{role}"`, but not in docstrings."""
    docstrings = {statement.value for statement in ast.walk(tree) if isinstance(statement, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in docstrings and str(node.value).endswith(DOTTED):
            yield node
        if isinstance(node, ast.JoinedStr):
            for before, after in zip(node.values, node.values[1:], strict=False):
                name = getattr(getattr(after, "value", None), "id", "")
                if name in ("suffix", "role") and str(getattr(before, "value", "")).endswith("."):
                    yield node


DOTTED = tuple(f".{role}" for role in ROLES)


def test_no_source_joins_or_cuts_names():
    files = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
    joining = {name for name, path in files.items() if any(dotted_roles(ast.parse(path.read_text())))}
    assert {name for name in joining if not any(fnmatchcase(name, pattern) for pattern in FOREIGN)} == set(WRITTEN_OUT)


@pytest.mark.parametrize(
    "text", ['f"{module}.weight"', 'name.removesuffix(".weight")', 'f"{module}.{role}"', 'module + ".bias"']
)
def test_what_counts(text: str):
    assert any(dotted_roles(ast.parse(f"x = {text}")))


@pytest.mark.parametrize("text", ['tensor_name(module, "weight")', 'specs["weight"]', 'f"{place}.{projection}"'])
def test_what_does_not(text: str):
    assert not any(dotted_roles(ast.parse(f"x = {text}")))
