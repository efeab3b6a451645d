"""The table of families: all classes that the sweep tries, in groups."""

from __future__ import annotations

from family import Family
from other_families import IMAGES, SEVERAL, SOUNDS
from text_families import DECODERS, ENCODER_DECODERS, ENCODERS, MIXTURES, STATE_SPACES

GROUPS: dict[str, list[Family]] = {
    "Decoders": DECODERS,
    "Mixtures of experts": MIXTURES,
    "State-space and hybrid models": STATE_SPACES,
    "Encoder-decoders": ENCODER_DECODERS,
    "Encoders": ENCODERS,
    "Images and video": IMAGES,
    "Sound and series": SOUNDS,
    "Several kinds of input": SEVERAL,
}
FAMILIES: dict[str, Family] = {family.cls: family for rows in GROUPS.values() for family in rows}
