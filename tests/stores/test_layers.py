"""Layers of every kind: what a fold keeps of them, what their forward computes afterwards, and that nothing leaks
between a model and its fold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import pytest
import torch
from independent import Case, decode_4bit, fold, make_case, make_layer, relative, requantised, seeded, stored_weight
from torch import Tensor, nn

import oftsurgery
from oftsurgery.adapters.rotation import Rotation
from oftsurgery.errors import FormatError, StateError
from oftsurgery.stores.layers import Layer

EXACT = "0.21 exact"


def one(layer: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"layer": layer})


def case(in_features: int = 64, out_features: int = 64) -> Case:
    return make_case(EXACT, in_features, out_features, b=16)


def inputs(features: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, features, generator=seeded("inputs", features)).to(dtype)


def pack(layer: Any) -> None:
    """What a CPU eval forward does to a 4-bit layer on AVX512-BF16 machines, on any machine."""
    layer.weight.data, _ = bnbf._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)


def whole(layer: Any) -> bytes:
    """All bytes and settings of a bitsandbytes layer, to tell whether anything has touched it."""
    w = layer.weight
    state = getattr(w, "quant_state", None)
    parts: list[Any] = [w.data, w.data.shape, getattr(w, "CB", None), getattr(w, "SCB", None), layer.bias]
    if state is not None:
        parts += [
            state.absmax,
            state.dtype,
            state.nested,
            getattr(state, "packing_format_for_cpu", False),
            state.offset,
        ]
        parts += [state.state2.absmax, state.state2.code] if state.nested else []
    if hasattr(layer, "state"):
        parts += [layer.state.CB, layer.state.SCB]
    flat = [
        p.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if isinstance(p, Tensor)
        else repr(p).encode()
        for p in parts
    ]
    return b"|".join(flat)


# --- what must survive ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "in place"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["single", "double"])
@pytest.mark.parametrize(("codec", "blocksize"), [("nf4", 64), ("fp4", 128)])
def test_4bit_attributes_survive(codec: str, blocksize: int, nested: bool, storage: torch.dtype, inplace: bool) -> None:
    layer: Any = make_layer(codec, 128, nested=nested, blocksize=blocksize, storage=storage, dtype=torch.bfloat16)
    layer.compute_dtype, layer.compute_type_is_set = torch.bfloat16, True
    layer.support_avx512bf16_for_cpu = False
    shape, state = layer.weight.shape, layer.weight.quant_state
    exact = case(128).live_weight(stored_weight(layer))

    folded: Any = fold(one(layer), case(128).adapter, inplace=inplace)["layer"]

    w = folded.weight
    assert (folded is layer) == inplace
    assert type(folded) is bnb.nn.Linear4bit
    assert type(w) is bnb.nn.Params4bit
    assert w.bnb_quantized is True
    assert w.compress_statistics is nested
    assert (w.quant_type, w.blocksize, w.quant_storage) == (codec, blocksize, storage)
    assert w.requires_grad is False
    assert w.module is folded
    assert (w.dtype, w.shape, w.device.type) == (storage, shape, "cpu")
    assert folded.quant_state is w.quant_state
    assert w.quant_state is not state
    assert (folded.compute_dtype, folded.compute_type_is_set) == (torch.bfloat16, True)
    assert folded.support_avx512bf16_for_cpu is False
    assert folded.quant_storage == storage
    for name in ("shape", "dtype", "blocksize", "quant_type", "nested"):
        assert getattr(w.quant_state, name) == getattr(state, name), name
    if nested:
        assert w.quant_state.state2.blocksize == 256
        assert w.quant_state.state2.dtype == torch.float32
    assert relative(decode_4bit(w, w.quant_state), exact) <= 1.001 * relative(requantised(exact, layer), exact)


@pytest.mark.parametrize("after_forward", [False, True], ids=["fresh", "after a forward"])
@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "in place"])
def test_8bit_attributes_survive(inplace: bool, after_forward: bool) -> None:
    layer: Any = make_layer("int8", 128)
    layer.state.threshold, layer.state.use_pool, layer.index = 6.0, True, None
    if after_forward:
        layer.train()(inputs(128))
        assert layer.weight.SCB is None
        assert layer.state.SCB is not None
    exact = case(128).live_weight(stored_weight(layer))

    folded: Any = fold(one(layer), case(128).adapter, inplace=inplace)["layer"]

    assert type(folded) is bnb.nn.Linear8bitLt
    assert type(folded.weight) is bnb.nn.Int8Params
    assert folded.weight.has_fp16_weights is False
    assert folded.weight.requires_grad is False
    assert (folded.state.threshold, folded.state.use_pool, folded.state.has_fp16_weights) == (6.0, True, False)
    assert folded.state.CB is None
    assert folded.state.SCB is None
    assert (folded.state is layer.state) == inplace
    assert folded.weight.CB.data_ptr() == folded.weight.data_ptr()
    assert relative(stored_weight(folded), exact) <= 1.001 * relative(requantised(exact, layer), exact)
    y = folded.train()(inputs(128))
    assert relative(y, inputs(128).double() @ stored_weight(folded).T + folded.bias.double()) <= 1e-6


def test_attributes_that_torch_compile_adds_do_not_break() -> None:
    layer: Any = make_layer("nf4", 64, nested=True)
    layer.weight._dynamo_dynamic_indices = {0}
    layer.weight.__dict__["_something"] = object()
    for inplace in (False, True):
        folded: Any = fold(one(layer), case().adapter, inplace=inplace)["layer"]
        assert not [k for k in folded.weight.__dict__ if k.startswith("_")]
    untouched: Any = make_layer("nf4", 64)
    untouched.weight._dynamo_dynamic_indices = {0}
    both = fold(nn.ModuleDict({"layer": make_layer("nf4", 64), "other": untouched}), case().adapter)
    assert torch.equal(both["other"].weight.data, untouched.weight.data)


@pytest.mark.parametrize("name", ["nf4", "nf4 double", "fp4 double", "int8", "nf4 double packed"])
def test_state_dict_loads_in_a_fresh_layer(name: str) -> None:
    codec, nested = name.split()[0], "double" in name
    layer: Any = make_layer(codec, 64, nested=nested)
    if "packed" in name:
        pack(layer)
    folded: Any = fold(one(layer), case().adapter)["layer"]
    state = {k: v.clone() for k, v in folded.state_dict().items()}
    assert set(state) == set(make_layer(codec, 64, nested=nested).state_dict())
    fresh: Any
    if codec == "int8":
        fresh = make_layer("int8", 64, generator=seeded("another"))
        fresh.load_state_dict(state)
    else:  # as transformers and diffusers do
        fresh = bnb.nn.Linear4bit(64, 64, quant_type=codec, compress_statistics=nested)
        stats = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
        fresh.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu", module=fresh)
        fresh.bias = nn.Parameter(state["bias"])
    assert torch.equal(stored_weight(fresh), stored_weight(folded))
    with torch.no_grad():
        assert torch.equal(fresh.train()(inputs()), folded.train()(inputs()))


# --- ways in which a layer may hold its weight ------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True], ids=["Params4bit", "plain Parameter"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_quant_state_on_the_module_only(storage: torch.dtype, plain: bool) -> None:
    """As FSDP leaves it: bitsandbytes' own forward finds the state on the module."""
    layer: Any = make_layer("nf4", 64, nested=True, storage=storage)
    exact = case().live_weight(stored_weight(layer))
    plain_error = relative(requantised(exact, layer), exact)
    if plain:
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    else:
        layer.weight.quant_state = None
    for inplace in (False, True):
        folded: Any = fold(one(layer), case().adapter, inplace=inplace)["layer"]
        assert folded.quant_state is folded.weight.quant_state
        assert folded.weight.dtype == storage
        assert folded.weight.module is folded
        assert relative(stored_weight(folded), exact) <= 1.001 * plain_error
        if not inplace:
            assert getattr(layer.weight, "quant_state", None) is None
        with torch.no_grad():
            y = folded.train()(inputs())
        assert relative(y, inputs().double() @ stored_weight(folded).T + folded.bias.double()) <= 1e-6


