"""Tensor names without the segments that wrappers of a model (torch.compile, FSDP, checkpointing, DDP, nested peft) add."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from oftsurgery.errors import CheckpointError, printable

# segments that torch's wrappers put anywhere in a name; no model has a module of such a name
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# the segment that DDP, DataParallel and DeepSpeed put first; elsewhere a model may have a module of this name
_FIRST = "module"
PEFT_PREFIX = ("base_model", "model")


def unwrapped(name: str) -> str:
    """``name`` without the segments that torch's wrappers put anywhere in a name.

    >>> unwrapped("_orig_mod.model.layers.0._checkpoint_wrapped_module.q_proj.weight")
    'model.layers.0.q_proj.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _ANYWHERE)


def without_module(name: str) -> str:
    """``name`` without each segment ``module``, for a name that the model does not have."""
    return ".".join(part for part in name.split(".") if part != _FIRST)


def without_peft(name: str) -> tuple[str, bool]:
    """``name`` without the segments of wrappers and without each leading ``base_model.model.``, and whether ``name`` had such a
    prefix.

    >>> without_peft("module.base_model.model.base_model.model.layers.0.q_proj.oft_R.weight")
    ('layers.0.q_proj.oft_R.weight', True)
    """
    parts, found = unwrapped(name).split("."), False
    while True:
        if tuple(parts[:2]) == PEFT_PREFIX:
            parts, found = parts[2:], True
        elif parts[0] == _FIRST and not found:
            parts = parts[1:]
        else:
            return ".".join(parts), found


def plain_names(names: Collection[str], *, whole: bool) -> Mapping[str, str]:
    """``{name: the name without segments of wrappers}`` of a checkpoint's tensors.

    Args:
        whole: whether the model's class has no ``module`` of its own; ``module.`` and ``base_model.model.`` are then removed
            too if all names begin with such a prefix.

    Raises:
        CheckpointError: two names become one name.
    """
    plain = {name: unwrapped(name) for name in names}
    for first in ("module.", "base_model.model.", "module.") if whole else ():
        if plain and all(new.startswith(first) for new in plain.values()):
            plain = {name: new.removeprefix(first) for name, new in plain.items()}
    before: dict[str, str] = {}
    for name, new in plain.items():
        if before.setdefault(new, name) != name:
            message = f"without the names of wrappers, {printable(before[new])!r} and this tensor have one name, {printable(new)!r}"
            raise CheckpointError(message, tensor=name, remedy="remove the tensor that you do not mean")
    return plain
