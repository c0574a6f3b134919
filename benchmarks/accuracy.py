"""What policies cost in accuracy: python benchmarks/accuracy.py MODEL --text EVAL --calib CALIB -o ROWS.jsonl

Nothing is compiled: integers are made as they are needed, as in `fxquant compare`. A row is appended when it is done.
One that is there already, of the same weights, policy, texts and version of fxquant, is not computed again. The float
model runs once for all rows.

--vary BASE … adds variations of each of these policies: `CHANGES` of this file, or those of --changes FILE.yaml, which
has label → keys of a policy file. Beside them, `each_rule` gives keys to every rule of BASE that quantizes.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
import yaml
from pydantic import TypeAdapter
from rich.table import Table
from torch import Tensor

import fxquant
from fxquant.calibration.batches import batched
from fxquant.calibration.calibration_file import CALIBRATION, text_hash
from fxquant.checkpoint.stamped_bytes import checkpoint_files, stamp_files
from fxquant.compilation.options import CompileOptions
from fxquant.compilation.prepare import calibration, prepare
from fxquant.errors import FxquantError
from fxquant.evaluation.divergence import CHUNK, Evaluation, document_scores, logits, summary
from fxquant.evaluation.verbs import COMPARE_CACHE
from fxquant.frontend.source import Source, open_source
from fxquant.lowering.output_folder.layout import stored_tensors
from fxquant.lowering.weights.reuse import save_stamps
from fxquant.policy.kinds import Kind
from fxquant.policy.policy import LEAVE_OUT, Policy, load_policy, shipped_policies
from fxquant.program.program import Program
from fxquant.runtime.weight_providers import Cached, Read, RecipeWeights
from fxquant.schemes.schemes import Scheme
from fxquant.storage.hashing import hash_text
from fxquant.text.load import load_batches
from fxquant.tools.console import console, errors, show_error, size
from fxquant.tools.stages import reporter

CACHE_BYTES = 2 << 30
"""Bytes of the float model's logits that are kept for all rows."""
KEY = ("model", "policy", "text", "calib", "fxquant")
"""Hashes, and the version: what a row is a function of."""
CHANGES: dict[str, dict[str, Any]] = {
    "groups of 128": {"rules": [{"kind": "routed_expert", "scheme": "W4A8_DYNAMIC", "group_size": 128}]},
    "experts int8": {"rules": [{"kind": "routed_expert", "scheme": "W8A8_DYNAMIC"}]},
    "shared experts float": {"rules": [{"kind": "shared_expert", "scheme": "FLOAT"}]},
    "attention float": {"rules": [{"kind": "attention", "scheme": "FLOAT"}]},
    "min_max": {"activation_statistic": "min_max"},
    "rounded calibration": {"calibration_weights": "rounded"},
}
HEADINGS = (
    "policy",
    "perplexity",
    "/ float",
    "95 %",
    "KL per token",
    "95 %",
    "KL, 99th",
    "top-1",
    "weights",
    "seconds",
)


def main() -> int:
    """Compute what is missing, and print all rows. The exit code is 1 where a policy does not fit the model."""
    options = arguments()
    rows, failed = known_rows(options.output), False
    with tempfile.TemporaryDirectory() as folder:
        scorer = Scorer(options, Path(folder))
        table: list[dict[str, Any]] = []
        for label, name in policies(options, Path(folder)):
            try:
                policy = load_policy(name)
                key = scorer.key(policy)
                row = rows.get(tuple(key.values()))
                if row is None:
                    row = key | {"label": label} | scorer.row(label, policy)
                    with options.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    rows[tuple(key.values())] = row
                table.append(row | {"label": label})
            except FxquantError as error:
                show_error(error)
                failed = True
    show(table, options.markdown)
    return int(failed)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="text to score")
    parser.add_argument("--calib", type=Path, help="calibration text; default: the file beside the model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--policies", nargs="*", help="shipped names and YAML paths; default: all shipped ones")
    parser.add_argument("--vary", metavar="BASE", nargs="*", default=[], help="policies to vary")
    parser.add_argument("--changes", type=Path, help="YAML: label → keys of a policy file")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    return parser.parse_args()


def policies(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str]]:
    """(label, shipped name or path), variations written to `folder`."""
    for name in shipped_policies() if options.policies is None else options.policies:
        yield name, name
    changes = yaml.safe_load(options.changes.read_text(encoding="utf-8")) if options.changes else CHANGES
    varied = [variation for base in options.vary for variation in variations(base, changes)]
    for index, (label, text) in enumerate(varied):
        file = folder / f"variation_{index}.yaml"
        file.write_text(text, encoding="utf-8")
        yield label, str(file)


