r"""Numbers that the kernels and their driver agree on: kinds of storage, and where each value lies in a table.

Places in tables are in bytes.
"""

from __future__ import annotations

import numpy as np

#: kinds of storage
FOUR_BIT, INT8, F32, F16, BF16 = range(5)
#: values that are computed together, rows that are rotated together, 4-bit blocks that are encoded together
LANES = ROWS = MANY = 16
#: the largest 4-bit block
MOST_BLOCK = 4096

LARGEST = np.finfo(np.float32).max
TINY = np.float32(1e-38)  #: bitsandbytes' bound under absmax
#: bits of infinity: of \|value\| as integers, from here on not finite
NOT_FINITE = 0x7F800000

# --- the sums of a pass, float64, by 16 lanes each --------------------------------------------------------------------

#: Σ exact², Σ (stored - exact)², the bits of the largest \|value\|, the second with plain rounding, Σ (exact - base)²,
#: Σ (stored - exact) (exact - base), strong blocks, and those whose scale the base's statistics do not hold
NORM, ERROR, TOP, NEAREST, CHANGE, HELD, STRONG, MISFITS = range(0, 8 * 128, 128)
SUMS = 8 * 128

# --- a job: the numbers of all tiles of a pass, int64------------------------------------------------------------------

#: addresses of kernels: the decoder, the encoder, one that comes after it or 0, and the one that finds a block's scale
DECODE, ENCODE, THEN, FIND = range(0, 32, 8)
#: the old weight: kind, codes, scales, block size, levels by code
KIND, CODES, SCALES, BLOCKSIZE, LEVELS = range(32, 72, 8)
#: the new one: kind, scales, block size, levels, and whether it keeps the base's scales (int8)
NEW_KIND, NEW_SCALES, NEW_BLOCKSIZE, NEW_LEVELS, KEEPS = range(72, 112, 8)
#: the rotation: block matrices, their size, bytes from one to the next (0: one for all); factors of the rows, or 0
MATRICES, BLOCK, STEP, FACTORS = range(112, 144, 8)
#: the weight's shape; rows of a group, whether old and new 4-bit blocks straddle rows, strides of the scratch
OUT, FEATURES, GROUP, FLAT, NEW_FLAT, X_STRIDE, Y_STRIDE = range(144, 200, 8)
#: each block's absmax; with double quantisation three planes of a float32 a block, and their bytes, else 0: Σ c(c - s), Σ c² and
#: Σ c(s - v) of a block's levels c and its weights before (v) and after the rotation (s); behind them, for a search, the first
#: two of plain rounding
ABSMAX, MOMENTS, MOMENT_PLANE = range(200, 224, 8)
#: the table of a search
SEARCH = 224
#: for kept scales: the base's; with double quantisation the table of scales in order (256 float32, then the middles between
#: them), their codes (256 float32), what it is scaled by, how many blocks share a factor, and the codes of the new scales
#: (uint8), else 0; and the numbers below
OWN, HELD_LEVELS, HELD_CODES, HELD_FACTORS, HELD_SIZE, HELD_OUT, NUMBERS = range(232, 288, 8)
#: of a sample: its planes, the bytes of one, and the blocks' weights
PLANES, PLANE, WEIGHTS = range(288, 312, 8)
#: values after the rotation, float32, which are then not rotated here; or 0
GIVEN = 312
JOB = 320

#: numbers for kept scales, float32: ω - 1, the largest mean square of a weak block's change and its largest weight in units of
#: its scale, the offset of double quantisation, by how much a scale may be exceeded, and what scales are divided by in a
#: sample's weights
OVER, SQUARE, CLIP, OFFSET, MISFIT, UNIT = range(0, 24, 4)

# --- tables of levels, of 4 bytes each --------------------------------------------------------------------------------

#: in order, the bounds between them, their codes; 32 cells of [-1, 1]: how many bounds are below, and the cell's own
LEVEL, BOUND, ORDER, CELL_BASE, CELL_BOUND = 0, 64, 128, 192, 320
LEVEL_TABLE = 448

# --- the table of double quantisation ---------------------------------------------------------------------------------

#: what is taken off scales, float32; the levels of 8-bit codes; from which value on a code is higher than each one, and
#: after the last one infinity; the codes of the lowest values with each upper half of their bits, a byte each
DYNAMIC_MAP, DYNAMIC_STEPS, DYNAMIC_START = 64, 1088, 2112
DYNAMIC_TABLE = DYNAMIC_START + 65536

# --- the table of a search, float32 -----------------------------------------------------------------------------------

#: ratios to the absmax; for each interval between two what :func:`.search_best.chord` makes of it
RATIOS, CURVE, LEFT, RIGHT = range(0, 512, 128)
#: how many there are, which is 1, from which ratio on an interval is too wide, and the last one
COUNT, ONE, WIDEST, LAST = range(512, 528, 4)
#: for each of CELLS cells of [-1, 1] the rows of :func:`.codes.errors_of_16`
CELL_ROWS = 576
CELLS = 64

# --- scratch behind a tile's rows -------------------------------------------------------------------------------------

#: of 16 blocks: the largest magnitudes, scales, factors, weights, room for a vector, errors of plain rounding
PEAKS, OWN_SCALES, UNITS, SHARES, ASIDE, PLAIN_ERRORS = range(0, 384, 64)
#: a vector a block, seven times
PARTIAL = 1024
#: the scratch of the kernel that finds a strong block's scale, and sums that nobody reads
FINDING, UNREAD = 8192, 65536
#: in it: errors at the ratios, the best so far and its scale, changes of codes, intervals; blocks' values, and so far behind them the
#: rows that they lie in
ERRORS, BEST, EACH, CROSSINGS, INTERVALS, VALUES = 8192, 8320, 8384, 8640, 9984, 12288
ROWS_APART = 4 * MOST_BLOCK
WORK = 65536 + SUMS
