"""The contract of a pass: it says what it rewrote and why it left the rest."""

from dataclasses import dataclass, field

from torch import fx

from fxquant.program.program import Program


@dataclass(frozen=True)
class PassResult:
    """Names of rewritten nodes, and node → reason for those that could have been rewritten and were not."""

    name: str
    rewritten: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)


class Pass:
    """Graph → graph. Subclasses give `name`, `why_not` and `rewrite`; both see the program as it stands."""

    name: str

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        """None to rewrite `node`, "" when it is none of this pass's business, else the reason to keep it."""
        raise TypeError(f"{type(self).__name__} does not say which nodes it rewrites")

    def rewrite(self, node: fx.Node, program: Program) -> None:
        """Replace `node`; it erases what it replaced."""
        raise TypeError(f"{type(self).__name__} does not say how it rewrites")

    def __call__(self, program: Program) -> PassResult:
        """As `apply`."""
        return self.apply(program)

    def apply(self, program: Program) -> PassResult:
        """Rewrite what is to be rewritten, and drop what nothing reads any more."""
        rewritten, kept = [], {}
        for node in list(program.graph.graph.nodes):
            reason = self.why_not(node, program)
            if reason is None:
                rewritten.append(node.name)
                self.rewrite(node, program)
            elif reason:
                kept[node.name] = reason
        program.graph.graph.eliminate_dead_code(is_impure_node=_has_effect)
        program.drop_unused_parameters()
        program.graph.lint()
        return PassResult(self.name, tuple(rewritten), kept)


def _has_effect(node: fx.Node) -> bool:
    """Inputs and outputs stay; no call of a program writes into anything."""
    return node.op in ("placeholder", "output")
