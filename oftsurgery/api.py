"""The public functions: pure parts joined to files, paths accepted as arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Literal, TypeVar

from torch import nn

from . import files
from . import model as live_model
from .adapter import Dialect, OFTAdapter, parse_adapter
from .errors import StateError, printable

__all__ = ["fold", "load_adapter", "unfold"]

M = TypeVar("M", bound=nn.Module)

AdapterLike = OFTAdapter | str | PathLike[str]


def load_adapter(path_or_repo: str | PathLike[str], *, dialect: Dialect | None = None, revision: str | None = None) -> OFTAdapter:
    """Read an OFT adapter that any peft release from 0.12 to 0.21 wrote.

    Args:
        path_or_repo: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a Hub id.
        dialect: which releases' arithmetic the adapter is of, where its files do not tell (a key of :data:`oftsurgery.DIALECTS`).
        revision: of the Hub repository.

    Raises:
        AdapterError: files are missing, damaged, pickles, or not an adapter's.
        DialectError: another kind of adapter, or an OFT one that cannot be told or is not supported.
        ShapeError, NonFiniteError: tensors that no adapter has.
    """
    folder = files.find_adapter(Path(path_or_repo) if not isinstance(path_or_repo, str) else path_or_repo, revision=revision)
    config, tensors, sha256 = files.read_adapter(folder)
    return parse_adapter(config, tensors, dialect=dialect, source=str(path_or_repo), sha256=sha256)


def fold(
    model: M,
    adapter: AdapterLike | Sequence[AdapterLike] | None = None,
    *,
    rounding: Literal["nearest"] = "nearest",
    inplace: bool = False,
    progress: bool = False,
) -> M:
    """Merge an OFT adapter into a model's weights, in the formats that they have.

    Each targeted weight is dequantised exactly, rotated by blocks in float32, and stored again as it was: NF4, FP4 (double quantisation and
    ``quant_storage`` kept), int8 or a float dtype. The result computes what the live adapter computes, up to the rounding of that storage, which is measured
    for each module and stated in one :class:`~oftsurgery.RoundingWarning`.

    Args:
        model: a torch or transformers model, plain or over bitsandbytes layers, compiled or spread by accelerate; or a ``PeftModel`` whose live adapters are
            to be folded, which gives the plain base model.
        adapter: an :class:`~oftsurgery.OFTAdapter` or what :func:`load_adapter` takes; several are the live chain ``x · Ra · Rb``, as peft's active adapters
            ``[a, b]``. For a model with live adapters: None for the active ones, or names.
        rounding: ``"nearest"``, as bitsandbytes rounds.
        inplace: change ``model`` itself, layer by layer on its device. Replaced weights wait in CPU memory until the last layer is done. Otherwise the result is
            a new model that shares every tensor that it did not change, and ``model`` stays as it is.
        progress: show a bar.

    Returns:
        the folded model; its ``oftsurgery`` attribute is the :class:`~oftsurgery.FoldRecord`.

    Raises:
        AdapterError, DialectError: the adapter cannot be used.
        MatchError: an adapter's module or tensor matches nothing in the model, or two match one.
        ShapeError: it does not fit.
        StateError: the model carries this adapter already, is merged by peft, not loaded, not quantised yet …
        FormatError: a targeted layer is of a kind that cannot be folded.
        NonFiniteError: NaN or infinity, in the adapter, the base or the result.
        After any error the model is as it was.
    """
    if rounding != "nearest":
        raise StateError(f"unknown rounding {printable(rounding)!r}", remedy="'nearest'")
    names, adapters = _resolve(model, adapter)
    with _bar(progress, "fold") as step:
        return live_model.fold_model(model, adapters, names=names, inplace=inplace, progress=step)  # type: ignore[return-value]


def unfold(
    folded: M,
    adapter: AdapterLike | Sequence[AdapterLike] | None = None,
    *,
    base: nn.Module | None = None,
    inplace: bool = False,
    progress: bool = False,
) -> M:
    """Take the last fold out of a model again.

    Args:
        folded: a model that :func:`fold` gave, or one that holds the same weights.
        adapter: what was folded: rotates back by the true inverse and rounds once more, so quantised weights come back inexactly; an
            :class:`~oftsurgery.UnfoldWarning` states the error.
        base: the model that was folded: restores its bytes exactly, checked against the record's hashes.
        inplace: change ``folded`` itself.
        progress: show a bar.

    Raises:
        StateError: neither or both given, or another adapter than the last one folded.
        IntegrityError: ``base`` is not the model that was folded.
        and those of :func:`fold`. After any error the model is as it was.
    """
    if (adapter is None) == (base is None):
        raise StateError("unfold needs the adapter or the base", remedy="unfold(model, adapter) rotates back, unfold(model, base=…) restores exactly")
    if base is not None:
        return live_model.restore_model(folded, base, inplace=inplace)  # type: ignore[return-value]
    _, adapters = _resolve(folded, adapter)
    with _bar(progress, "unfold") as step:
        return live_model.unfold_model(folded, adapters or [], inplace=inplace, progress=step)  # type: ignore[return-value]


def _resolve(model: nn.Module, adapter: AdapterLike | Sequence[AdapterLike] | None) -> tuple[list[str] | None, list[OFTAdapter] | None]:
    """(names of live adapters, None) or (None, loaded adapters)."""
    given = [] if adapter is None else [adapter] if isinstance(adapter, (OFTAdapter, str, PathLike)) else list(adapter)
    live = getattr(live_model.inner_model(model), "peft_config", {})
    if isinstance(live, Mapping) and live and all(isinstance(a, str) and a in live for a in given):
        return [str(a) for a in given] or None, None
    if adapter is None:
        return None, None
    return None, [a if isinstance(a, OFTAdapter) else load_adapter(a) for a in given]


@contextmanager
def _bar(show: bool, verb: str) -> Iterator[live_model.Progress | None]:
    if not show:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(desc=verb, unit="layer") as bar:

        def step(done: int, total: int, path: str) -> None:
            bar.total = total
            bar.set_postfix_str(printable(path, 40), refresh=False)
            bar.update(done - bar.n)

        yield step
