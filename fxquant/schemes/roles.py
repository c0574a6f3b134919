"""Tensor names: the path of a module, and the role that a tensor has in it, "weight" or "input_scale".

Nothing else joins the two or takes them apart, but for the names of foreign checkpoints.
"""


def tensor_name(module: str, role: str) -> str:
    """`<module>.<role>`; without the dot where one of them is empty."""
    return f"{module}.{role}" if module and role else module or role


def module_and_role(name: str) -> tuple[str, str]:
    """What `tensor_name` joined."""
    module, _, role = name.rpartition(".")
    return module, role
