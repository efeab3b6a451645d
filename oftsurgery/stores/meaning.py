"""What a module's name in an adapter means in a model: :class:`Meaning`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Meaning:
    """The weights of a model that one module of an adapter means.

    Attributes:
        modules: paths in the model, in the order of the rows; several where the model splits the adapter's module.
        part: where the model fuses modules, the number of the adapter's module among them; else None.
        of: the names of all modules that the model fuses, in the adapter's layout; empty elsewhere.
        swapped: whether the halves of the rows are in the other order in the model.
    """

    modules: tuple[str, ...]
    part: int | None = None
    of: tuple[str, ...] = ()
    swapped: bool = False

    @property
    def whole(self) -> str | None:
        """The path of the one module whose rows are the adapter's, in the same order; None elsewhere."""
        return self.modules[0] if len(self.modules) == 1 and self.part is None and not self.swapped else None
