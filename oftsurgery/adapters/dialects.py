"""The dialects of adapters, one for each range of peft releases: how files show their dialect, and which rotation a
module's tensors stand for. A new dialect needs a row of the table at the end and a name in :data:`Dialect`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.errors import AdapterError, DialectError, ShapeError, printable

from .rotation import Cayley, Rotation

Dialect = Literal[
    "peft-0.13", "peft-0.15", "peft-0.17", "peft-0.21", "peft-boft", "peft-boft-0.13", "peft-hra", "peft-road",
    "kohya", "kohya-flux", "lycoris", "lycoris-2.0", "onetrainer", "onetrainer-2025-11-14",
]  # fmt: skip

Config = Mapping[str, Any]
Parts = Mapping[str, Tensor]  # a module's tensors by the ends of their keys
Modules = Mapping[str, Parts]

_MATRICES = frozenset({"oft_r", "oft_s"})  # peft ≤ 0.15: the generator is the skew part of a matrix
_TRIANGLES = frozenset({"oft_R.weight", "oft_embedding_R.weight"})  # peft ≥ 0.16: the upper triangle of a matrix


@dataclass(frozen=True)
class _Rules:
    """The rules of one dialect.

    Attributes:
        releases: the peft releases that write the dialect, in words.
        ends: the ends of the keys of a module's rotation, for any config; an adapter with other ends has another dialect.
        wrote: function of ``(config, modules, source)`` that tells whether these releases may have written the files;
            it raises if no release writes such files.
        rotation: function of ``(a module's parts, config)`` that gives the rotation.
    """

    releases: str
    ends: frozenset[str]
    wrote: Callable[[Config, Modules, str | None], bool]
    rotation: Callable[[Parts, Config], Rotation]


def detect_dialect(config: Config, modules: Modules, named: str | None, source: str | None) -> str:
    """The dialect of an adapter's files, which the user may have ``named``.

    Raises:
        DialectError: the files mix dialects, contradict the ``named`` dialect, or do not show their dialect.
        AdapterError: tensors are missing.
    """
    if named is not None and named not in _RULES:
        message = f"the named dialect is {printable(named)!r}, but the files are of an OFT adapter of peft"
        raise DialectError(message, path=source, remedy=f"use one of {', '.join(_RULES)}, or leave the dialect out")
    ends = {part for parts in modules.values() for part in parts}
    possible = {dialect: rules for dialect, rules in _RULES.items() if ends <= rules.ends}
    if not possible:
        message = f"the adapter has keys of several dialects: {', '.join(sorted(ends))}"
        remedy = "save the whole adapter with one release of peft"
        raise DialectError(message, path=source, remedy=remedy)
    candidates = [dialect for dialect, rules in possible.items() if rules.wrote(config, modules, source)]
    fitting = [dialect for dialect in candidates if named in (None, dialect)]
    if not fitting:
        message = f"the named dialect is {named}, but the files are of {' or '.join(candidates)}"
        raise DialectError(message, path=source, remedy="leave the dialect out")
    if len(fitting) > 1:
        series, version = config.get("use_cayley_neumann"), printable(config.get("peft_version"))
        seen = f"use_cayley_neumann={series!r}, peft_version={version!r}"
        message = f"the files do not tell the dialect: it is {' or '.join(candidates)} (config: {seen})"
        remedy = "name the dialect, load_adapter(…, dialect=…), by the peft release that trained the adapter"
        raise DialectError(message, path=source, remedy=remedy)
    return fitting[0]


def rotation_of(dialect: str, parts: Parts, config: Config) -> Rotation:
    """The rotation that a module's tensors stand for in a dialect, with COFT's clamp applied."""
    return _RULES[dialect].rotation(parts, config)


def live_coft_radius(dialect: str, config: Config, rotation: Rotation) -> float | None:
    """COFT's bound of each block's ``‖Q‖_F`` in training, for a rotation of this dialect; None without COFT."""
    rows = rotation.generator.shape[0]
    width = _width_of_matrices(rows, rotation.block_size, rotation.scale) if _RULES[dialect].ends == _MATRICES else 1
    return coft_radius(config, rows, width)


def coft_radius(config: Config, rows: int, width: int = 1) -> float | None:
    """COFT's bound of each block's Frobenius norm, ``eps / √rows`` for a generator of ``rows`` blocks; None without COFT.

    peft ≤ 0.15 has ``eps · width²`` in place of ``eps``: ``width`` is ⌈out/r⌉ for r blocks per row, which in peft ≤ 0.13
    is the block size.
    """
    return float(config.get("eps", 6e-5)) * width**2 / rows**0.5 if config.get("coft") else None


def _clamp(q: Tensor, radius: float) -> Tensor:
    """Each block of ``q: (rows, b, b)`` scaled to Frobenius norm ``radius`` where it is larger."""
    norm = torch.linalg.matrix_norm(q, keepdim=True)
    return torch.where(norm <= radius, q, q * (radius / norm.clamp(min=torch.finfo(q.dtype).tiny)))


def _misshapen(message: str, part: str, tensor: Tensor) -> ShapeError:
    return ShapeError(message, tensor=part, shape=tensor.shape, remedy="restore the file of the adapter")


def _check_shared(rows: Tensor, config: Config) -> None:
    if config.get("block_share") and rows.shape[0] != 1:
        message = "`block_share` is set, but the generator has more than one row"
        raise ShapeError(message, shape=rows.shape, remedy="restore the config that peft wrote")


# --- peft ≤ 0.15: matrices, whose skew part is the generator ----------------------------------------------------------


def _wrote_0_13(config: Config, modules: Modules, source: str | None) -> bool:
    """Whether peft ≤ 0.13 wrote the files, whose config has no ``oft_block_size``; ``oft_s`` is then an error."""
    if "oft_block_size" in config:
        return False
    for path, parts in modules.items():
        if "oft_s" in parts:
            message = "the module has oft_s, but the config has no `oft_block_size`: neither peft ≤ 0.13 nor 0.14/0.15 writes that"
            remedy = "restore the adapter_config.json that belongs to these tensors"
            raise DialectError(message, module=path, path=source, remedy=remedy)
    return True


def _wrote_0_15(config: Config, modules: Modules, source: str | None) -> bool:
    """Whether peft 0.14 or 0.15 wrote the files, whose config has ``oft_block_size``; a missing matrix is then an error."""
    if "oft_block_size" not in config:
        return False
    for path, parts in modules.items():
        missing = _MATRICES - parts.keys()
        if missing:
            message = f"peft 0.14 and 0.15 save oft_r and oft_s; {', '.join(missing)} is missing"
            raise AdapterError(message, module=path, path=source, remedy="restore the whole file")
    return True


def _rotation_of_matrices(parts: Parts, config: Config, *, side: rotations.Side) -> Rotation:
    """The rotation of a module of peft ≤ 0.15, whose file holds whole matrices."""
    a = parts["oft_r"]  # a module of these dialects always has oft_r, with oft_s in peft 0.14 and 0.15
    if a.ndim != 3 or a.shape[1] != a.shape[2] or a.shape[0] < 1 or a.shape[1] < 2:
        raise _misshapen("oft_r must be (blocks, b, b) with b ≥ 2", "oft_r", a)
    _check_shared(a, config)
    scale = parts.get("oft_s")
    if scale is not None and (scale.ndim != 2 or scale.shape[1] != 1):
        raise _misshapen("oft_s must be (out, 1)", "oft_s", scale)
    a = a.to(torch.float64)
    rows, b, _ = a.shape
    radius = coft_radius(config, rows, _width_of_matrices(rows, b, scale))
    if radius is not None:  # COFT clamps the raw matrix
        if scale is not None and config.get("block_share"):
            message = "a COFT adapter of peft 0.14/0.15 with one shared block clamps by the number of blocks a row, which its files do not hold"
            raise DialectError(message, remedy="run one forward in peft 0.15 and save again with `coft: false`")
        a = _clamp(a, radius)
    generator, shared = rotations.vector((a - a.transpose(1, 2)) / 2), bool(config.get("block_share"))
    return Rotation(generator, side=side, scale=None if scale is None else scale.reshape(-1), shared=shared)


def _width_of_matrices(rows: int, block_size: int, scale: Tensor | None) -> int:
    """The ``width`` of :func:`coft_radius`: the outputs for each block, or the block size without ``oft_s``."""
    return block_size if scale is None else -(-scale.shape[0] // rows)


# --- peft ≥ 0.16: the upper triangles of skew-symmetric generators ----------------------------------------------------


def _has_embeddings(modules: Modules) -> bool:
    """Whether the adapter rotates embeddings, which needs peft ≥ 0.19, whatever the config says."""
    return any("oft_embedding_R.weight" in parts for parts in modules.values())


def _wrote_0_17(config: Config, modules: Modules, source: str | None) -> bool:
    return not _has_embeddings(modules) and _since_0_18(config, source) is not True


def _wrote_0_21(config: Config, modules: Modules, source: str | None) -> bool:
    return _has_embeddings(modules) or _since_0_18(config, source) is not False


def _since_0_18(config: Config, source: str | None) -> bool | None:
    """Whether the config is of peft ≥ 0.18; None for a config that does not show its release."""
    version = config.get("peft_version")
    release = re.match(r"(\d+)\.(\d+)", version or "")
    after = release is not None and (int(release[1]), int(release[2])) >= (0, 18)
    if config.get("use_cayley_neumann") is False:
        return after  # the exact map is the same before and after 0.18
    if "use_cayley_neumann" not in config:
        message = "the config has no `use_cayley_neumann`, so the map is unknown: peft ≥ 0.16 always writes `use_cayley_neumann`"
        raise DialectError(message, path=source, remedy="restore the adapter_config.json that belongs to these tensors")
    if version is None:
        return False  # the field `peft_version` came with 0.18
    # a development version of 0.18.0 may have either series
    return None if not after or re.search(r"^0\.18\.0\.?dev", version) else True


def _rotation_of_triangles(parts: Parts, config: Config, *, since_0_18: bool) -> Rotation:
    """The rotation of a module of peft ≥ 0.16, whose file holds the upper triangles of generators."""
    if len(parts) > 1:
        message = f"one module has both {' and '.join(sorted(parts))}"
        raise AdapterError(message, remedy="save the adapter again with peft's save_pretrained")
    part, v = next(iter(parts.items()))
    if v.ndim != 2 or v.shape[0] < 1:
        raise _misshapen("a generator must be (blocks, b(b-1)/2)", part, v)
    try:
        rotations.block_size_of(v.shape[1])
    except ShapeError as error:
        raise _misshapen(error.message, part, v) from None
    _check_shared(v, config)
    cayley = Cayley()
    if config.get("use_cayley_neumann"):
        cayley = Cayley(terms=int(config.get("num_cayley_neumann_terms", 5)), since_0_18=since_0_18)
    radius = coft_radius(config, v.shape[0])
    if radius is not None:
        # peft ≥ 0.16 clamps the skew-symmetric matrix anew in every live forward, so a file may hold unclamped values
        v = rotations.vector(_clamp(rotations.skew(v.to(torch.float64)), radius))
    side: rotations.Side = "embedding" if part.startswith("oft_embedding") else "input"
    return Rotation(generator=v, cayley=cayley, side=side, shared=bool(config.get("block_share")))


# --- the table --------------------------------------------------------------------------------------------------------

_RULES: Mapping[str, _Rules] = {
    "peft-0.13": _Rules(
        "peft ≤ 0.13: output side, `oft_r` without `oft_s`", _MATRICES, _wrote_0_13, partial(_rotation_of_matrices, side="output")),
    "peft-0.15": _Rules(
        "peft 0.14 and 0.15: input side with `oft_s`", _MATRICES, _wrote_0_15, partial(_rotation_of_matrices, side="input")),
    "peft-0.17": _Rules(
        "peft 0.16 and 0.17: input side, the first Neumann series", _TRIANGLES, _wrote_0_17, partial(_rotation_of_triangles, since_0_18=False)),
    "peft-0.21": _Rules(
        "peft ≥ 0.18: input side and embeddings, the second Neumann series", _TRIANGLES, _wrote_0_21, partial(_rotation_of_triangles, since_0_18=True)),
}  # fmt: skip

#: dialect → the releases that write it
DIALECTS: Mapping[str, str] = MappingProxyType({
    **{dialect: rules.releases for dialect, rules in _RULES.items()},
    "peft-boft": "peft ≥ 0.14: BOFT",
    "peft-boft-0.13": "peft ≤ 0.13: BOFT, whose convolutions are laid out otherwise",
    "peft-hra": "peft: HRA",
    "peft-road": "peft: RoAd",
    "kohya": "kohya's sd-scripts: `networks.oft`",
    "kohya-flux": "kohya's sd-scripts: `networks.oft_flux`",
    "lycoris": "LyCORIS ≥ 2.1: diag-oft and BOFT",
    "lycoris-2.0": "LyCORIS 2.0: finished matrices (`oft_diag`)",
    "onetrainer": "OneTrainer: OFT_2",
    "onetrainer-2025-11-14": "OneTrainer from 14 to 16 November 2025: OFT_2 with the first series",
})  # fmt: skip

#: dialects of releases whose live layers compute with plain weights only: they multiply `weight.data`, whatever it stores
PLAIN_ONLY = frozenset({"peft-0.15", "peft-boft", "peft-boft-0.13", "peft-hra", "kohya", "kohya-flux"})

#: ends of all keys that hold a rotation
ROTATION_KEYS: tuple[str, ...] = tuple(sorted({end for rules in _RULES.values() for end in rules.ends}))
