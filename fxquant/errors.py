"""What reaches a user when something is wrong: where, what, and the way out."""

MESSAGE_CHARACTERS = 5_000
"""Maximum length of each part of an error: place, fact, remedy."""


class FxquantError(Exception):
    """A fault in what the user handed in.

    place  the file, tensor, layer or option at fault
    fact   what is wrong with it, with the numbers
    remedy what to do about it; a command gets its own line
    state  one sentence on the state of the output, if one was being written; also set on interrupts
    """

    state = ""

    def __init__(self, place: object, fact: str, remedy: str = "") -> None:
        self.place, self.fact, self.remedy = _bounded(str(place)), _bounded(fact), _bounded(remedy)
        super().__init__(f"{self.place}: {self.fact}" + (f" {self.remedy}" if remedy else ""))

    def __reduce__(self) -> tuple:
        """Picklable: errors cross process boundaries."""
        return type(self), (self.place, self.fact, self.remedy)


def _bounded(text: str) -> str:
    """Messages quote names from files: cut to a bounded length, and escape what UTF-8 cannot encode."""
    if len(text) > MESSAGE_CHARACTERS:
        text = f"{text[:MESSAGE_CHARACTERS]} …"
    return text.encode("utf-8", "backslashreplace").decode()


class StoppedError(FxquantError):
    """The environment failed: a full disk, a file that changed or could not be read. Finished work remains valid."""


class InternalError(Exception):
    """A bug in fxquant (a pass, a lowering), not in the input; `place` is where it was detected."""

    def __init__(self, place: object, fact: str) -> None:
        self.place, self.fact = str(place), fact
        super().__init__(f"{place}: {fact}")

    def __reduce__(self) -> tuple:
        """Picklable, like FxquantError."""
        return type(self), (self.place, self.fact)
