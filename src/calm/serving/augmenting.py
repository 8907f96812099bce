"""What a request may say of the augmenting models: the same on every engine."""

from __future__ import annotations

from collections.abc import Sequence

from calm.errors import CalmError


def switched_on(augmenting: object, names: Sequence[str]) -> list[str]:
    """The augmenting models that a request's `augmenting` switches on.

    Args:
        augmenting: `"all"`, `"none"` (the bare anchor answers) or a list of names.
        names: Those of the composition.

    Raises:
        CalmError: If it is anything else, or names what is not there.
    """
    expected = f'expected "all", "none" or some of {list(names)}'
    if augmenting == "all":
        return list(names)
    if augmenting == "none":
        return []
    if not isinstance(augmenting, list | tuple) or not all(isinstance(one, str) for one in augmenting):
        raise CalmError(f"augmenting: {augmenting!r}: {expected}")
    if unknown := sorted(set(augmenting) - set(names)):
        raise CalmError(f"augmenting: {unknown} are not here: {expected}")
    return [name for name in names if name in augmenting]
