"""`fold(…, format=)`: a live model takes another format whole or not at all, and goes on as a model of transformers."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import bert, distance, gpt2, live, llama, logits, quantise, state_bytes
from peft import OFTConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import oftsurgery
from oftsurgery import FormatError, RoundingWarning, StateError, UnfoldWarning, UntieWarning

BITS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


def straight(model: nn.Module) -> nn.Module:
    """Without the repacking of CPU forwards, which has a test of its own."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def loaded(make: Any, tmp_path: Path, kind: str, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """A model as transformers quantises it while loading; ``kind`` "" for a plain model."""
    make().save_pretrained(tmp_path / "plain")
    settings = {"quantization_config": BitsAndBytesConfig(**BITS[kind], **options)} if kind else {}
    return straight(auto.from_pretrained(tmp_path / "plain", dtype=torch.float32, **settings))


def fold(model: Any, adapter: Any = None, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        return straight(oftsurgery.fold(model, adapter, **options))


def saved(model: Any, tmp_path: Path, **config: Any) -> tuple[Any, str]:
    """A live peft model over ``model``, and the folder of its adapter."""
    peft_model = live(model, **config)
    peft_model.save_pretrained(tmp_path / "adapter")
    return peft_model, str(tmp_path / "adapter")


def facts(model: Any) -> dict[str, Any]:
    """All that a fold may change in a model."""
    flags = ("hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method")
    return {
        "bytes": state_bytes(model),
        "modules": dict(model.named_modules()),
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "config": model.config.to_dict(),
        "flags": {name: model.__dict__.get(name) for name in flags},
        "record": getattr(model, "oftsurgery", None),
    }


@pytest.mark.parametrize(
    ("kind", "format_"), [("nf4", "bf16"), ("nf4", "int8"), ("int8", "nf4"), ("", "nf4"), ("", "fp16")]
)
def test_a_fold_that_fails_leaves_the_model_as_it_was(kind: str, format_: Any, tmp_path: Path) -> None:
    model = loaded(llama, tmp_path, kind)
    _, adapter = saved(llama(), tmp_path)
    before, computed = facts(model), logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoundingWarning)
        with pytest.raises(RoundingWarning):
            oftsurgery.fold(model, adapter, format=format_, inplace=True)
    assert facts(model) == before
    assert torch.equal(logits(model), computed)
    pure = fold(model, adapter, format=format_)
    assert facts(model) == before
    assert fold(model, adapter, format=format_, inplace=True) is model
    assert state_bytes(model) == state_bytes(pure)
    assert pure.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("kind", BITS)
def test_a_live_quantised_model_becomes_16_bit_without_a_second_rounding(kind: str, tmp_path: Path) -> None:
    """The peft model, the wrapped model and the adapter's files give one result, which is the live model's in 16 bits."""
    peft_model, adapter = saved(loaded(llama, tmp_path, kind), tmp_path)
    wrapped = oftsurgery.wrap(loaded(llama, tmp_path, kind), adapter)
    folds = [
        fold(peft_model, format="bf16"),
        fold(wrapped, format="bf16"),
        fold(loaded(llama, tmp_path, kind), adapter, format="bf16"),
    ]
    assert all(state_bytes(one) == state_bytes(folds[0]) for one in folds)
    assert not any("bitsandbytes" in type(m).__module__ for m in folds[0].modules())
    assert folds[0].oftsurgery.worst[1].error < 0.005
    exact = fold(peft_model, format="fp32")
    if kind == "nf4":  # a live int8 layer also rounds its inputs
        assert distance(logits(exact), logits(peft_model)) < 1e-5
    report = oftsurgery.verify(folds[0], peft_model, torch.arange(12).reshape(2, 6))
    assert report.worst is not None
    assert report.worst[1].relative < (0.01 if kind == "nf4" else 0.03)


@pytest.mark.parametrize("around", ["peft", "wrapped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
def test_a_live_model_is_exported_in_one_step(around: str, dtype: Any, tmp_path: Path) -> None:
    model, adapter = saved(loaded(llama, tmp_path, "nf4"), tmp_path)
    if around == "wrapped":
        model = oftsurgery.wrap(loaded(llama, tmp_path, "nf4"), adapter)
    before = logits(model)
    with nullcontext() if dtype == torch.float32 else pytest.warns(RoundingWarning):
        record = oftsurgery.export_safetensors(model, tmp_path / "out", dtype)
    assert record is not None
    assert record.worst is not None
    assert record.worst[1].error < (1e-6 if dtype == torch.float32 else 0.01 if dtype else 0.2)
    again = straight(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"))
    assert distance(logits(again), before) < (1e-5 if dtype == torch.float32 else 0.05 if dtype else 0.5)
    assert torch.equal(logits(model), before)
    with pytest.raises(StateError, match="exists"):
        oftsurgery.export_safetensors(model, tmp_path / "out", dtype)


def test_an_undo_record_and_the_base_are_refused(tmp_path: Path) -> None:
    model = loaded(llama, tmp_path, "nf4")
    _, adapter = saved(llama(), tmp_path)
    with pytest.raises(StateError, match=r"this fold also changes the weights' formats.*keep the base"):
        oftsurgery.fold(model, adapter, format="bf16", undo=tmp_path / "fold.undo")
    assert not (tmp_path / "fold.undo").exists()
    folded = fold(model, adapter, format="bf16")
    with pytest.raises(
        StateError, match=r"the folded model has another format than its base.*use the base model itself"
    ):
        oftsurgery.unfold(folded, base=model)
    with pytest.warns(UnfoldWarning):
        back = oftsurgery.unfold(folded, adapter)
    assert getattr(back, "oftsurgery", None) is None
    assert distance(logits(back), logits(model)) < 0.02
    # the same format keeps both ways back
    folded = fold(model, adapter, format="nf4", undo=tmp_path / "fold.undo")
    assert not folded.oftsurgery.base
    for way in ({"base": model}, {"undo": tmp_path / "fold.undo"}):
        assert state_bytes(oftsurgery.unfold(folded, **way)) == state_bytes(model)


def test_further_adapters_fold_into_the_new_format(tmp_path: Path) -> None:
    _, first = saved(llama(), tmp_path)
    second = str(tmp_path / "second")
    live(llama(), seed=1).save_pretrained(second)
    once = fold(loaded(llama, tmp_path, "nf4"), first, format="bf16")
    twice = fold(once, second, format="int8")
    assert [r.base.get("format") for r in (*twice.oftsurgery.earlier, twice.oftsurgery)] == ["bf16", "int8"]
    assert {m.format for m in twice.oftsurgery.modules.values()} == {"int8"}
    peft_model = live(twice, seed=2)
    assert fold(peft_model, format="fp32").oftsurgery.base["format"] == "fp32"


@pytest.mark.parametrize("format_", ["bf16", "int8", "fp4"])
def test_gpt2_gets_its_own_layers_back(format_: Any, tmp_path: Path) -> None:
    """GPT-2's own layers hold (in, out), and bitsandbytes' layers (out, in)."""
    model = loaded(gpt2, tmp_path, "nf4")
    peft_model = live(model, target_modules=["c_attn", "c_proj"])
    folded = fold(peft_model, format=format_)
    expected = {"bf16": "Conv1D", "int8": "Linear8bitLt", "fp4": "Linear4bit"}[format_]
    assert type(folded.transformer.h[0].attn.c_attn).__name__ == expected
    folded.save_pretrained(tmp_path / "out")
    again = straight(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"))
    assert torch.equal(logits(again), logits(folded))
    if format_ == "bf16":
        assert distance(logits(folded), logits(peft_model)) < 0.02


def test_a_plain_gpt2_is_quantised_as_transformers_quantises_it(tmp_path: Path) -> None:
    model = loaded(gpt2, tmp_path, "")
    _, adapter = saved(loaded(gpt2, tmp_path, "nf4"), tmp_path, target_modules=["c_attn"])
    folded = fold(model, adapter, format="nf4", rounding="nearest")
    quantised = loaded(gpt2, tmp_path, "nf4")
    assert {p: type(m) for p, m in folded.named_modules()} == {p: type(m) for p, m in quantised.named_modules()}
    mine, theirs = state_bytes(folded), state_bytes(quantised)
    assert {n for n in mine if mine[n] != theirs[n]} <= {n for n in mine if "c_attn" in n}
    oftsurgery.export_safetensors(folded, tmp_path / "out")
    again = straight(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"))
    assert torch.equal(logits(again), logits(folded))


@pytest.mark.parametrize(("kind", "format_"), [("nf4", "bf16"), ("", "nf4"), ("int8", "nf4"), ("nf4", "fp16")])
def test_trained_biases_and_heads_come_along(kind: str, format_: Any, tmp_path: Path) -> None:
    settings = {
        "target_modules": ["query", "dense"],
        "modules_to_save": ["classifier"],
        "bias": "oft_only",
        "task_type": "SEQ_CLS",
    }
    skip = {"llm_int8_skip_modules": ["classifier"]}
    model = loaded(bert, tmp_path, kind, AutoModelForSequenceClassification, **skip)
    peft_model = live(model, **settings)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "modules_to_save" in name or ("query" in name and name.endswith("bias")):
                parameter.add_(0.1)
    folded = fold(peft_model, format=format_)
    assert type(folded.classifier) is nn.Linear
    if format_ in ("bf16", "fp16"):
        assert {p.dtype for p in folded.parameters()} == {folded.dtype}
        assert distance(logits(folded), logits(peft_model)) < 0.02
    oftsurgery.export_safetensors(folded, tmp_path / "out")
    folded.save_pretrained(tmp_path / "saved")
    for place in ("out", "saved"):
        again = straight(AutoModelForSequenceClassification.from_pretrained(tmp_path / place, dtype="auto"))
        assert torch.equal(logits(again), logits(folded))


@pytest.mark.parametrize("format_", ["bf16", "int8"])
def test_tied_embeddings_stay_tied_or_come_apart(format_: Any, tmp_path: Path) -> None:
    make = partial(llama, tie_word_embeddings=True)
    folded = fold(live(loaded(make, tmp_path, "nf4")), format=format_)
    assert folded.lm_head.weight is folded.model.embed_tokens.weight
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        peft_model = live(loaded(make, tmp_path, "nf4"), target_modules=["q_proj", "embed_tokens"])
    with pytest.warns(UntieWarning):
        apart = fold(peft_model, format=format_)
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    assert apart.config.tie_word_embeddings is False
    apart.save_pretrained(tmp_path / "out")
    again = straight(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"))
    assert torch.equal(logits(again), logits(apart))


class Tiny(nn.Module):
    """A model of nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)))  # type: ignore[no-any-return]


