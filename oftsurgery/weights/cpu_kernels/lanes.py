"""Vector operations for the kernels: numba functions over 16 lanes, each a few lines of LLVM.

LLVM fits the lanes to the machine: one register with AVX-512, two with AVX2, four with NEON or SSE. What belongs to one
format's codes is in :mod:`.codes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

from llvmlite import ir
from numba import float32, float64, int32, int64, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from . import processor
from .layout import LANES


class _Vector(types.Type):
    def __init__(self, name: str, element: ir.Type) -> None:
        super().__init__(name=name)
        self.vector = ir.VectorType(element, LANES)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: _Vector) -> None:
        super().__init__(manager, fe_type, fe_type.vector)


FLOAT, DOUBLE, INT = ir.FloatType(), ir.DoubleType(), ir.IntType(32)
BYTE, WORD, LONG = ir.IntType(8), ir.IntType(16), ir.IntType(64)
f32x = _Vector("f32x16", FLOAT)
f64x = _Vector("f64x16", DOUBLE)
i32x = _Vector("i32x16", INT)
FLOATS, INTS = f32x.vector, i32x.vector
BYTES, WORDS = ir.VectorType(BYTE, LANES), ir.VectorType(WORD, LANES)
NOTHING = ir.Constant(INT, 0)


def operation(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """A numba function of fixed types from a function that emits its LLVM: ``emit(builder, *values) -> value``, or a list
    of values where the type is a tuple.
    """

    def define(emit: Callable[..., Any]) -> Any:
        def lowered(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            result = emit(builder, *values)
            returns = signature.return_type
            return context.make_tuple(builder, returns, result) if isinstance(returns, types.BaseTuple) else result

        def typing(_context: Any, *_arguments: Any) -> Any:
            return signature, lowered

        # an intrinsic's arguments must be named
        names = ["context", *(f"a{i}" for i in range(len(signature.args)))]
        named = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
        typing.__signature__ = named  # type: ignore[attr-defined]
        return intrinsic(typing)

    return define


# --- emitting LLVM ----------------------------------------------------------------------------------------------------


def call(b: Any, name: str, result: ir.Type, *args: Any) -> Any:
    """A call of an intrinsic or a routine of LLVM."""
    module = b.module
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def _call_like(b: Any, name: str, x: Any, *more: Any) -> Any:
    """LLVM's ``name`` of vectors of one type, for that type."""
    return call(b, f"{name}.v{x.type.count}{x.type.element.intrinsic_name}", x.type, x, *more)


def emit_fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    return _call_like(b, "llvm.fmuladd", x, y, z)


def emit_absolute(b: Any, x: Any) -> Any:
    return _call_like(b, "llvm.fabs", x)


def emit_rounded(b: Any, x: Any) -> Any:
    """``x`` rounded to whole numbers, ties to even."""
    return _call_like(b, "llvm.rint", x)


def constant(value: float, vector: ir.VectorType = FLOATS) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def further(b: Any, address: Any, nbytes: int) -> Any:
    """The address ``nbytes`` after ``address``."""
    return b.add(address, ir.Constant(LONG, nbytes)) if nbytes else address


def shuffle(b: Any, x: Any, order: Sequence[int], y: Any = None) -> Any:
    """The lanes of x, then y, that ``order`` names."""
    other = ir.Constant(x.type, ir.Undefined) if y is None else y
    return b.shuffle_vector(x, other, ir.Constant(ir.VectorType(INT, len(order)), list(order)))


def emit_fill(b: Any, value: Any, lanes: int = LANES) -> Any:
    vector = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    return shuffle(b, b.insert_element(vector, value, ir.Constant(INT, 0)), [0] * lanes)


def emit_load(b: Any, address: Any, type_: ir.Type = FLOATS) -> Any:
    loaded = b.load(b.inttoptr(address, type_.as_pointer()))
    loaded.align = _alignment(type_)
    return loaded


def emit_store(b: Any, address: Any, value: Any) -> Any:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = _alignment(value.type)
    return NOTHING


def _alignment(type_: ir.Type) -> int:
    element = getattr(type_, "element", type_)
    return {FLOAT: 4, DOUBLE: 8}.get(element) or element.width // 8


def loop(b: Any, count: Any, step: int, begin: Sequence[Any], body: Callable[..., Sequence[Any]]) -> list[Any]:
    """``values = body(i, *values)`` for i = 0, step … below ``count`` (at least once), from the values ``begin``."""
    before, inside, after = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
    b.branch(inside)
    b.position_at_end(inside)
    i = b.phi(LONG)
    i.add_incoming(ir.Constant(LONG, 0), before)
    values = [b.phi(value.type) for value in begin]
    for value, first in zip(values, begin, strict=True):
        value.add_incoming(first, before)
    new = list(body(i, *values))
    for value, next_ in zip(values, new, strict=True):
        value.add_incoming(next_, b.block)
    i_next = b.add(i, ir.Constant(LONG, step))
    i.add_incoming(i_next, b.block)
    b.cbranch(b.icmp_signed("<", i_next, count), inside, after)
    b.position_at_end(after)
    return new