def test_quant_state_on_the_weight_only() -> None:
    layer: Any = make_layer("fp4", 64)
    layer.quant_state = None
    exact = case().live_weight(stored_weight(layer))
    folded: Any = fold(one(layer), case().adapter)["layer"]
    assert relative(stored_weight(folded), exact) <= 1.001 * relative(requantised(exact, layer), exact)


@pytest.mark.parametrize("mode", ["fresh", "train", "eval"])
@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "in place"])
def test_8bit_with_float_weights(inplace: bool, mode: str) -> None:
    """`has_fp16_weights`: the weight is plain, and its quantisation of the last forward is kept in the state; a fold
    must not leave a stale one.
    """
    layer: Any = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True)
    layer.weight.data = torch.randn(64, 64, generator=seeded("fp16 weights")) / 8
    layer.weight.requires_grad = mode == "fresh"  # bitsandbytes has no CPU forward for a trained one
    if mode != "fresh":
        layer.train(mode == "train")(inputs())
        assert layer.state.CB is not None
    exact = case().live_weight(layer.weight.detach().double())
    folded: Any = fold(one(layer), case().adapter, inplace=inplace)["layer"]
    assert type(folded.weight) is bnb.nn.Int8Params
    assert folded.weight.has_fp16_weights is True
    assert folded.weight.requires_grad is (mode == "fresh")
    assert folded.weight.dtype == torch.float32
    folded.weight.requires_grad = False
    assert relative(folded.weight, exact) <= 1e-6
    for training in (False, True):
        with torch.no_grad():
            y = folded.train(training)(inputs())
        assert relative(y, inputs().double() @ exact.T + folded.bias.double()) <= 2e-2  # int8 on the fly
    if mode != "fresh" and not inplace:
        assert layer.state.CB is not None  # the original's is its own


