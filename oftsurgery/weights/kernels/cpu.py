"""The fused CPU kernel: decode → rotate → scale → absmax → encode → pack for one tile of a weight, compiled by numba.

The kernel is one file, because numba's cache between processes watches the file of the compiled function alone. Two layers:

* *vector operations*: numba functions over 16 lanes (``<16 x float>`` …), each a few lines of LLVM. LLVM fits them to
  the machine: one register with AVX-512, two with AVX2, four with NEON or SSE.
* *the kernel*: plain loops over addresses. It allocates nothing, raises nothing and holds no lock, so any number of
  threads may run it on tiles of their own.

The arithmetic that decides codes is that of :mod:`oftsurgery.formats.codecs`, operation by operation; only the order of
the rotation's sums differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import float32, float64, int32, int64, njit, types, uint8
from numba.core import config as numba_config
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

#: kinds of storage
FOUR_BIT, INT8, F32, F16, BF16 = range(5)
#: how 4-bit blocks are scaled: by their absmax, by what errs less, by that with no codes yet, by what is there already;
#: by the base's own scales, with the change over-relaxed (int8 too), and what the relaxation is found from
NEAREST, BEST, SCALES, GIVEN, KEEP, SAMPLE = range(6)
#: what a tile sums up, see :func:`fold_tile`
SUMS = 8
LANES = 16
#: rows that are rotated together
ROWS = 16

_HOST = numba_config.CPU_FEATURES if numba_config.CPU_FEATURES is not None else llvm.get_host_cpu_features().flatten()
_FEATURES = set(_HOST.split(",")) if numba_config.CPU_NAME != "generic" else set()
_AVX512 = "+avx512f" in _FEATURES
#: without this feature LLVM would call a conversion routine that is not linked in
HAS_F16 = _AVX512 or "+f16c" in _FEATURES or llvm.get_default_triple().startswith(("aarch64", "arm64"))

# --- vector operations ------------------------------------------------------------------------------------------------


class _Vector(types.Type):
    def __init__(self, name: str, element: ir.Type) -> None:
        super().__init__(name=name)
        self.vector = ir.VectorType(element, LANES)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: _Vector) -> None:
        super().__init__(manager, fe_type, fe_type.vector)


_F, _D, _I = ir.FloatType(), ir.DoubleType(), ir.IntType(32)
_BYTE, _WORD, _LONG = ir.IntType(8), ir.IntType(16), ir.IntType(64)
f32x = _Vector("f32x16", _F)
f64x = _Vector("f64x16", _D)
i32x = _Vector("i32x16", _I)
_BYTES, _WORDS = ir.VectorType(_BYTE, LANES), ir.VectorType(_WORD, LANES)
_NOTHING = ir.Constant(_I, 0)


def _operation(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """A numba function of fixed types from a function that emits its LLVM: ``emit(builder, *values) -> value``."""

    def define(emit: Callable[..., Any]) -> Any:
        def typing(_context: Any, *_arguments: Any) -> Any:
            return signature, lambda _context, builder, _signature, args: emit(builder, *args)

        # an intrinsic's arguments must be named
        names = ["context", *(f"a{i}" for i in range(len(signature.args)))]
        named = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
        typing.__signature__ = named  # type: ignore[attr-defined]
        return intrinsic(typing)

    return define


def _call(b: Any, name: str, result: ir.Type, *args: Any) -> Any:
    module = b.module
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def _call_like(b: Any, name: str, x: Any, *more: Any) -> Any:
    """LLVM's ``name`` of vectors of one type, for that type."""
    return _call(b, f"{name}.v{x.type.count}{x.type.element.intrinsic_name}", x.type, x, *more)


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    return _call_like(b, "llvm.fmuladd", x, y, z)


def _constant(value: float, vector: ir.VectorType) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _shuffle(b: Any, x: Any, order: Sequence[int], y: Any = None) -> Any:
    """The lanes of x, then y, that ``order`` names."""
    other = ir.Constant(x.type, ir.Undefined) if y is None else y
    return b.shuffle_vector(x, other, ir.Constant(ir.VectorType(_I, len(order)), list(order)))


def _fill(b: Any, value: Any, lanes: int = LANES) -> Any:
    vector = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    return _shuffle(b, b.insert_element(vector, value, ir.Constant(_I, 0)), [0] * lanes)


def _load(b: Any, address: Any, type_: ir.Type) -> Any:
    loaded = b.load(b.inttoptr(address, type_.as_pointer()))
    loaded.align = _alignment(type_)
    return loaded


def _store(b: Any, address: Any, value: Any) -> Any:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = _alignment(value.type)
    return _NOTHING


def _alignment(type_: ir.Type) -> int:
    element = getattr(type_, "element", type_)
    return {_F: 4, _D: 8}.get(element) or element.width // 8


def _prefetch(b: Any, address: Any, write: int) -> Any:
    flags = [ir.Constant(_I, flag) for flag in (write, 2, 1)]
    _call(b, "llvm.prefetch.p0", ir.VoidType(), b.inttoptr(address, _BYTE.as_pointer()), *flags)
    return _NOTHING


