def __getattr__(name: str) -> object:  # scripts outside the package import `find_checkpoint` from here
    if name != "find_checkpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .finding import find_checkpoint

    return find_checkpoint
