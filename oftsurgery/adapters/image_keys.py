"""Sort the keys of an adapter's single file, as image tools write such files, into modules and their tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from oftsurgery.dtypes import FLOATS
from oftsurgery.errors import AdapterError, DialectError, NonFiniteError, printable

Parts = dict[str, dict[str, Tensor]]

_END = re.compile(
    r"(?P<path>.+?)\.(?P<end>oft_blocks(?:\.\d+)?|oft_diag|oft_R\.\w+|alpha|rescale|w_norm|b_norm)", re.DOTALL
)

#: ends of keys, and why no adapter with such a key is read
_REFUSED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"oft_R\.(clipped_oft|cans_oft)$"), "an unreleased branch of OneTrainer wrote the file, and no release says what it computes"),
    (re.compile(r"dora_scale$"), "the file has a DoRA scale, and the tools do not agree on what a DoRA of an OFT computes"),
    (re.compile(r"(initial_norm|dora_(log_)?multiplier)$"), "an unreleased branch of OneTrainer wrote the file (DoRA of an OFT)"),
    (re.compile(r"(^|\.)(psoft_\w+|[AB]\.psoft)"), "the file is of PSOFT, whose other matrices come from a decomposition of the base and are not stored"),
)  # fmt: skip

#: adapters of other kinds, by their keys
_OTHER_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("LoRA", re.compile(r"\.lora_(up|down|mid|A|B)\b|\.lora\.(up|down)\.|\.lora_linear_layer\.|_lora\.(up|down)\.")),
    ("LoHa", re.compile(r"\.hada_(w|t)\d")),
    ("LoKr", re.compile(r"\.lokr_(w|t)\d")),
    ("(IA)³", re.compile(r"\.on_input$")),
)

#: embeddings of textual inversion that tools bundle with an adapter: ``bundle_emb.<name>.…``
_EMBEDDING = re.compile(r"bundle_emb\.([^.]+)(\..*)?", re.DOTALL)

_TRAIN_PLAIN = "fold a file that a release of the tool wrote"
_SAVE_ALONE = "save the OFT parts as a file of their own (a copy of the file without these keys)"


def without_bundled(
    tensors: Mapping[str, Tensor], source: str | None, *, leave_out: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """``(the other tensors, the names of the embeddings that are bundled with the adapter)``.

    Raises:
        DialectError: the file holds such embeddings, and the caller did not say that they are left out.
    """
    bundled = {key: match[1] for key in tensors if (match := _EMBEDDING.fullmatch(key)) is not None}
    if bundled and not leave_out:
        names = ", ".join(map(printable, dict.fromkeys(bundled.values())))
        message = f"the file holds embeddings of textual inversion beside the rotations (bundle_emb: {names}), which no fold puts into a model"
        remedy = (
            "leave them out on purpose: load_adapter(…, without_embeddings=True) (--without-embeddings), and give your tool the embeddings "
            "as files of their own"
        )
        raise DialectError(message, tensor=next(iter(bundled)), path=source, remedy=remedy)
    own = {key: tensor for key, tensor in tensors.items() if key not in bundled}
    return own, tuple(sorted(set(bundled.values())))


def sort_image_keys(tensors: Mapping[str, Tensor], source: str | None) -> Parts:
    """``{module's name in the file: {end of the key: tensor}}``.

    Raises:
        DialectError: the file has keys of other kinds of adapters, or of kinds that are not read.
        AdapterError: a tensor has no floats, or is empty.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    if tensors and not has_image_keys(tensors):
        _check_kind(tensors, source)
    found: Parts = {}
    for key, tensor in tensors.items():
        where: dict[str, Any] = {"tensor": key, "path": source}
        for pattern, why in _REFUSED:
            if pattern.search(key):
                raise DialectError(why, **where, remedy=_TRAIN_PLAIN)
        match = _END.fullmatch(key)
        if match is None or (
            match["end"].startswith("oft_R.") and match["end"] not in ("oft_R.weight", "oft_R.scaled_oft")
        ):
            message = f"the key {printable(key)!r} belongs to no OFT adapter: the file mixes kinds of adapters, or is of another kind"
            raise DialectError(message, **where, remedy=_SAVE_ALONE)
        if match["end"] != "oft_R.scaled_oft":  # a mere mark, of any dtype
            _check_values(tensor, where)
        found.setdefault(match["path"], {})[match["end"]] = tensor
    if not found:
        raise AdapterError("the file holds no tensor", path=source, remedy="give the file that the tool saved")
    return found


def _check_kind(names: Iterable[str], source: str | None) -> None:
    """Refuse the file of another kind of adapter, and a file that is no adapter.

    Raises:
        DialectError: as said.
    """
    known = [name for name in names if _END.fullmatch(name) is None and not any(p.search(name) for p, _ in _REFUSED)]
    kind = kind_of_other(known)
    if kind is not None:
        message = f"the file is a {kind} adapter, not an OFT adapter"
        remedy = "oftsurgery folds OFT, BOFT, HRA and RoAd adapters only; merge others with the tool that trained them"
        raise DialectError(message, path=source, remedy=remedy)
    if len(known) == len(list(names)):
        message = f"the file is no adapter: it holds tensors like {printable(known[0])!r}"
        remedy = "give the adapter's file; the commands take BASE, ADAPTER and OUTPUT in this order"
        raise DialectError(message, path=source, remedy=remedy)


def kind_of_other(names: Iterable[str]) -> str | None:
    """The kind of an adapter of another kind than OFT, by the names of its tensors; None for anything else.

    >>> kind_of_other(["lora_unet_mid_block.lora_up.weight"]), kind_of_other(["mid_block.weight"])
    ('LoRA', None)
    """
    return next((kind for name in names for kind, pattern in _OTHER_KINDS if pattern.search(name)), None)


def has_image_keys(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these ``names`` is an OFT adapter of an image tool, and no model.

    >>> has_image_keys(["lora_unet_mid_block.oft_blocks", "lora_unet_mid_block.alpha"]), has_image_keys(["mid_block.weight"])
    (True, False)
    """
    ends = (match["end"] for name in names if (match := _END.fullmatch(name)) is not None)
    return any(end.startswith("oft_") for end in ends)


def _check_values(tensor: Tensor, where: Mapping[str, Any]) -> None:
    if tensor.numel() == 0:
        raise AdapterError("the adapter's tensor is empty", **where, remedy="save the adapter again")
    if tensor.dtype not in FLOATS:
        message = f"the tensor must be float32, float16, bfloat16 or float64, but is {tensor.dtype}"
        raise AdapterError(message, **where, remedy="restore the file of the adapter")
    if not all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):
        message = "the adapter's tensor holds NaN or infinity"
        raise NonFiniteError(message, **where, remedy="retrain from an earlier checkpoint")
