"""Tensor names: the path of a module, and the role that a tensor has in it, "weight" or "input_scale".

Only this module joins and splits them, except for names in foreign checkpoints.
"""


def tensor_name(module: str, role: str) -> str:
    """`<module>.<role>`; without the dot where one of them is empty."""
    return f"{module}.{role}" if module and role else module or role


def module_and_role(name: str) -> tuple[str, str]:
    """The inverse of `tensor_name`."""
    module, _, role = name.rpartition(".")
    return module, role
