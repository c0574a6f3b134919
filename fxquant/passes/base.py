"""The contract of a pass: graph → graph, with what it rewrote, what it left and why, and what it found out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from fxquant.program.program import Program
from fxquant.program.program_check import ProgramCheck


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    rewritten  names of the nodes that are no longer what they were, or of the modules that were decided
    skipped    node that could have been rewritten and was not → reason
    findings   fact that the user is told, with nothing refused → its source
    """

    name: str
    rewritten: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    findings: dict[str, str] = field(default_factory=dict)


class Pass(ABC):
    """Program → program, in place. `run_passes` checks the program after each."""

    name: str

    @abstractmethod
    def apply(self, program: Program) -> PassResult:
        """Do it. Raises FxquantError for what the input is to blame for, InternalError for the rest."""

    def __call__(self, program: Program) -> PassResult:
        """As `apply`."""
        return self.apply(program)


class RewritePass(Pass):
    """A pass that looks at one node after the other; both methods see the program as it stands."""

    @abstractmethod
    def why_not(self, node: fx.Node, program: Program) -> str | None:
        """None to rewrite `node`, "" when it is none of this pass's business, else the reason to keep it."""

    @abstractmethod
    def rewrite(self, node: fx.Node, program: Program) -> None:
        """Replace `node`; it erases what it replaced."""

    def apply(self, program: Program) -> PassResult:
        """Rewrite what is to be rewritten, and drop what nothing reads any more."""
        rewritten, skipped = [], {}
        for node in list(program.graph.graph.nodes):
            reason = self.why_not(node, program)
            if reason is None:
                rewritten.append(node.name)
                self.rewrite(node, program)
            elif reason:
                skipped[node.name] = reason
        program.graph.graph.eliminate_dead_code(is_impure_node=_has_effect)
        program.drop_unused_parameters()
        return PassResult(self.name, tuple(rewritten), skipped)


def run_passes(program: Program, passes: Sequence[Pass]) -> list[PassResult]:
    """Apply `passes` in order. Raises InternalError, with the pass, for a program that does not hold together."""
    check, results = ProgramCheck(), []
    for program_pass in passes:
        results.append(program_pass.apply(program))
        check(program, program_pass.name)
    return results


def findings(results: Sequence[PassResult]) -> list[str]:
    """What nobody has shown to work or to fail on the target, each with its source, once."""
    items = (item for result in results for item in result.findings.items())
    return list(dict.fromkeys(f"{fact} ({reference})" for fact, reference in items))


def _has_effect(node: fx.Node) -> bool:
    """Inputs and outputs stay; no call of a program writes into anything."""
    return node.op in ("placeholder", "output")