def test_1x1_convolution() -> None:
    conv = nn.Conv2d(64, 32, 1, stride=2)
    conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
    c = case(64, 32)
    exact = c.live_weight(conv.weight.detach().double().reshape(32, 64))
    folded = fold(one(conv), c.adapter)["layer"]
    assert folded.weight.shape == (32, 64, 1, 1)
    assert relative(folded.weight.reshape(32, 64), exact) <= 1e-6
    x = torch.randn(2, 64, 6, 6, generator=seeded("image"))
    rotated = (x.double().movedim(1, -1) @ c.dense).movedim(-1, 1)
    expected = nn.functional.conv2d(
        rotated, conv.weight.double(), conv.bias.double() if conv.bias is not None else None, stride=2
    )
    assert relative(folded(x), expected) <= 1e-6


def test_transformers_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(48, 64)  # out, in; weight (in, out)
    c = case(64, 48)
    folded = fold(one(layer), c.adapter)["layer"]
    assert folded.weight.shape == (64, 48)
    assert folded.weight.is_contiguous()
    expected = (inputs().double() @ c.dense) @ layer.weight.double() + layer.bias.double()
    assert relative(folded(inputs()), expected) <= 1e-6


def embedding(kind: str) -> Any:
    weight = torch.randn(50, 64, generator=seeded("embedding"))
    layer: Any
    if kind == "8bit":
        layer = bnb.nn.Embedding8bit(50, 64)
        layer.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
    elif kind == "dense":
        layer = nn.Embedding(50, 64, _weight=weight)
    else:
        layer = bnb.nn.Embedding4bit(50, 64, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=None, quant_type=kind, module=layer
        )
    return layer.to("cpu")


@pytest.mark.parametrize("kind", ["dense", "nf4", "fp4", "8bit"])
def test_embeddings(kind: str) -> None:
    layer = embedding(kind)
    c = case()
    adapter = oftsurgery.OFTAdapter({"layer": Rotation(c.adapter.modules["layer"].generator, side="embedding")})
    exact = stored_weight(layer) @ c.dense  # E[i]·R
    folded = fold(one(layer), adapter)["layer"]
    assert type(folded) is type(layer)
    plain = 1e-6 if kind == "dense" else 1.001 * relative(requantised(exact, layer), exact)
    assert relative(stored_weight(folded), exact) <= plain
    tokens = torch.tensor([[3, 0], [49, 7]])
    assert relative(folded(tokens), stored_weight(folded)[tokens]) <= 1e-6
    assert relative(layer(tokens), stored_weight(layer)[tokens]) <= 1e-6
    if kind in ("nf4", "fp4"):
        assert folded.weight.module is folded
        assert folded.weight.compress_statistics is None
        assert folded.quant_state is folded.weight.quant_state


