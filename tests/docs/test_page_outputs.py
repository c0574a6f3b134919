"""docs/page_outputs.py: what counts as the same output, and what does not. docs/page_blocks.py: what a page has."""

from pathlib import Path

import pytest
from page_blocks import blocks, fxquant_arguments
from page_outputs import difference

PRINTED = "verified\n┃ check ┃ checked ┃\n│ files │ 128 │\n│ kept │ 32 │\nperplexity 15.8922\n3.6 s, 614 MB of memory\n"


@pytest.mark.parametrize(
    "shown",
    [
        PRINTED,
        "verified\n…\nkept   32\n…",
        "…\nperplexity 15.9\n…",
        "verified\ncheck checked\nfiles 128\nkept 32\nperplexity 15.8\n4.0 s, 600 MB of memory",
    ],
)
def test_the_same(shown: str) -> None:
    assert not difference(shown, PRINTED)


@pytest.mark.parametrize(
    "shown",
    [
        "verified",  # more is printed
        PRINTED + "and more",
        PRINTED.replace("128", "129"),
        PRINTED.replace("15.8922", "18.1"),
        "verified\n…\nfiles 127\n…",
        "…\nkept 32\n…\nfiles 128\n…",  # another order
    ],
)
def test_another(shown: str) -> None:
    assert difference(shown, PRINTED)


def test_a_tail_is_looser_than_a_mean() -> None:
    line = "KL, 99th percentile 0.0229 top-1 agreement 93.92%"
    assert not difference(line, line.replace("0.0229", "0.0199"))
    for old, new in (("0.0229", "0.0149"), ("93.92", "73.92"), ("99th", "98th")):
        assert difference(line, line.replace(old, new))


def test_blocks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "## One\n\n```sh\na \\\n    b\n# no\nc\n```\n\n```text\nout\n```\n\ntext\n\n"
        '```sh title="not run: needs an NPU"\nd\n```\n```yaml title="my.yaml"\ne: 1\n```\n'
        '```sh title="exit code 1"\nf\n```\n'
    )
    import page_blocks

    of_page = blocks(page)
    page_blocks_root, page_blocks.ROOT = page_blocks.ROOT, tmp_path
    try:
        assert of_page[0].commands == ["a b", "c"]
        assert [block.follows for block in of_page] == [False, True, False, True, True]
        assert [block.why_not_run for block in of_page] == ["", "", "needs an NPU", "", ""]
        assert [block.file_name for block in of_page] == ["", "", "", "my.yaml", ""]
        assert [block.exit_code for block in of_page] == [0, 0, 0, 0, 1]
        assert of_page[0].section == "One"
    finally:
        page_blocks.ROOT = page_blocks_root


def test_fxquant_arguments() -> None:
    assert fxquant_arguments("A=1 fxquant show 'a b' | head; python -m fxquant plan x && ls") == [
        ["show", "a b"],
        ["plan", "x"],
    ]
