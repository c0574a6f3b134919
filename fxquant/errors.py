"""What reaches a user when something is wrong: where, what, and the way out."""

MESSAGE_CHARACTERS = 5_000
"""Of each part of an error: its place, its fact, its remedy."""


class FxquantError(Exception):
    """A fault in what the user handed in.

    place  the file, tensor, layer or option at fault
    fact   what is wrong with it, with the numbers
    remedy what to do about it; a command stands on a line of its own
    state  what is true of the output now, in one sentence, where one was being written; interrupts have it too
    """

    state = ""

    def __init__(self, place: object, fact: str, remedy: str = "") -> None:
        self.place, self.fact, self.remedy = _bounded(str(place)), _bounded(fact), _bounded(remedy)
        super().__init__(f"{self.place}: {self.fact}" + (f" {self.remedy}" if remedy else ""))

    def __reduce__(self) -> tuple:
        """Errors come back from other processes."""
        return type(self), (self.place, self.fact, self.remedy)


def _bounded(text: str) -> str:
    """Names out of files are part of messages: as text that any stream takes, of a bounded length."""
    if len(text) > MESSAGE_CHARACTERS:
        text = f"{text[:MESSAGE_CHARACTERS]} …"
    return text.encode("utf-8", "backslashreplace").decode()


class StoppedError(FxquantError):
    """The world got in the way: a full disk, a file that changed or could not be read. What is finished stays good."""


class InternalError(Exception):
    """A fault of ours, of a pass or a lowering, that no input is to blame for: `place` is where it was found."""

    def __init__(self, place: object, fact: str) -> None:
        self.place, self.fact = str(place), fact
        super().__init__(f"{place}: {fact}")

    def __reduce__(self) -> tuple:
        """As above."""
        return type(self), (self.place, self.fact)
