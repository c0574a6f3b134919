"""Pass contract: graph → graph, and a result: what the pass rewrote, what it skipped and why, and its findings."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from fxquant.program.program import Program
from fxquant.program.program_check import ProgramCheck


@dataclass(frozen=True)
class PassResult:
    """Result of one pass.

    rewritten  names of the nodes that changed, or of the modules that the pass decided
    skipped    node that could have been rewritten and was not → reason
    findings   fact to report, though nothing is refused → its source
    choices    what the policy left open and the pass decided, with the reason
    """

    name: str
    rewritten: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    findings: dict[str, str] = field(default_factory=dict)
    choices: tuple[str, ...] = ()


class Pass(ABC):
    """Program → program, in place. `run_passes` checks the program after each."""

    name: str

    @abstractmethod
    def apply(self, program: Program) -> PassResult:
        """Apply the pass. Raises FxquantError for faults of the input, InternalError for all others."""

    def __call__(self, program: Program) -> PassResult:
        """As `apply`."""
        return self.apply(program)


class RewritePass(Pass):
    """A pass over the nodes, one by one; both methods see the rewrites of earlier nodes."""

    @abstractmethod
    def why_not(self, node: fx.Node, program: Program) -> str | None:
        """None to rewrite `node`, "" if it does not concern this pass, else the reason to skip it."""

    @abstractmethod
    def rewrite(self, node: fx.Node, program: Program) -> None:
        """Replace `node` and erase what was replaced."""

    def apply(self, program: Program) -> PassResult:
        """Rewrite the nodes in graph order, then drop nodes and parameters that nothing reads."""
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
    """Apply `passes` in order. Raises InternalError, naming the pass, if the program check fails."""
    check, results = ProgramCheck(), []
    for program_pass in passes:
        results.append(program_pass.apply(program))
        check(program, program_pass.name)
    return results


def findings(results: Sequence[PassResult]) -> list[str]:
    """What has been shown neither to work nor to fail on the target, each with its source, once."""
    items = (item for result in results for item in result.findings.items())
    return list(dict.fromkeys(f"{fact} ({reference})" for fact, reference in items))


def choices(results: Sequence[PassResult]) -> list[str]:
    """What policies left open, as it was decided."""
    return [choice for result in results for choice in result.choices]


def _has_effect(node: fx.Node) -> bool:
    """Inputs and outputs stay; no call of a program has side effects."""
    return node.op in ("placeholder", "output")