def _halves(b: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine all lanes of a vector into one."""
    width = value.type.count
    while width > 1:
        width //= 2
        value = combine(_shuffle(b, value, range(width)), _shuffle(b, value, range(width, 2 * width)))
    return b.extract_element(value, ir.Constant(_I, 0))


def _smaller(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def _larger_int(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.icmp_signed(">", x, y), x, y)


def _pick(b: Any, table: Any, index: Any) -> Any:
    """``table[index]`` by lanes, for indices 0 to 15."""
    if _AVX512:
        kind = "sf" if table.type.element == _F else "si"
        return _call(b, f"llvm.x86.avx512.permvar.{kind}.512", table.type, table, index)
    level = [_shuffle(b, table, [i] * LANES) for i in range(16)]
    for bit in range(4):
        on = b.icmp_signed("!=", b.and_(index, _constant(1 << bit, i32x.vector)), _constant(0, i32x.vector))
        level = [b.select(on, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _mask(b: Any, lanes: Any) -> Any:
    """A bit for each lane that holds."""
    return b.zext(b.bitcast(lanes, _WORD), _LONG)


def _wide(b: Any, words: Any) -> Any:
    """bfloat16 as float32."""
    return b.bitcast(b.shl(b.zext(words, i32x.vector), _constant(16, i32x.vector)), f32x.vector)


load = _operation(f32x(int64))(lambda b, address: _load(b, address, f32x.vector))
load64 = _operation(f64x(int64))(lambda b, address: _load(b, address, f64x.vector))
load_ints = _operation(i32x(int64))(lambda b, address: _load(b, address, i32x.vector))
load_one = _operation(float32(int64))(lambda b, address: _load(b, address, _F))
load_word = _operation(int64(int64))(lambda b, address: _load(b, address, _LONG))
load_i8 = _operation(f32x(int64))(lambda b, address: b.sitofp(_load(b, address, _BYTES), f32x.vector))
load_bf16 = _operation(f32x(int64))(lambda b, address: _wide(b, _load(b, address, _WORDS)))
store = _operation(int32(int64, f32x))(_store)
store64 = _operation(int32(int64, f64x))(_store)
store_ints = _operation(int32(int64, i32x))(_store)
store_one = _operation(int32(int64, float32))(_store)
store_byte = _operation(int32(int64, int64))(lambda b, address, value: _store(b, address, b.trunc(value, _BYTE)))
store_i8 = _operation(int32(int64, f32x))(lambda b, address, whole: _store(b, address, b.fptosi(whole, _BYTES)))
#: ask for the cache line at an address, which need not exist
prefetch = _operation(int32(int64))(lambda b, address: _prefetch(b, address, 0))
prefetch_to_write = _operation(int32(int64))(lambda b, address: _prefetch(b, address, 1))

fill = _operation(f32x(float32))(_fill)
fill64 = _operation(f64x(float64))(_fill)
zeros = _operation(f32x())(lambda _: _constant(0.0, f32x.vector))
no_bits = _operation(i32x())(lambda _: _constant(0, i32x.vector))
as_float = _operation(float32(int32))(lambda b, bits: b.bitcast(bits, _F))
as_bits = _operation(int32(float32))(lambda b, value: b.bitcast(value, _I))

add = _operation(f32x(f32x, f32x))(ir.IRBuilder.fadd)
sub = _operation(f32x(f32x, f32x))(ir.IRBuilder.fsub)
mul = _operation(f32x(f32x, f32x))(ir.IRBuilder.fmul)
div = _operation(f32x(f32x, f32x))(ir.IRBuilder.fdiv)
fma = _operation(f32x(f32x, f32x, f32x))(_fma)
fma64 = _operation(f64x(f64x, f64x, f64x))(_fma)
absolute = _operation(f32x(f32x))(lambda b, x: _call_like(b, "llvm.fabs", x))
#: to even
rounded = _operation(f32x(f32x))(lambda b, x: _call_like(b, "llvm.rint", x))
lesser = _operation(f32x(f32x, f32x))(_smaller)
greater = _operation(f32x(f32x, f32x))(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
#: the totals or the least of all lanes
total = _operation(float32(f32x))(lambda b, x: _halves(b, x, b.fadd))
total64 = _operation(float64(f64x))(lambda b, x: _halves(b, x, b.fadd))
least = _operation(float32(f32x))(lambda b, x: _halves(b, x, lambda u, v: _smaller(b, u, v)))
top_bits = _operation(int32(i32x))(lambda b, bits: _halves(b, bits, lambda u, v: _larger_int(b, u, v)))
pick = _operation(f32x(f32x, i32x))(_pick)
pick_ints = _operation(i32x(i32x, i32x))(_pick)
which_below = _operation(int64(f32x, f32x))(lambda b, x, y: _mask(b, b.fcmp_ordered("<", x, y)))
which_differ = _operation(int64(i32x, i32x))(lambda b, x, y: _mask(b, b.icmp_signed("!=", x, y)))
first_bit = _operation(int64(int64))(lambda b, bits: b.cttz(bits, ir.Constant(ir.IntType(1), 1)))
cells_of = _operation(i32x(f32x, f32x, f32x))(lambda b, *args: b.fptosi(_fma(b, *args), i32x.vector))


@_operation(f64x(f32x, f64x, f64x))
def weigh(b, x, weight, total_):
    """``total_ + x · weight`` in float64."""
    return _fma(b, b.fpext(x, f64x.vector), weight, total_)


@_operation(f64x(f32x, f32x, f64x))
def add_product(b, x, y, total_):
    """``total_ + x · y`` in float64."""
    return _fma(b, b.fpext(x, f64x.vector), b.fpext(y, f64x.vector), total_)


@_operation(i32x(i32x, f32x))
def max_bits(b, bits, x):
    """The larger of ``bits`` and the bits of \\|x\\|, as integers: NaN > infinity > every number."""
    return _larger_int(b, b.and_(b.bitcast(x, i32x.vector), _constant(0x7FFFFFFF, i32x.vector)), bits)


@_operation(f32x(f32x, f32x, f32x, f32x))
def choose_less(b, x, y, yes, no):
    """``yes`` where x < y, else ``no``."""
    return b.select(b.fcmp_ordered("<", x, y), yes, no)


@_operation(f32x(f32x, f32x, f32x, f32x))
def add_up_to(b, x, limit, change, total_):
    """``total_ + change`` where x ≤ limit, else ``total_``."""
    return b.select(b.fcmp_ordered("<=", x, limit), b.fadd(total_, change), total_)


@_operation(i32x(int64))
def load_codes(b, address):
    """16 codes from 8 bytes, the first in the high nibble."""
    octets = ir.VectorType(_BYTE, 8)
    packed = _load(b, address, octets)
    high, low = b.lshr(packed, _constant(4, octets)), b.and_(packed, _constant(15, octets))
    return b.zext(_shuffle(b, high, [i // 2 + 8 * (i % 2) for i in range(16)], low), i32x.vector)


def _packed(b: Any, codes: Any, octets: ir.Type) -> Any:
    """Pairs of lanes as a byte each, or as a byte for each byte of a lane."""
    pairs = ir.VectorType(_LONG, 8)
    pair = b.bitcast(codes, pairs)  # the first code in the low half
    return b.trunc(b.or_(b.shl(pair, _constant(4, pairs)), b.lshr(pair, _constant(32, pairs))), octets)


@_operation(int32(int64, i32x))
def store_codes(b, address, codes):
    """Mirror of :func:`load_codes`."""
    return _store(b, address, _packed(b, codes, ir.VectorType(_BYTE, 8)))


@_operation(int32(int64, i32x, i32x, i32x, i32x))
def store_four_codes(b, address, *codes):
    """:func:`store_codes` of four vectors one after the other, packed together."""
    all_ = codes[0]
    for i in range(1, 4):  # a byte of each lane to each vector
        all_ = b.or_(all_, b.shl(codes[i], _constant(8 * i, i32x.vector)))
    octets = b.bitcast(_packed(b, all_, ir.VectorType(_I, 8)), ir.VectorType(_BYTE, 32))
    return _store(b, address, _shuffle(b, octets, [4 * lane + vector for vector in range(4) for lane in range(8)]))


@_operation(i32x(f32x, f32x))
def rank(b, x, bounds):
    """How many of 15 ascending ``bounds`` (the 16th lane is not read) are below x: ``torch.bucketize``, ties to the
    lower side.
    """
    index = _constant(0, i32x.vector)
    for step in (8, 4, 2, 1):
        bound = _pick(b, bounds, b.add(index, _constant(step - 1, i32x.vector)))
        above = b.fcmp_ordered(">", x, bound)
        index = b.select(above, b.add(index, _constant(step, i32x.vector)), index)
    return index


#: cells that [-1, 1] is cut into by :func:`rank_by_cell`; 0 where there is no instruction for tables of 32
CELLS = 32 if _AVX512 else 0
#: cells a unit, a little less than 16: 1 and what rounds to a bit more is in the last one
CELL_FACTOR = 15.9999


@_operation(i32x(f32x, i32x, i32x, f32x, f32x))
def rank_by_cell(b, x, base_low, base_high, bounds_low, bounds_high):
    """:func:`rank`, where each of 32 cells of [-1, 1] holds at most one bound: how many are in cells below, and whether
    the cell's own is below x.
    """
    if not CELLS:
        return _constant(0, i32x.vector)  # never called
    cell = b.fptosi(_fma(b, x, _constant(CELL_FACTOR, f32x.vector), _constant(16.0, f32x.vector)), i32x.vector)
    base = _call(b, "llvm.x86.avx512.vpermi2var.d.512", i32x.vector, base_low, cell, base_high)
    bound = _call(b, "llvm.x86.avx512.vpermi2var.ps.512", f32x.vector, bounds_low, cell, bounds_high)
    return b.select(b.fcmp_ordered(">", x, bound), b.add(base, _constant(1, i32x.vector)), base)


@_operation(f32x(int64, i32x))
def look_up(b, address, index):
    """The values of ``index``, 0 to 31, of the 32 values at ``address``."""
    if _AVX512:
        low = _load(b, address, f32x.vector)
        high = _load(b, b.add(address, ir.Constant(_LONG, 64)), f32x.vector)
        return _call(b, "llvm.x86.avx512.vpermi2var.ps.512", f32x.vector, low, index, high)
    value = ir.Constant(f32x.vector, ir.Undefined)
    for lane in range(LANES):
        one = b.zext(b.extract_element(index, ir.Constant(_I, lane)), _LONG)
        at = b.add(address, b.shl(one, ir.Constant(_LONG, 2)))
        value = b.insert_element(value, _load(b, at, _F), ir.Constant(_I, lane))
    return value


@_operation(f32x(int64))
def totals(b, address):
    """The totals of 16 vectors at ``address``, one after the other, by lanes."""
    rows = [_load(b, b.add(address, ir.Constant(_LONG, 64 * i)), f32x.vector) for i in range(LANES)]
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
        rows = [b.fadd(_shuffle(b, u, first, v), _shuffle(b, u, second, v)) for u, v in pairs]
    return rows[0]


@_operation(f32x(f32x))
def to_int8(b, x):
    """x rounded to even and clamped to ±127; NaN to 0."""
    whole = _call_like(b, "llvm.rint", x)
    for limit, sign in ((127.0, "<"), (-127.0, ">")):
        edge = _constant(limit, f32x.vector)
        whole = b.select(b.fcmp_unordered(sign, whole, edge), whole, edge)
    return b.select(b.fcmp_ordered("ord", whole, whole), whole, _constant(0.0, f32x.vector))


@_operation(f32x(int64))
def load_f16(b, address):
    if not HAS_F16:
        return _constant(0.0, f32x.vector)  # never called
    return b.fpext(b.bitcast(_load(b, address, _WORDS), ir.VectorType(ir.HalfType(), LANES)), f32x.vector)


@_operation(f32x(int64, f32x))
def store_f16(b, address, x):
    """Store x; returns the stored values."""
    if not HAS_F16:
        return x  # never called
    half = b.fptrunc(x, ir.VectorType(ir.HalfType(), LANES))
    _store(b, address, b.bitcast(half, _WORDS))
    return b.fpext(half, f32x.vector)


@_operation(f32x(int64, f32x))
def store_bf16(b, address, x):
    """Store x rounded to even; returns the stored values. x must hold no NaN."""
    bits, half = b.bitcast(x, i32x.vector), _constant(16, i32x.vector)
    odd = b.and_(b.lshr(bits, half), _constant(1, i32x.vector))
    words = b.trunc(b.lshr(b.add(b.add(bits, odd), _constant(0x7FFF, i32x.vector)), half), _WORDS)
    _store(b, address, words)
    return _wide(b, words)


# the register block of a rotation: as many rows × columns of sums as the registers hold
_BLOCK_ROWS, _BLOCK_LANES = (8, 16) if _AVX512 else (4, 8)


def _emit_product(b, element, vectors, x, x_stride, m, m_stride, y, y_stride, depth):
    """y[r, :] = Σₖ x[r, k] · m[k, :] for _BLOCK_ROWS rows and ``vectors`` registers of columns, sums kept in registers."""
    size = 4 * _BLOCK_LANES  # bytes of a register
    each = _alignment(element)
    lane = ir.VectorType(element, size // each)
    start, loop, end = b.block, b.append_basic_block("product"), b.append_basic_block("product_done")
    rows = [x]
    for _ in range(1, _BLOCK_ROWS):
        rows.append(b.add(rows[-1], x_stride))
    b.branch(loop)
    b.position_at_end(loop)
    k, m_row = b.phi(_LONG), b.phi(_LONG)
    k.add_incoming(ir.Constant(_LONG, 0), start)
    m_row.add_incoming(m, start)
    sums = [[b.phi(lane) for _ in range(vectors)] for _ in rows]
    m_lanes = [_load(b, b.add(m_row, ir.Constant(_LONG, size * v)), lane) for v in range(vectors)]
    offset = b.mul(k, ir.Constant(_LONG, each))
    for row, own in zip(rows, sums, strict=True):
        many = _fill(b, _load(b, b.add(row, offset), element), lane.count)
        for v in range(vectors):
            new = _fma(b, many, m_lanes[v], own[v])
            own[v].add_incoming(_constant(0.0, lane), start)
            own[v].add_incoming(new, loop)
            own[v] = new
    k_next = b.add(k, ir.Constant(_LONG, 1))
    k.add_incoming(k_next, loop)
    m_row.add_incoming(b.add(m_row, m_stride), loop)
    b.cbranch(b.icmp_signed("<", k_next, depth), loop, end)
    b.position_at_end(end)
    for own in sums:
        for v, value in enumerate(own):
            _store(b, b.add(y, ir.Constant(_LONG, size * v)), value)
        y = b.add(y, y_stride)
    return _NOTHING


product_one = _operation(int32(*[int64] * 7))(lambda b, *args: _emit_product(b, _F, 1, *args))
product_two = _operation(int32(*[int64] * 7))(lambda b, *args: _emit_product(b, _F, 2, *args))
product64 = _operation(int32(*[int64] * 7))(lambda b, *args: _emit_product(b, _D, 2, *args))


# --- the kernel -------------------------------------------------------------------------------------------------------

_SETTINGS = {"nogil": True, "error_model": "numpy", "boundscheck": False}
_inline = njit(inline="never", **_SETTINGS)


def _compiled(signature: Any) -> Any:
    return njit(signature, cache=True, **_SETTINGS)


_LARGEST = np.finfo(np.float32).max
_TINY = np.float32(1e-38)  # bitsandbytes' bound under absmax


class _Levels(NamedTuple):
    """A 4-bit format's levels in order, the bounds between them and their codes; with ``by_cell`` these are in order too,
    and the tables those of :func:`rank_by_cell`.
    """

    values: Any
    bounds: Any
    order: Any
    by_cell: Any
    base_low: Any
    base_high: Any
    bounds_low: Any
    bounds_high: Any


@_inline
def _levels(values, bounds, order, by_cell, cells):
    tables = load_ints(cells), load_ints(cells + 64), load(cells + 128), load(cells + 192)
    return _Levels(load(values), load(bounds), load_ints(order), by_cell, *tables)


@_inline
def _nearest(s, levels):
    """The numbers of the levels nearest to s."""
    if levels.by_cell:
        inside = greater(lesser(s, fill(float32(1.0))), fill(float32(-1.0)))
        return rank_by_cell(inside, levels.base_low, levels.base_high, levels.bounds_low, levels.bounds_high)
    return rank(s, levels.bounds)


@_inline
def _put(codes, index, levels):
    """Store the codes of 16 levels by their numbers."""
    store_codes(codes, index if levels.by_cell else pick_ints(levels.order, index))


@_inline
def _largest(x, n):
    """Bits of the largest magnitude of n values."""
    bits = no_bits()
    for i in range(0, n, LANES):
        bits = max_bits(bits, load(x + 4 * i))
    return top_bits(bits)


@_inline
def _add_up(sums, norm, error, kept, top):
    """To ``sums``: Σ exact², Σ (stored - exact)² and Σ (stored - exact)(exact - base), by lanes; the bits of the largest."""
    sums[0] += total64(norm)
    sums[1] += total64(error)
    sums[2] = max(sums[2], float64(top))
    sums[5] += total64(kept)


@_inline
def _ask(kind, codes, first, count, write):
    """Ask for the cache lines of ``count`` weights from ``first`` on, while the kernel computes something else: each row
    is on pages of its own, which the processor would not guess.
    """
    halves = 1 if kind == FOUR_BIT else 2 if kind == INT8 else 8 if kind == F32 else 4
    for at in range(codes + first * halves // 2, codes + (first + count) * halves // 2, 64):
        if write:
            prefetch_to_write(at)
        else:
            prefetch(at)


@_inline
def _decode(kind, codes, scales, blocksize, levels, first, count, out):
    """``count`` weights from flat index ``first`` on (4-bit: a block's first) to float32 at ``out``. Int8's scale is
    one value, at ``scales``.
    """
    if kind == FOUR_BIT:
        for done in range(0, count, blocksize):
            scale = fill(load_one(scales + 4 * ((first + done) // blocksize)))
            for i in range(done, min(done + blocksize, count), LANES):
                store(out + 4 * i, mul(pick(levels, load_codes(codes + (first + i) // 2)), scale))
    elif kind == INT8:
        scale = fill(load_one(scales))
        for i in range(0, count, LANES):
            store(out + 4 * i, mul(load_i8(codes + first + i), scale))
    elif kind == F32:
        for i in range(0, count, LANES):
            store(out + 4 * i, load(codes + 4 * (first + i)))
    else:
        for i in range(0, count, LANES):
            at = codes + 2 * (first + i)
            store(out + 4 * i, load_bf16(at) if kind == BF16 else load_f16(at))


@_inline
def _rotate(x, x_stride, y, y_stride, rows, columns, first_block, matrices, b, step, row_scale):
    """ROWS rows of ``columns`` values, rotated by blocks: y = x · blockdiag(matrices[first_block:]); strides in bytes.

    ``row_scale``: 0, or the address of what rows of y are still to be scaled by.

    Returns:
        Σ (exact - base)² of the first ``rows`` of them.
    """
    wide = 2 * _BLOCK_LANES
    weight, change = fill64(1.0), fill64(0.0)
    for c in range(0, columns, b):
        m = matrices + 4 * (first_block + c // b) * step
        for r in range(0, ROWS, _BLOCK_ROWS):
            x_at, y_at = x + r * x_stride + 4 * c, y + r * y_stride + 4 * c
            done = 0
            while done + wide <= b:
                product_two(x_at, x_stride, m + 4 * done, 4 * b, y_at + 4 * done, y_stride, b)
                done += wide
            while done < b:
                product_one(x_at, x_stride, m + 4 * done, 4 * b, y_at + 4 * done, y_stride, b)
                done += _BLOCK_LANES
        # while they are in the first-level cache; in float32, two sums at a time
        even, odd = zeros(), zeros()
        x_at, y_at = x + 4 * c, y + 4 * c
        if row_scale == 0 and rows == ROWS:
            for _ in range(0, ROWS, 2):
                for i in range(0, 4 * b, 4 * LANES):
                    u = sub(load(y_at + i), load(x_at + i))
                    v = sub(load(y_at + y_stride + i), load(x_at + x_stride + i))
                    even, odd = fma(u, u, even), fma(v, v, odd)
                x_at += 2 * x_stride
                y_at += 2 * y_stride
        else:
            for r in range(rows):
                scale = fill(load_one(row_scale + 4 * r) if row_scale != 0 else float32(1.0))
                for i in range(0, 4 * b, 4 * LANES):
                    u = sub(mul(load(y_at + i), scale), load(x_at + i))
                    even = fma(u, u, even)
                x_at += x_stride
                y_at += y_stride
        change = weigh(add(even, odd), weight, change)
    sum_ = total64(change)
    if 1e-20 < sum_ < 1e38:
        return sum_
    # squares that float32 may not hold
    change = fill64(0.0)
    for r in range(rows):
        scale = fill(load_one(row_scale + 4 * r) if row_scale != 0 else float32(1.0))
        for i in range(0, 4 * columns, 4 * LANES):
            u = sub(mul(load(y + r * y_stride + i), scale), load(x + r * x_stride + i))
            change = add_product(u, u, change)
    return total64(change)


@_inline
def _encode_4bit(base, x, first, count, length, codes, scales, blocksize, levels, moments, sums):
    """Encode ``count`` values at ``x`` as the flat weights ``first`` and on (the first of a block) of ``length`` in
    all. ``base``: their values before the rotation.

    ``moments``: 0, or where to put each block's Σc(c-s), Σc² and Σc(s-v) (s: the scaled weight, c: its level, v: the
    scaled base), from which the error and what is kept follow with any other absmax.
    """
    # absmax first, for all blocks: a code waits for its block's absmax, so in one loop each block would wait for the
    # one before
    top = int32(0)
    for done in range(0, count, blocksize):
        bits = _largest(x + 4 * done, min(blocksize, count - done))
        top = max(top, bits)
        absmax = as_float(bits)
        # in a short last block bitsandbytes bounds the absmax itself
        bounded = max(absmax, _TINY) if first + done + blocksize > length else absmax
        store_one(scales + 4 * ((first + done) // blocksize), bounded)
    whole = blocksize % (4 * LANES) == 0 and count % blocksize == 0
    if levels.by_cell and whole and as_float(top) > float32(1e-18):
        _encode_whole_blocks(base, x, first, count, codes, scales, blocksize, levels, moments, top, sums)
        return
    norm, error, kept = fill64(0.0), fill64(0.0), fill64(0.0)
    for done in range(0, count, blocksize):
        size = min(blocksize, count - done)
        block = (first + done) // blocksize
        absmax = load_one(scales + 4 * block)
        bounded = max(absmax, _TINY)
        factor = fill(float32(1.0) / bounded)
        stored = levels.values if absmax >= _TINY else mul(levels.values, fill(absmax / bounded))
        squares, misses, held = zeros(), zeros(), zeros()
        cross, power, along = zeros(), zeros(), zeros()
        if first + done + blocksize > length:  # and divides by it
            divisor = fill(bounded)
            for i in range(done, done + size, LANES):
                store(x + 4 * i, div(load(x + 4 * i), divisor))
                store(base + 4 * i, div(load(base + 4 * i), divisor))
            factor = fill(float32(1.0))
        for i in range(done, done + size, LANES):
            s = mul(load(x + 4 * i), factor)
            index = _nearest(s, levels)
            _put(codes + (first + i) // 2, index, levels)
            c = pick(stored, index)
            miss = sub(c, s)
            moved = sub(s, mul(load(base + 4 * i), factor))
            squares, misses, held = fma(s, s, squares), fma(miss, miss, misses), fma(miss, moved, held)
            if moments != 0:
                cross, power, along = fma(c, miss, cross), fma(c, c, power), fma(c, moved, along)
        weight = fill64(float64(bounded) * float64(bounded))
        norm, error, kept = weigh(squares, weight, norm), weigh(misses, weight, error), weigh(held, weight, kept)
        if moments != 0:
            store_one(moments + 12 * block, total(cross))
            store_one(moments + 12 * block + 4, total(power))
            store_one(moments + 12 * block + 8, total(along))
    _add_up(sums, norm, error, kept, top)


@_inline
def _encode_whole_blocks(base, x, first, count, codes, scales, blocksize, levels, moments, top_bits_, sums):
    """:func:`_encode_4bit` of blocks of a multiple of 64 whose absmax is known, the largest of them with bits
    ``top_bits_``: the usual case. What the sums leave out is far below float32's rounding of the largest block's.
    """
    values, tables = levels.values, levels[4:]
    top = as_float(top_bits_)
    norm, error, kept = fill64(0.0), fill64(0.0), fill64(0.0)
    to, scale_at = codes + first // 2, scales + 4 * (first // blocksize)
    moments += 12 * (first // blocksize) if moments != 0 else 0
    from_base = base - x
    largest = fill64(float64(top) * float64(top))
    done = 0
    while done < count:
        # in float32, in units of the largest, for some blocks at a time
        squares, misses, helds = zeros(), zeros(), zeros()
        last = min(count, done + max(blocksize, 64 * LANES))
        while done < last:
            absmax = load_one(scale_at)
            factor = fill(float32(1.0) / max(absmax, _TINY))
            minus = fill(float32(-1.0) / max(absmax, _TINY))
            ratio = absmax / top
            square, missed, crossed, held, turned = zeros(), zeros(), zeros(), zeros(), zeros()
            for at in range(x + 4 * done, x + 4 * (done + blocksize), 16 * LANES):
                s0, s1 = mul(load(at), factor), mul(load(at + 64), factor)
                s2, s3 = mul(load(at + 128), factor), mul(load(at + 192), factor)
                i0 = rank_by_cell(s0, *tables)
                i1 = rank_by_cell(s1, *tables)
                i2 = rank_by_cell(s2, *tables)
                i3 = rank_by_cell(s3, *tables)
                store_four_codes(to, i0, i1, i2, i3)
                to += 32
                m0, m1 = sub(pick(values, i0), s0), sub(pick(values, i1), s1)
                m2, m3 = sub(pick(values, i2), s2), sub(pick(values, i3), s3)
                square = add(square, add(fma(s0, s0, mul(s1, s1)), fma(s2, s2, mul(s3, s3))))
                missed = add(missed, add(fma(m0, m0, mul(m1, m1)), fma(m2, m2, mul(m3, m3))))
                from_ = at + from_base
                d0, d1 = fma(load(from_), minus, s0), fma(load(from_ + 64), minus, s1)
                d2, d3 = fma(load(from_ + 128), minus, s2), fma(load(from_ + 192), minus, s3)
                held = add(held, add(fma(m0, d0, mul(m1, d1)), fma(m2, d2, mul(m3, d3))))
                if moments != 0:
                    crossed = add(crossed, add(fma(s0, m0, mul(s1, m1)), fma(s2, m2, mul(s3, m3))))
                    turned = add(turned, add(fma(s0, d0, mul(s1, d1)), fma(s2, d2, mul(s3, d3))))
            weight = fill(ratio * ratio)
            squares, misses = fma(square, weight, squares), fma(missed, weight, misses)
            helds = fma(held, weight, helds)
            if moments != 0:  # with c = s + (c - s)
                crossed_, missed_ = total(crossed), total(missed)
                store_one(moments, crossed_ + missed_)
                store_one(moments + 4, total(square) + crossed_ + crossed_ + missed_)
                store_one(moments + 8, total(turned) + total(held))
                moments += 12
            scale_at += 4
            done += blocksize
        norm, error, kept = weigh(squares, largest, norm), weigh(misses, largest, error), weigh(helds, largest, kept)
    _add_up(sums, norm, error, kept, top_bits_)


# --- the scale of a 4-bit block that errs least -----------------------------------------------------------------------
#
# In units of the block's absmax, E(s) = W - 2s·α(s), with W = Σx² and α(s) = max over all codes of Σxc - s/2·Σc²: a
# maximum of lines in s, hence convex, and below its chord between any two scales. So E is known to be nowhere between
# two scales less than `_chord` says of its values there. The kernel measures E at fixed ratios, looks up the codes'
# changes, one by one, in the intervals that may hold the least one, and leaves the rest. See docs/rounding.md.
#
# ``search`` is the address of the float32 table that fold_cpu makes for a codec; offsets in it, in values:
RATIOS, CURVE, LEFT, RIGHT, UNUSED = 0, 32, 64, 96, 128
LEVELS, BOUNDS, META, CELL_TABLES = 160, 176, 192, 208
#: the values at META
_FACTOR, _SHIFT, _MIRRORED, _COUNT, _ONE, _STEP, _TOP = range(7)
#: ``work`` is scratch for one block, in float32; offsets of: the error at each ratio, sums, crossings, the best, a stack
_ERRORS, _SUMS, _EACH, _CROSSINGS, _BEST, _STACK, _VALUES = 0, 64, 576, 640, 960, 1024, 1280
#: code changes that are looked at together
_MOST = 64
WORK = _VALUES + 2 * 4096


@_inline
def _measure(x, n, s, search):
    """The squared error of n values at ``x`` with their nearest codes for scale s."""
    levels, bounds = load(search + 4 * LEVELS), load(search + 4 * BOUNDS)
    factor, scale = fill(float32(1.0) / s), fill(-s)
    error = zeros()
    for i in range(0, n, LANES):
        v = load(x + 4 * i)
        miss = fma(pick(levels, rank(mul(v, factor), bounds)), scale, v)
        error = fma(miss, miss, error)
    return total(error)


@_inline
def _chord(a, b, error_a, error_b, power):
    """A bound under the error at all scales from a to b, from the errors there and Σx²."""
    d = error_b - error_a
    curve = (b - a) * ((b - a) * power - b * error_a + a * error_b) / (a * b)
    if not abs(d) < curve:
        return min(error_a, error_b)
    return float32(0.5) * (error_a + error_b) - float32(0.25) * (curve + d * d / curve)


@_inline
def _changes(x, n, low, high, limit, search, work):
    """Try the best scale of each set of codes between scales ``low`` and ``high``, which are so close that every weight
    changes its code once at most; better scales go to ``work``.

    Returns:
        whether the number of changes was small enough.
    """
    levels, bounds = load(search + 4 * LEVELS), load(search + 4 * BOUNDS)
    own, factor, other = fill(-low), fill(float32(1.0) / low), fill(float32(1.0) / high)
    each, at = work + 4 * _EACH, work + 4 * _CROSSINGS
    stride = 4 * (_MOST + LANES)
    errors, crosses, powers = zeros(), zeros(), zeros()
    count = 0
    for i in range(0, n, LANES):
        v = load(x + 4 * i)
        code, code_after = rank(mul(v, factor), bounds), rank(mul(v, other), bounds)
        outer = pick(levels, code)
        miss = fma(outer, own, v)
        errors, crosses, powers = fma(miss, miss, errors), fma(outer, miss, crosses), fma(outer, outer, powers)
        bits = which_differ(code, code_after)
        if bits != 0:
            if count > _MOST - LANES:
                return False
            inner = pick(levels, code_after)
            after = fma(inner, own, v)
            store(each, div(add(v, v), add(outer, inner)))  # the scale at which v is midway
            store(each + 64, sub(mul(after, after), mul(miss, miss)))
            store(each + 128, sub(mul(inner, after), mul(outer, miss)))
            store(each + 192, sub(mul(inner, inner), mul(outer, outer)))
            while bits != 0:
                lane = 4 * first_bit(bits)
                bits &= bits - 1
                for k in range(4):
                    store_one(at + k * stride + 4 * count, load_one(each + 64 * k + lane))
                count += 1
    error, cross, power = total(errors), total(crosses), total(powers)
    best = load_one(work + 4 * _BEST)
    if power > float32(1e-5):
        scale = low + cross / power
        if error - cross * cross / power < best and scale > 0 and scale <= limit:
            best = error - cross * cross / power
            store_one(work + 4 * _BEST + 4, scale)
    store(at + 4 * count, fill(float32(np.inf)))
    huge = fill(float32(1e30))
    for first in range(0, count, LANES):
        mine = load(at + 4 * first)
        errors, crosses, powers = fill(error), fill(cross), fill(power)
        for i in range(count):
            s = fill(load_one(at + 4 * i))
            errors = add_up_to(s, mine, fill(load_one(at + stride + 4 * i)), errors)
            crosses = add_up_to(s, mine, fill(load_one(at + 2 * stride + 4 * i)), crosses)
            powers = add_up_to(s, mine, fill(load_one(at + 3 * stride + 4 * i)), powers)
        shift = div(crosses, powers)
        scales = add(shift, fill(low))
        found = sub(errors, mul(shift, crosses))
        found = choose_less(fill(float32(1e-5)), powers, found, huge)
        found = choose_less(zeros(), scales, found, huge)
        found = choose_less(scales, fill(limit), found, huge)
        one = least(found)
        if one < best:
            best = one
            store(each, scales)
            lane = first_bit(which_below(found, fill(as_float(as_bits(one) + int32(1)) if one > 0 else float32(1e-30))))
            store_one(work + 4 * _BEST + 4, load_one(each + 4 * lane))
    store_one(work + 4 * _BEST, best)
    return True


@_inline
def _refine(x, n, low, high, error_low, error_high, power, limit, search, work):
    """:func:`_changes` of an interval in as many parts as needed, except parts that cannot hold the least error.
    ``low`` may be 0.
    """
    step = load_one(search + 4 * (META + _STEP))
    stack = work + 4 * _STACK
    store_one(stack, low)
    store_one(stack + 4, high)
    store_one(stack + 8, error_low)
    store_one(stack + 12, error_high)
    depth = 1
    while depth > 0:
        depth -= 1
        at = stack + 16 * depth
        a, b, error_a, error_b = load_one(at), load_one(at + 4), load_one(at + 8), load_one(at + 12)
        if a > 0:
            bound = _chord(a, b, error_a, error_b, power)
        else:  # smaller scales clip more
            edge, clipped = fill(b), zeros()
            for i in range(0, n, LANES):
                over = greater(sub(absolute(load(x + 4 * i)), edge), zeros())
                clipped = fma(over, over, clipped)
            bound = total(clipped)
        if bound >= _enough(load_one(work + 4 * _BEST), power):
            continue
        if a > 0 and b <= a * step and _changes(x, n, a, b, limit, search, work):
            continue
        if (a > 0 and b < a * float32(1.0002)) or depth > 60:
            continue
        middle = float32(0.5) * (a + b)
        error = _measure(x, n, middle, search)
        for k in range(2):
            store_one(at, a if k == 0 else middle)
            store_one(at + 4, middle if k == 0 else b)
            store_one(at + 8, error_a if k == 0 else error)
            store_one(at + 12, error if k == 0 else error_b)
            at += 16
        depth += 2


@_inline
def _enough(best, power):
    """The error below which no scale can gain more than float32's own rounding."""
    return best * float32(1.0 - 1e-6) - power * float32(1e-8)


@_inline
def _try_ratios(x, n, absmax, search, work):
    """Measure the error of n values at ``x`` for the table's ratios to their absmax > 0. Leaves the errors and Σx², in
    units of the absmax, in ``work``, and the best of them; returns that one's index.
    """
    meta = search + 4 * META
    values = work + 4 * _VALUES
    factor, shift = fill(load_one(meta + 4 * _FACTOR)), fill(load_one(meta + 4 * _SHIFT))
    mirrored = load_one(meta + 4 * _MIRRORED) != 0
    count = int64(load_one(meta + 4 * _COUNT))
    sums = work + 4 * _SUMS
    small = absmax < _TINY
    unit = fill(absmax if small else float32(1.0) / absmax)
    table = search + 4 * CELL_TABLES
    if n == 4 * LANES and not small:
        v0, v1, v2, v3 = mul(load(x), unit), mul(load(x + 64), unit), mul(load(x + 128), unit), mul(load(x + 192), unit)
        if mirrored:
            v0, v1, v2, v3 = absolute(v0), absolute(v1), absolute(v2), absolute(v3)
        c0, c1 = cells_of(v0, factor, shift), cells_of(v1, factor, shift)
        c2, c3 = cells_of(v2, factor, shift), cells_of(v3, factor, shift)
        store(sums + 64 * count, add(fma(v0, v0, mul(v1, v1)), fma(v2, v2, mul(v3, v3))))
        for j in range(count):
            m0, g0 = look_up(table, c0), look_up(table + 128, c0)
            m1, g1 = look_up(table, c1), look_up(table + 128, c1)
            m2, g2 = look_up(table, c2), look_up(table + 128, c2)
            m3, g3 = look_up(table, c3), look_up(table + 128, c3)
            d0, d1 = sub(absolute(sub(v0, m0)), g0), sub(absolute(sub(v1, m1)), g1)
            d2, d3 = sub(absolute(sub(v2, m2)), g2), sub(absolute(sub(v3, m3)), g3)
            store(sums + 64 * j, add(fma(d0, d0, mul(d1, d1)), fma(d2, d2, mul(d3, d3))))
            table += 256
    else:
        powers = zeros()
        cells = values + 4 * n
        for i in range(0, n, LANES):
            v = load(x + 4 * i)
            v = div(v, unit) if small else mul(v, unit)
            v = absolute(v) if mirrored else v
            store(values + 4 * i, v)
            store_ints(cells + 4 * i, cells_of(v, factor, shift))
            powers = fma(v, v, powers)
        store(sums + 64 * count, powers)
        for j in range(count):
            error = zeros()
            for i in range(0, n, LANES):
                c = load_ints(cells + 4 * i)
                d = sub(absolute(sub(load(values + 4 * i), look_up(table, c))), look_up(table + 128, c))
                error = fma(d, d, error)
            store(sums + 64 * j, error)
            table += 256
    errors = work + 4 * _ERRORS
    one = int64(load_one(meta + 4 * _ONE))
    huge = fill(float32(1e30))
    first = totals(sums)
    store(errors, first)
    more = huge
    if count > LANES - 1:
        more = totals(sums + 1024)
        store(errors + 64, more)
        more = choose_less(load(search + 4 * UNUSED + 64), huge, more, huge)
    first = choose_less(load(search + 4 * UNUSED), huge, first, huge)
    best, j = load_one(errors + 4 * one), one
    if _LARGEST / absmax > load_one(meta + 4 * _TOP):
        lowest = least(lesser(first, more))
        if lowest < best:
            edge = fill(as_float(as_bits(lowest) + int32(1)))
            best, j = lowest, first_bit(which_below(first, edge) | (which_below(more, edge) << 16))
    store_one(work + 4 * _BEST, best)
    store_one(work + 4 * _BEST + 4, load_one(search + 4 * (RATIOS + j)))
    return j


@_inline
def _best_scale(x, n, absmax, j, search, work):
    """The scale that errs least, in units of the absmax, after :func:`_try_ratios` found j the best of its own."""
    meta, values, errors = search + 4 * META, work + 4 * _VALUES, work + 4 * _ERRORS
    small = absmax < _TINY
    unit = fill(absmax if small else float32(1.0) / absmax)
    mirrored = load_one(meta + 4 * _MIRRORED) != 0
    for i in range(0, n, LANES):
        v = load(x + 4 * i)
        v = div(v, unit) if small else mul(v, unit)
        store(values + 4 * i, absolute(v) if mirrored else v)
    count = int64(load_one(meta + 4 * _COUNT))
    power = load_one(errors + 4 * count)
    limit = _LARGEST / absmax
    # around the best of these scales first: what is found there leaves less of the others
    step = load_one(meta + 4 * _STEP)
    done = int64(0)
    if j > 0:
        low, high = load_one(search + 4 * (RATIOS + j - 1)), load_one(search + 4 * (RATIOS + j + 1))
        if high <= low * step and _changes(values, n, low, high, limit, search, work):
            done = int64(3) << (j - 1)
    enough = fill(_enough(load_one(work + 4 * _BEST), power))
    bits = _open(errors, search, power, enough) | (_open(errors + 64, search + 64, power, enough) << 16)
    bits &= ((int64(1) << count) - 1) & ~done
    while bits != 0:
        k = first_bit(bits)
        bits &= bits - 1
        low, high = load_one(search + 4 * (RATIOS + k)), load_one(search + 4 * (RATIOS + k + 1))
        if not (high <= low * step and _changes(values, n, low, high, limit, search, work)):
            _refine(
                values, n, low, high, load_one(errors + 4 * k), load_one(errors + 4 * k + 4), power, limit, search, work
            )
    low = load_one(search + 4 * RATIOS)
    if (float32(1.0) - low) * (float32(1.0) - low) < load_one(work + 4 * _BEST):
        _refine(values, n, float32(0.0), low, power, load_one(errors), power, limit, search, work)
    return load_one(work + 4 * _BEST + 4)


@_inline
def _open(errors, search, power, enough):
    """A bit for each of 16 intervals whose :func:`_chord` is below ``enough``."""
    a, b = load(errors), load(errors + 4)
    d = sub(b, a)
    curve = sub(
        mul(load(search + 4 * CURVE), fill(power)),
        sub(mul(load(search + 4 * LEFT), a), mul(load(search + 4 * RIGHT), b)),
    )
    inside = sub(mul(add(a, b), fill(float32(0.5))), mul(add(curve, div(mul(d, d), curve)), fill(float32(0.25))))
    return which_below(choose_less(absolute(d), curve, inside, lesser(a, b)), enough)


@_inline
def _encode_best(
    base, x, first, count, codes, scales, blocksize, levels, moments, plain, search, work, mode, sums
):  # fmt: skip
    """As :func:`_encode_4bit`, with better scales of the blocks; ``mode`` SCALES: those alone, GIVEN: codes for the
    scales that are there.

    ``plain`` and ``moments``: 0, or where to put each block's absmax, and the moments with it. Adds to the fourth of
    ``sums`` the error of plain rounding.

    Each step is taken for all blocks before the next: within a block each waits for the one before.
    """
    if mode != GIVEN:
        _find_scales(x, first, count, scales, blocksize, levels, moments, plain, search, work, sums)
    if mode == SCALES:
        return
    norm, error, kept = fill64(0.0), fill64(0.0), fill64(0.0)
    for done in range(0, count, blocksize):
        scale = load_one(scales + 4 * ((first + done) // blocksize))
        norm, error, kept = _encode_block(
            base + 4 * done, x + 4 * done, min(blocksize, count - done), scale, float32(0.0), mode == GIVEN,
            codes + (first + done) // 2, levels, norm, error, kept,
        )  # fmt: skip
    _add_up(sums, fill64(0.0), error, kept, int32(0))  # the others are there


@_inline
def _encode_block(base, x, n, scale, over, far, codes, levels, norm, error, kept):
    """Encode n values at ``x`` for a scale that is there, the change times 1 + ``over``; ``far``: whether the scale may be
    far from their absmax, and float32 may not hold squares in units of it.

    Returns:
        the sums of :func:`_add_up`, with these added.
    """
    tiny = abs(scale) < _TINY
    more, factor = fill(over), fill(scale if tiny else float32(1.0) / scale)
    if far or tiny:
        minus = fill(-scale)
        for i in range(0, n, LANES):
            w, v = load(x + 4 * i), load(base + 4 * i)
            t = fma(sub(w, v), more, w)
            index = _nearest(zeros() if scale == 0 else div(t, factor) if tiny else mul(t, factor), levels)
            _put(codes + i // 2, index, levels)
            miss = fma(pick(levels.values, index), minus, w)
            norm, error = add_product(w, w, norm), add_product(miss, miss, error)
            kept = add_product(miss, sub(v, w), kept)
        return norm, error, kept
    squares, misses, held = zeros(), zeros(), zeros()
    for i in range(0, n, LANES):
        w = mul(load(x + 4 * i), factor)
        moved = sub(w, mul(load(base + 4 * i), factor))
        index = _nearest(fma(moved, more, w), levels)
        _put(codes + i // 2, index, levels)
        miss = sub(pick(levels.values, index), w)
        squares, misses, held = fma(w, w, squares), fma(miss, miss, misses), fma(miss, moved, held)
    weight = fill64(float64(scale) * float64(scale))
    return weigh(squares, weight, norm), weigh(misses, weight, error), weigh(held, weight, kept)


@_inline
def _plain_error(x, n, absmax, levels):
    """The squared error of plain rounding below bitsandbytes' bound of absmax, which then decides the codes."""
    error, scale, factor = fill64(0.0), fill(-absmax), fill(float32(1.0) / _TINY)
    for i in range(0, n, LANES):
        v = load(x + 4 * i)
        miss = fma(pick(levels.values, rank(mul(v, factor), levels.bounds)), scale, v)
        error = add_product(miss, miss, error)
    return total64(error)


@_inline
def _find_scales(x, first, count, scales, blocksize, levels, moments, plain, search, work, sums):
    """The steps of :func:`_encode_best` before the codes."""
    one = int64(load_one(search + 4 * (META + _ONE)))
    power_at = int64(load_one(search + 4 * (META + _COUNT)))
    exact = load_one(search + 4 * (META + _STEP)) != 0
    top = int32(0)
    for done in range(0, count, blocksize):
        highest = _largest(x + 4 * done, min(blocksize, count - done))
        top = max(top, highest)
        store_one(scales + 4 * ((first + done) // blocksize), as_float(highest))
    sums[2] = max(sums[2], float64(top))
    if top >= 0x7F800000:
        return
    if plain != 0:
        for done in range(0, count, blocksize):
            block = (first + done) // blocksize
            absmax = load_one(scales + 4 * block)
            factor = fill(float32(1.0) / max(absmax, _TINY))
            cross, power = zeros(), zeros()
            for i in range(done, min(done + blocksize, count), LANES):
                s = mul(load(x + 4 * i), factor)
                c = pick(levels.values, rank(s, levels.bounds))
                cross, power = fma(c, sub(c, s), cross), fma(c, c, power)
            store_one(plain + 4 * block, absmax)
            store_one(moments + 12 * block, total(cross))
            store_one(moments + 12 * block + 4, total(power))
    norm = error = 0.0
    for done in range(0, count, blocksize):
        at, size = x + 4 * done, min(blocksize, count - done)
        place = scales + 4 * ((first + done) // blocksize)
        absmax = load_one(place)
        if absmax == 0:
            continue
        j = _try_ratios(at, size, absmax, search, work)
        square = float64(absmax) * float64(absmax)
        norm += square * float64(load_one(work + 4 * (_ERRORS + power_at)))
        error += (
            square * float64(load_one(work + 4 * (_ERRORS + one)))
            if absmax >= _TINY
            else _plain_error(at, size, absmax, levels)
        )
        if exact:
            store_one(place, _best_scale(at, size, absmax, j, search, work) * absmax)
        else:
            store_one(place, load_one(search + 4 * (RATIOS + j)) * absmax)
    sums[0] += norm
    sums[3] += error
    # the best scale for the codes at that one; after the exact search that is the same one, to the last bits
    for done in range(0, count, blocksize):
        place = scales + 4 * ((first + done) // blocksize)
        scale = load_one(place)
        if scale == 0:
            continue
        store_one(place, _refit(x + 4 * done, min(blocksize, count - done), scale, levels))


@_inline
def _refit(x, n, scale, levels):
    """The best scale > 0, S/Q, for the codes that n values at ``x`` have with the scale ``scale``."""
    small = scale < _TINY
    factor = fill(scale if small else float32(1.0) / scale)
    cross, power = zeros(), zeros()
    for i in range(0, n, LANES):
        v = load(x + 4 * i)
        s = div(v, factor) if small else mul(v, factor)
        c = pick(levels.values, rank(s, levels.bounds))
        cross, power = fma(c, s, cross), fma(c, c, power)
    return min(total(cross) / total(power) * scale, _LARGEST)


# --- the base's own scales, and the change over-relaxed ---------------------------------------------------------------
#
# See oftsurgery.weights.preserve. ``keep`` is the address of a table of int64, by index:
OWN, TABLE, TABLE_CODES, FACTORS, FACTOR_SIZE, SCALE_CODES, NUMBERS, PLANE = range(8)
#: ``own`` the base's scales, float32, one a 4-bit block or int8 row. With double quantisation the table of scales in
#: order (256 float32, then the middles between them) and their codes (256 float32), what it is scaled by, how many blocks
#: have a factor, and the codes of the new scales, uint8; else 0. Then the numbers below, float32, and for SAMPLE the
#: bytes of one plane.
_OVER, _SQUARE, _CLIP, _OFFSET, _MISFIT, _UNIT = range(6)
#: ω - 1, the largest mean square of a weak block's change and its largest weight in units of its scale, the offset of
#: double quantisation, by how much a scale may be exceeded, and what scales are divided by in a sample's weights


@_inline
def _is_strong(base, x, n, scale, numbers, top):
    """Whether a block of n values is to be scaled anew; ``top``: its largest magnitude."""
    moved = zeros()
    factor = fill(float32(1.0) / max(abs(scale), _TINY))
    for i in range(0, n, LANES):
        d = mul(sub(load(x + 4 * i), load(base + 4 * i)), factor)
        moved = fma(d, d, moved)
    return total(moved) > load_one(numbers + 4 * _SQUARE) * float32(n) or top > load_one(numbers + 4 * _CLIP) * abs(
        scale
    )


@_inline
def _held_scale(wanted, top, block, keep, sums):
    """The scale nearest to ``wanted`` that the statistics of the base can hold; notes its code, and whether it clips
    the block's largest magnitude ``top``.
    """
    table = load_word(keep + 8 * TABLE)
    if table == 0:
        return wanted
    numbers = load_word(keep + 8 * NUMBERS)
    factor = load_one(load_word(keep + 8 * FACTORS) + 4 * (block // load_word(keep + 8 * FACTOR_SIZE)))
    offset = load_one(numbers + 4 * _OFFSET)
    scaled = (wanted - offset) / factor if factor != 0 else float32(0.0)
    index = int64(0)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        if scaled > load_one(table + 4 * (256 + index + step - 1)):
            index += step
    seen = float32(load_one(table + 4 * index) * factor) + offset
    store_byte(
        load_word(keep + 8 * SCALE_CODES) + block, int64(load_one(load_word(keep + 8 * TABLE_CODES) + 4 * index))
    )
    if min(wanted, top) - abs(seen) > load_one(numbers + 4 * _MISFIT) * max(abs(seen), offset):
        sums[7] += 1.0
    return seen


@_inline
def _keep_4bit(base, x, first, count, codes, scales, blocksize, levels, search, work, keep, sums):
    """Encode ``count`` values as :func:`_encode_4bit`, with the base's own scales and the change over-relaxed; strong
    blocks with scales of their own, to nearest. Adds to ``sums`` also how many of these there were, and how many of
    their scales the base's statistics do not hold.
    """
    own, numbers = load_word(keep + 8 * OWN), load_word(keep + 8 * NUMBERS)
    norm, error, kept = fill64(0.0), fill64(0.0), fill64(0.0)
    largest = int32(0)
    for done in range(0, count, blocksize):
        size = min(blocksize, count - done)
        block = (first + done) // blocksize
        at, from_, to = x + 4 * done, base + 4 * done, codes + (first + done) // 2
        scale = load_one(own + 4 * block)
        bits = _largest(at, size)
        largest = max(largest, bits)
        if bits >= 0x7F800000:
            continue
        top, over = as_float(bits), load_one(numbers + 4 * _OVER)
        if _is_strong(from_, at, size, scale, numbers, top):
            sums[6] += 1.0
            over = float32(0.0)
            if top > 0:
                j = _try_ratios(at, size, top, search, work)
                wanted = _refit(at, size, load_one(search + 4 * (RATIOS + j)) * top, levels)
                scale = _held_scale(wanted, top, block, keep, sums)
        store_one(scales + 4 * block, scale)
        norm, error, kept = _encode_block(from_, at, size, scale, over, False, to, levels, norm, error, kept)
    _add_up(sums, norm, error, kept, largest)


@_inline
def _sample(base, x, first, count, blocksize, keep, place, sums):
    """What the relaxation is found from, at ``place``: planes of the base and of the change in units of the scale, and
    of the change's weight; zeros in strong blocks. Adds to ``sums`` Σ change², by that weight, and as
    :func:`_keep_4bit`.
    """
    own, numbers, plane = load_word(keep + 8 * OWN), load_word(keep + 8 * NUMBERS), load_word(keep + 8 * PLANE)
    unit = load_one(numbers + 4 * _UNIT)
    nothing = zeros()
    need = fill64(0.0)
    for done in range(0, count, blocksize):
        size = min(blocksize, count - done)
        scale = load_one(own + 4 * ((first + done) // blocksize))
        at, from_, to = x + 4 * done, base + 4 * done, place + 4 * done
        bits = _largest(at, size)
        sums[2] = max(sums[2], float64(bits))
        strong = bits >= 0x7F800000 or _is_strong(from_, at, size, scale, numbers, as_float(bits))
        if strong:
            sums[6] += 1.0
        if strong or abs(scale) < _TINY:
            for i in range(0, 4 * size, 4 * LANES):
                store(to + i, nothing)
                store(to + plane + i, nothing)
                store(to + 2 * plane + i, nothing)
            continue
        factor, weight = fill(float32(1.0) / scale), fill((scale / unit) * (scale / unit))
        for i in range(0, 4 * size, 4 * LANES):
            v = load(from_ + i)
            moved = mul(sub(load(at + i), v), factor)
            store(to + i, mul(v, factor))
            store(to + plane + i, moved)
            moved_ = mul(moved, weight)
            store(to + 2 * plane + i, moved_)
            need = add_product(moved, moved_, need)
    sums[0] += total64(need)


@_compiled(types.void(*[int64] * 10, float64[::1], float64[::1]))
def projections(planes, plane, first, last, int8, values, bounds, order, by_cell, cells, relaxations, out):
    """For each of ``relaxations`` ω, Σ weight (level(base + ω change) - base) of values ``first`` to ``last`` of a
    sample, in ``out``.
    """
    levels = _levels(values, bounds, order, by_cell, cells)
    highest, lowest = fill(float32(1.0)), fill(float32(-1.0))
    many, few = fill(float32(127.0)), fill(float32(1.0 / 127.0))
    out[:] = 0.0
    for start in range(first, last, 256 * LANES):  # the planes of so many stay in the first-level cache, nearly
        end = min(start + 256 * LANES, last)
        for j in range(len(relaxations)):
            omega, part = fill(float32(relaxations[j])), zeros()
            for i in range(planes + 4 * start, planes + 4 * end, 4 * LANES):
                v = load(i)
                t = fma(load(i + plane), omega, v)
                whole = rounded(mul(greater(lesser(t, highest), lowest), many))
                c = mul(whole, few) if int8 else pick(levels.values, _nearest(t, levels))
                part = fma(sub(c, v), load(i + 2 * plane), part)
            out[j] += total64(weigh(part, fill64(1.0), fill64(0.0)))


@_inline
def _encode_int8(base, x, count, first, row, codes, scb, keep, sums):
    """Encode one row of ``count`` values, scaled by its absmax, or with ``keep`` as :func:`_keep_4bit` does a block."""
    bits = _largest(x, count)
    absmax = as_float(bits)
    scale, over = absmax, float32(0.0)
    if keep != 0 and bits < 0x7F800000:
        own, numbers = load_one(load_word(keep + 8 * OWN) + 4 * row), load_word(keep + 8 * NUMBERS)
        if own < 0 or _is_strong(base, x, count, own, numbers, absmax):
            sums[6] += 1.0
        else:
            scale, over = own, load_one(numbers + 4 * _OVER)
    store_one(scb, scale)
    factor = float32(127.0) / scale if scale > 0 else float32(0.0)
    overflows = as_bits(factor) >= 0x7F800000
    step = scale / float32(127.0)
    many, few, more, divisor, limit = fill(factor), fill(step), fill(over), fill(scale), fill(float32(127.0))
    norm, error, kept = fill64(0.0), fill64(0.0), fill64(0.0)
    # else a row of zeros or denormals; where 127/scb overflows, divide first
    usual = not overflows and step >= _TINY and bits < 0x7F800000
    inside = scale == absmax and over == 0  # no code is beyond 127
    weight = fill64(float64(step) * float64(step))
    for start in range(0, count, 16 * LANES):
        squares, misses, held = zeros(), zeros(), zeros()
        for i in range(start, min(start + 16 * LANES, count), LANES):
            w = load(x + 4 * i)
            moved = sub(w, load(base + 4 * i))
            if usual:
                w, moved = mul(w, many), mul(moved, many)
                c = rounded(w) if inside else to_int8(fma(moved, more, w))
                miss = sub(c, w)
                squares, misses, held = fma(w, w, squares), fma(miss, miss, misses), fma(miss, moved, held)
            else:
                t = fma(moved, more, w)
                c = to_int8(mul(div(t, divisor), limit) if overflows else mul(t, many))
                miss = sub(mul(c, few), w)
                norm, error = add_product(w, w, norm), add_product(miss, miss, error)
                kept = add_product(miss, moved, kept)
            store_i8(codes + first + i, c)
        if usual:
            norm, error, kept = weigh(squares, weight, norm), weigh(misses, weight, error), weigh(held, weight, kept)
    _add_up(sums, norm, error, kept, bits)


@_inline
def _encode_dense(kind, base, x, count, first, out, sums):
    """Encode ``count`` values; the largest of ``sums`` is of the values as stored too."""
    norm, error, kept = fill64(0.0), fill64(0.0), fill64(0.0)
    bits = no_bits()
    for i in range(0, count, LANES):
        v = load(x + 4 * i)
        bits = max_bits(bits, v)
        if kind == F32:
            store(out + 4 * (first + i), v)
        else:
            to = out + 2 * (first + i)
            stored = store_bf16(to, v) if kind == BF16 else store_f16(to, v)
            bits = max_bits(bits, stored)
            miss = sub(stored, v)
            norm, error = add_product(v, v, norm), add_product(miss, miss, error)
            kept = add_product(miss, sub(v, load(base + 4 * i)), kept)
    _add_up(sums, norm, error, kept, top_bits(bits))


@_compiled(types.void(*[int64] * 37, float64[::1]))
def fold_tile(
    kind, codes, scales, blocksize, levels,
    new_kind, new_codes, new_scales, new_blocksize, new_levels, new_bounds, new_order, by_cell, cells, moments,
    matrices, b, shared, row_scale,
    out_features, features, first_row, last_row, first_column, last_column,
    group, flat, new_flat, x, x_stride, y, y_stride, mode, search, plain, work, keep, sums,
):  # fmt: skip
    """Fold rows ``first_row`` to ``last_row`` of columns ``first_column`` to ``last_column``.

    Addresses and strides are in bytes. ``group`` rows (a multiple of ROWS) are done at a time through the scratch ``x``
    and ``y``, float32: decoded, and rotated. Where 4-bit blocks straddle rows (``flat``: the old ones, ``new_flat``: the
    new), the columns are all of the row, the strides are the row's, and groups begin with a block.

    ``by_cell``: the new levels lie in order and one to a cell; ``cells`` holds 32 int32 and 32 float32 for
    :func:`rank_by_cell` then.

    ``mode``: NEAREST, or of 4-bit weights as for :func:`_encode_best`, with its ``search``, ``plain`` and ``work``; KEEP
    with the table ``keep`` and, as SAMPLE, which writes to ``new_codes`` instead, of int8 too.

    ``sums``: (SUMS,) float64, Σ exact², Σ (stored - exact)², the integer bits of the largest \\|value\\|, from 0x7F800000
    on not finite, but for NEAREST and KEEP the second with plain rounding, Σ (exact - base)², Σ (stored - exact) (exact -
    base), and of KEEP and SAMPLE the strong blocks, and the misfits among them.
    """
    length = out_features * features
    old = load(levels)
    new = _levels(new_levels, new_bounds, new_order, by_cell, cells)
    columns = last_column - first_column
    step = 0 if shared else b * b
    for row in range(first_row, last_row, group):
        rows = min(group, last_row - row)
        if flat:
            _decode(kind, codes, scales, blocksize, old, row * features, rows * features, x)
        else:
            for r in range(rows):
                at = scales + 4 * (row + r) if kind == INT8 else scales
                first = (row + r) * features + first_column
                _ask(kind, codes, first + group * features, columns, False)
                if mode != SAMPLE:
                    _ask(new_kind, new_codes, first, columns, True)
                _decode(kind, codes, at, blocksize, old, first, columns, x + r * x_stride)
        for r in range(0, rows, ROWS):
            at = 0 if row_scale == 0 else row_scale + 4 * (row + r)
            sums[4] += _rotate(
                x + r * x_stride, x_stride, y + r * y_stride, y_stride, min(ROWS, rows - r), columns, first_column // b,
                matrices, b, step, at,
            )  # fmt: skip
        if row_scale != 0:
            for r in range(rows):
                scale = fill(load_one(row_scale + 4 * (row + r)))
                for i in range(0, columns, LANES):
                    at = y + r * y_stride + 4 * i
                    store(at, mul(load(at), scale))
        for r in range(1 if new_flat else rows):
            base, at, first = x + r * x_stride, y + r * y_stride, (row + r) * features + first_column
            count = rows * features if new_flat else columns
            if mode == SAMPLE:
                size = new_blocksize if new_kind == FOUR_BIT else features
                place = new_codes + 4 * (first - first_row * features)
                _sample(base, at, first, count, size, keep, place, sums)
            elif new_kind == FOUR_BIT and mode == NEAREST:
                _encode_4bit(base, at, first, count, length, new_codes, new_scales, new_blocksize, new, moments, sums)
            elif new_kind == FOUR_BIT and mode == KEEP:
                _keep_4bit(base, at, first, count, new_codes, new_scales, new_blocksize, new, search, work, keep, sums)
            elif new_kind == FOUR_BIT:
                _encode_best(
                    base, at, first, count, new_codes, new_scales, new_blocksize, new, moments, plain, search, work,
                    mode, sums,
                )  # fmt: skip
            elif new_kind == INT8:
                _encode_int8(base, at, columns, first, row + r, new_codes, new_scales + 4 * (row + r), keep, sums)
            else:
                _encode_dense(new_kind, base, at, columns, first, new_codes, sums)


@_compiled(
    types.UniTuple(float64, 2)(float32[::1], uint8[::1], float32[::1], float32[::1], float32, int64, float32[:, ::1])
)
def nested_error(scales, codes, levels, nested, offset, blocksize, moments):
    """:func:`oftsurgery.weights.kernels.blockwise.nested_error` of statistics that are stored as ``codes``."""
    error = kept = 0.0
    for i in range(len(codes)):
        seen = float32(levels[codes[i]] * nested[i // blocksize]) + offset
        scale = float64(scales[i])
        delta = float64(seen) - scale
        error += delta * (2.0 * scale * float64(moments[i, 0]) + delta * float64(moments[i, 1]))
        kept += delta * scale * float64(moments[i, 2])
    return error, kept


# --- block rotations, in float64 --------------------------------------------------------------------------------------


@_inline
def _skew(v, index, b, wide, q):
    """``wide/b`` skew-symmetric blocks from the rows of v, from ``index`` blocks of ``wide`` on, on the diagonal of q:
    (wide, wide).
    """
    q[:, :] = 0.0
    each = wide // b
    for e in range(each):
        row = (index * each + e) % v.shape[0]
        at = 0
        for i in range(e * b, e * b + b):
            for j in range(i + 1, e * b + b):
                q[i, j] = v[row, at]
                q[j, i] = -v[row, at]
                at += 1


@_inline
def _multiply(x, y, out):
    """out = x · y, all (wide, wide)."""
    wide = x.shape[0]
    stride = 8 * wide
    columns = _BLOCK_LANES  # two registers of float64
    for r in range(0, wide, _BLOCK_ROWS):
        for c in range(0, wide, columns):
            left, right, to = x.ctypes.data + r * stride, y.ctypes.data + 8 * c, out.ctypes.data + r * stride + 8 * c
            product64(left, stride, right, stride, to, stride, wide)


@_inline
def _invert(a):
    """Gauss-Jordan in place. The symmetric part of I + Q is I, so every pivot is at least 1, and no search for pivots is needed."""
    wide = a.shape[0]
    base = a.ctypes.data
    for k in range(wide):
        pivot = 1.0 / a[k, k]
        a[k, k] = 1.0
        row = base + 8 * wide * k
        for c in range(0, wide, LANES):
            store64(row + 8 * c, fma64(load64(row + 8 * c), fill64(pivot), fill64(0.0)))
        for i in range(wide):
            if i != k:
                factor = fill64(-a[i, k])
                a[i, k] = 0.0
                for c in range(0, wide, LANES):
                    at = base + 8 * (wide * i + c)
                    store64(at, fma64(load64(row + 8 * c), factor, load64(at)))


@_compiled(float64(float64[:, ::1], int64, int64, int64, int64, float64, float64[:, :, ::1], float64[:, :, ::1]))
def rotation_blocks(v, b, first, last, power, weight, scratch, out):
    """Blocks ``first`` to ``last`` of out: (n, wide, wide), from generator rows v: (m, b(b-1)/2); wide a multiple of 16
    and b.

    ``power`` 0: the exact Cayley map; else ``I + 2ΣQᵏ (k < power) + weight · Q^power``. ``scratch``: (3, wide, wide).

    Returns:
        the largest residual ``‖R(I+Q) - (I-Q)‖`` relative to the operands, element-wise (NaN where that is not finite);
        0 for a series.
    """
    wide = out.shape[1]
    q, p, t = scratch[0], scratch[1], scratch[2]
    worst = 0.0
    for index in range(first, last):
        r = out[index]
        _skew(v, index, b, wide, q)
        if power == 0:
            r[:, :] = q
            for i in range(wide):
                r[i, i] = 1.0
            p[:, :] = r
            _invert(r)
            for i in range(wide):
                for j in range(wide):
                    r[i, j] *= 2.0
                r[i, i] -= 1.0
            _multiply(r, p, t)
            residual, size_r, size_q = 0.0, 0.0, 1.0
            for i in range(wide):
                for j in range(wide):
                    miss = abs(t[i, j] + q[i, j] - (1.0 if i == j else 0.0))
                    if not miss < np.inf:
                        return np.nan
                    residual = max(residual, miss)
                    size_r, size_q = max(size_r, abs(r[i, j])), max(size_q, abs(q[i, j]))
            worst = max(worst, residual / (size_q * (1.0 + size_r)))
        else:
            factor = weight if power == 1 else 2.0
            for i in range(wide):
                for j in range(wide):
                    r[i, j] = factor * q[i, j]
                r[i, i] += 1.0
            p[:, :] = q
            for k in range(2, power + 1):
                _multiply(p, q, t)
                p, t = t, p
                factor = weight if k == power else 2.0
                for i in range(wide):
                    for j in range(wide):
                        r[i, j] += factor * p[i, j]
    return worst


@_inline
def _above(beta, count, x):
    """Whether the symmetric tridiagonal matrix with a zero diagonal and ``count`` off-diagonals has an eigenvalue above
    x > 0 (a Sturm sequence).
    """
    d = -x
    for i in range(count):
        if d >= 0.0:
            return True
        d = -x - beta[i] * beta[i] / d
    return d >= 0.0


@_inline
def _top(beta, count, floor):
    """The largest eigenvalue of that matrix, or ``floor`` if it has none above it."""
    if not _above(beta, count, floor if floor > 0.0 else 1e-300):
        return floor
    low, high = floor, 0.0
    for i in range(count):
        high = max(high, beta[i] + (beta[i + 1] if i + 1 < count else 0.0))
    for _ in range(60):
        middle = 0.5 * (low + high)
        if middle <= low or middle >= high:
            break
        if _above(beta, count, middle):
            low = middle
        else:
            high = middle
    return high


@_inline
def _squares(x):
    """The sum of squares of x: (wide, wide)."""
    square = fill64(0.0)
    for c in range(0, 8 * x.size, 8 * LANES):
        value = load64(x.ctypes.data + c)
        square = fma64(value, value, square)
    return total64(square)


@_compiled(types.void(float64[:, ::1], int64, int64, int64, int64, float64[:, :, ::1], float64[::1]))
def angle_bounds(v, b, wide, first, last, scratch, out):
    """A bound above the largest θ of each skew-symmetric generator ``first`` to ``last``, in ``out``: with eigenvalues
    ±iθ, ‖Q⁴‖² = Σθ⁸ over all of them, so twice the largest's. ``scratch``: (3, wide, wide).
    """
    q, p, t = scratch[0], scratch[1], scratch[2]
    for index in range(first, last):
        _skew(v, index, b, wide, q)
        size = np.sqrt(_squares(q))
        if size == 0.0:
            out[index] = 0.0
            continue
        for c in range(0, 8 * wide * wide, 8 * LANES):
            at = q.ctypes.data + c
            store64(at, fma64(load64(at), fill64(1.0 / size), fill64(0.0)))
        _multiply(q, q, p)
        _multiply(p, p, t)
        out[index] = size * (0.5 * _squares(t)) ** 0.125


@_compiled(float64(float64[:, ::1], int64, int64, int64, int64, float64, float64[:, ::1], float64[:, ::1]))
def largest_angle(v, b, wide, first, last, floor, q, basis):
    """The largest θ, with ±iθ an eigenvalue of one of the skew-symmetric generators ``first`` to ``last``, or ``floor``
    if none is above it.

    Lanczos with full reorthogonalisation (it makes Q tridiagonal: exact after ``wide`` steps, and the end of the
    spectrum is there much before), then bisection. ``q``: (wide, wide), ``basis``: (steps + 2, wide) scratch; steps ≥
    2.
    """
    steps = min(basis.shape[0] - 2, wide)
    beta = np.empty(steps)
    best = floor
    for index in range(first, last):
        _skew(v, index, b, wide, q)
        scale = q.max()
        if scale == 0.0:
            continue
        # a fixed start with a part in every eigenvector, as random numbers have
        seed = 12345
        norm = 0.0
        for i in range(wide):
            seed = (seed * 1103515245 + 12345) % 2147483648
            basis[0, i] = seed / 2147483648.0 - 0.5
            norm += basis[0, i] * basis[0, i]
        for i in range(wide):
            basis[0, i] /= np.sqrt(norm)
        count = 0
        reached = 0.0
        for step in range(steps):
            at = basis.ctypes.data + 8 * wide * (step + 1)
            for c in range(0, wide, LANES):
                total_ = fill64(0.0)
                for k in range(wide):
                    total_ = fma64(load64(q.ctypes.data + 8 * (k * wide + c)), fill64(basis[step, k]), total_)
                store64(at + 8 * c, total_)
            for other in range(step + 1):
                row = basis.ctypes.data + 8 * wide * other
                dot = fill64(0.0)
                for c in range(0, wide, LANES):
                    dot = fma64(load64(at + 8 * c), load64(row + 8 * c), dot)
                factor = fill64(-total64(dot))
                for c in range(0, wide, LANES):
                    store64(at + 8 * c, fma64(load64(row + 8 * c), factor, load64(at + 8 * c)))
            square = fill64(0.0)
            for c in range(0, wide, LANES):
                square = fma64(load64(at + 8 * c), load64(at + 8 * c), square)
            norm = np.sqrt(total64(square))
            if not norm > 1e-13 * scale:
                break
            beta[count] = norm
            count += 1
            # all of the basis is rarely needed: further steps find nothing larger once the end of the spectrum is there
            if count % 16 == 8 and count > 16:
                top = _top(beta, count, reached)
                if top <= reached * (1 + 1e-14):
                    break
                reached = top
            for i in range(wide):
                basis[step + 1, i] /= norm
        if count > 0:
            best = _top(beta, count, best)
    return best
