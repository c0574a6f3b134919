"""Model files of the tests as published versions: the structure of released files in words of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from places import MODEL_FILES
from torch import nn

from fxquant.frontend.recognition import difference, published
from fxquant.frontend.recognition.published import Version, read, versions
from fxquant.frontend.user_file import module_of, open_user_file


@contextmanager
def style_published() -> Iterator[None]:
    """Within this context its classes are recognised, whatever file has them."""
    known = (*versions(), *_own())
    with pytest.MonkeyPatch.context() as patch:
        for module in (published, difference):
            patch.setattr(module, "versions", lambda: known)
        published.forget()
        yield
    published.forget()


STYLES = {"deepseek_style.py": "deepseek", "remote_style.py": "remote code"}
"""File in tests/model_files → its family in versions.json."""


def _own() -> Iterator[Version]:
    for name, family in STYLES.items():
        with open_user_file(MODEL_FILES / name) as file:
            for cls in vars(module_of(file)).values():
                if isinstance(cls, type) and issubclass(cls, nn.Module):
                    yield _version(cls, family)


def _version(cls: type[nn.Module], family: str) -> Version:
    code = read(cls)
    assert code is not None
    statements = tuple(statement.digest for statement in code.statements)
    return Version(family, cls.__name__, "tests", code.digest, statements)
