"""A trained head (peft saves that of a classifier by itself) in models of 4 and 8 bits: the head stays plain, the config says so,
and the output is what the live adapter computes over the base that is quantised but for its head.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import TOKENS, adapted, bnb_config, build, differing, load, outputs, quiet_fold, tensors, unpacked
from independent import relative
from peft import PeftModel
from torch import nn

import oftsurgery
from oftsurgery import FormatError, RoundingWarning, StateError
from oftsurgery.stores.quantised_loading import loadable_config

CODECS = ("nf4", "fp4", "int8")
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_labels": 3,
}  # fmt: skip
CLASSES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "BertForSequenceClassification": (SMALL, ["query", "dense"]),
    "RobertaForSequenceClassification": (SMALL | {"pad_token_id": 1}, ["query"]),
    "DistilBertForSequenceClassification": (
        {"vocab_size": 64, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "num_labels": 3},
        ["q_lin"],
    ),
    "LlamaForSequenceClassification": (SMALL | {"pad_token_id": 0}, ["q_proj"]),
}


def classifier(cls: str, place: Path) -> None:
    """``base``, plain, and ``adapter`` with a trained head."""
    config, targets = CLASSES[cls]
    model_class = getattr(transformers, cls)
    torch.manual_seed(0)
    model_class(model_class.config_class(**config)).save_pretrained(place / "base")
    live = adapted(load(place / "base", cls), targets, task_type="SEQ_CLS")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    live.save_pretrained(place / "adapter")


def head_of(cls: str) -> list[str]:
    return ["score"] if cls.startswith("Llama") else ["classifier", *(["pre_classifier"] if "Distil" in cls else [])]


def live_over(place: Path, cls: str, codec: str) -> Any:
    """peft's live adapter over the base that is quantised but for its head."""
    base = load(place / "base", cls, quantization_config=bnb_config(codec, llm_int8_skip_modules=head_of(cls)))
    return PeftModel.from_pretrained(base, place / "adapter").eval()


