"""Objects of libraries that this package does not import by itself."""

from __future__ import annotations

from functools import cache


def is_of(library: str, obj: object, *names: str) -> bool:
    """Whether ``obj`` is of one of a library's classes ``names``, or of a derived class. The library is not imported: no object
    can have its classes before another program imports it.

    >>> from collections import Counter
    >>> is_of("collections", Counter(), "OrderedDict", "Counter")
    True
    """
    return _derives(type(obj), library, names)  # type: ignore[arg-type] # mypy doubts that a class is hashable


@cache
def _derives(type_: type, library: str, names: tuple[str, ...]) -> bool:
    return any(c.__name__ in names and c.__module__.partition(".")[0] == library for c in type_.__mro__)
