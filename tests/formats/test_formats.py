"""Storage formats as objects: what others ask of them, whichever it is; against bitsandbytes' and transformers' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import bitsandbytes as bnb
import pytest
import torch
from independent import relative, seeded
from torch import Tensor
from transformers import BitsAndBytesConfig

from oftsurgery import Rotation, use_backend
from oftsurgery.cli import arguments
from oftsurgery.folding import disk_plan
from oftsurgery.formats import checkpoint_tensors, codecs
from oftsurgery.formats.all_formats import FORMATS
from oftsurgery.formats.base import Format
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.formats.int8 import Int8
from oftsurgery.records import card
from oftsurgery.weights import undo
from oftsurgery.weights.fold import fold_encoded

CASES = {
    "dense": WeightFormat("dense", (6, 128), torch.bfloat16),
    "nf4": WeightFormat("nf4", (6, 128), torch.float16, 64),
    "fp4 double": WeightFormat("fp4", (6, 128), torch.bfloat16, 32, 256),
    "nf4 in bfloat16": WeightFormat("nf4", (6, 128), torch.bfloat16, 64, 256, torch.bfloat16),
    "int8": WeightFormat("int8", (6, 128), torch.float16),
}
by_case = pytest.mark.parametrize("f", CASES.values(), ids=CASES)


def test_every_list_of_formats_names_them_all() -> None:
    quantised = {name for name, kind in FORMATS.items() if kind.quantised}
    assert {f.codec for f in CASES.values()} == FORMATS.keys()
    assert (
        set(get_args(disk_plan.Format)) == set(arguments.FORMATS) == {"same", "bnb", "fp32", "fp16", "bf16", *quantised}
    )
    assert set(arguments._SHARED["--quantize"]["choices"]) == quantised
    assert quantised <= card._FORMAT_TAGS


def stored(f: WeightFormat) -> EncodedWeight:
    return codecs.encode(torch.randn(f.shape, generator=seeded(f.codec)), f)


@by_case
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_every_format_folds_to_the_rotated_weight(f: WeightFormat, backend: str) -> None:
    """By whichever kernel the format names: as far off as encoding the exact weight is, at most by half."""
    before, turn = stored(f), Rotation(generator=torch.randn(8, 120, generator=seeded("turn")) * 0.05)
    exact = codecs.decode(before).double() @ torch.block_diag(*turn.blocks.double()).T
    stays = codecs.decode(codecs.encode(exact.float(), f)).double()
    with use_backend(backend):
        got = codecs.decode(fold_encoded(before, (turn,), f, "nearest").encoded).double()
    assert relative(got, exact) <= 1.5 * relative(stays, exact) + 1e-7


@by_case
def test_a_stored_weight_is_known_by_its_names(f: WeightFormat) -> None:
    tensors = f.kind.to_checkpoint("a.weight", stored(f))
    names, weight = {**tensors, "a.bias": None, "b.weight": None}, tensors["a.weight"]
    where = ("a.weight", names, tensors.__getitem__, tuple(weight.shape), weight.dtype)
    assert checkpoint_tensors.format_by_names("a.weight", names, weight.dtype) is f.kind
    assert checkpoint_tensors.companion_names("a.weight", names) == tuple(tensors)
    found = checkpoint_tensors.read_weight(*where)
    assert (found.format, found.fingerprint) == (f, stored(f).fingerprint)
    read = []
    assert checkpoint_tensors.stored_format(*where[:2], lambda n: read.append(n) or tensors[n], *where[3:]) == f
    assert read == ([f"a.weight.quant_state.bitsandbytes__{f.codec}"] if f.blocksize else [])
    shapes = checkpoint_tensors.checkpoint_shapes("a.weight", f)
    assert shapes.keys() == tensors.keys()
    for name, (dtype, shape) in shapes.items():
        assert tensors[name].dtype == dtype
        assert shape is None or tensors[name].shape == shape


@by_case
def test_tensors_beside_a_weight_belong_to_it(f: WeightFormat) -> None:
    names = f.kind.to_checkpoint("a.weight", stored(f)).keys()
    for name in names - {"a.weight"}:
        assert checkpoint_tensors.owner_of(name) == "a.weight"
        assert checkpoint_tensors.is_companion(name, names)
        assert not checkpoint_tensors.is_companion(name, names - {"a.weight"})
    for name in ("a.weight", "a.bias", "SCB", "absmax", "a.weight.absmax.x"):
        assert checkpoint_tensors.owner_of(name) is None


@by_case
def test_an_undo_record_predicts_from_codes_and_scales(f: WeightFormat) -> None:
    """A new format has nothing of its own to say."""
    encoded = stored(f)
    given = Format.prediction_inputs(f.kind, encoded)
    assert given.keys() == ({"weight", f.kind.scales_name} if f.quantised else {"weight"})
    assert all(torch.equal(values, encoded.tensors[name]) for name, values in given.items())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_a_plain_weight_is_loaded_as_by_bitsandbytes(name: str, dtype: torch.dtype, double: bool) -> None:
    plain = torch.randn(6, 128, generator=seeded(name))
    kind = FORMATS[name]
    got = codecs.as_loaded(codecs.dense(plain), kind.loaded_as((6, 128), dtype, double))
    new: torch.Tensor
    if name == "int8":
        new = bnb.nn.Int8Params(plain.to(dtype), requires_grad=False, has_fp16_weights=False).to("cpu")
        assert torch.equal(got.tensors["SCB"], new.SCB)
    else:
        settings = {"quant_type": name, "compress_statistics": double}
        new = bnb.nn.Params4bit(plain.to(dtype), requires_grad=False, **settings).to("cpu")
        assert torch.equal(got.tensors["absmax"], new.quant_state.absmax)
        assert (got.format.blocksize, got.format.dtype) == (new.quant_state.blocksize, new.quant_state.dtype)
        assert bool(got.format.nested_blocksize) == new.quant_state.nested == double
    assert torch.equal(got.tensors["weight"], new.data)
    asked = BitsAndBytesConfig(**kind.config_fields)
    assert (asked.load_in_4bit, asked.load_in_8bit) == (name != "int8", name == "int8")
    assert asked.quantization_method() == ("llm_int8" if name == "int8" else name)


def test_a_dense_weight_is_loaded_in_its_dtype() -> None:
    plain = torch.randn(6, 128, generator=seeded(0))
    got = codecs.as_loaded(codecs.dense(plain), FORMATS["dense"].loaded_as((6, 128), torch.bfloat16, False))
    assert torch.equal(got.tensors["weight"], plain.bfloat16())


class FourBitRows(Int8):
    """Int8 with fewer levels."""

    name, unit, strong_change = "rows", 7.0, 1 / 14

    def levels(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.arange(-7, 8, device=device, dtype=torch.int8)
        return codes / 7, (codes[1:] - 0.5) / 7, codes

    def nearest_levels(self, scaled: Tensor) -> Tensor:
        return torch.round(scaled * 7).clamp(-7, 7) / 7

    def codes_at(self, weight: Tensor, scales: Tensor, f: WeightFormat) -> Tensor:
        scaled = weight.reshape(f.shape) / scales.unsqueeze(-1)
        return torch.round(7 * scaled).clamp(-7, 7).to(torch.int8)

    def codes_by_level(self, facts: Mapping[str, Any]) -> Tensor:
        return torch.arange(-7, 8).to(torch.int8)

    def nearest_ranks(self, numbers: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        near = torch.round(numbers).clamp(-7, 7)
        up = ((numbers > near) | (near == -7)) & (near < 7)
        return near + 7, up, (0.5 - (numbers - near).abs()) * 1024

    def kernel_name(self, f: WeightFormat) -> str:
        return ""


@pytest.mark.parametrize("rows", [600, 3000], ids=["reference", "tiled"])
def test_a_class_and_a_row_are_all_that_a_new_format_takes(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "rows", FourBitRows())
    f = WeightFormat("rows", (rows, 128), torch.float16)
    plain = torch.randn(f.shape, generator=seeded(rows))
    before = codecs.encode(plain, f)
    assert (codecs.decode(before) - plain).abs().max() <= plain.abs().max() / 14 * 1.001
    rotation = Rotation(0.001 * torch.randn(8, 120, generator=seeded(1)))
    folded = fold_encoded(before, [rotation], rounding="preserve")
    assert (folded.backend, folded.rounding) == ("reference" if rows == 600 else "tiled", "preserve")
    assert folded.kept == pytest.approx(1, abs=0.2)
    entry = undo.encode_weight(before, folded.encoded, [rotation], noise=folded.error, relaxation=folded.kept_scales)
    assert len(entry.data) < plain.numel() / 4
    assert undo.decode_weight(entry, folded.encoded).fingerprint == before.fingerprint
