"""tests/model_files/deepseek_style.py as a published version: the structure of DeepSeek's file in words of ours."""

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


def _own() -> Iterator[Version]:
    with open_user_file(MODEL_FILES / "deepseek_style.py") as file:
        for name, cls in vars(module_of(file)).items():
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                code = read(cls)
                assert code is not None
                statements = tuple(statement.digest for statement in code.statements)
                yield Version("deepseek", name, "tests", code.digest, statements)
