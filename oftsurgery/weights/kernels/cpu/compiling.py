"""Compile a kernel by numba: one module of LLVM for the kernel and all of its parts, which is optimised once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from numba import int64, types
from numba.core import compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import intrinsic


def compiled(function: Callable[..., None]) -> tuple[str, int, bytes]:
    """The symbol, the number of arguments and the object code of a function of integers that gives nothing."""
    arguments = len(inspect.signature(function).parameters)
    with global_compiler_lock:
        typing, target = cpu_target.typing_context, cpu_target.target_context
        typing.refresh()
        target.refresh()
        library = target.codegen().create_library(function.__name__)
        library.enable_object_caching()
        symbol = _compile_into(library, function, types.void(*[int64] * arguments)).fndesc.mangled_name
        for each in library._final_module.functions:
            if not each.is_declaration and each.name != symbol:
                each.linkage = "internal"  # of a part that is inlined wherever it is called nothing stays
        library.finalize()
        return symbol, arguments, library._get_compiled_object()


def part(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """A function of fixed types that is compiled into the kernels which call it, once each.

    numba's own functions are each a library, which is optimised and turned into machine code for itself, and again in all
    that call it: several times the work.
    """

    def define(function: Callable[..., Any]) -> Any:
        def emit(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            library = context.active_code_library
            known = vars(library).setdefault("_oftsurgery_parts", {})
            if function not in known:
                known[function] = _compile_into(library, function, signature)
            return context.call_internal(builder, known[function].fndesc, signature, values)

        def typed(_context: Any, *_arguments: Any) -> Any:
            return signature, emit

        # an intrinsic's arguments must be named
        names = ["context", *inspect.signature(function).parameters]
        typed.__signature__ = Signature([Parameter(n, Parameter.POSITIONAL_OR_KEYWORD) for n in names])  # type: ignore[attr-defined]
        return intrinsic(typed)

    return define


def _compile_into(library: Any, function: Callable[..., Any], signature: Any) -> Any:
    flags = compiler.Flags()
    flags.error_model = "numpy"
    flags.nrt = flags.boundscheck = False
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    typing, target = cpu_target.typing_context, cpu_target.target_context
    return compiler.compile_internal(
        typing, target, library, function, signature.args, signature.return_type, flags, {}
    )
