"""The functions here check a fold's figures, put the figures on a colour scale or in bars, and write them as text."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from oftsurgery.errors import CheckpointError, printable
from oftsurgery.records.record import FoldRecord

#: the number of steps of a colour scale
LEVELS = 9


@dataclass(frozen=True)
class Scale:
    """A colour scale of :data:`LEVELS` steps from ``low`` to ``high``, in equal differences or equal ratios."""

    low: float
    high: float
    ratios: bool = False

    def level(self, value: float) -> int:
        """The step of ``value``, from 0 to ``LEVELS - 1``."""
        low, high, value = (math.log(max(x, 1e-300)) if self.ratios else x for x in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.0
        return min(LEVELS - 1, max(0, int(share * LEVELS)))

    @classmethod
    def of_errors(cls, values: Sequence[float]) -> Scale:
        """A scale from the least value to the largest. Values that differ by less than a tenth get similar colours; values
        that differ a hundredfold (quantised weights beside float32 ones) are drawn in ratios.
        """
        low, high = min(values), max(values)
        if high > 100 * low:
            low = max(low, high * 1e-4)
            return cls(low, high, ratios=True) if high > 0 else cls(0.0, 0.0)
        middle, half = (low + high) / 2, max((high - low) / 2, high * 0.05)
        return cls(middle - half, middle + half)

    @classmethod
    def from_zero(cls, values: Sequence[float]) -> Scale:
        """A scale from zero, which has a meaning itself, to the largest value."""
        return cls(0.0, max(values))

    @classmethod
    def to_one(cls, values: Sequence[float]) -> Scale:
        """A scale from zero to one, or to a larger value: the same ratio has the same colour on every map."""
        return cls(0.0, max(1.0, *values))

    @classmethod
    def of_defects(cls, values: Sequence[float]) -> Scale:
        """A scale in ratios over at least a factor of ten, and from float32's own rounding upwards."""
        high = max(1e-4, *values)
        return cls(max(1e-7, min(high / 10, *values)), high, ratios=True)


def histogram(
    values: Sequence[float], bins: int = 12, *, borders: Sequence[float] | None = None
) -> tuple[list[float], list[int]]:
    """``(bins + 1 borders, bins counts)`` of ``values``, in equal steps, or in equal ratios where the values differ more than
    tenfold; ``borders`` may be given. A value below or above the borders counts in the first or last bin.
    """
    if borders is None:
        low, high = min(values), max(values)
        if high <= low * 1.001:  # equal values make one bar in the middle
            low, high = low * 0.9, high * 1.1 or 1.0
        ratios = high > 10 * low > 0
        low = max(low, high * 1e-4) if ratios else low
        shares = [i / bins for i in range(bins + 1)]
        borders = [low * (high / low) ** share if ratios else low + (high - low) * share for share in shares]
    counts = [0] * (len(borders) - 1)
    for value in values:
        counts[min(len(counts) - 1, max(0, bisect_right(borders, value) - 1))] += 1
    return list(borders), counts


def check_figures(record: FoldRecord) -> None:
    """Refuse a record with figures that are not numbers: the record comes from a file that nobody vouches for.

    Raises:
        CheckpointError: a figure is not a finite number.
    """
    for path, module in record.modules.items():
        for name in (*_NEEDED, "nearest", "rho", "change", "output_error", "output_nearest", *_SIGNED):
            value = getattr(module, name)
            if value is None and name not in _NEEDED:
                continue
            if not is_figure(abs(value) if name in _SIGNED else value):
                remedy = "restore the record that the fold wrote"
                wanted = "a finite number" + " of at least 0" * (name not in _SIGNED)
                message = f"the record's {name} is {printable(repr(value), 40)}, expected is {wanted}"
                raise CheckpointError(message, module=path, remedy=remedy)


_NEEDED = ("error", "defect", "angle")

_SIGNED = ("kept", "output_kept")  # these figures may be negative


def is_figure(value: object) -> bool:
    """Whether a value from a file is a finite number and not negative."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def percent(value: float) -> str:
    """A ratio as text, with three digits.

    >>> percent(0.0931), percent(0.5), percent(0.00002), percent(0.0)
    ('9.31\\xa0%', '50.0\\xa0%', '2.0e-5', '0\\xa0%')
    """
    if value == 0:
        return "0\N{NO-BREAK SPACE}%"
    if value < 1e-4:
        return scientific(value)
    return f"{100 * value:#.3g}".rstrip(".") + "\N{NO-BREAK SPACE}%" if value < 10 else f"{value:.3g} ×"


def scientific(value: float) -> str:
    """A number as text, with two digits.

    >>> scientific(0.00123), scientific(0.0)
    ('1.2e-3', '0')
    """
    if value == 0:
        return "0"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"


def degrees(radians: float) -> str:
    """An angle as text, in degrees.

    >>> degrees(0.3), degrees(0.0003), degrees(0.0)
    ('17.2°', '0.017°', '0°')
    """
    angle = math.degrees(radians)
    return "0°" if angle == 0 else f"{angle:.1f}°" if angle >= 1 else f"{angle:.2g}°"


def size(nbytes: float) -> str:
    """A number of bytes as text, in decimal units.

    >>> size(999), size(23_400_000), size(5e9)
    ('999 B', '23.4 MB', '5.00 GB')
    """
    power = sum(nbytes >= 999.5 * 1000**i for i in range(3))
    figure = f"{nbytes / 1000**power:#.3g}".rstrip(".") if power else f"{nbytes:.0f}"
    return f"{figure} {('B', 'kB', 'MB', 'GB')[power]}"
