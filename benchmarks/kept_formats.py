"""What a fold keeps of an adapter's change where it keeps the format of another package: ``python benchmarks/kept_formats.py``, a minute.

The weights are four of SmolLM2-135M-Instruct, stored by each package's quantiser and turned by random rotations of blocks of 32 inputs. Each
row is a format, and each pair of columns a size of the change ‖exact − base‖ / ‖base‖: the error of storing the result, and the share of the
change that is kept. The undo record is the share of the weight's bytes at the middle size. The last rows fold the same weights within NF4 and
int8.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from oftsurgery import EncodedWeight, Rotation, WeightFormat
from oftsurgery.formats.codecs import encode
from oftsurgery.formats.packages.methods import METHODS
from oftsurgery.formats.packages.package_format import PackageFormat
from oftsurgery.formats.packages.stored import Source
from oftsurgery.weights.fold import fold_encoded
from oftsurgery.weights.undo import encode_weight

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from language_model import SmolLM2

NAMES = [
    f"model.layers.{i}.{end}.weight"
    for i, end in ((3, "self_attn.q_proj"), (10, "self_attn.o_proj"), (17, "mlp.up_proj"), (25, "mlp.down_proj"))
]
SIZES = (0.01, 0.03, 0.1)


def package(method: str, tensors: dict[str, Tensor], settings: dict[str, Any]) -> PackageFormat:
    entries = {f"x.{n}": (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    source = Source(entries, settings, torch.bfloat16, lambda name: tensors[name.removeprefix("x.")])
    stored = METHODS[method](source)["x.weight"]
    layout = {local: entries[name] for local, name in stored.tensors.items()}
    return PackageFormat(method, stored.shape, stored.dtype, stored=stored, entries=layout)


def hqq(out: int, inputs: int) -> PackageFormat:
    def text(words: str) -> Tensor:
        return torch.tensor(list(words.encode()), dtype=torch.uint8)

    def number(n: int) -> Tensor:
        return torch.tensor(n, dtype=torch.int32)

    groups = out * inputs // 64
    facts = {"shape": torch.tensor([out, inputs]), "nbits": number(4), "group_size": number(64), "axis": number(1)}
    facts |= {"packing": text("4bit_u8"), "compute_dtype": text("torch.bfloat16")}
    scales = torch.zeros(2, groups, 1, dtype=torch.bfloat16)
    return package(
        "hqq",
        {"W_q": torch.zeros(groups // 2, 64, dtype=torch.uint8), "scale": scales[0], "zero": scales[1], **facts},
        {},
    )


def compressed(out: int, inputs: int, bits: int, group: int, *, symmetric: bool) -> PackageFormat:
    scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    groups = inputs // group
    tensors = {"weight_scale": torch.zeros(out, groups, dtype=torch.bfloat16)}
    if bits == 8:
        tensors["weight"] = torch.zeros(out, inputs, dtype=torch.int8)
    else:
        tensors |= {
            "weight_packed": torch.zeros(out, inputs * bits // 32, dtype=torch.int32),
            "weight_shape": torch.tensor([out, inputs]),
        }
    if not symmetric:
        tensors["weight_zero_point"] = torch.zeros(out * bits // 32, groups, dtype=torch.int32)
    return package("compressed-tensors", tensors, {"config_groups": {"": {"weights": scheme}}})


def fp8(out: int, inputs: int, block: int) -> PackageFormat:
    tensors = {"weight": torch.zeros(out, inputs, dtype=torch.float8_e4m3fn)}
    tensors["weight_scale_inv"] = torch.zeros(-(-out // block), -(-inputs // block))
    return package("fp8", tensors, {"weight_block_size": [block, block]})


def formats(out: int, inputs: int) -> Iterator[tuple[str, WeightFormat, str]]:
    """``(name, format, rounding)``."""
    for rounding in ("nearest", "preserve"):
        yield f"HQQ, 4 bits, groups of 64, `{rounding}`", hqq(out, inputs), rounding
        for symmetric in (True, False):
            kind = "symmetric" if symmetric else "asymmetric"
            form = compressed(out, inputs, 4, 64, symmetric=symmetric)
            yield f"compressed-tensors, 4 bits, groups of 64, {kind}, `{rounding}`", form, rounding
        yield (
            f"compressed-tensors, 8 bits, rows, `{rounding}`",
            compressed(out, inputs, 8, inputs, symmetric=True),
            rounding,
        )
        yield f"FP8, blocks of 128 × 128, `{rounding}`", fp8(out, inputs, 128), rounding
    for rounding in ("nearest", "preserve"):
        yield f"NF4, `{rounding}`", WeightFormat("nf4", (out, inputs), torch.bfloat16, blocksize=64), rounding
        yield f"int8, `{rounding}`", WeightFormat("int8", (out, inputs), torch.float16), rounding


def turned(base: EncodedWeight, size: float) -> Rotation:
    """A rotation that changes the weight by about ``size``."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randn(base.format.shape[1] // 32, 32 * 31 // 2, generator=generator)
    return Rotation(generator=blocks * (size / 2 / math.sqrt(31)))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        SmolLM2(Path(folder))
        held = load_file(next(Path(folder).glob("*.safetensors")))
    weights = [held[name].float() for name in NAMES]
    rows: dict[str, list[list[Any]]] = {}
    undos: dict[str, list[tuple[int, int, float]]] = {}
    for weight in weights:
        for name, form, rounding in formats(*weight.shape):
            base = encode(weight, form)
            chains = [[turned(base, size)] for size in SIZES]
            fold_encoded(base, chains[1], rounding=rounding)  # compiles
            start = time.perf_counter()
            folds = [fold_encoded(base, chain, rounding=rounding) for chain in chains]
            seconds = (time.perf_counter() - start) / len(folds)
            rows.setdefault(name, []).append(folds)
            middle = folds[1]
            entry = encode_weight(base, middle.encoded, chains[1], noise=middle.error, relaxation=middle.kept_scales)
            nbytes = sum(t.nbytes for n, t in base.tensors.items() if n not in form.kind.shared_tensors)
            undos.setdefault(name, []).append((len(entry.data), nbytes, seconds))
    head = " | ".join(f"moved by {size:.0%}: error | kept" for size in SIZES)
    print(f"| format, rounding | {head} | undo record | s for 10⁶ weights |")
    print("|---|" + "---:|---:|" * len(SIZES) + "---:|---:|")
    count = sum(weight.numel() for weight in weights)
    for name, folds in rows.items():
        cells = []
        for column in zip(*folds, strict=True):
            change = [f.change**2 for f in column]
            kept = sum(f.kept * c for f, c in zip(column, change, strict=True)) / sum(change)
            cells += [f"{sum(f.error for f in column) / len(column):.1%}", f"{kept:.1%}"]
        coded, whole, seconds = (sum(values) for values in zip(*undos[name], strict=True))
        cells += [f"{coded / whole:.0%}", f"{seconds / count * 1e6:.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