def _prefetch(b: Any, address: Any, write: int) -> Any:
    flags = [ir.Constant(INT, flag) for flag in (write, 2, 1)]
    call(b, "llvm.prefetch.p0", ir.VoidType(), b.inttoptr(address, BYTE.as_pointer()), *flags)
    return NOTHING


def _halves(b: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine all lanes of a vector into one."""
    width = value.type.count
    while width > 1:
        width //= 2
        value = combine(shuffle(b, value, range(width)), shuffle(b, value, range(width, 2 * width)))
    return b.extract_element(value, ir.Constant(INT, 0))


def emit_lesser(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def emit_greater(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _larger_int(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.icmp_signed(">", x, y), x, y)


def emit_pick(b: Any, table: Any, index: Any) -> Any:
    """``table[index]`` by lanes, for indices 0 to 15."""
    if processor.AVX512:
        kind = "sf" if table.type.element == FLOAT else "si"
        return call(b, f"llvm.x86.avx512.permvar.{kind}.512", table.type, table, index)
    level = [shuffle(b, table, [i] * LANES) for i in range(16)]
    for bit in range(4):
        on = b.icmp_signed("!=", b.and_(index, constant(1 << bit, INTS)), constant(0, INTS))
        level = [b.select(on, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _mask(b: Any, lanes: Any) -> Any:
    """A bit for each lane: whether the comparison holds there."""
    return b.zext(b.bitcast(lanes, WORD), LONG)


def _store_some(b: Any, address: Any, x: Any, bits: Any) -> Any:
    """Store the lanes of x that have a bit in ``bits``, one after the other. 16 floats at the address may change."""
    lanes = b.bitcast(b.trunc(bits, WORD), ir.VectorType(ir.IntType(1), LANES))
    if processor.AVX512:  # in a register: the instruction that stores to memory is slow on some processors
        return emit_store(b, address, call(b, "llvm.x86.avx512.mask.compress.v16f32", FLOATS, x, constant(0.0), lanes))
    pointer = b.inttoptr(address, FLOAT.as_pointer())
    call(b, "llvm.masked.compressstore.v16f32", ir.VoidType(), x, pointer, lanes)
    return NOTHING


def _wide(b: Any, words: Any) -> Any:
    """bfloat16 as float32."""
    return b.bitcast(b.shl(b.zext(words, INTS), constant(16, INTS)), FLOATS)


def _transposed(b: Any, address: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Of 16 vectors at ``address``, one after the other, all lanes of each combined: by lanes."""
    rows = [emit_load(b, further(b, address, 64 * i), vector) for i in range(LANES)]
    width = LANES  # of each row's own part in a vector
    while width > 1:
        width //= 2
        half = len(rows) // 2
        # rows i and i + half share a vector from now on: lane groups of 2·width, the first half of each is row i's
        first, second = [], []
        for group in range(0, LANES, 2 * width):
            own = list(range(group, group + width))
            first += own + [LANES + lane for lane in own]
            second += [lane + width for lane in own] + [LANES + lane + width for lane in own]
        pairs = zip(rows[:half], rows[half:], strict=True)
        rows = [combine(shuffle(b, u, first, v), shuffle(b, u, second, v)) for u, v in pairs]
    return rows[0]


def _call_kernel(b: Any, address: Any, *words: Any) -> Any:
    """Call another kernel at its address, as C does."""
    function = ir.FunctionType(ir.VoidType(), [LONG] * len(words))
    b.call(b.inttoptr(address, function.as_pointer()), words)
    return NOTHING


# --- loads and stores -------------------------------------------------------------------------------------------------

load = operation(f32x(int64))(lambda b, address: emit_load(b, address))
load64 = operation(f64x(int64))(lambda b, address: emit_load(b, address, f64x.vector))
load_ints = operation(i32x(int64))(lambda b, address: emit_load(b, address, INTS))
load_one = operation(float32(int64))(lambda b, address: emit_load(b, address, FLOAT))
load_double = operation(float64(int64))(lambda b, address: emit_load(b, address, DOUBLE))
load_word = operation(int64(int64))(lambda b, address: emit_load(b, address, LONG))
load_byte = operation(int64(int64))(lambda b, address: b.zext(emit_load(b, address, BYTE), LONG))
load_i8 = operation(f32x(int64))(lambda b, address: b.sitofp(emit_load(b, address, BYTES), FLOATS))
load_bf16 = operation(f32x(int64))(lambda b, address: _wide(b, emit_load(b, address, WORDS)))
store = operation(int32(int64, f32x))(emit_store)
store64 = operation(int32(int64, f64x))(emit_store)
store_ints = operation(int32(int64, i32x))(emit_store)
store_one = operation(int32(int64, float32))(emit_store)
store_double = operation(int32(int64, float64))(emit_store)
store_byte = operation(int32(int64, int64))(lambda b, address, value: emit_store(b, address, b.trunc(value, BYTE)))
store_i8 = operation(int32(int64, f32x))(lambda b, address, whole: emit_store(b, address, b.fptosi(whole, BYTES)))
store_some = operation(int32(int64, f32x, int64))(_store_some)
#: ask for the cache line at an address, which need not exist
prefetch = operation(int32(int64))(lambda b, address: _prefetch(b, address, 0))
prefetch_to_write = operation(int32(int64))(lambda b, address: _prefetch(b, address, 1))


@operation(f32x(int64))
def load_f16(b, address):
    if not processor.HAS_F16:
        return constant(0.0)  # never called
    return b.fpext(b.bitcast(emit_load(b, address, WORDS), ir.VectorType(ir.HalfType(), LANES)), FLOATS)


@operation(f32x(int64, f32x))
def store_f16(b, address, x):
    """Store x; returns the stored values."""
    if not processor.HAS_F16:
        return x  # never called
    half = b.fptrunc(x, ir.VectorType(ir.HalfType(), LANES))
    emit_store(b, address, b.bitcast(half, WORDS))
    return b.fpext(half, FLOATS)


@operation(f32x(int64, f32x))
def store_bf16(b, address, x):
    """Store x rounded to even; returns the stored values. x must hold no NaN."""
    bits, half = b.bitcast(x, INTS), constant(16, INTS)
    odd = b.and_(b.lshr(bits, half), constant(1, INTS))
    words = b.trunc(b.lshr(b.add(b.add(bits, odd), constant(0x7FFF, INTS)), half), WORDS)
    emit_store(b, address, words)
    return _wide(b, words)


# --- arithmetic -------------------------------------------------------------------------------------------------------

fill = operation(f32x(float32))(emit_fill)
fill64 = operation(f64x(float64))(emit_fill)
zeros = operation(f32x())(lambda _: constant(0.0))
no_bits = operation(i32x())(lambda _: constant(0, INTS))
as_float = operation(float32(int32))(lambda b, bits: b.bitcast(bits, FLOAT))
as_bits = operation(int32(float32))(lambda b, value: b.bitcast(value, INT))
unsigned = operation(int64(int32))(lambda b, bits: b.zext(bits, LONG))
floats = operation(f32x(i32x))(lambda b, bits: b.bitcast(bits, FLOATS))

add = operation(f32x(f32x, f32x))(ir.IRBuilder.fadd)
add64 = operation(f64x(f64x, f64x))(ir.IRBuilder.fadd)
sub64 = operation(f64x(f64x, f64x))(ir.IRBuilder.fsub)
mul64 = operation(f64x(f64x, f64x))(ir.IRBuilder.fmul)
wide = operation(f64x(f32x))(lambda b, x: b.fpext(x, f64x.vector))
sub = operation(f32x(f32x, f32x))(ir.IRBuilder.fsub)
mul = operation(f32x(f32x, f32x))(ir.IRBuilder.fmul)
div = operation(f32x(f32x, f32x))(ir.IRBuilder.fdiv)
fma = operation(f32x(f32x, f32x, f32x))(emit_fma)
fma64 = operation(f64x(f64x, f64x, f64x))(emit_fma)
absolute = operation(f32x(f32x))(emit_absolute)
rounded = operation(f32x(f32x))(emit_rounded)
lesser = operation(f32x(f32x, f32x))(emit_lesser)
greater = operation(f32x(f32x, f32x))(emit_greater)
#: the totals or the least of all lanes
total = operation(float32(f32x))(lambda b, x: _halves(b, x, b.fadd))
total64 = operation(float64(f64x))(lambda b, x: _halves(b, x, b.fadd))
least = operation(float32(f32x))(lambda b, x: _halves(b, x, lambda u, v: emit_lesser(b, u, v)))
top_bits = operation(int32(i32x))(lambda b, bits: _halves(b, bits, lambda u, v: _larger_int(b, u, v)))
pick = operation(f32x(f32x, i32x))(emit_pick)
which_below = operation(int64(f32x, f32x))(lambda b, x, y: _mask(b, b.fcmp_ordered("<", x, y)))
which_differ = operation(int64(i32x, i32x))(lambda b, x, y: _mask(b, b.icmp_signed("!=", x, y)))
bits_in = operation(int64(int64))(lambda b, bits: b.ctpop(bits))
first_bit = operation(int64(int64))(lambda b, bits: b.cttz(bits, ir.Constant(ir.IntType(1), 1)))
cells_of = operation(i32x(f32x, f32x, f32x))(lambda b, *args: b.fptosi(emit_fma(b, *args), INTS))
#: the totals, or the largest, of 16 vectors at an address, one after the other: by lanes
totals = operation(f32x(int64))(lambda b, address: _transposed(b, address, FLOATS, b.fadd))
tops = operation(i32x(int64))(lambda b, address: _transposed(b, address, INTS, lambda u, v: _larger_int(b, u, v)))
#: call another kernel
call_five = operation(int32(*[int64] * 6))(_call_kernel)
call_nine = operation(int32(*[int64] * 10))(_call_kernel)


@operation(f64x(f32x, f64x, f64x))
def weigh(b, x, weight, total_):
    """``total_ + x · weight`` in float64."""
    return emit_fma(b, b.fpext(x, f64x.vector), weight, total_)


@operation(f64x(f32x, f32x, f64x))
def add_product(b, x, y, total_):
    """``total_ + x · y`` in float64."""
    return emit_fma(b, b.fpext(x, f64x.vector), b.fpext(y, f64x.vector), total_)


@operation(i32x(i32x, f32x))
def max_bits(b, bits, x):
    """The larger of ``bits`` and the bits of \\|x\\|, as integers: NaN > infinity > every number."""
    return _larger_int(b, b.and_(b.bitcast(x, INTS), constant(0x7FFFFFFF, INTS)), bits)


@operation(f32x(f32x, f32x, f32x, f32x))
def choose_less(b, x, y, yes, no):
    """``yes`` where x < y, else ``no``."""
    return b.select(b.fcmp_ordered("<", x, y), yes, no)


@operation(f32x(f32x, f32x, f32x, f32x))
def add_up_to(b, x, limit, change, total_):
    """``total_ + change`` where x ≤ limit, else ``total_``."""
    return b.select(b.fcmp_ordered("<=", x, limit), b.fadd(total_, change), total_)


@operation(f32x(f32x))
def to_int8(b, x):
    """x rounded to even and clamped to ±127; NaN to 0."""
    whole = emit_rounded(b, x)
    for limit, sign in ((127.0, "<"), (-127.0, ">")):
        edge = constant(limit)
        whole = b.select(b.fcmp_unordered(sign, whole, edge), whole, edge)
    return b.select(b.fcmp_ordered("ord", whole, whole), whole, constant(0.0))


# --- products ---------------------------------------------------------------------------------------------------------

#: the register block of a rotation: as many rows × columns of sums as the registers hold
BLOCK_ROWS, BLOCK_LANES = (8, 16) if processor.AVX512 else (4, 8)


def _product(b, element, vectors, x, x_stride, m, m_stride, y, y_stride, depth):
    """y[r, :] = Σₖ x[r, k] · m[k, :] for BLOCK_ROWS rows and ``vectors`` registers of columns, sums kept in registers."""
    size = 4 * BLOCK_LANES  # bytes of a register
    each = _alignment(element)
    lane = ir.VectorType(element, size // each)
    rows = [x]
    for _ in range(1, BLOCK_ROWS):
        rows.append(b.add(rows[-1], x_stride))

    def step(k: Any, m_row: Any, *sums: Any) -> list[Any]:
        m_lanes = [emit_load(b, further(b, m_row, size * v), lane) for v in range(vectors)]
        offset = b.mul(k, ir.Constant(LONG, each))
        new = []
        for r, row in enumerate(rows):
            many = emit_fill(b, emit_load(b, b.add(row, offset), element), lane.count)
            new += [emit_fma(b, many, m_lanes[v], sums[r * vectors + v]) for v in range(vectors)]
        return [b.add(m_row, m_stride), *new]

    _, *sums = loop(b, depth, 1, [m, *[constant(0.0, lane)] * (BLOCK_ROWS * vectors)], step)
    for r in range(BLOCK_ROWS):
        for v in range(vectors):
            emit_store(b, further(b, y, size * v), sums[r * vectors + v])
        y = b.add(y, y_stride)
    return NOTHING


product_one = operation(int32(*[int64] * 7))(lambda b, *args: _product(b, FLOAT, 1, *args))
product_two = operation(int32(*[int64] * 7))(lambda b, *args: _product(b, FLOAT, 2, *args))
product64 = operation(int32(*[int64] * 7))(lambda b, *args: _product(b, DOUBLE, 2, *args))