# --- the folded layer's own forward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["fresh", "packed"])
@pytest.mark.parametrize(("codec", "nested"), [("nf4", False), ("nf4", True), ("fp4", True), ("int8", False)])
def test_forward_computes_the_folded_weight(codec: str, nested: bool, packed: bool) -> None:
    layer: Any = make_layer(codec, 128, nested=nested)
    c = case(128)
    if packed and codec != "int8":
        pack(layer)
    elif packed:
        layer.eval()(inputs(128))
    folded: Any = fold(one(layer), c.adapter)["layer"]
    weight, x = stored_weight(folded), inputs(128)
    expected = x.double() @ weight.T + folded.bias.double()
    with torch.no_grad():
        assert relative(folded.train()(x), expected) <= 1e-6
        for _ in range(
            2
        ):  # the first repacks a 4-bit layer where the machine does; it computes in bfloat16, int8 rounds its inputs
            assert relative(folded.eval()(x), expected) <= 2e-2
        assert relative(folded.train()(x), expected) <= 2e-2
    if codec != "int8" and folded.support_avx512bf16_for_cpu:
        assert folded.weight.quant_state.packing_format_for_cpu
    # and a second fold of what the forwards have left
    back = make_case("0.17 Neumann", 128, 64, b=16)
    again: Any = fold(one(folded), back.adapter)["layer"]
    exact = back.live_weight(weight)
    assert relative(stored_weight(again), exact) <= 1.001 * relative(requantised(exact, folded), exact) + 2**-9


# --- no leak between a model and its pure fold ------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "nested"), [("nf4", False), ("nf4", True), ("fp4", True), ("int8", False)])
@pytest.mark.parametrize("who", ["original", "folded"])
def test_forwards_and_saving_of_one_leave_the_other(codec: str, nested: bool, who: str) -> None:
    def build() -> Any:
        return nn.ModuleDict(
            {
                "layer": make_layer(codec, 64, nested=nested, bias=True),
                "untouched": make_layer(codec, 64, nested=nested, generator=seeded("untouched")),
            }
        )

    model = build()
    folded = fold(model, case().adapter)
    runs, stays = (model, folded) if who == "original" else (folded, model)
    before = {name: whole(m) for name, m in stays.items()}
    for layer in runs.values():
        with torch.no_grad():
            layer.train()(inputs())
            layer.eval()(inputs())
            layer.eval()(inputs(dtype=torch.bfloat16))  # casts the bias in place
        if codec != "int8" and not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            pack(layer)
        layer.to(torch.bfloat16) if codec == "int8" else None
        layer.state_dict()
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
    assert {name: whole(m) for name, m in stays.items()} == before
    assert all(m.bias.requires_grad for m in stays.values())
    if who == "original":
        fresh = fold(build(), case().adapter)
        assert {name: whole(m) for name, m in fresh.items()} == before
    with torch.no_grad():
        for name, layer in stays.items():
            expected = inputs().double() @ stored_weight(layer).T + layer.bias.double()
            assert relative(layer.train()(inputs()), expected) <= 1e-6, name


def test_untouched_layers_share_their_storage() -> None:
    model = nn.ModuleDict(
        {
            "layer": make_layer("nf4", 64),
            "a": make_layer("nf4", 64, nested=True),
            "b": make_layer("int8", 64),
            "c": nn.Linear(64, 64),
        }
    )
    folded = fold(model, case().adapter)
    for name in "abc":
        assert folded[name].weight.data_ptr() == model[name].weight.data_ptr(), name
        assert folded[name].weight is not model[name].weight
    assert folded["a"].weight.quant_state.absmax.data_ptr() == model["a"].weight.quant_state.absmax.data_ptr()
    assert folded["a"].weight.module is folded["a"]
    assert folded["a"].quant_state is folded["a"].weight.quant_state


# --- refusals ---------------------------------------------------------------------------------------------------------


def unquantised_4bit() -> nn.Module:
    return bnb.nn.Linear4bit(64, 64)


def lost_state() -> nn.Module:
    layer: Any = make_layer("nf4", 64)
    layer.weight.quant_state = layer.quant_state = None
    return layer  # type: ignore[no-any-return]


def lost_scb() -> nn.Module:
    layer: Any = make_layer("int8", 64)
    layer.weight.SCB = None
    return layer  # type: ignore[no-any-return]


def other_type() -> nn.Module:
    layer: Any = make_layer("nf4", 64)
    layer.weight.quant_state.quant_type = "int4"
    return layer  # type: ignore[no-any-return]


