"""The models that a server lists: the composition, its bare anchor, and it with one augmenting model alone."""

from __future__ import annotations

from calm.errors import CalmError
from calm.serving.augmenting import switched_on
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

    def chosen(self, model: str, augmenting: object) -> list[str]:
        """The augmenting models that are on.

        Args:
            model: A name that is listed.
            augmenting: A request's field, see `switched_on`; `None` where it has none.

        Raises:
            APIError: 404 for a model that is not listed, 400 for an augmenting model that is not there, or when both
                the name and the field choose.
        """
        if model not in self.on:
            raise APIError(
                404, f"the model {model!r} does not exist: expected one of {list(self.on)}", code="model_not_found"
            )
        if augmenting is None:
            return self.on[model]
        if self.on[model] != self.augmenting:
            raise APIError(
                400,
                f"model {model!r} and augmenting both choose augmenting models: leave one out",
                param="augmenting",
            )
        try:
            return switched_on(augmenting, self.augmenting)
        except CalmError as error:
            raise APIError(400, str(error), param="augmenting") from error

    def off(self, model: str, augmenting: str | list[str] | None) -> frozenset[str]:
        """The augmenting models to switch off; arguments and errors as for `chosen`."""
        return frozenset(self.augmenting) - set(self.chosen(model, augmenting))
