"""fxquant run"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxquant.errors import FxquantError
from fxquant.tools.compile_options import Prepack
from fxquant.tools.console import errors as stderr
from fxquant.tools.console import print_notes
from fxquant.tools.stages import reporter

if TYPE_CHECKING:
    from fxquant.generation.prompts import Prompt

FROM_FILE = "[dim]default: generation_config.json[/]"


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled folder.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text to continue; - reads stdin.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts: a .txt with one per line, a .json or .jsonl of texts, chats or token ids.",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are what a user says: in the form of the chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --chat: the system message.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Stop after this many tokens. [dim]default: generation_config.json, else 64[/]", min=1
        ),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the best token, whatever generation_config.json says.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help=f"Sample at this temperature; 0: greedy. {FROM_FILE}", min=0)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help=f"Sample of the best tokens that sum to P. {FROM_FILE}", min=0, max=1),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help=f"Sample of the K best tokens; 0: of all. {FROM_FILE}", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of each prompt's own generator.", min=0)] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text.", show_default=False)
    ] = None,
    prepack: Prepack = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Prompts that run together.", min=1)] = 8,
    generation_config: Annotated[
        bool, typer.Option("--generation-config/--no-generation-config", help="Read generation_config.json.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each prompt only.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress and rates.")] = False,
) -> None:
    """Continue prompts: by ONNX Runtime where OUT has an ONNX graph, else by its fx graph on CPU.

    Greedy, unless OUT's generation_config.json or an option asks for sampling. Rates and memory follow on stderr.
    """
    from fxquant.api import GenerateOptions, open_generator
    from fxquant.tools.generated import show

    options = GenerateOptions(
        max_new_tokens=max_new_tokens,
        chat=chat,
        system=system,
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop or (),
        batch_size=batch_size,
        generation_config=generation_config,
        prepack=prepack,
    )
    given = asked_prompts(prompt, prompts)  # a wrong file is found before the model is opened
    generator = open_generator(out, options)
    if not quiet:
        print_notes(generator.notes, to=stderr)
    report = reporter(quiet or len(given) == 1, beside_text=True)  # one text is its own progress
    show(generator, generator.encode(given, report), report, as_json, quiet)


def asked_prompts(prompt: str | None, file: Path | None) -> "list[Prompt]":
    """The prompts of the command line, of stdin or of a file."""
    from fxquant.generation.prompts import STDIN, read_prompts, stdin_prompt, text_prompt

    if (prompt is None) == (file is None):
        fact = "there is no prompt." if prompt is None else "both are given."
        raise FxquantError("--prompt, --prompts", fact, "Pass --prompt TEXT, --prompt - for stdin, or --prompts FILE.")
    if file is not None:
        return read_prompts(file)
    assert prompt is not None
    return [stdin_prompt() if prompt == STDIN else text_prompt(prompt)]