def rounding(model: Any) -> float:
    """How far storing the rotated weights may move the outputs of these models."""
    return 0.05 if any("8bit" in type(m).__name__ for m in model.modules()) else 0.5


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_plain_base_is_quantised_but_for_its_head(tmp_path: Path, cls: str, codec: Any) -> None:
    classifier(cls, tmp_path)
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format=codec)
    folded = load(tmp_path / "out", cls)
    live = live_over(tmp_path, cls, codec)
    assert relative(outputs(folded), outputs(live)) < rounding(folded)
    for name in head_of(cls):
        module = folded.get_submodule(name)
        for path, child in module.named_modules():
            if isinstance(child, nn.Linear):
                assert type(child) is nn.Linear, path
    report = oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    assert report.ok, report.wrong
    assert not [f for f in oftsurgery.doctor(tmp_path / "out") if f.severity == "error"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("cls", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_a_quantised_base_gives_its_head_up(tmp_path: Path, cls: str, codec: Any) -> None:
    """The base's own head is in 4 or 8 bits, as transformers quantises it by itself: in memory and on disk."""
    classifier(cls, tmp_path)
    quantised = load(tmp_path / "base", cls, quantization_config=bnb_config(codec))
    head = [name for name, m in quantised.named_modules() if name.startswith("classifier") and isinstance(m, nn.Linear)]
    assert all(type(quantised.get_submodule(name)) is not nn.Linear for name in head)
    oftsurgery.export_safetensors(quantised, tmp_path / "quantised")
    live = outputs(live_over(tmp_path, cls, codec))
    record = quiet_fold(tmp_path / "quantised", tmp_path / "adapter", tmp_path / "disk")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        memory = oftsurgery.fold(quantised, tmp_path / "adapter", rounding="nearest")
    assert memory.oftsurgery.saved == record.saved
    oftsurgery.export_safetensors(memory, tmp_path / "memory")
    assert differing(tensors(tmp_path / "disk"), tensors(tmp_path / "memory")) == []
    skips = [
        json.loads((tmp_path / where / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
        for where in ("disk", "memory")
    ]
    assert skips == [head, head]
    for model in (memory, load(tmp_path / "disk", cls)):
        assert relative(outputs(unpacked(model)), live) < rounding(model)
        assert all(type(model.get_submodule(name)) is nn.Linear for name in head)
    report = oftsurgery.verify_checkpoint(tmp_path / "disk", tmp_path / "quantised", tmp_path / "adapter")
    assert report.ok, report.wrong
    # and back: in memory, on disk
    before = load(tmp_path / "quantised", cls)
    restored = oftsurgery.unfold(memory, base=before)
    assert torch.equal(outputs(unpacked(restored)), outputs(unpacked(before)))
    assert all(type(restored.get_submodule(name)) is not nn.Linear for name in head)
    oftsurgery.unfold_checkpoint(tmp_path / "disk", tmp_path / "restored", base=tmp_path / "quantised")
    assert differing(tensors(tmp_path / "restored"), tensors(tmp_path / "quantised")) == []
    assert torch.equal(outputs(load(tmp_path / "restored", cls)), outputs(before))


@pytest.mark.parametrize("codec", ["nf4", "int8"])
@pytest.mark.parametrize("cls", ["BertForSequenceClassification", "DistilBertForSequenceClassification"])
def test_a_head_that_the_checkpoint_lacks_becomes_plain(tmp_path: Path, cls: str, codec: Any) -> None:
    """transformers puts layers of bitsandbytes in the head's places and does not quantise them: no forward runs."""
    classifier(cls, tmp_path)
    load(tmp_path / "base", cls).base_model.save_pretrained(tmp_path / "headless")
    config = bnb_config(codec)
    model = getattr(transformers, cls).from_pretrained(tmp_path / "headless", num_labels=3, quantization_config=config)
    assert type(model.classifier) is not nn.Linear
    assert model.classifier.weight.is_floating_point()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        memory = oftsurgery.fold(model, tmp_path / "adapter", rounding="nearest")
    assert all(type(memory.get_submodule(name)) is nn.Linear for name in head_of(cls))
    if cls.startswith("Bert"):  # its adapter lacks the pooler, which `headless` has
        assert relative(outputs(unpacked(memory)), outputs(live_over(tmp_path, cls, codec))) < rounding(memory)
    oftsurgery.export_safetensors(memory, tmp_path / "out")
    assert torch.equal(outputs(unpacked(load(tmp_path / "out", cls))), outputs(unpacked(memory)))
    restored = oftsurgery.unfold(memory, base=model)
    assert torch.equal(restored.classifier.weight, model.classifier.weight)


def test_what_has_no_way_back_is_refused(tmp_path: Path) -> None:
    cls = "BertForSequenceClassification"
    classifier(cls, tmp_path)
    model = load(tmp_path / "base", cls, quantization_config=bnb_config("nf4"))
    oftsurgery.export_safetensors(model, tmp_path / "quantised")
    for fold in (
        lambda: quiet_fold(tmp_path / "quantised", tmp_path / "adapter", tmp_path / "out", undo=tmp_path / "undo"),
        lambda: oftsurgery.fold(model, tmp_path / "adapter", undo=tmp_path / "undo"),
    ):
        with pytest.raises(StateError, match=r"no form for a weight that becomes plain.*keep the base"):
            fold()
    assert not (tmp_path / "undo").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        folded = oftsurgery.fold(model, tmp_path / "adapter")
    with pytest.raises(StateError, match=r"a folder has no layer to put back.*base=model"):
        oftsurgery.unfold(folded, base=tmp_path / "quantised")


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_conv1d_takes_no_values_once_quantised(tmp_path: Path, codec: Any) -> None:
    """GPT-2's own class holds its weights (in, out), bitsandbytes' layer (out, in)."""
    build("gpt2").save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", "GPT2LMHeadModel", quantization_config=bnb_config(codec))
    oftsurgery.export_safetensors(model, tmp_path / "quantised")
    rotation = oftsurgery.Rotation(torch.randn(4, 120) / 30)
    saved = {"transformer.h.0.attn.c_proj.weight": torch.randn(64, 64)}
    adapter = oftsurgery.OFTAdapter({"transformer.h.0.attn.c_attn": rotation}, saved)
    for fold in (
        lambda: quiet_fold(tmp_path / "quantised", adapter, tmp_path / "out"),
        lambda: oftsurgery.fold(model, adapter),
    ):
        with pytest.raises(FormatError, match=r"own values for a weight that is stored quantised.*--skip-modules"):
            fold()


def test_an_error_leaves_the_model_as_it_was(tmp_path: Path, snapshot: Any) -> None:
    cls = "BertForSequenceClassification"
    classifier(cls, tmp_path)
    model = load(tmp_path / "base", cls, quantization_config=bnb_config("nf4"))
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoundingWarning)
        with pytest.raises(RoundingWarning):
            oftsurgery.fold(model, tmp_path / "adapter", inplace=True, rounding="nearest")
    assert snapshot(model) == before


# --- what transformers quantises --------------------------------------------------------------------------------------


def test_a_list_that_quantises_exactly_what_is_written() -> None:
    config = json.loads(build("bert").config.to_json_string(use_diff=False))
    config["architectures"] = ["BertForSequenceClassification"]
    config["quantization_config"] = bnb_config("int8").to_dict()
    model = build("bert")
    linears = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]

    def skip(*plain: str, given: Any = None) -> Any:
        written: dict[str, Any] = {n: (t.dtype, tuple(t.shape)) for n, t in model.state_dict().items()}
        written |= {f"{p}.SCB": (torch.float32, None) for p in linears if p not in plain}
        config["quantization_config"]["llm_int8_skip_modules"] = given
        return loadable_config(config, written)["quantization_config"]["llm_int8_skip_modules"]

    assert skip() is None
    assert skip("classifier") == ["classifier"]
    assert skip("classifier", given=["classifier", "lm_head"]) == ["classifier", "lm_head"]
    assert skip(given=["classifier"]) is None
    dense = [p for p in linears if p.endswith("intermediate.dense")]
    assert skip(*dense, given=["intermediate.dense"]) == ["intermediate.dense"]
    assert skip(dense[0]) == dense[:1]
    with pytest.raises(StateError, match="must be a list of names, but is"):
        skip("classifier", given="classifier")


GEMMA = {
    "vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0, 0.0],
    "laurel_rank": 16,
}  # fmt: skip
UNTIED: dict[str, tuple[dict[str, Any], str, str]] = {
    "Gemma3nForCausalLM": (GEMMA, "q_proj", "lm_head"),
    "MobileBertForMaskedLM": (
        SMALL
        | {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 1},
        "query",
        "decoder",
    ),
}


@pytest.mark.parametrize("codec", ["nf4", "int8"])
@pytest.mark.parametrize("cls", UNTIED)
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")  # peft's own, of tied layers in an adapter
def test_an_untied_model_is_quantised_as_it_was_when_tied(tmp_path: Path, cls: str, codec: Any) -> None:
    """transformers leaves the module of the last parameter alone, and finds it before it ties the head."""
    config, target, head = UNTIED[cls]
    model_class = getattr(transformers, cls)
    torch.manual_seed(0)
    model_class(model_class.config_class(**config)).save_pretrained(tmp_path / "base")
    live = adapted(load(tmp_path / "base", cls), [target], modules_to_save=[head])
    live.save_pretrained(tmp_path / "adapter")
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format=codec)
    base = load(tmp_path / "base", cls, quantization_config=bnb_config(codec))
    folded = load(tmp_path / "out", cls)
    kinds = {path: type(m) for path, m in folded.named_modules() if isinstance(m, nn.Linear)}
    assert kinds == {path: type(m) for path, m in base.named_modules() if isinstance(m, nn.Linear)}
    live = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    if cls == "MobileBertForMaskedLM" and codec == "nf4":
        with pytest.raises(RuntimeError, match="Sizes of tensors"):  # it computes with a weight that is quantised
            outputs(live)
    else:
        assert relative(outputs(folded), outputs(live)) < rounding(folded)
    report = oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    assert report.ok, report.wrong


def test_experts_that_transformers_replaces_are_refused(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=2, moe_layers=[1],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path / "base")
    adapted(load(tmp_path / "base", "Llama4ForCausalLM"), ["q_proj"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(FormatError, match=r"would not find the weight that is written.*experts.*--format bf16"):
        quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format="nf4")
    assert not (tmp_path / "out").exists()
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format="bf16", quantize="nf4")
    folded = load(tmp_path / "out", "Llama4ForCausalLM")
    with torch.no_grad():
        assert bool(torch.isfinite(folded(TOKENS).logits).all())


def test_the_rules_are_those_of_transformers_own_quantizer(tmp_path: Path) -> None:
    """What :mod:`~oftsurgery.stores.quantised_loading` leans on: the quantizer itself, on the meta device."""
    from transformers.quantizers.auto import AutoHfQuantizer

    from oftsurgery.stores.naming import names_of
    from oftsurgery.stores.skeleton import skeleton

    for cls, (changes, _) in CLASSES.items():
        config = json.loads(getattr(transformers, cls).config_class(**changes).to_json_string(use_diff=False))
        config["architectures"] = [cls]
        for skip in (None, [], ["classifier", "score"], ["^classifier$"], ["layer.0"]):
            model: Any = skeleton(config, torch.float32, 100)
            shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
            names = names_of(model, shapes)
            assert names.quantised_with is not None
            ours = names.quantised_with(skip)
            quantizer = AutoHfQuantizer.from_config(bnb_config("nf4", llm_int8_skip_modules=skip), pre_quantized=True)
            with torch.device("meta"):
                quantizer.preprocess_model(model=model, device_map={"": "cpu"}, dtype=torch.float32)
            theirs = {f"{p}.weight" for p, m in model.named_modules() if type(m).__module__.startswith("bitsandbytes")}
            assert ours == theirs, (cls, skip)
