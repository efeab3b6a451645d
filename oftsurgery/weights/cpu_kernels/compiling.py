"""Compile a kernel: numba turns the function and its parts into LLVM, and llvmlite turns that into object code.

Only the public functions of both libraries are used. The object code is a C function of 64-bit integers. It needs nothing
of numba or Python, so a later process can load it without numba.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import int64, types
from numba.extending import typeof_impl

from . import KERNELS, processor, symbol

#: functions of C's library that object code may call
_OF_C = ("sqrt", "memset", "memcpy")


class Part:
    """A function of fixed types that kernels call. numba compiles a part when the first kernel that names it is compiled.

    Args:
        signature: numba's types of the arguments and the result.
        function: a Python function of these types, of which numba's nopython mode knows every operation.
    """

    def __init__(self, signature: Any, function: Callable[..., Any]) -> None:
        self._signature, self._function = signature, function
        self._compiled: Any = None

    def compiled(self) -> Any:
        """numba's own function, compiled for the signature. Wrappers for Python and C would double the work."""
        if self._compiled is None:
            options = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
            self._compiled = numba.njit(self._signature, **options)(self._function)
        return self._compiled


@typeof_impl.register(Part)
def _type_of_part(part: Part, _context: Any) -> Any:
    """numba asks for the type of each name in the function that numba compiles."""
    return numba.typeof(part.compiled())


def part(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function that kernels call, see :class:`Part`."""
    return lambda function: Part(signature, function)


def compile_kernel(name: str) -> tuple[int, bytes]:
    """The number of arguments and the object code of a kernel, as :func:`compiled` gives them."""
    return compiled(getattr(import_module(f".{KERNELS[name]}", __package__), name), symbol(name))


def compiled(function: Callable[..., None], symbol: str) -> tuple[int, bytes]:
    """The number of arguments and the object code of a function of integers that returns nothing.

    Args:
        symbol: the function's name in the object code.

    Raises:
        RuntimeError: the function can raise an error, so its code would need Python.
    """
    arguments = len(inspect.signature(function).parameters)
    callback = numba.cfunc(types.void(*[int64] * arguments), nopython=True, error_model="numpy")(function)
    module = llvm.parse_assembly(callback.inspect_llvm())
    for each in [*module.functions, *module.global_variables]:
        if not each.is_declaration and each.name != callback.native_name:
            each.linkage = "internal"
    module.get_function(callback.native_name).name = symbol
    target = processor.target()
    _optimise(module, target)
    foreign = [f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    if set(foreign) - set(_OF_C):
        raise RuntimeError(f"the kernel {symbol} calls {', '.join(foreign)}, and may call only {', '.join(_OF_C)}")
    return arguments, target.emit_object(module)


def _optimise(module: Any, target: Any) -> None:
    """Optimise a kernel with all its parts, and take out numba's code that reports an error to Python: no kernel raises one,
    which LLVM finds out.
    """
    builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    passes = llvm.create_new_module_pass_manager()
    passes.add_ipsccp_pass()
    passes.add_simplify_cfg_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.add_strip_dead_prototype_pass()
    passes.run(module, builder)
