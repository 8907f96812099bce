"""The models that a server lists: the composition, its bare anchor, and it with one augmenting model alone."""

from __future__ import annotations

from calm.errors import CalmError
from calm.serving.errors import APIError


class Names:
    """Which augmenting models a request asks for, by the model's name or by its `augmenting` field.

    Any tool that can choose a model can so choose anchor or composition: NAME is the composition, NAME:anchor the bare
    anchor, and, where there are several augmenting models, NAME:ONE the composition with that one alone.

    Args:
        name: The composition's name.
        augmenting: The names of its augmenting models.

    Raises:
        CalmError: If two of the names are the same.
    """

    def __init__(self, name: str, augmenting: list[str]) -> None:
        self.augmenting = augmenting
        self.on: dict[str, list[str]] = {name: augmenting, f"{name}:anchor": []}
        if len(augmenting) > 1:
            if "anchor" in augmenting:
                raise CalmError(f"an augmenting model is called 'anchor', as {name}:anchor, the bare anchor, would be.")
            self.on |= {f"{name}:{one}": [one] for one in augmenting}

    def off(self, model: str, augmenting: str | list[str] | None) -> frozenset[str]:
        """The augmenting models to switch off.

        Raises:
            APIError: 404 for a model that is not listed, 400 for an augmenting model that is not there, or when both
                the name and the field choose.
        """
        if model not in self.on:
            raise APIError(
                404, f"the model {model!r} does not exist: expected one of {list(self.on)}", code="model_not_found"
            )
        on = self.on[model]
        if augmenting is not None:
            if on != self.augmenting:
                raise APIError(
                    400,
                    f"model {model!r} and augmenting both choose augmenting models: leave one out",
                    param="augmenting",
                )
            on = {"all": self.augmenting, "none": []}[augmenting] if isinstance(augmenting, str) else augmenting
        if unknown := sorted(set(on) - set(self.augmenting)):
            raise APIError(
                400,
                f'augmenting: {unknown} are not here: expected "all", "none" or some of {self.augmenting}',
                param="augmenting",
            )
        return frozenset(self.augmenting) - set(on)
