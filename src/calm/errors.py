"""The errors that `calm` raises on purpose: each names the value, what was expected and what to do."""


class CalmError(ValueError):
    """Base of every error that a user's input can cause; its message is complete without a stack trace."""


class UnsupportedModelError(CalmError):
    """A base that cannot be composed, with the reason (DESIGN.md, issue 2: "refused by name")."""


class TokenizerMismatchError(CalmError):
    """Two bases whose tokenizers differ, so that their positions do not line up."""


class CheckpointError(CalmError):
    """A composition checkpoint, or a base that it refers to, that cannot be used as it is."""


class DivergedError(CalmError):
    """A training whose loss or gradient is no number any more; most often its learning rate is too high."""
