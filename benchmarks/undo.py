"""This benchmark measures what an undo record costs: bits a weight on the real MiniLM with adapters that are trained
here, processor seconds for one layer of 4096 × 4096, and other compressors on the same streams.

    python benchmarks/undo.py

The benchmark takes about four minutes on two cores; most of the time is training.
"""

from __future__ import annotations

import bz2
import importlib.util
import logging
import lzma
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import demo
import transformers

import oftsurgery
from oftsurgery import Rotation
from oftsurgery.folding import undo_reader
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import WeightFormat
from oftsurgery.stores.layers import Layer
from oftsurgery.stores.ties import modules_of
from oftsurgery.weights import undo, undo_streams
from oftsurgery.weights.fold import fold_encoded

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "as in the record (LZMA without contexts)": lambda raw: lzma.compress(
        raw, lzma.FORMAT_RAW, filters=undo_streams.FILTERS
    ),
    "LZMA, the library's default filters": lambda raw: lzma.compress(
        raw, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}]
    ),
    "bzip2": bz2.compress,
    "zlib 9": lambda raw: zlib.compress(raw, 9),
}

if importlib.util.find_spec("zstandard") is not None:
    import zstandard

    COMPRESSORS |= {f"zstd {level}": zstandard.ZstdCompressor(level=level).compress for level in (3, 19)}


def minilm(quantisation: str, adapter: Path, folder: Path) -> None:
    base = demo.load_base(quantisation)
    streams: list[bytes] = []
    raw = undo_streams.Streams.raw

    def listen(self: Any, true: bytes | None, nbytes: int) -> bytes:
        if true is not None:
            streams.append(true)
        return raw(self, true, nbytes)

    path = folder / f"{quantisation}.undo"
    start = time.perf_counter()
    with mock.patch.object(undo_streams.Streams, "raw", listen):
        folded = oftsurgery.fold(base, adapter, undo=path)
    middle = time.perf_counter()
    oftsurgery.unfold(folded, undo=path)
    end = time.perf_counter()
    modules = modules_of(base)
    paths = list(folded.oftsurgery.modules)  # type: ignore[union-attr]
    weights = sum(modules[p].weight.numel() * (2 if quantisation == "NF4" else 1) for p in paths)  # type: ignore[union-attr, operator]
    assert weights == sum(torch.Size(Layer(p, modules[p]).read()[0].format.shape).numel() for p in paths)
    angle = max(m.angle for m in folded.oftsurgery.modules.values())  # type: ignore[union-attr]
    print(
        f"{quantisation}: {path.stat().st_size * 8 / weights:.3f} bits a weight in all "
        f"({path.stat().st_size} bytes, {weights} weights; largest angle {angle:.2f}); "
        f"{middle - start:.1f} s to fold and write, {end - middle:.1f} s to use"
    )
    data = sum(facts["data"][1] for facts in undo_reader.open_undo(path).weights.values())
    print(
        f"  data {data * 8 / weights:.3f}, the rest (manifest and header) {(path.stat().st_size - data) * 8 / weights:.3f}"
    )
    for name, compress in COMPRESSORS.items():
        start = time.perf_counter()
        size = sum(min(len(compress(s)), len(s)) for s in streams)
        print(f"  {size * 8 / weights:.3f} bits, {time.perf_counter() - start:5.2f} s: {name}")


def layer(codec: str, n: int = 4096) -> None:
    torch.manual_seed(0)
    four = (64, 256) if codec != "int8" else ()
    before = codecs.encode(torch.randn(n, n) * 0.02, WeightFormat(codec, (n, n), torch.float32, *four))
    rotation = Rotation(0.01 * torch.randn(n // 32, 496), shared=False)
    folded = fold_encoded(before, [rotation])
    start = time.process_time()
    entry = undo.encode_weight(before, folded.encoded, [rotation], noise=folded.error)
    middle = time.process_time()
    undo.decode_weight(entry, folded.encoded)
    end = time.process_time()
    print(
        f"{codec}, {n} × {n}, b = 32: {middle - start:.1f} processor seconds to write and prove, {end - middle:.1f} to use, "
        f"{len(entry.data) * 8 / n**2:.3f} bits a weight"
    )


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(f"{torch.get_num_threads()} threads")
    for codec in ("nf4", "int8"):
        layer(codec)
    with tempfile.TemporaryDirectory() as name:
        for quantisation in demo.QUANTISATIONS:
            adapter = Path(name) / quantisation
            list(demo.fine_tune(quantisation, adapter, steps=20))
            minilm(quantisation, adapter, Path(name))


if __name__ == "__main__":
    main()
