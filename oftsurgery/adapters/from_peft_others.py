"""Make an adapter from the files of peft's relatives of OFT: BOFT, HRA and RoAd."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from oftsurgery.errors import AdapterError, DialectError, ShapeError, printable

from .boft import PeftBoft
from .hra import Householder
from .road import Pairs
from .weight_map import WeightMap

Config = Mapping[str, Any]
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class OtherKind:
    """A relative of OFT.

    Attributes:
        ends: the ends of the keys of a module.
        ignored: ends of keys that the live layers compute anew.
        dialects: the dialects of the kind, the newest first.
        read: function of ``(a module's parts, config, dialect or None)`` that gives the module's map.
    """

    ends: tuple[str, ...]
    ignored: tuple[str, ...]
    dialects: tuple[str, ...]
    read: Callable[[Parts, Config, str | None], WeightMap]


def _all_there(parts: Parts, ends: tuple[str, ...]) -> list[Tensor]:
    missing = [end for end in ends if end not in parts]
    if missing:
        message = f"the module lacks {', '.join(missing)}"
        raise AdapterError(message, tensor=missing[0], remedy="restore the whole file that peft saved")
    return [parts[end] for end in ends]


def _misshapen(message: str, part: str, tensor: Tensor) -> ShapeError:
    return ShapeError(message, tensor=part, shape=tensor.shape, remedy="restore the file of the adapter")


def _read_boft(parts: Parts, config: Config, named: str | None) -> WeightMap:
    blocks, scale = _all_there(parts, ("boft_R", "boft_s"))
    if blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3] or blocks.shape[3] < 2:
        raise _misshapen("boft_R must be (factors, blocks, b, b) with b ≥ 2", "boft_R", blocks)
    if scale.ndim != 2 or 1 not in scale.shape:
        raise _misshapen("boft_s must be (out, 1), or (1, out) for a convolution", "boft_s", scale)
    factors, n, b = blocks.shape[:3]
    if factors > 1 and (b % 2 or n % 2 ** (factors - 1)):
        message = (
            f"{factors} factors of BOFT need blocks of an even size, and a multiple of {2 ** (factors - 1)} of them"
        )
        raise _misshapen(message, "boft_R", blocks)
    convolution = scale.shape[0] == 1 and scale.shape[1] > 1
    return PeftBoft(blocks, scale, relaid=convolution and _before_0_14(config, named))


def _before_0_14(config: Config, named: str | None) -> bool:
    """Whether a release before 0.14 wrote a convolution's BOFT, which has another formula since.

    Raises:
        DialectError: neither the config nor the caller says so.
    """
    if named is not None:
        return named == "peft-boft-0.13"
    release = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    if release is None:
        message = "the adapter has a BOFT of a convolution, whose formula changed in peft 0.14, and the config has no `peft_version`"
        remedy = "name the dialect by the release that trained the adapter: dialect='peft-boft' (≥ 0.14) or 'peft-boft-0.13' (--dialect)"
        raise DialectError(message, remedy=remedy)
    return (int(release[1]), int(release[2])) < (0, 14)


def _read_hra(parts: Parts, config: Config, named: str | None) -> WeightMap:  # noqa: ARG001 - one signature for all
    (u,) = _all_there(parts, ("hra_u",))
    if u.ndim != 2:
        raise _misshapen("hra_u must be (in, r)", "hra_u", u)
    if not bool((u.double().norm(dim=0) > 0).all()):
        message = "a reflection's vector is zero, and has no direction"
        raise AdapterError(message, tensor="hra_u", remedy="retrain from an earlier checkpoint")
    return Householder(u, orthogonal=bool(config.get("apply_GS")))


def _read_road(parts: Parts, config: Config, named: str | None) -> WeightMap:  # noqa: ARG001
    theta, alpha = _all_there(parts, ("road_theta", "road_alpha"))
    variant, group = config.get("variant", "road_1"), config.get("group_size", 64)
    if variant not in ("road_1", "road_2", "road_4"):
        message = f"the config's `variant` is {printable(variant)!r}, not road_1, road_2 or road_4"
        raise DialectError(message, tensor="adapter_config.json", remedy="restore the config that peft wrote")
    if type(group) is not int or group < 2 or group % 2:
        message = f"the config's `group_size` is {printable(group)!r}, not an even number"
        raise AdapterError(message, tensor="adapter_config.json", remedy="restore the config that peft wrote")
    count = theta.numel()
    rows = {"road_1": 2 * count, "road_2": count, "road_4": count // 2}[variant]
    if theta.ndim != 1 or theta.shape != alpha.shape or rows % group:
        message = f"road_theta and road_alpha must have the values of whole groups of {group} outputs"
        raise _misshapen(message, "road_theta", theta)
    return Pairs(theta, alpha, variant, group)


#: ``peft_type`` → the kind
OTHER_KINDS: Mapping[str, OtherKind] = {
    "BOFT": OtherKind(("boft_R", "boft_s"), ("boft_P",), ("peft-boft", "peft-boft-0.13"), _read_boft),
    "HRA": OtherKind(("hra_u",), (), ("peft-hra",), _read_hra),
    "ROAD": OtherKind(("road_theta", "road_alpha"), (), ("peft-road",), _read_road),
}


def dialect_of(kind: OtherKind, modules: Mapping[str, WeightMap], named: str | None) -> str:
    """The dialect of an adapter whose modules are read.

    Raises:
        DialectError: the named dialect is of another kind.
    """
    if named is not None and named not in kind.dialects:
        message = f"the named dialect is {printable(named)}, but the files are of {' or '.join(kind.dialects)}"
        raise DialectError(message, remedy="leave the dialect out, or name one of these")
    if named is not None:
        return named
    if any(isinstance(m, PeftBoft) and m.relaid for m in modules.values()):
        return "peft-boft-0.13"
    return kind.dialects[0]
