"""Compile report: what `fxquant compile` prints at its end."""

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console

from fxquant.engines.table import ENGINES
from fxquant.tools.console import console, print_line, print_notes, print_whole, size
from fxquant.tools.tables import NamedTable

if TYPE_CHECKING:
    from torch import Tensor

    from fxquant.api import CompileReport

UNSEEN_NAMED = 4
FEW_TOKENS = 512
"""Calibration tokens below which ranges are guesses; the defaults of `--samples` × `--seq-len` are 8,192."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")


def as_document(report: "CompileReport") -> dict:
    """The report for scripts."""
    return {
        "out": str(report.out),
        "input_kind": report.input_kind,
        "structural_hash": report.structural_hash,
        "policy": report.policy.name,
        "target": report.target.value,
        "ledger": report.ledger.as_json()["totals"],
        "unverified": report.unverified,
        "choices": report.choices,
        "reserves": report.reserves,
        "serve": report.serve,
        "graph_only": report.graph_only,
        "tokenizer": not lacks_tokenizer(report),
        "unused_rules": [str(rule) for rule in report.unused_rules],
        "files": {file.name: file.nbytes for file in report.output.files},
        "bytes": asdict(report.output.work),
        "notes": report.notes,
        "expert_tokens": {module: counts.tolist() for module, counts in routed(report).items()},
        "verification": report.verification.as_json() if report.verification else None,
    }


def routed(report: "CompileReport") -> "dict[str, Tensor]":
    """Router → int64 [E]: how many calibration tokens each expert saw."""
    return report.calibration.experts if report.calibration else {}


def unseen_line(report: "CompileReport") -> str:
    """Warning with the number of experts that no calibration token was routed to, and the first of them; else ""."""
    counts = routed(report)
    names = [f"{module}: {i}" for module, seen in counts.items() for i in (seen == 0).nonzero().flatten().tolist()]
    if not names:
        return ""
    first = ", ".join(names[:UNSEEN_NAMED]) + (", …" if len(names) > UNSEEN_NAMED else "")
    return (
        f"{len(names):,} of {sum(map(len, counts.values())):,} experts saw no token of the calibration text ({first})"
    )


def written_line(report: "CompileReport") -> str:
    """Where the bytes of the weights came from: `13.4 MB quantized, 2 MB copied`."""
    parts = asdict(report.output.work)
    return ", ".join(f"{size(nbytes)} {how}" for how, nbytes in parts.items() if nbytes)


def few_tokens_line(report: "CompileReport") -> str:
    """Warning about too little calibration text; "" if it was enough, or not needed."""
    tokens = int(report.calibration.tokens.sum()) if report.calibration else FEW_TOKENS
    if tokens >= FEW_TOKENS:
        return ""
    return (
        f"calibrated on {tokens:,} tokens: ranges from fewer than {FEW_TOKENS} are guesses; pass more text with --calib"
    )


def ledger_table(report: "CompileReport") -> NamedTable:
    """One row per bucket and reason."""
    headings = ("bucket", "by", "tensors", "bytes")
    table = NamedTable("where every tensor of the checkpoint went", headings, names=2)
    for (bucket, why), (count, nbytes) in sorted(report.ledger.totals().items()):
        table.add_row(bucket, why, f"{count:,}", size(nbytes))
    entries = report.ledger.entries
    table.add_section()
    table.add_row("checkpoint", "", f"{len(entries):,}", size(sum(entry.nbytes for entry in entries)))
    return table


def print_report(report: "CompileReport", console: Console = console) -> None:
    """Print the ledger, rules that decided nothing, warnings, verification, and the output folder."""
    from fxquant.tools.verify import verification_tables

    console.print(ledger_table(report))
    for rule in report.unused_rules:
        reason = "optional" if rule.optional else "overridden"
        print_line((f"rule “{rule}” decided nothing ({reason})", "dim"), to=console)
    for warning in filter(None, (unseen_line(report), few_tokens_line(report))):
        print_line((warning, "yellow"), to=console)
    if report.verification:
        console.print(verification_tables(report.verification))
    _print_output(report, console)
    for reason in report.unverified:
        print_line(("unverified ", "yellow"), reason, to=console)
    for line in (*report.choices, *report.reserves):
        print_line((line, "dim"), to=console)
    print_notes(report.notes, console)
    _print_serving(report, console)


def _print_output(report: "CompileReport", console: Console) -> None:
    written = sum(file.nbytes for file in report.output.files)
    print_whole(str(report.out), "bold", console)
    print_line(f"{size(written)} of weights, policy {report.policy.name}", to=console)
    print_line((written_line(report), "dim"), to=console)
    print_line((f"from a {report.input_kind}, graph {report.structural_hash[:12]}", "dim"), to=console)
    deployed = report.output.deployment
    if deployed is not None and deployed.steps:
        before, after = deployed.steps[0].calls_before, deployed.steps[-1].calls_after
        print_line(f"NPU graph of {before:,} operators, fused to {after:,}:", to=console)
        print_whole(f"fxquant show {shlex.quote(str(report.out))} --fused", "dim", console)


def _print_serving(report: "CompileReport", console: Console) -> None:
    """How to serve it, as one line to copy."""
    engine = ENGINES[report.target]
    where = f", {engine.where}" if engine.where else ""
    claim = "for its own graph alone, no engine" if report.graph_only else f"for {report.contract.title}{where}"
    print_line((claim, "dim"), to=console)
    if engine.reads_tokenizer and lacks_tokenizer(report):
        fact = f"the model came without tokenizer files ({', '.join(TOKENIZERS)}): the engine needs them in that folder"
        print_line((fact, "yellow"), to=console)
        return
    print_whole(report.serve, "dim", console)


def lacks_tokenizer(report: "CompileReport") -> bool:
    """Whether the output has no tokenizer."""
    return not any((report.out / name).is_file() for name in TOKENIZERS)
