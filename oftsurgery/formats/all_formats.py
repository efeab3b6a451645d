""":data:`FORMATS` is the table of all storage formats. A new format is a subclass of
:class:`~oftsurgery.formats.base.Format` in a file of this folder, and a row of the table. Code that serves every format
asks :attr:`WeightFormat.kind`.
"""

from __future__ import annotations

from oftsurgery.other_libraries import is_of

from .base import Format
from .dense import Dense
from .four_bit import FourBit
from .int8 import Int8

_NF4, _FP4 = FourBit("nf4", strong_change=1 / 18), FourBit("fp4", strong_change=1 / 12, farther=(20.0, 70.0))

#: every storage format by its name
FORMATS: dict[str, Format] = {kind.name: kind for kind in (Dense(), _NF4, _FP4, Int8())}


def format_of_parameter(parameter: object) -> Format:
    """The format whose bitsandbytes class the parameter has; the plain format for all other parameters."""
    return next(
        (kind for kind in FORMATS.values() if is_of("bitsandbytes", parameter, kind.parameter_class)), FORMATS["dense"]
    )
