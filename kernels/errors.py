"""The base of every error that rooflama raises on purpose."""

MOST_CHARACTERS = 1000  # of each part of an error


def shorten(text: str) -> str:
    """``text``, a long one without its middle: what a message quotes from a file may be megabytes."""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:800]} [{len(text)} characters] {text[-150:]}"


class RooflamaError(Exception):
    """An error that the caller can fix: what was found, the rule it breaks, and what to do.

    The three parts are separate arguments so that none can be forgotten. A long one is shortened.
    """

    def __init__(self, found: str, *, rule: str, remedy: str):
        self.found, self.rule, self.remedy = map(shorten, (found, rule, remedy))
        super().__init__(f"{self.found}: {self.rule}. {self.remedy}.")


class KernelInputError(RooflamaError, ValueError):
    """A tensor or number that a kernel cannot take. Raised before any launch, with nothing written."""
