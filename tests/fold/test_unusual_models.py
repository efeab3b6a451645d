"""Folds of models and calls out of the ordinary: modules that stand twice, trained in part, repacked, compiled, called in odd modes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from models import TOKENS, bert, distance, live, llama, logits, quantise, shake, state_bytes
from peft import OFTConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune

import oftsurgery
from oftsurgery import FormatError, IntegrityError, RoundingWarning, StateError, UntieWarning, rotations


def oft(model: nn.Module, targets: list[str], **config: Any) -> Any:
    settings = {"oft_block_size": 4, "target_modules": targets} | config
    wrapped = get_peft_model(model, OFTConfig(**settings)).eval()
    shake(wrapped, 0)
    return wrapped


def net(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval()


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["oft_only", "all"])
def test_biases_trained_live_go_back_to_the_bases(kind: str) -> None:
    base = bert()
    before = state_bytes(base)
    trained = live(bert(), target_modules=["query"], bias=kind)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.add_(1)
    folded = oftsurgery.fold(trained)
    assert folded.oftsurgery.saved
    assert set(folded.oftsurgery.saved.values()) == {None}
    assert state_bytes(oftsurgery.unfold(folded, base=base)) == before


def test_a_base_that_changed_elsewhere_is_not_called_restored(tmp_path: Path) -> None:
    live(llama()).save_pretrained(tmp_path)
    base = llama()
    folded = oftsurgery.fold(base, tmp_path)
    folded.model.norm.weight = nn.Parameter(folded.model.norm.weight + 1)
    with pytest.raises(IntegrityError, match=r"did not touch \[tensor 'model.norm.weight'\].*Remedy"):
        oftsurgery.unfold(folded, base=base)


class Twice(nn.Module):
    def __init__(self, quantised: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(16, 16)
        if quantised:
            quantise(self, "int8")
        self.b = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_one_module_under_two_names_is_rotated_where_peft_puts_its_layer(
    quantised: bool, inplace: bool, tmp_path: Path
) -> None:
    peft_model = oft(Twice(quantised), ["a"])
    with torch.no_grad():
        expected = peft_model(X)
    peft_model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base = Twice(quantised)
        before = state_bytes(base)
        for folded in (oftsurgery.fold(base, tmp_path, inplace=inplace), oftsurgery.fold(peft_model)):
            assert folded.a is not folded.b
            with torch.no_grad():
                assert distance(folded(X), expected) < (0.03 if quantised else 1e-6)
    assert [w for w in caught if w.category is UntieWarning]
    if not inplace:
        assert base.a is base.b
        assert state_bytes(base) == before


def test_a_layer_that_its_owner_never_calls_stays_as_it_is() -> None:
    model = net(nn.MultiheadAttention(16, 2, batch_first=True))
    adapter = oftsurgery.OFTAdapter({"0.out_proj": oftsurgery.Rotation(torch.randn(4, 6))})
    with pytest.warns(oftsurgery.IdleWarning, match=r"never calls the layers.* \(0\.out_proj\)"):
        folded = oftsurgery.fold(model, adapter)
    assert folded.oftsurgery.idle == ("0.out_proj",)
    assert torch.equal(folded[0].out_proj.weight, model[0].out_proj.weight)


def test_saved_modules_may_hold_integers(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential()
        torch.manual_seed(0)
        model.add_module("body", nn.Linear(16, 16))
        model.add_module("head", nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 2)))
        return model.eval()

    peft_model = oft(make(), ["body"], modules_to_save=["head"])
    peft_model.train()
    peft_model(X)  # the running statistics move, and their counter
    peft_model.eval()
    peft_model.save_pretrained(tmp_path)
    folded = oftsurgery.fold(make(), tmp_path)
    assert int(folded.head[0].num_batches_tracked) == 1
    with torch.no_grad():
        assert distance(folded(X), peft_model(X)) < 1e-6


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks at a CPU forward on AVX512-BF16 alone")
def test_a_base_that_a_cpu_forward_repacked_is_named_as_such(tmp_path: Path) -> None:
    live(llama()).save_pretrained(tmp_path)
    base = quantise(llama(), "nf4")
    with pytest.warns(RoundingWarning):
        folded = oftsurgery.fold(base, tmp_path)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    logits(base)
    with pytest.raises(
        IntegrityError, match=r"CPU forward has repacked the base's 4-bit weight.*Remedy: load the base again"
    ):
        oftsurgery.unfold(folded, base=base)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_the_base_ties_is_tied_again(inplace: bool) -> None:
    with pytest.warns(UserWarning, match="no implementation exists to tie"):
        peft_model = live(llama(tie_word_embeddings=True), target_modules=["embed_tokens"])
    with pytest.warns(UntieWarning):
        folded = oftsurgery.fold(peft_model)
    base = llama(tie_word_embeddings=True)
    back = oftsurgery.unfold(folded, base=base, inplace=inplace)
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert back.config.tie_word_embeddings
    assert state_bytes(back) == state_bytes(base)


def test_a_live_model_is_restored_from_its_checkpoint_too(tmp_path: Path) -> None:
    live(llama()).save_pretrained(tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    for kind in ("plain", "nf4", "int8"):
        base = llama() if kind == "plain" else quantise(llama(), kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RoundingWarning)
            folded = oftsurgery.fold(base, tmp_path / "adapter")
        assert state_bytes(oftsurgery.unfold(folded, base=tmp_path / "base")) == state_bytes(base), kind


@pytest.mark.parametrize("kind", ["plain", "nf4", "int8"])
@pytest.mark.parametrize("around", ["inference_mode", "meta"])
def test_the_callers_modes_do_not_reach_the_result(around: str, kind: str, tmp_path: Path) -> None:
    live(llama()).save_pretrained(tmp_path)
    base = llama() if kind == "plain" else quantise(llama(), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        expected = oftsurgery.fold(base, tmp_path)
        with torch.inference_mode() if around == "inference_mode" else torch.device("meta"):
            folded = oftsurgery.fold(base, tmp_path)
    assert state_bytes(folded) == state_bytes(expected)
    folded(TOKENS, labels=TOKENS).loss  # noqa: B018 - no tensor of inference mode is in the way of autograd
    assert not any(p.is_inference() for p in folded.parameters())


def computed(kind: str) -> nn.Module:
    if kind == "lazy":
        return net(nn.LazyLinear(16))
    layer = nn.Linear(16, 16)
    if kind == "float8":
        layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    elif kind == "pruned":
        prune.random_unstructured(layer, "weight", 0.5)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and in use
            getattr(nn.utils, kind)(layer)
    return net(layer)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "pruned", "lazy", "float8"])
def test_weights_that_are_not_plain_parameters_are_refused_by_name(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = computed(kind)
    with pytest.raises((StateError, FormatError), match=r"'0'.*Remedy: "):
        oftsurgery.fold(model, oftsurgery.OFTAdapter({"0": oftsurgery.Rotation(torch.randn(4, 6))}))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: oftsurgery.fold({"a": 1}, "x"), "a model is a torch.nn.Module, not a dict"),
        (lambda: oftsurgery.fold(None, "x"), "not a NoneType"),
        (lambda: oftsurgery.fold(net(nn.Linear(4, 4)), 3), "not a int"),
        (lambda: oftsurgery.fold(net(nn.Linear(4, 4)), net(nn.Linear(4, 4))), "not a Sequential"),
        (
            lambda: oftsurgery.fold(oft(net(nn.Linear(16, 16)), ["0"]), "zz"),
            r"no live adapter zz.*the model's adapters with set_adapter\(\): default",
        ),
        (
            lambda: oftsurgery.fold(net(oft(net(nn.Linear(16, 16)), ["0"]))),
            r"in a part of this model.*fold the part.*get_submodule\('0",
        ),
    ],
)
def test_wrong_arguments_get_an_answer(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(oftsurgery.OFTSurgeryError, match=text):
        call()


def test_warnings_are_told_of_the_callers_line(tmp_path: Path) -> None:
    live(llama()).save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folded = oftsurgery.fold(quantise(llama(), "nf4"), tmp_path)
        wrapped = oftsurgery.wrap(quantise(llama(), "nf4"), tmp_path)
        oftsurgery.fold(wrapped)
        oftsurgery.unfold(folded, tmp_path)
    assert len(caught) == 3
    assert {w.filename for w in caught} == {__file__}


def test_what_is_noted_on_a_parameter_stays_noted(tmp_path: Path) -> None:
    live(llama()).save_pretrained(tmp_path)
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight.sequence_parallel = True
    assert oftsurgery.fold(model, tmp_path).model.layers[0].self_attn.q_proj.weight.sequence_parallel


def test_the_product_precision_is_raised_until_the_last_thread_is_done() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with rotations.full_precision("cpu"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    try:
        thread.start()
        assert inside.wait(10)
        with rotations.full_precision("cpu"):
            pass
        assert torch.get_float32_matmul_precision() == "highest"
        leave.set()
        thread.join()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        leave.set()
        torch.set_float32_matmul_precision(before)


def test_one_module_under_two_names_inside_a_compiled_one(tmp_path: Path) -> None:
    peft_model = oft(net(Twice(False)), ["0.a"])
    with torch.no_grad():
        expected = peft_model(X)
    peft_model.save_pretrained(tmp_path)
    torch._dynamo.reset()
    compiled = nn.Sequential(torch.compile(Twice(False), backend="eager"))
    with pytest.warns(UntieWarning):
        folded = oftsurgery.fold(compiled, tmp_path)
    with torch.no_grad():
        assert distance(folded(X), expected) < 1e-6


def test_an_embedding_that_the_adapter_both_saved_and_rotates_goes_back(tmp_path: Path) -> None:
    peft_model = live(llama(), target_modules=["embed_tokens"])
    with torch.no_grad():
        peft_model.base_model.model.model.embed_tokens.base_layer.weight.add_(0.1)  # a resized or retrained embedding
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        peft_model.save_pretrained(tmp_path)
    base = llama()
    folded = oftsurgery.fold(base, tmp_path)
    assert distance(logits(folded), logits(peft_model)) < 1e-6
    assert "model.embed_tokens.weight" in folded.oftsurgery.saved
    assert state_bytes(oftsurgery.unfold(folded, base=base)) == state_bytes(base)