def tiny(kind: str = "") -> nn.Module:
    torch.manual_seed(0)
    return quantise(Tiny(), kind) if kind else Tiny()


TINY = OFTConfig(r=0, oft_block_size=16, target_modules=["up"], init_weights=False, use_cayley_neumann=False)


@pytest.mark.parametrize("format_", ["fp32", "bf16", "int8", "fp4"])
def test_a_model_without_a_config(format_: Any) -> None:
    torch.manual_seed(1)
    peft_model = get_peft_model(tiny("nf4"), TINY).eval()
    folded = fold(peft_model, format=format_)
    x = torch.randn(3, 64)
    with torch.no_grad():
        made, expected = folded(x.to(folded.norm.weight.dtype)).double(), peft_model(x).double()
    assert distance(made, expected) < {"fp32": 1e-5, "bf16": 0.02, "int8": 0.03, "fp4": 0.4}[format_]
    assert folded.up.bias.dtype == folded.norm.weight.dtype == (torch.bfloat16 if format_ == "bf16" else torch.float32)


def test_hooks_and_flags_stay_on_new_layers() -> None:
    torch.manual_seed(1)
    model = tiny("nf4")
    calls: list[str] = []
    model.up.register_forward_hook(lambda *_: calls.append("hook"))
    add_hook_to_module(model.down, AlignDevicesHook(execution_device="cpu"))
    model.down.train()
    rotation = oftsurgery.Rotation(generator=torch.randn(4, 120) * 0.03)
    adapter = oftsurgery.OFTAdapter({"up": rotation}, {}, dialect="peft-0.21", config={}, source=None)
    folded = oftsurgery.fold(model, adapter, format="fp32")
    folded(torch.randn(2, 64))
    assert calls == ["hook"]
    assert type(folded.down._hf_hook).__name__ == "AlignDevicesHook"
    assert folded.down.training
    assert type(model.down) is bnb.nn.Linear4bit


