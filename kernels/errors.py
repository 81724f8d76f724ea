"""The base of every error that rooflama raises on purpose."""


class RooflamaError(Exception):
    """An error the caller can mend: what was found, the rule it breaks, and what to do.

    The three parts are separate arguments so that none can be forgotten.
    """

    def __init__(self, found: str, *, rule: str, remedy: str):
        self.found, self.rule, self.remedy = found, rule, remedy
        super().__init__(f"{found}: {rule}. {remedy}.")


class KernelInputError(RooflamaError, ValueError):
    """A tensor or number that a kernel cannot take. Raised before any launch, with nothing written."""
