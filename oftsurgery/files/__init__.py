def __getattr__(name: str) -> object:  # `find_checkpoint`, which scripts outside of the package import from here
    if name != "find_checkpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .finding import find_checkpoint

    return find_checkpoint
