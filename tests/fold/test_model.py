"""Folding whole live models: transformers, peft, compile, accelerate, tied and trained parts; each against the live
model itself.
"""

from __future__ import annotations

import copy
import json
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from independent import make_case, relative
from models import TOKENS, bert, distance, gpt2, live, llama, logits, quantise, shake, state_bytes
from peft import OFTConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
)

import oftsurgery
from oftsurgery import RoundingWarning, UnfoldWarning, UntieWarning

# --- the fold is what the live model computes -------------------------------------------------------------------------


@pytest.mark.parametrize("from_disk", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_plain_model_computes_what_the_live_one_does(tmp_path: Path, from_disk: bool, inplace: bool) -> None:
    peft_model = live(llama())
    expected = logits(peft_model)
    peft_model.save_pretrained(tmp_path)
    if from_disk:
        model = llama()
        folded = oftsurgery.fold(model, tmp_path, inplace=inplace)
        assert (folded is model) == inplace
    else:
        folded = oftsurgery.fold(peft_model, inplace=inplace)
    assert type(folded) is LlamaForCausalLM
    assert not [n for n, _ in folded.named_parameters() if "oft" in n or "base_layer" in n]
    assert distance(logits(folded), expected) < 1e-6
    if not inplace and not from_disk:
        assert torch.equal(logits(peft_model), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantised_model_is_as_close_as_its_rounding(kind: str) -> None:
    peft_model = live(quantise(llama(), kind))
    expected = logits(peft_model)
    with pytest.warns(
        RoundingWarning,
        match=rf"rounded 4 weights to {kind}.*relative error .* in the median, .* at worst \(model\.layers",
    ):
        folded = oftsurgery.fold(peft_model)
    record = folded.oftsurgery
    limit = {"nf4": 0.11, "fp4": 0.15, "int8": 0.02}[kind]
    assert len(record.modules) == 4
    assert all(0 < m.error < limit and m.format.startswith(kind) for m in record.modules.values())
    assert distance(logits(folded), expected) < 2 * limit
    # the base is farther away than the fold: the adapter is in
    assert distance(logits(folded), expected) < distance(logits(quantise(llama(), kind)), expected)


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_several_adapters_fold_in_the_live_order(order: list[str], tmp_path: Path) -> None:
    config = OFTConfig(oft_block_size=16, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(llama(), config, adapter_name="a")
    model.add_adapter("b", OFTConfig(oft_block_size=32, target_modules=["q_proj", "v_proj"]))
    for seed, name in enumerate("ab"):
        shake(model, seed, name)
        model.save_pretrained(tmp_path, selected_adapters=[name])
    model.base_model.set_adapter(order)
    model.eval()
    expected = logits(model)
    folded = oftsurgery.fold(model)
    assert distance(logits(folded), expected) < 1e-6
    assert [a.source for a in folded.oftsurgery.adapters] == [f"live adapter {n!r}" for n in order]
    from_disk = oftsurgery.fold(llama(), [tmp_path / n for n in order])
    assert distance(logits(from_disk), expected) < 1e-6
    one_by_one = oftsurgery.fold(oftsurgery.fold(llama(), tmp_path / order[1]), tmp_path / order[0])
    assert distance(logits(one_by_one), expected) < 1e-6
    # the other order is another model: this test would see it
    assert distance(logits(oftsurgery.fold(llama(), [tmp_path / n for n in reversed(order)])), expected) > 1e-4
    # naming live adapters overrides the active ones
    assert distance(logits(oftsurgery.fold(model, list(reversed(order)))), expected) > 1e-4


def test_trained_biases_and_saved_modules_come_along(tmp_path: Path) -> None:
    model = live(bert(), target_modules=["query", "dense"], bias="all", modules_to_save=["classifier"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert distance(logits(oftsurgery.fold(model)), expected) < 1e-6
    base = bert()
    before = state_bytes(base)
    folded = oftsurgery.fold(base, tmp_path)
    assert distance(logits(folded), expected) < 1e-6
    assert state_bytes(base) == before
    assert "classifier.weight" in folded.oftsurgery.saved
    restored = oftsurgery.unfold(folded, base=base)
    assert state_bytes(restored) == before
    with pytest.warns(UnfoldWarning, match=r"tensors that the adapter had replaced .* are not restored"):
        oftsurgery.unfold(folded, tmp_path)


# --- pure means pure --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "nf4", "int8"])
def test_pure_fold_shares_what_it_did_not_change_and_leaves_the_input(kind: str, tmp_path: Path) -> None:
    live(llama()).save_pretrained(tmp_path)
    model = llama() if kind == "plain" else quantise(llama(), kind)
    seen: list[str] = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: seen.append("called"))
    before, expected = state_bytes(model), logits(model)
    identities = {n: id(m) for n, m in model.named_modules()}, {n: id(p) for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        folded = oftsurgery.fold(model, tmp_path)
    assert state_bytes(model) == before
    assert ({n: id(m) for n, m in model.named_modules()}, {n: id(p) for n, p in model.named_parameters()}) == identities
    assert torch.equal(logits(model), expected)
    changed = set(folded.oftsurgery.modules)
    mine, theirs = dict(model.named_parameters()), dict(folded.named_parameters())
    for name, parameter in mine.items():
        shares = parameter.data_ptr() == theirs[name].data_ptr()
        assert shares == (name.removesuffix(".weight") not in changed), name
        assert theirs[name] is not parameter
        assert theirs[name].requires_grad == parameter.requires_grad
    seen.clear()
    logits(folded)
    assert seen == ["called"]  # hooks are copied with the modules
    # moving, casting and freezing the copy stays in the copy
    folded.to(torch.bfloat16).requires_grad_(False).train()
    assert state_bytes(model) == before
    assert not model.training
    assert torch.equal(logits(model), expected)
    handle.remove()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_cpu_forwards_of_input_and_result_do_not_meet(kind: str, tmp_path: Path) -> None:
    """bitsandbytes changes layers in a forward (repacking, int8 statistics): neither model may see the other's."""
    live(llama()).save_pretrained(tmp_path)
    model = quantise(llama(), kind)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = bnb.functional.has_avx512bf16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        folded = oftsurgery.fold(model, tmp_path)
        again = oftsurgery.fold(model, tmp_path)
    first = logits(folded)
    original = logits(model)
    assert torch.equal(logits(again), first)
    assert torch.equal(logits(folded), first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        after_forward = oftsurgery.fold(model, tmp_path)
    assert torch.equal(logits(model), original)
    assert distance(logits(after_forward), first) < (0.05 if kind == "nf4" else 1e-9)


# --- kinds of model ---------------------------------------------------------------------------------------------------


def test_tied_embedding_is_untied_and_the_head_stays(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no implementation exists to tie the adapters"):
        model = live(llama(tie_word_embeddings=True), target_modules=["embed_tokens", "q_proj"])
    expected = logits(model)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    for inplace in (False, True):
        base = llama(tie_word_embeddings=True)
        head = base.lm_head.weight.detach().clone()
        with pytest.warns(UntieWarning, match="shared with another module"):
            folded = oftsurgery.fold(base, tmp_path, inplace=inplace)
        assert distance(logits(folded), expected) < 1e-6
        assert torch.equal(folded.lm_head.weight, head)
        assert not folded.config.tie_word_embeddings
        assert base.config.tie_word_embeddings != inplace
        assert folded.oftsurgery.modules["model.embed_tokens"].untied
        assert folded.oftsurgery.modules["model.embed_tokens"].side == "embedding"
        folded.save_pretrained(tmp_path / "folded")
        assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()), expected) < 1e-6


def test_tied_head_is_untied_and_the_embedding_stays() -> None:
    with pytest.warns(UserWarning, match="no implementation exists to tie the adapters"):
        model = live(llama(tie_word_embeddings=True), target_modules=["lm_head"])
    expected = logits(model)
    with pytest.warns(UntieWarning):
        folded = oftsurgery.fold(model)
    assert distance(logits(folded), expected) < 1e-6
    assert not torch.equal(folded.lm_head.weight, folded.model.embed_tokens.weight)


def test_gpt2_conv1d_is_rotated_on_its_input_side(tmp_path: Path) -> None:
    """peft's OFT layers take no Conv1D; adapters for GPT-2 are trained on its bitsandbytes linears, whose weight is
    transposed.
    """
    torch.manual_seed(0)
    model = gpt2()
    linear = {n: m for n, m in model.named_modules() if type(m).__name__ == "Conv1D" and n.endswith("c_attn")}
    as_linear = gpt2()
    for name in linear:
        parent = as_linear.get_submodule(name.rpartition(".")[0])
        conv = parent.c_attn
        parent.c_attn = nn.Linear(*conv.weight.shape)
        parent.c_attn.weight = nn.Parameter(conv.weight.t().detach().clone())
        parent.c_attn.bias = nn.Parameter(conv.bias.detach().clone())
    peft_model = live(as_linear, target_modules=["c_attn"])
    expected = logits(peft_model)
    peft_model.save_pretrained(tmp_path)
    folded = oftsurgery.fold(model, tmp_path)
    assert folded.transformer.h[0].attn.c_attn.weight.shape == (64, 192)
    assert distance(logits(folded), expected) < 1e-6


def test_transformers_own_adapters_fold_too() -> None:
    model = llama()
    model.add_adapter(OFTConfig(oft_block_size=16, target_modules=["q_proj"]), adapter_name="mine")
    shake(model, 0, "mine")
    expected = logits(model.eval())
    folded = oftsurgery.fold(model)
    assert distance(logits(folded), expected) < 1e-6
    assert not hasattr(folded, "peft_config")
    assert hasattr(model, "peft_config")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("how", ["wrapper", "module", "submodule"])
@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_models_fold_and_stay_compiled(how: str, inplace: bool, tmp_path: Path) -> None:
    peft_model = live(llama())
    expected = logits(peft_model)
    peft_model.save_pretrained(tmp_path)
    torch._dynamo.reset()
    model: Any = llama()
    if how == "wrapper":
        model = torch.compile(model, backend="eager")
    elif how == "module":
        model.compile(backend="eager")
    else:
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    base = logits(model)
    folded = oftsurgery.fold(model, tmp_path, inplace=inplace)
    assert type(folded) is type(model)
    assert distance(logits(folded), expected) < 1e-5
    if how == "module":
        assert folded._compiled_call_impl is not None
        assert folded._compiled_call_impl._torchdynamo_orig_callable.__self__ is folded
    if not inplace:
        assert distance(logits(model), base) < 1e-5
    assert folded.oftsurgery.modules.keys() == {
        f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_models_that_accelerate_offloads_fold(where: str, inplace: bool, kind: str, tmp_path: Path) -> None:
    def base() -> nn.Module:
        return llama() if kind == "plain" else quantise(llama(), kind)

    live(llama()).save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        expected = logits(oftsurgery.fold(base(), tmp_path / "adapter"))
        model = base()
        if where == "cpu":
            cpu_offload(model, torch.device("cpu"))
        else:
            disk_offload(model, str(tmp_path / "offload"), torch.device("cpu"))
        assert model.model.layers[0].self_attn.q_proj.weight.is_meta
        before = logits(model)
        folded = oftsurgery.fold(model, tmp_path / "adapter", inplace=inplace)
    assert distance(logits(folded), expected) < 1e-7
    assert folded.model.layers[0].self_attn.q_proj.weight.is_meta
    if not inplace:
        assert torch.equal(logits(model), before)
        assert torch.equal(logits(oftsurgery.unfold(folded, base=model)), before)


@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "in place"])
def test_a_hooked_layer_in_two_places_folds_in_the_one_that_the_adapter_names(inplace: bool) -> None:
    layer, case, x = nn.Linear(64, 64), make_case("0.21 exact", 64, 64, path="0"), torch.randn(3, 64)
    # accelerate binds the forward of the module that it puts a hook on
    add_hook_to_module(layer, AlignDevicesHook(torch.device("cpu"), io_same_device=True))
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    with pytest.warns(UntieWarning):
        folded = oftsurgery.fold(nn.Sequential(layer, nn.Tanh(), layer), case.adapter, inplace=inplace)
    expected = torch.tanh(x.double() @ case.dense @ weight.T + bias) @ weight.T + bias
    assert relative(folded(x), expected) < 1e-6


def test_offloaded_4bit_layers_are_refused(tmp_path: Path) -> None:
    """accelerate 1.15 cannot run such a model either: it keeps the codes, but not their quantisation state."""
    live(llama()).save_pretrained(tmp_path)
    model = quantise(llama(), "nf4")
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="meta tensor"):
        logits(model)
    with pytest.raises(
        oftsurgery.StateError,
        match=r"4-bit layer offloaded .*'model.layers.0.self_attn.q_proj'.*Remedy: keep 4-bit layers on a device",
    ):
        oftsurgery.fold(model, tmp_path)


# --- out again, and the record ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "nf4", "int8"])
def test_unfold_states_its_error_and_base_restores_exactly(kind: str, tmp_path: Path) -> None:
    live(llama()).save_pretrained(tmp_path)
    model = llama() if kind == "plain" else quantise(llama(), kind)
    before = state_bytes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        folded = oftsurgery.fold(model, tmp_path)
    folded_bytes = state_bytes(folded)
    with pytest.warns(UnfoldWarning, match="not bit-exact: the largest relative error") as caught:
        back = oftsurgery.unfold(folded, tmp_path)
    stated = float(str(caught[0].message).split("relative error is ")[1].split(" ")[0])
    true = max(distance(weight_of(back, path), weight_of(model, path)) for path in folded.oftsurgery.modules)
    assert true <= 1.1 * stated + 1e-6
    assert stated <= 2 * true + 1e-9
    assert not hasattr(back, "oftsurgery")
    assert state_bytes(folded) == folded_bytes
    exact = oftsurgery.unfold(folded, base=model)
    assert state_bytes(exact) == before
    assert not hasattr(exact, "oftsurgery")


def weight_of(model: nn.Module, path: str) -> torch.Tensor:
    from oftsurgery.formats.codecs import decode
    from oftsurgery.stores.layers import Layer

    return decode(Layer(path, model.get_submodule(path)).read()[0]).double()


def test_record_says_what_was_folded_and_survives_json_and_copies(tmp_path: Path) -> None:
    live(llama()).save_pretrained(tmp_path / "one")
    live(llama(), seed=1, use_cayley_neumann=False).save_pretrained(tmp_path / "two")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        once = oftsurgery.fold(quantise(llama(), "nf4"), tmp_path / "one")
        twice = oftsurgery.fold(once, tmp_path / "two")
    record = twice.oftsurgery
    adapter = oftsurgery.load_adapter(tmp_path / "two")
    assert [a.fingerprint for a in record.adapters] == [adapter.fingerprint]
    assert record.adapters[0].sha256 == adapter.sha256
    assert record.adapters[0].dialect == "peft-0.21"
    assert record.earlier == (once.oftsurgery,)
    for path, module in record.modules.items():
        rotation = adapter.modules[path]
        blocks = rotation.blocks
        assert module.angle == pytest.approx(float(torch.linalg.eigvals(blocks).angle().abs().max()), abs=1e-6)
        assert module.defect < 1e-12
        assert module.block_size == (16,)
        assert module.before == once.oftsurgery.modules[path].after
    assert record.versions["torch"] == metadata.version("torch")
    assert oftsurgery.FoldRecord.from_dict(json.loads(record.to_json())) == record
    assert copy.deepcopy(twice).oftsurgery == record
    # out again in order, and in that order alone
    with pytest.raises(
        oftsurgery.StateError, match=r"last fold is of .*two, not of .*one.*Remedy: unfold the last fold first"
    ):
        oftsurgery.unfold(twice, tmp_path / "one")
    with pytest.warns(UnfoldWarning):
        assert oftsurgery.unfold(twice, tmp_path / "two").oftsurgery == once.oftsurgery


def test_progress_bar_counts_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live(llama()).save_pretrained(tmp_path)
    oftsurgery.fold(llama(), tmp_path, progress=True)
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize("inplace", [False, True])
def test_a_wrapped_and_trained_model_folds(inplace: bool, tmp_path: Path) -> None:
    live(llama()).save_pretrained(tmp_path)
    wrapped = oftsurgery.wrap(llama(), tmp_path)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    before = logits(wrapped)
    wrapped(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    expected = logits(wrapped)
    assert distance(expected, before) > 1e-4
    with pytest.raises(oftsurgery.StateError, match="live adapters, and an adapter to fold was given too"):
        oftsurgery.fold(wrapped, tmp_path)
    folded = oftsurgery.fold(wrapped, inplace=inplace)
    assert (folded is wrapped) == inplace
    assert type(folded.model.layers[0].self_attn.q_proj) is nn.Linear
    assert distance(logits(folded), expected) < 1e-6
    if not inplace:
        assert torch.equal(logits(wrapped), expected)
