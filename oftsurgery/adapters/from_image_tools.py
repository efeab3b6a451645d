"""Make an adapter from the single file of an image tool: kohya's sd-scripts, LyCORIS, OneTrainer, diffusers.

The dialect follows from keys, shapes and the file's metadata. Where these do not tell, the error names the choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from oftsurgery import rotations
from oftsurgery.errors import AdapterError, DialectError, ShapeError, module_in_errors, printable

from .adapter import OFTAdapter
from .boft import LycorisBoft
from .from_peft import parse_adapter
from .image_keys import Parts, sort_image_keys, without_bundled
from .onetrainer import OneTrainerBlocks
from .output_blocks import FinishedBlocks, FluxParts, OutputBlocks
from .to_peft import IMAGE_METADATA, KEY_PREFIX
from .weight_map import WeightMap

Bias = Literal["kept", "rotated"]

#: diffusers' key for the config of peft in a file's metadata
PEFT_METADATA = "lora_adapter_metadata"

#: prefixes by which OneTrainer names the model's component; peft's own files have another prefix
_COMPONENTS = re.compile(
    r"(lora_(unet|transformer|te[123]?)_|(unet|transformer|text_encoder(_[23])?|diffusion_model|text_encoders)\.)"
)

#: the commit and the days of OneTrainer's first series; on the last day both series were there
_FIRST_REVISION, _FIRST_DAYS = "1336b9b8", ("2025-11-14", "2025-11-16")

#: kohya's live layer turned the bias until this day
_KOHYA_KEEPS_BIAS = "2024-09-13"


@dataclass(frozen=True)
class _File:
    """The facts that the readers of a dialect need.

    Attributes:
        metadata: the metadata of the file.
        args: the arguments of the network's training (``ss_network_args``).
        constraint: the limit that the caller states for files without ``alpha``.
        turns_bias: whether the live layers turned the biases.
        source: the place of the file.
    """

    metadata: Mapping[str, str]
    args: Mapping[str, Any]
    constraint: float | None
    turns_bias: bool
    source: str | None


def parse_image_adapter(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    dialect: str | None = None,
    bias: Bias | None = None,
    constraint: float | None = None,
    without_embeddings: bool = False,
    source: str | None = None,
    sha256: str | None = None,
) -> OFTAdapter:
    """An adapter from the tensors and the metadata of one safetensors file.

    Args:
        dialect, bias, constraint, without_embeddings: as for :func:`oftsurgery.load_adapter`.
        source, sha256: the place and the SHA-256 of the file, for messages and records.

    Raises:
        DialectError: the file is of another kind, or does not tell its dialect.
        AdapterError: keys are missing, unknown or of a wrong type.
        ShapeError, NonFiniteError: no tool writes such tensors.
    """
    config = _peft_config(metadata, source)
    tensors, left_out = without_bundled(tensors, source, leave_out=without_embeddings)
    if config is not None and (dialect is None or dialect.startswith("peft")):
        named = {key if key.startswith(KEY_PREFIX) else KEY_PREFIX + key: t for key, t in tensors.items()}
        adapter = parse_adapter(config, named, dialect=dialect, source=source, sha256=sha256)  # type: ignore[arg-type]  # it checks the dialect
        return replace(adapter, config={**adapter.config, IMAGE_METADATA: dict(metadata)}, left_out=left_out)
    parts, sums = _without_norms(sort_image_keys(tensors, source), source)
    args = _network_args(metadata)
    name = _dialect_of(parts, metadata, dialect, source)
    rules = _RULES[name]
    if bias == "rotated" and not rules.may_turn_bias:
        message = f"no release of the tool ({name}) turns biases, but bias='rotated' was given"
        raise DialectError(message, path=source, remedy="leave bias out")
    if bias is None:
        _check_bias(name, metadata, args, source)
    file = _File(metadata, args, constraint, bias == "rotated", source)
    modules: dict[str, WeightMap] = {}
    for path, own in sorted(parts.items()):
        with module_in_errors(path):
            modules[path] = rules.read(own, file)
    if sums and name != "lycoris":
        message = f"the file holds changes of normalisation layers, which only LyCORIS trains, and is of {name}"
        raise DialectError(message, tensor=next(iter(sums)), path=source, remedy="restore the file that the tool saved")
    kept = bias or "kept" if rules.may_turn_bias else None
    config = {
        IMAGE_METADATA: dict(metadata),
        "without_alpha": name == "lycoris" and "alpha" not in next(iter(parts.values())),
    }
    where: dict[str, Any] = {"source": source, "sha256": sha256}
    return OFTAdapter(modules, sums=sums, dialect=name, config=config, bias=kept, left_out=left_out, **where)


def _without_norms(found: Parts, source: str | None) -> tuple[Parts, dict[str, Tensor]]:
    """``(the modules with rotations, {tensor name: what LyCORIS adds to the tensor})``.

    Raises:
        AdapterError: no module has a rotation.
    """
    norms = {
        path: own
        for path, own in found.items()
        if own.keys() <= {"w_norm", "b_norm", "alpha"} and own.keys() != {"alpha"}
    }
    rotated = {path: own for path, own in found.items() if path not in norms}
    if not rotated:
        message = "the file holds changes of normalisation layers and no rotation"
        raise AdapterError(
            message, path=source, remedy="add the changes to the base's tensors: no rotation is to be folded"
        )
    leaves = {"w_norm": "weight", "b_norm": "bias"}
    sums = {f"{path}.{leaves[end]}": t for path, own in norms.items() for end, t in own.items() if end in leaves}
    return rotated, sums


def _peft_config(metadata: Mapping[str, str], source: str | None) -> dict[str, Any] | None:
    """The config of peft in the metadata of diffusers' files; None for another file."""
    if PEFT_METADATA not in metadata:
        return None
    config = _json_object(metadata[PEFT_METADATA])
    if config is None or "peft_type" not in config:
        message = f"the metadata `{PEFT_METADATA}` is no config of peft"
        raise AdapterError(message, path=source, remedy="restore the file that diffusers' save_lora_adapter wrote")
    return config


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _network_args(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of the training, as sd-scripts or SimpleTuner store them."""
    texts = (metadata.get(key, "") for key in ("ss_network_args", "lycoris_config"))
    return next((found for text in texts if (found := _json_object(text))), {})


# --- which dialect ----------------------------------------------------------------------------------------------------


def _dialect_of(parts: Parts, metadata: Mapping[str, str], named: str | None, source: str | None) -> str:
    """The dialect of the file, which the caller may have named.

    Raises:
        DialectError: the file mixes dialects, contradicts the named dialect, or does not tell its dialect.
    """
    found: dict[str, str] = {}
    for path, own in parts.items():
        for dialect in _candidates(path, own, source):
            found.setdefault(dialect, path)
    ends = {_kind(own) for own in parts.values()}
    if len(ends - {"lone"}) > 1:
        message = f"the file has modules of several kinds: {', '.join(sorted(ends))}"
        raise DialectError(message, path=source, remedy="save the kinds as files of their own")
    if named is not None:
        if named not in found:
            message = f"the named dialect is {printable(named)}, but the file is of {' or '.join(sorted(found))}"
            raise DialectError(message, path=source, remedy="leave the dialect out, or name one of these")
        return named
    certain = [dialect for dialect in found if all(_tells(dialect, path, own, metadata) for path, own in parts.items())]
    if len(certain) == 1:
        return certain[0]
    choice = sorted(certain or found)
    kind = next(iter(ends))
    message = f"the file does not tell the dialect of its {kind}: it is {' or '.join(choice)}"
    remedy = f"name the dialect by the tool that trained the adapter: load_adapter(…, dialect={choice[0]!r})"
    raise DialectError(message, path=source, remedy=remedy)


def _kind(own: Mapping[str, Tensor]) -> str:
    for end in ("oft_blocks", "oft_diag", "oft_R.weight"):
        if end in own:
            return end
    return "oft_blocks.0" if any(end.startswith("oft_blocks.") for end in own) else "lone"


def _candidates(path: str, own: Mapping[str, Tensor], source: str | None) -> list[str]:
    """The dialects that write a module with these tensors."""
    kind = _kind(own)
    if kind == "oft_blocks":
        dims = own["oft_blocks"].ndim
        if dims == 4:
            return ["lycoris"]
        # kohya trains no scale and always stores alpha
        return ["lycoris"] if "rescale" in own or "alpha" not in own else ["kohya", "lycoris"]
    if kind == "oft_diag":
        return ["lycoris-2.0"]
    if kind == "oft_blocks.0":
        return ["kohya-flux"]
    if kind == "oft_R.weight":
        return ["onetrainer", "onetrainer-2025-11-14"]
    message = f"the module has {', '.join(sorted(own))} and no rotation"
    raise AdapterError(message, module=path, path=source, remedy="restore the file that the tool saved")


def _tells(dialect: str, path: str, own: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether the file shows that the module is of this dialect, among the dialects that write such tensors."""
    trainer = metadata.get("ss_network_module", "")
    if dialect in ("kohya", "lycoris") and _kind(own) == "oft_blocks":
        if len(_candidates(path, own, None)) == 1:
            return dialect == "lycoris"
        kohya = [path.startswith("oft_unet_")] + ([trainer == "networks.oft"] if trainer else [])
        # a preset of LyCORIS may set any prefix
        return all(kohya) if dialect == "kohya" else not any(kohya)
    if dialect.startswith("onetrainer"):
        date, known = metadata.get("modelspec.date", "")[:10], _COMPONENTS.match(path) is not None
        known = known or any(key.startswith("ot_") for key in metadata)
        first = metadata.get("ot_revision", "").startswith(_FIRST_REVISION) or _FIRST_DAYS[0] <= date < _FIRST_DAYS[1]
        if dialect == "onetrainer":
            return known and not first and date != _FIRST_DAYS[1]
        return known and first
    return True


def _check_bias(dialect: str, metadata: Mapping[str, str], args: Mapping[str, Any], source: str | None) -> None:
    """Refuse a file that hints at a training which turned the biases.

    Raises:
        DialectError: as said.
    """
    why = ""
    if dialect == "lycoris" and str(args.get("bypass_mode")).lower() in ("true", "1"):
        why = "the adapter was trained in bypass mode, which turns biases in some releases of LyCORIS"
    started = metadata.get("ss_training_started_at", "")
    if dialect == "kohya" and re.fullmatch(r"\d+(\.\d+)?", started):
        import datetime

        day = ""
        with suppress(ValueError, OverflowError, OSError):  # a time that no calendar has
            day = datetime.datetime.fromtimestamp(float(started), datetime.timezone.utc).date().isoformat()
        if day and day < _KOHYA_KEEPS_BIAS:
            why = f"the adapter was trained on {day}: before {_KOHYA_KEEPS_BIAS} kohya's live layer turned biases, and its merge did not"
    if why:
        remedy = "say what to do: load_adapter(…, bias='kept') or load_adapter(…, bias='rotated') (--bias)"
        raise DialectError(why, path=source, remedy=remedy)


# --- the readers ------------------------------------------------------------------------------------------------------


def _alpha(own: Mapping[str, Tensor]) -> float | None:
    alpha = own.get("alpha")
    if alpha is None:
        return None
    if alpha.numel() != 1:
        raise _misshapen("alpha must be one number", "alpha", alpha)
    value = float(alpha.reshape(()).double())
    if value < 0:
        message = f"alpha is {value:g}, and a limit is not negative"
        raise AdapterError(message, tensor="alpha", remedy="restore the file that the tool saved")
    return value


def _misshapen(message: str, part: str, tensor: Tensor) -> ShapeError:
    return ShapeError(message, tensor=part, shape=tensor.shape, remedy="restore the file of the adapter")


def _square(own: Mapping[str, Tensor], part: str, dims: tuple[int, ...] = (3,)) -> Tensor:
    """Blocks, whose last two dimensions are equal and at least 1."""
    blocks = own[part]
    if blocks.ndim not in dims or blocks.shape[-1] != blocks.shape[-2]:
        sizes = " or ".join("(m, n, b, b)" if d == 4 else "(n, b, b)" for d in dims)
        raise _misshapen(f"the blocks must be {sizes}", part, blocks)
    return blocks


def _only(own: Mapping[str, Tensor], known: tuple[str, ...]) -> None:
    more = sorted(end for end in own if end not in known)
    if more:
        message = f"the module also has {', '.join(more)}, which no release of the tool writes there"
        raise DialectError(message, tensor=more[0], remedy="restore the file that the tool saved")


def _read_lycoris(own: Mapping[str, Tensor], file: _File) -> WeightMap:
    _only(own, ("oft_blocks", "alpha", "rescale"))
    blocks, scale, alpha = _square(own, "oft_blocks", (3, 4)), own.get("rescale"), _alpha(own)
    rows = blocks.shape[-3] * blocks.shape[-1]
    if scale is not None and scale.ndim == 1:
        message = "the scale has one dimension: LyCORIS 2.1.0 and 2.1.0.post1 scaled the columns of square layers by it, and failed for others"
        remedy = "train the adapter with a later release of LyCORIS"
        raise DialectError(message, tensor="rescale", remedy=remedy)
    if scale is not None and (scale.shape[0] != rows or scale.numel() != rows):
        raise _misshapen(f"the scale must be ({rows}, 1) or ({rows}, 1, 1, 1)", "rescale", scale)
    if alpha is None:
        alpha = _stated_constraint(file)
    if blocks.ndim == 3:
        return OutputBlocks(blocks, alpha, "lycoris", scale, file.turns_bias)
    factors, n, b = blocks.shape[:3]
    if b % 2 or n % 2 ** (factors - 1):
        message = (
            f"{factors} factors of BOFT need blocks of an even size, and a multiple of {2 ** (factors - 1)} of them"
        )
        raise _misshapen(message, "oft_blocks", blocks)
    return LycorisBoft(blocks, alpha, scale, file.turns_bias)


def _stated_constraint(file: _File) -> float | None:
    """The limit of a file without ``alpha``: what the caller or the arguments of the training say."""
    if file.constraint is not None:
        return file.constraint
    for name in ("constraint", "constrain"):
        if name in file.args:
            try:
                return float(file.args[name])
            except (TypeError, ValueError):
                break
    message = "the blocks have no alpha (LyCORIS 2.1.0 to 2.1.0.post2), so the limit of the training is not known"
    remedy = "state the limit: load_adapter(…, constraint=0.01) (--constraint), 0 for none"
    raise DialectError(message, tensor="alpha", path=file.source, remedy=remedy)


def _read_finished(own: Mapping[str, Tensor], file: _File) -> WeightMap:  # noqa: ARG001 - one signature for all
    _only(own, ("oft_diag",))
    if own["oft_diag"].ndim == 4:
        message = "oft_diag has four dimensions, and no release of LyCORIS computes with such blocks"
        raise DialectError(message, tensor="oft_diag", remedy="restore the file that LyCORIS saved")
    return FinishedBlocks(_square(own, "oft_diag"))


def _read_kohya(own: Mapping[str, Tensor], file: _File) -> WeightMap:
    _only(own, ("oft_blocks", "alpha"))
    return OutputBlocks(_square(own, "oft_blocks"), _alpha(own), "kohya", None, file.turns_bias)


def _read_kohya_flux(own: Mapping[str, Tensor], file: _File) -> WeightMap:  # noqa: ARG001 - one signature for all
    count = sum(end.startswith("oft_blocks.") for end in own)
    names = tuple(f"oft_blocks.{i}" for i in range(count))
    _only(own, (*names, "alpha"))
    alpha = _alpha(own)
    missing = [name for name in names if name not in own] + ([] if alpha is not None else ["alpha"])
    if missing or alpha is None:
        message = f"the module lacks {', '.join(missing)}"
        raise AdapterError(message, tensor=missing[0], remedy="restore the file that sd-scripts saved")
    parts = tuple(_square(own, name) for name in names)
    if len({len(part) for part in parts}) > 1:
        message = "all parts of a module have one number of blocks"
        raise _misshapen(message, names[-1], parts[-1])
    return FluxParts(parts, alpha)


def _read_onetrainer(own: Mapping[str, Tensor], file: _File, *, first_days: bool) -> WeightMap:  # noqa: ARG001
    _only(own, ("oft_R.weight", "oft_R.scaled_oft"))
    v = own["oft_R.weight"]
    if v.ndim != 2:
        raise _misshapen("oft_R.weight must be (blocks, b(b-1)/2)", "oft_R.weight", v)
    try:
        rotations.block_size_of(v.shape[1])
    except ShapeError as error:
        raise _misshapen(error.message, "oft_R.weight", v) from None
    return OneTrainerBlocks(v, "oft_R.scaled_oft" in own, first_days)


def _first_days(own: Mapping[str, Tensor], file: _File) -> WeightMap:
    return _read_onetrainer(own, file, first_days=True)


def _today(own: Mapping[str, Tensor], file: _File) -> WeightMap:
    return _read_onetrainer(own, file, first_days=False)


@dataclass(frozen=True)
class _Rules:
    """The rules of one dialect.

    Attributes:
        read: function of a module's tensors and the file that gives the module's map.
        may_turn_bias: whether some release of the tool turns biases with the rows.
    """

    read: Callable[[Mapping[str, Tensor], _File], WeightMap]
    may_turn_bias: bool = False


_RULES: Mapping[str, _Rules] = {
    "lycoris": _Rules(_read_lycoris, may_turn_bias=True),
    "lycoris-2.0": _Rules(_read_finished),
    "kohya": _Rules(_read_kohya, may_turn_bias=True),
    "kohya-flux": _Rules(_read_kohya_flux),
    "onetrainer": _Rules(_today),
    "onetrainer-2025-11-14": _Rules(_first_days),
}