def test_a_model_that_a_forward_repacked(tmp_path: Path) -> None:
    """A CPU forward on machines with AVX512-BF16 repacks 4-bit weights and rounds their scales to bfloat16."""
    make, adapter = partial(loaded, llama, tmp_path, "nf4"), saved(llama(), tmp_path)[1]
    model = make()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = bnb.functional.has_avx512bf16()
    logits(model)
    a, b = (fold(m, adapter, format="fp32") for m in (model, make()))
    assert distance(logits(a), logits(b)) < 0.01
    a, b = (fold(m, adapter, format="int8") for m in (model, make()))
    assert distance(logits(a), logits(b)) < 0.03


def test_a_compiled_model_takes_the_format() -> None:
    model = quantise(llama(), "nf4")
    compiled = torch.compile(model, backend="eager")
    adapter = oftsurgery.OFTAdapter(
        {"model.layers.0.self_attn.q_proj": oftsurgery.Rotation(generator=torch.full((4, 120), 0.01))},
        {}, dialect="peft-0.21", config={}, source=None,
    )  # fmt: skip
    folded = fold(compiled, adapter, format="fp32")
    assert not any("bitsandbytes" in type(m).__module__ for m in folded.modules())
    assert torch.isfinite(logits(folded)).all()


def test_what_is_refused(tmp_path: Path) -> None:
    rotation = oftsurgery.Rotation(generator=torch.full((4, 120), 0.01))
    adapter = oftsurgery.OFTAdapter({"up": rotation}, {}, dialect="peft-0.21", config={}, source=None)
    refused: list[tuple[nn.Module, dict[str, Any], str]] = [
        (tiny("nf4"), {"format": "q4_k"}, "the format 'q4_k' is not known Remedy: choose one of same, fp32"),
        (tiny("nf4"), {"format": "bf16", "double_quant": True}, "the format bf16 does not quantise the statistics"),
        (tiny("nf4"), {"format": "int8", "double_quant": True}, "the format int8 does not quantise the statistics"),
        (tiny("nf4"), {"double_quant": True}, "the format same does not quantise the statistics"),
        (tiny(), {"format": "nf4"}, "a Tiny is no model of transformers"),
        (cpu_offload(tiny()), {"format": "bf16"}, "the tensor is offloaded or not loaded.*oftsurgery.fold_checkpoint"),
    ]
    for model, options, message in refused:
        with pytest.raises(StateError, match=message):
            oftsurgery.fold(model, adapter, **options)
    embedding = bnb.nn.Embedding4bit(8, 64, quant_type="nf4", device="cpu").to("cpu")
    model = tiny("nf4")
    model.table = embedding
    with pytest.raises(FormatError, match="an embedding of bitsandbytes keeps its format or becomes plain"):
        oftsurgery.fold(model, adapter, format="int8")
    folded = fold(model, adapter, format="fp32")
    assert type(folded.table) is nn.Embedding
    index = torch.arange(8)
    assert distance(folded.table(index).double(), embedding(index).double()) < 1e-6
