"""The one exception that reaches a user: where, what, and the way out."""


class FxquantError(Exception):
    """A fault in what the user handed in.

    place  the file, tensor, layer or option at fault
    fact   what is wrong with it, with the numbers
    remedy what to do about it
    """

    def __init__(self, place: object, fact: str, remedy: str = "") -> None:
        self.place, self.fact, self.remedy = str(place), fact, remedy
        super().__init__(f"{place}: {fact}" + (f" {remedy}" if remedy else ""))
