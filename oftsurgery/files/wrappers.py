"""Names of tensors without what wrappers of a model put into them: torch.compile, FSDP, checkpointing, DDP, nested peft."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from oftsurgery.errors import CheckpointError, printable

# segments that torch's wrappers put anywhere in a name; nobody else calls a module so
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# what DDP, DataParallel and DeepSpeed put first; elsewhere it may be the model's own name
_FIRST = "module"
PEFT_PREFIX = ("base_model", "model")


def unwrapped(name: str) -> str:
    """``name`` without the segments that torch's wrappers put anywhere.

    >>> unwrapped("_orig_mod.model.layers.0._checkpoint_wrapped_module.q_proj.weight")
    'model.layers.0.q_proj.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _ANYWHERE)


def without_module(name: str) -> str:
    """``name`` without each ``module`` in it, which may be the model's own: for a name that the model does not have."""
    return ".".join(part for part in name.split(".") if part != _FIRST)


def without_peft(name: str) -> tuple[str, bool]:
    """``name`` without wrappers' segments and peft's ``base_model.model.``, as often as they stand first, and whether
    that stood there.

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
    """``{name: the name without wrappers' segments}`` of a checkpoint's tensors.

    Args:
        whole: the names are those of a class that has no ``module`` of its own: without a ``module.`` or
            ``base_model.model.`` with which all of them begin.

    Raises:
        CheckpointError: two names become one.
    """
    plain = {name: unwrapped(name) for name in names}
    for first in ("module.", "base_model.model.", "module.") if whole else ():
        if plain and all(new.startswith(first) for new in plain.values()):
            plain = {name: new.removeprefix(first) for name, new in plain.items()}
    before: dict[str, str] = {}
    for name, new in plain.items():
        if before.setdefault(new, name) != name:
            message = f"{printable(before[new])!r} and this tensor are one, without the names of wrappers"
            raise CheckpointError(message, tensor=name, remedy="remove the one that is not meant")
    return plain
