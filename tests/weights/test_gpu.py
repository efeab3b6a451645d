"""What differs on a GPU: arithmetic on the device, and replaced weights that wait in CPU memory. Needs CUDA; `make
test` runs it where there is one.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from models import live, llama, logits, quantise, state_bytes

import oftsurgery
import oftsurgery.folding.engine
from oftsurgery import RoundingWarning

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    live(llama()).save_pretrained(tmp_path)
    return tmp_path


def fold(model: torch.nn.Module, adapter: Path, **how: bool) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        return oftsurgery.fold(model, adapter, **how)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ["plain", "nf4", "fp4", "int8"])
def test_the_device_gives_the_codes_that_the_cpu_gives(kind: str, inplace: bool, adapter: Path) -> None:
    make = llama if kind == "plain" else lambda: quantise(llama(), kind)
    expected = fold(make(), adapter)
    folded = fold(make().to("cuda"), adapter, inplace=inplace)
    assert all(p.device.type == "cuda" for p in folded.parameters())
    got = folded.state_dict()
    assert got.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        own = got[name].cpu()
        if ".quant_state." in name:
            fields, theirs = (json.loads(bytes(t.tolist())) for t in (own, tensor))
            # the mean of the scales depends on the order of a sum
            assert fields.pop("nested_offset", 0) == pytest.approx(theirs.pop("nested_offset", 0), rel=1e-6)
            assert fields == theirs
        elif name.endswith("absmax") and tensor.dtype == torch.uint8:
            # so a scale may round to its other neighbour
            apart = (own.int() - tensor.int()).abs()
            assert apart.max() <= 1
            assert apart.double().mean() <= 0.01
        elif tensor.is_floating_point():
            assert torch.allclose(own, tensor, rtol=1e-5, atol=1e-6), name
        else:
            assert (own != tensor).double().mean() <= 1e-4, name


@pytest.mark.parametrize("kind", ["plain", "nf4", "int8"])
def test_an_error_in_place_brings_back_what_waited_in_cpu_memory(
    kind: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = (llama() if kind == "plain" else quantise(llama(), kind, "cuda")).to("cuda")
    tokens = torch.tensor([[1, 5, 9, 2]], device="cuda")
    with torch.no_grad():
        expected = model(tokens).logits
    before = {n: (p.device, p.detach().cpu().clone()) for n, p in model.named_parameters()}
    calls: list[int] = []
    real = oftsurgery.folding.engine.fold_encoded

    def failing(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("injected")
        return real(*args, **kwargs)

    monkeypatch.setattr(oftsurgery.folding.engine, "fold_encoded", failing)
    with pytest.raises(RuntimeError, match="injected"):
        fold(model, adapter, inplace=True)
    for name, parameter in model.named_parameters():
        device, data = before[name]
        assert parameter.device == device
        assert torch.equal(parameter.detach().cpu(), data)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)


def test_tf32_does_not_reach_a_fold(adapter: Path) -> None:
    expected = fold(llama().to("cuda"), adapter)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        rough = fold(llama().to("cuda"), adapter)
    finally:
        torch.set_float32_matmul_precision(before)
    assert state_bytes(rough.cpu()) == state_bytes(expected.cpu())
    assert logits(rough).isfinite().all()
