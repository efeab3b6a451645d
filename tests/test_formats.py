"""Storage formats as objects: what others ask of them, whichever it is; against bitsandbytes' and transformers' own."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from independent import seeded
from transformers import BitsAndBytesConfig

from oftsurgery import codecs, formats
from oftsurgery.codecs import EncodedWeight, WeightFormat
from oftsurgery.formats import FORMATS

CASES = {
    "dense": WeightFormat("dense", (6, 128), torch.bfloat16),
    "nf4": WeightFormat("nf4", (6, 128), torch.float16, 64),
    "fp4 double": WeightFormat("fp4", (6, 128), torch.bfloat16, 32, 256),
    "nf4 in bfloat16": WeightFormat("nf4", (6, 128), torch.bfloat16, 64, 256, torch.bfloat16),
    "int8": WeightFormat("int8", (6, 128), torch.float16),
}
by_case = pytest.mark.parametrize("f", CASES.values(), ids=CASES)


def stored(f: WeightFormat) -> EncodedWeight:
    return codecs.encode(torch.randn(f.shape, generator=seeded(f.codec)), f)


@by_case
def test_a_stored_weight_is_known_by_its_names(f: WeightFormat) -> None:
    tensors = f.kind.spread("a.weight", stored(f))
    names, weight = {**tensors, "a.bias": None, "b.weight": None}, tensors["a.weight"]
    where = ("a.weight", names, tensors.__getitem__, tuple(weight.shape), weight.dtype)
    assert formats.of_names("a.weight", names, weight.dtype) is f.kind
    assert formats.companion_names("a.weight", names) == tuple(tensors)
    found = formats.gather(*where)
    assert (found.format, found.fingerprint) == (f, stored(f).fingerprint)
    read = []
    assert formats.format_of(*where[:2], lambda n: read.append(n) or tensors[n], *where[3:]) == f
    assert read == ([f"a.weight.quant_state.bitsandbytes__{f.codec}"] if f.blocksize else [])
    shapes = formats.spread_shapes("a.weight", f)
    assert shapes.keys() == tensors.keys()
    for name, (dtype, shape) in shapes.items():
        assert tensors[name].dtype == dtype
        assert shape is None or tensors[name].shape == shape


@by_case
def test_tensors_beside_a_weight_belong_to_it(f: WeightFormat) -> None:
    names = f.kind.spread("a.weight", stored(f)).keys()
    for name in names - {"a.weight"}:
        assert formats.owner_of(name) == "a.weight"
        assert formats.is_companion(name, names)
        assert not formats.is_companion(name, names - {"a.weight"})
    for name in ("a.weight", "a.bias", "SCB", "absmax", "a.weight.absmax.x"):
        assert formats.owner_of(name) is None


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_a_plain_weight_is_loaded_as_by_bitsandbytes(name: str, dtype: torch.dtype, double: bool) -> None:
    plain = torch.randn(6, 128, generator=seeded(name))
    kind = FORMATS[name]
    got = codecs.load(codecs.dense(plain), kind.loaded_as((6, 128), dtype, double))
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
    asked = BitsAndBytesConfig(**kind.loading)
    assert (asked.load_in_4bit, asked.load_in_8bit) == (name != "int8", name == "int8")
    assert asked.quantization_method() == ("llm_int8" if name == "int8" else name)


def test_a_dense_weight_is_loaded_in_its_dtype() -> None:
    plain = torch.randn(6, 128, generator=seeded(0))
    got = codecs.load(codecs.dense(plain), FORMATS["dense"].loaded_as((6, 128), torch.bfloat16, False))
    assert torch.equal(got.tensors["weight"], plain.bfloat16())