def variations(base: str, changes: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """(label, text of a policy file) of each change."""
    extends = str(Path(base).absolute()) if base.endswith((".yaml", ".yml")) else base
    texts = []
    for label, change in changes.items():
        document = {"extends": extends} | {key: value for key, value in change.items() if key != "each_rule"}
        if "each_rule" in change:
            document["rules"] = document.get("rules", []) + _rules_with(load_policy(base), change["each_rule"])
        texts.append((f"{base}, {label}", yaml.safe_dump(document, sort_keys=False)))
    return texts


def _rules_with(policy: Policy, keys: dict[str, Any]) -> list[dict[str, Any]]:
    """The rules of a policy in order, without those that earlier ones override; `keys` go to all
    that quantize layers of the graph."""
    rules: list[dict[str, Any]] = []
    covered: set[Kind] = set()
    for rule in policy.rules:
        if not rule.kind or not covered.issuperset(rule.kind):
            plain = rule.scheme in (Scheme.FLOAT, LEAVE_OUT) or Kind.MTP in rule.kind  # whose layers no search fits
            more = {} if plain else keys
            rules.append(rule.model_dump(mode="json", exclude_defaults=True) | more)
        covered |= set() if rule.path else set(rule.kind)
    return rules


def known_rows(file: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Key → row. A last line that a kill cut short is dropped from the file."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    rows = map(json.loads, whole.splitlines())
    return {tuple(row[name] for name in KEY): row for row in rows}


class Scorer:
    """One model on one text. The float logits are made when a row first asks for them, and calibrations are shared."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._source: Source = open_source(options.model)
        self._options, self._folder = CompileOptions(calib=options.calib), folder
        self._report = reporter(quiet=not errors.is_terminal)
        self._batches = load_batches(options.text, self._source.checkpoint, options.samples, options.seq_len)
        self._original: tuple[Program, Read] = (self._source.program(), Cached(self._source.checkpoint.read))
        self._cached: dict[int, list[Tensor]] = {}
        texts = {"text": self._batches, "calib": calibration(self._source, self._options) or []}
        self._hashes = {name: text_hash(batched(documents, 1, 0)) for name, documents in texts.items()}
        self._hashes["model"] = content_hash(self._source)

    def key(self, policy: Policy) -> dict[str, str]:
        """`KEY` of its row."""
        contents = TypeAdapter(Policy).dump_python(
            policy, mode="json", exclude={"name", "description"}, exclude_defaults=True
        )
        known = self._hashes | {"policy": hash_text(json.dumps(contents, sort_keys=True))}
        return {name: (known | {"fxquant": fxquant.__version__})[name] for name in KEY}

    def row(self, label: str, policy: Policy) -> dict[str, Any]:
        """What it measures; `seconds` are without the float model."""
        if not self._cached:
            self._keep()
        start = time.perf_counter()
        folders = sorted(file.parent.parent for file in self._folder.glob(f"*/{CALIBRATION}"))
        prepared = prepare(self._source, policy, self._options, self._report, for_engine=False, known=folders)
        if prepared.calibration is not None:
            place = self._folder / f"calibration_{len(folders)}"
            place.mkdir()
            prepared.calibration.save(place / CALIBRATION)
            save_stamps(stamp_files(checkpoint_files(self._source.checkpoint)), place)
        program, checkpoint = prepared.program, prepared.checkpoint
        result = self._evaluate(
            label, program, Cached(RecipeWeights(program, checkpoint, prepared.solved), COMPARE_CACHE)
        )
        nbytes = sum(tensor.nbytes for tensor in stored_tensors(program, checkpoint))
        return result.as_json() | {"bytes": nbytes, "seconds": round(time.perf_counter() - start, 1)}

    def _evaluate(self, label: str, program: Program, read: Read) -> Evaluation:
        scores: list[Tensor] = []
        with self._report(label, len(self._batches), "documents") as advance:
            for start, chunk in self._chunks():
                scores += document_scores(chunk, self._expected(start, chunk), logits(program, read, chunk))
                advance(len(chunk))
        return summary(scores)

    def _chunks(self) -> Iterator[tuple[int, list[Tensor]]]:
        return ((start, self._batches[start : start + CHUNK]) for start in range(0, len(self._batches), CHUNK))

    def _keep(self) -> None:
        """As many chunks of float logits as there is room for."""
        room = CACHE_BYTES
        with self._report("float", len(self._batches), "documents") as advance:
            for start, chunk in self._chunks():
                if room <= 0:
                    break
                self._cached[start] = logits(*self._original, chunk)
                room -= sum(tensor.nbytes for tensor in self._cached[start])
                advance(len(chunk))

    def _expected(self, start: int, chunk: list[Tensor]) -> list[Tensor]:
        return self._cached[start] if start in self._cached else logits(*self._original, chunk)


def content_hash(source: Source) -> str:
    """XXH3-128 over config.json and every byte of the weights, in hex."""
    digest = xxhash.xxh3_128(json.dumps(source.checkpoint.config, sort_keys=True).encode())
    for path in sorted(checkpoint_files(source.checkpoint)):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def show(rows: list[dict[str, Any]], markdown: Path | None) -> None:
    """On the screen, and as Markdown."""
    cells = [cells_of(row) for row in rows]
    table = Table(padding=(0, 0))
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for texts in cells:
        table.add_row(*texts)
    console.print(table)
    if markdown is not None:
        lines = [HEADINGS, ("---", *("---:" for _ in HEADINGS[1:])), *cells]
        markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")


def cells_of(row: dict[str, Any]) -> tuple[str, ...]:
    """One for each of `HEADINGS`."""

    def span(name: str, form: str) -> str:
        return "–".join(f"{end:{form}}" for end in row["intervals"].get(name, ()))

    return (
        row["label"],
        f"{row['quantized']['perplexity']:.4f}",
        f"{row['perplexity_ratio']:.5f}",
        span("perplexity_ratio", ".4f"),
        f"{row['kl_mean']:.5f}",
        span("kl_mean", ".5f"),
        f"{row['kl_p99']:.4f}",
        f"{row['top1_agreement']:.2%}",
        size(row["bytes"]),
        f"{row['seconds']:.0f}",
    )


if __name__ == "__main__":
    sys.exit(main())