def saved_after_packing() -> nn.Module:
    layer: Any = make_layer("nf4", 128)
    pack(layer)
    layer.state_dict()
    return layer  # type: ignore[no-any-return]


def parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "4-bit not quantised yet": (
        unquantised_4bit,
        StateError,
        r"4-bit layer is not quantised yet \[module 'layer'\] Remedy: move the model",
    ),
    "8-bit not quantised yet": (
        lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
        StateError,
        r"8-bit layer is not quantised yet \[module 'layer'\]",
    ),
    "lost quant_state": (
        lost_state,
        FormatError,
        r"4-bit layer has lost its quant_state \[module 'layer', format 4-bit\] Remedy: reload",
    ),
    "lost SCB": (
        lost_scb,
        FormatError,
        r"int8 layer has lost its SCB statistics \[module 'layer', tensor 'SCB', format int8\]",
    ),
    "unknown 4-bit type": (other_type, FormatError, r"the 4-bit type is unknown \[module 'layer', format int4\]"),
    "saved after a CPU forward": (
        saved_after_packing,
        StateError,
        r"absmax transposed: bitsandbytes now computes noise with the layer \[module 'layer', tensor 'absmax', shape 2×64\] Remedy: load the base",
    ),
    "parametrised": (parametrised, StateError, r"weight is parametrised .* Remedy: call remove_parametrizations"),
    "meta": (
        lambda: nn.Linear(64, 64, device="meta"),
        StateError,
        r"weight is on the meta device and has no values \[module 'layer'\]",
    ),
    "3×3 convolution": (
        lambda: nn.Conv2d(64, 64, 3),
        FormatError,
        r"a 3×3 convolution cannot be folded: .* Remedy: train the adapter without",
    ),
    "grouped convolution": (
        lambda: nn.Conv2d(64, 64, 1, groups=2),
        FormatError,
        r"a grouped convolution cannot be folded, .* \d+ groups \[module 'layer'\]",
    ),
    "another module": (
        lambda: nn.Bilinear(64, 64, 2),
        FormatError,
        r"a Bilinear has no weight that oftsurgery can rotate",
    ),
    "integers": (
        lambda: setattr_weight(
            nn.Linear(64, 64), nn.Parameter(torch.ones(64, 64, dtype=torch.int32), requires_grad=False)
        ),
        FormatError,
        r"a Linear with a weight of torch.int32 is stored in a way that oftsurgery does not know \[module 'layer', shape 64×64\]",
    ),
}


def setattr_weight(layer: nn.Module, weight: nn.Parameter) -> nn.Module:
    layer.weight = weight
    return layer


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, error, text = REFUSED[name]
    layer = make()
    with pytest.raises(error, match=text):
        fold(one(layer), case().adapter, inplace=True)


def test_saving_after_a_cpu_forward_is_noise_in_bitsandbytes_itself() -> None:
    """The reason for that refusal; with double quantisation bitsandbytes restores absmax, and the fold is right."""
    single: Any = make_layer("nf4", 128)
    expected = inputs(128).double() @ stored_weight(single).T + single.bias.double()
    pack(single)
    single.state_dict()
    with torch.no_grad():
        assert relative(single.train()(inputs(128)), expected) > 0.1
    double: Any = make_layer("nf4", 128, nested=True)
    c = case(128)
    exact = c.live_weight(stored_weight(double))
    pack(double)
    double.state_dict()
    folded = fold(one(double), c.adapter)["layer"]
    assert relative(stored_weight(folded), exact) <= 1.001 * relative(requantised(exact, folded), exact) + 2**-7


def test_a_write_that_fails_half_way_undoes_itself() -> None:
    class Brittle(bnb.nn.Linear4bit):  # type: ignore[misc]
        brittle = False

        def __setattr__(self, name: str, value: object) -> None:
            if self.brittle and name == "quant_state":
                self.brittle = False
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    layer: Any = make_layer("nf4", 64)
    layer.__class__ = Brittle
    weight, state, before = layer.weight, layer.quant_state, whole(layer)
    encoded = Layer("layer", layer).read()[0]
    layer.brittle = True
    with pytest.raises(KeyboardInterrupt):
        Layer("layer", layer).write(encoded, park=True)
    assert layer.weight is weight
    assert layer.quant_state is state
    assert whole(layer) == before
