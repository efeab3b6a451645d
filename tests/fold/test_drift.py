"""Where a fold in memory, a fold on disk and peft's live model once came apart: tied weights, checkpoints whose tensors
are not the model's own, layers that are read and never called, and errors on the way out.

The reference is peft's live model over a base that transformers loaded.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    TOKENS,
    bnb_config,
    differing,
    file_bytes,
    load,
    quiet_transformers,
    scaled_up,
    tensors,
)
from independent import relative
from models import SIZES
from peft import OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from warned import noted, quietly

import oftsurgery
from oftsurgery.stores.idle import is_idle

GROUPED = SIZES | {"num_key_value_heads": 2}
BART: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 64,
    "max_position_embeddings": 64,
    **{
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 128))
    },
}
T5: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}

#: class → (its config, what its forward takes beyond token ids)
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "LlamaForCausalLM": (GROUPED, "tokens"),
    "BertForMaskedLM": (SIZES, "tokens"),
    "BartForConditionalGeneration": (BART, "tokens"),
    "M2M100ForConditionalGeneration": (BART, "tokens"),
    "T5ForConditionalGeneration": (T5, "tokens"),
    "UMT5ForConditionalGeneration": (T5, "tokens"),
    "NomicBertForMaskedLM": (SIZES, "tokens"),
    "GteForMaskedLM": (SIZES, "tokens"),
    "HrmTextForCausalLM": (GROUPED, "tokens"),
    "Molmo2TextModel": (GROUPED | {"head_dim": 16, "additional_vocab_size": 8}, "tokens"),
    "Qwen3MoeForCausalLM": (
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "moe_intermediate_size": 64},
        "tokens",
    ),
    "Tipsv2TextModel": (SIZES, "tokens"),
    "Dinov2Model": (VISION | {"use_swiglu_ffn": True}, "pixels"),
    "Step3p7VisionModel": (VISION | {"patch_size": 8, "mlp_ratio": 2.0, "max_position_embeddings": 16}, "pixels"),
    "SiglipVisionModel": (VISION, "pixels"),
    "MobileBertForMaskedLM": (
        SIZES
        | {"embedding_size": 32, "intra_bottleneck_size": 64, "true_hidden_size": 64, "num_feedforward_networks": 1},
        "tokens",
    ),
    "MambaForCausalLM": (
        {"vocab_size": 96, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 1, "time_step_rank": 16},
        "tokens",
    ),
    "FalconMambaForCausalLM": (
        {"vocab_size": 96, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 1, "time_step_rank": 16},
        "tokens",
    ),
    "JambaForCausalLM": (
        GROUPED
        | {
            "num_hidden_layers": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "mamba_dt_rank": 16,
            "mamba_d_state": 8,
        },
        "tokens",
    ),
    "LayoutLMv3Model": (
        SIZES
        | {
            "coordinate_size": 8,
            "shape_size": 16,
            "visual_embed": False,
            "has_relative_attention_bias": True,
            "has_spatial_attention_bias": True,
            "rel_pos_bins": 32,
            "rel_2d_pos_bins": 64,
        },
        "boxes",
    ),
    "WavLMModel": (
        SIZES
        | {
            "conv_dim": (32, 32),
            "conv_kernel": (10, 3),
            "conv_stride": (5, 2),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        "waves",
    ),
}


def outputs(model: Any) -> Tensor:
    """float64 logits, or last hidden states (pooled ones beside them where there are any)."""
    config = getattr(model, "config", None) or model.base_model.model.config
    takes = MODELS[type(model.base_model.model if isinstance(model, PeftModel) else model).__name__][1]
    generator = torch.Generator().manual_seed(9)
    if takes == "pixels":
        given = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    elif takes == "waves":
        given = {"input_values": torch.randn(2, 400, generator=generator)}
    else:
        given = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
        if getattr(config, "is_encoder_decoder", False):
            given["decoder_input_ids"] = TOKENS
        if takes == "boxes":
            corners = torch.randint(500, (*TOKENS.shape, 2), generator=generator)
            given["bbox"] = torch.cat([corners, corners + 300], dim=-1)
    with torch.no_grad():
        out = model(**given)
    found = [getattr(out, name, None) for name in ("logits", "last_hidden_state", "pooler_output")]
    return torch.cat([t.double().reshape(-1) for t in found if t is not None])


def settings(storage: str) -> dict[str, Any]:
    """Of ``from_pretrained``."""
    return {} if storage == "fp32" else {"quantization_config": bnb_config(storage, double=storage == "nf4")}


def fold_settings(storage: str) -> dict[str, Any]:
    """Of ``fold_checkpoint``: the same for a plain source."""
    return {"trained_on": "plain"} if storage == "fp32" else {"format": storage, "double_quant": storage == "nf4"}


Base = Callable[..., Path]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """``base(cls, **changes)``: the folder of a tiny model, made once."""
    root = tmp_path_factory.mktemp("drift")

    @cache
    def make(cls: str, **changes: Any) -> Path:
        torch.manual_seed(0)
        model_class = getattr(transformers, cls)
        model = scaled_up(model_class(model_class.config_class(**MODELS[cls][0] | changes))).eval()
        folder = root / " ".join([cls, *(f"{k}={v}" for k, v in changes.items())])
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


def trained(model: Any, targets: Any, *, seed: int = 0, **config: Any) -> Any:
    """peft's live model, all that trains in it changed."""
    with warnings.catch_warnings():
        for message in ("Model has `tie_word_embeddings=True`", "Setting `save_embedding_layers`"):
            warnings.filterwarnings("ignore", message, UserWarning)
        live = get_peft_model(
            model, OFTConfig(oft_block_size=16, use_cayley_neumann=True, target_modules=targets, **config)
        ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.04 if "oft_" in name else 0.05))
    return live


def saved(live: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        live.save_pretrained(folder)
    return folder


def state(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict())


def names(caught: list[warnings.WarningMessage]) -> list[str]:
    return sorted({w.category.__name__ for w in caught})


# --- tied weights -----------------------------------------------------------------------------------------------------

TIED: dict[str, tuple[str, list[str], list[str]]] = {
    "llama, a head": ("LlamaForCausalLM", ["q_proj"], ["lm_head"]),
    "llama, embeddings": ("LlamaForCausalLM", ["q_proj"], ["embed_tokens"]),
    "llama, both": ("LlamaForCausalLM", ["q_proj"], ["lm_head", "embed_tokens"]),
    "bert, embeddings": ("BertForMaskedLM", ["query"], ["word_embeddings"]),
    # the adapter brings the embeddings as they were too: peft saves what it rotates of them
    "llama, a head, embeddings rotated": ("LlamaForCausalLM", ["q_proj", "embed_tokens"], ["lm_head"]),
    "llama, embeddings, a head rotated": ("LlamaForCausalLM", ["q_proj", "lm_head"], ["embed_tokens"]),
}


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("case", TIED)
def test_one_of_two_tied_weights_trained(base: Base, tmp_path: Path, case: str, storage: str) -> None:
    """It alone is another: in memory, on disk, live."""
    cls, targets, modules = TIED[case]
    source = base(cls, tie_word_embeddings=True)
    live = trained(load(source, cls, **settings(storage)), targets, modules_to_save=modules)
    adapter, wanted = saved(live, tmp_path / "adapter"), outputs(live)
    # nf4: rounding alone takes less
    limit = 1e-4 if storage == "fp32" else 0.15

    folded = quietly(oftsurgery.fold, load(source, cls, **settings(storage)), adapter)
    assert relative(outputs(folded), wanted) < limit
    quietly(oftsurgery.fold_checkpoint, source, adapter, tmp_path / "disk", **fold_settings(storage))
    model = load(tmp_path / "disk", cls)
    assert relative(outputs(model), wanted) < limit
    assert differing(state(model), state(folded)) == []


#: (class, targets, modules_to_save)
UNTIED: dict[str, tuple[str, list[str], list[str] | None]] = {
    **{
        f"{cls.partition('For')[0]}, {what}": (cls, ["q_proj", *more], modules)
        for cls in ("BartForConditionalGeneration", "M2M100ForConditionalGeneration")
        for what, more, modules in (
            ("head rotated", ["lm_head"], None),
            ("head trained", [], ["lm_head"]),
            ("shared rotated", ["shared"], None),
            ("embeddings rotated", ["embed_tokens"], None),
            ("embeddings trained", [], ["embed_tokens"]),
        )
    },
    **{
        f"{cls.partition('For')[0]}, {what}": (cls, ["q", *more], modules)
        for cls in ("T5ForConditionalGeneration", "UMT5ForConditionalGeneration")
        for what, more, modules in (("head rotated", ["lm_head"], None), ("head trained", [], ["lm_head"]))
    },
    "Bert, head rotated": ("BertForMaskedLM", ["query", "decoder"], None),
    "Bert, embeddings rotated": ("BertForMaskedLM", ["query", "word_embeddings"], None),
}


@pytest.mark.parametrize("case", UNTIED)
def test_one_of_more_than_two_tied_weights_changed(base: Base, tmp_path: Path, case: str) -> None:
    """The others stay as they are, and are in what is written: folded on disk, exported, and saved by transformers.

    The forward stays the same too: T5's and UMT5's scales its decoder's outputs by what ``tie_word_embeddings`` says.
    """
    cls, targets, modules = UNTIED[case]
    source = base(cls)
    live = trained(load(source, cls), targets, modules_to_save=modules)
    adapter, wanted = saved(live, tmp_path / "adapter"), outputs(live)

    with noted() as caught:
        folded = oftsurgery.fold(load(source, cls), adapter)
    assert relative(outputs(folded), wanted) < 1e-4
    with noted() as caught_on_disk:
        oftsurgery.fold_checkpoint(source, adapter, tmp_path / "disk", trained_on="plain")
    oftsurgery.export_safetensors(folded, tmp_path / "exported")
    folded.save_pretrained(tmp_path / "saved")
    for written in ("disk", "exported", "saved"):
        model = load(tmp_path / written, cls)
        assert relative(outputs(model), wanted) < 1e-4, written
        assert differing(state(model), state(folded)) == [], written
    for warned in (caught, caught_on_disk):
        if "shared" in targets:  # which nothing calls
            assert any("shared" in str(w.message) for w in warned)
        else:
            assert names(warned) == ["UntieWarning"]


@pytest.mark.parametrize("modules", [None, ["lm_head"]], ids=["rotated", "trained"])
def test_a_head_of_a_t5_from_before_transformers_5(base: Base, tmp_path: Path, modules: list[str] | None) -> None:
    """Its config has no ``scale_decoder_outputs``, which transformers 5 then takes from ``tie_word_embeddings``."""
    cls = "T5ForConditionalGeneration"
    source = shutil.copytree(base(cls), tmp_path / "base")
    config = json.loads((source / "config.json").read_text())
    for name in ("scale_decoder_outputs", "tie_word_embeddings"):
        config.pop(name, None)
    (source / "config.json").write_text(json.dumps(config))
    live = trained(load(source, cls), ["q"] if modules else ["q", "lm_head"], modules_to_save=modules)
    adapter, wanted = saved(live, tmp_path / "adapter"), outputs(live)
    quietly(oftsurgery.fold_checkpoint, source, adapter, tmp_path / "disk", trained_on="plain")
    assert relative(outputs(load(tmp_path / "disk", cls)), wanted) < 1e-4


@pytest.mark.parametrize("targets", ["lm_head", "embed_tokens"])
def test_a_fold_on_disk_tells_what_it_unties(base: Base, tmp_path: Path, targets: str) -> None:
    """As one in memory does, in the record and by a warning."""
    source = base("LlamaForCausalLM", tie_word_embeddings=True)
    adapter = saved(trained(load(source, "LlamaForCausalLM"), ["q_proj", targets]), tmp_path / "adapter")
    with noted() as caught:
        record = oftsurgery.fold_checkpoint(source, adapter, tmp_path / "disk", trained_on="plain")
    with noted() as caught_in_memory:
        folded = oftsurgery.fold(load(source, "LlamaForCausalLM"), adapter)
    untied = {path.rpartition(".")[2] for path, module in record.modules.items() if module.untied}
    assert untied == {targets}
    assert dict(record.modules) == dict(folded.oftsurgery.modules)
    assert names(caught_in_memory) == ["UntieWarning"]
    assert [str(w.message) for w in caught] == [str(w.message) for w in caught_in_memory]


def test_a_tied_bias_trained(base: Base, tmp_path: Path) -> None:
    """BERT's decoder and its head share their bias too: it is in the adapter under both names, in the file under one."""
    source = base("BertForMaskedLM")
    live = trained(load(source, "BertForMaskedLM"), ["query"], bias="all")
    adapter = saved(live, tmp_path / "adapter")
    quietly(
        oftsurgery.fold_checkpoint, source, adapter, tmp_path / "disk", undo=tmp_path / "fold.undo", trained_on="plain"
    )
    model = load(tmp_path / "disk", "BertForMaskedLM")
    assert relative(outputs(model), outputs(live)) < 1e-4
    assert torch.equal(model.cls.predictions.bias, live.base_model.model.cls.predictions.bias)
    for way, value in (("base", source), ("undo", tmp_path / "fold.undo")):
        quietly(oftsurgery.unfold_checkpoint, tmp_path / "disk", tmp_path / way, **{way: value})
        assert differing(tensors(tmp_path / way), tensors(source)) == [], way


def test_a_tied_bias_trained_comes_out_of_memory(base: Base, tmp_path: Path) -> None:
    source = base("BertForMaskedLM")
    adapter = saved(trained(load(source, "BertForMaskedLM"), ["query"], bias="all"), tmp_path / "adapter")
    folded = quietly(oftsurgery.fold, load(source, "BertForMaskedLM"), adapter, undo=tmp_path / "fold.undo")
    before = state(load(source, "BertForMaskedLM"))
    assert differing(state(oftsurgery.unfold(folded, undo=tmp_path / "fold.undo")), before) == []
    assert differing(state(oftsurgery.unfold(folded, base=load(source, "BertForMaskedLM"))), before) == []


def test_a_head_with_a_tied_bias_trained(base: Base, tmp_path: Path) -> None:
    """The decoder's own bias then, which the file does not have, beside the head's, which stays."""
    source = base("BertForMaskedLM")
    live = trained(load(source, "BertForMaskedLM"), ["query"], modules_to_save=["decoder"])
    adapter = saved(live, tmp_path / "adapter")
    quietly(oftsurgery.fold_checkpoint, source, adapter, tmp_path / "disk", trained_on="plain")
    model = load(tmp_path / "disk", "BertForMaskedLM")
    assert relative(outputs(model), outputs(live)) < 1e-4
    head, was = model.cls.predictions, load(source, "BertForMaskedLM").cls.predictions
    own = live.base_model.model.cls.predictions.decoder.modules_to_save["default"]
    assert torch.equal(head.decoder.weight, own.weight)
    assert torch.equal(head.decoder.bias, own.bias)
    assert torch.equal(head.bias, was.bias)


def test_records_of_earlier_commits_name_modules_as_the_adapter_does(base: Base, tmp_path: Path) -> None:
    source = base("LlamaForCausalLM", tie_word_embeddings=True)
    adapter = saved(trained(load(source, "LlamaForCausalLM").model, ["q_proj"]), tmp_path / "adapter")
    quietly(oftsurgery.fold_checkpoint, source, adapter, tmp_path / "disk", trained_on="plain")
    record = json.loads((tmp_path / "disk" / "oftsurgery.json").read_text())
    record["modules"] = {path.removeprefix("model."): module for path, module in record["modules"].items()}
    assert not any(path.startswith("model.") for path in record["modules"])
    (tmp_path / "disk" / "oftsurgery.json").write_text(json.dumps(record))
    assert oftsurgery.verify_checkpoint(tmp_path / "disk", source, adapter).ok
    oftsurgery.unfold_checkpoint(tmp_path / "disk", tmp_path / "back", base=source)
    assert differing(tensors(tmp_path / "back"), tensors(source)) == []


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]], ids=lambda t: t[1])
def test_a_fold_that_unties_is_resumed_to_the_same_bytes(base: Base, tmp_path: Path, targets: list[str]) -> None:
    """Interrupted between shards: the untied tensor is in the last, the one that it was tied to in the first."""
    source = base("LlamaForCausalLM", tie_word_embeddings=True)
    adapter = saved(trained(load(source, "LlamaForCausalLM"), targets, modules_to_save=None), tmp_path / "adapter")

    def fold(name: str, **options: Any) -> None:
        undo = tmp_path / f"{name}.undo"
        options |= {"max_shard_size": "50KB", "undo": undo, "trained_on": "plain"}
        quietly(oftsurgery.fold_checkpoint, source, adapter, tmp_path / name, **options)

    def interrupt(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    fold("whole")
    with pytest.raises(KeyboardInterrupt):
        fold("killed", progress=interrupt)
    assert not (tmp_path / "killed").exists()
    assert list((tmp_path / ".killed.oftsurgery").glob("*.safetensors"))
    fold("killed", resume=True)
    assert file_bytes(tmp_path / "killed") == file_bytes(tmp_path / "whole")
    assert (tmp_path / "killed.undo").read_bytes() == (tmp_path / "whole.undo").read_bytes()


# --- unfolding --------------------------------------------------------------------------------------------------------


def test_a_base_whose_replaced_tensor_is_another_is_refused(base: Base, tmp_path: Path) -> None:
    source = base("BertForMaskedLM")
    adapter = saved(trained(load(source, "BertForMaskedLM"), ["query"], bias="oft_only"), tmp_path / "adapter")
    quietly(oftsurgery.fold_checkpoint, source, adapter, tmp_path / "disk", trained_on="plain")
    other = load(source, "BertForMaskedLM")
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.bias.add_(1)
    other.save_pretrained(tmp_path / "other")
    left = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(oftsurgery.IntegrityError) as caught:
        oftsurgery.unfold_checkpoint(tmp_path / "disk", tmp_path / "back", base=tmp_path / "other")
    assert "bert.encoder.layer.0.attention.self.query.bias" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    folded = quietly(oftsurgery.fold, load(source, "BertForMaskedLM"), adapter)
    with pytest.raises(oftsurgery.IntegrityError):
        oftsurgery.unfold(folded, base=other)


def brought_and_rotated(source: Path, folder: Path) -> tuple[list[Path], Any]:
    """An adapter with a head of its own and a rotation of it, as peft writes one whose embeddings were trained or
    resized under the rotation; and the live model that peft makes of it.
    """
    live = trained(load(source, "LlamaForCausalLM"), ["q_proj", "lm_head"])
    adapter = saved(live, folder / "adapter")
    found = load_file(adapter / "adapter_model.safetensors")
    found["base_model.model.lm_head.base_layer.weight"] += 0.05 * torch.randn(96, 64)
    save_file(found, adapter / "adapter_model.safetensors", {"format": "pt"})
    again = PeftModel.from_pretrained(load(source, "LlamaForCausalLM"), adapter).eval()
    assert relative(outputs(again), outputs(live)) > 0.1
    return [adapter], again


def brought_then_rotated(source: Path, folder: Path) -> tuple[list[Path], Any]:
    """One adapter brings a head, a second rotates it: live, the second over a base that has that head."""
    first = trained(load(source, "LlamaForCausalLM"), ["q_proj"], modules_to_save=["lm_head"])
    saved(first, folder / "first")
    saved(trained(load(source, "LlamaForCausalLM"), ["lm_head"], seed=1), folder / "with the base's head")
    # peft saves a head that it rotates, the base's here: this one is to rotate what is there
    rotations = load_file(folder / "with the base's head" / "adapter_model.safetensors")
    (folder / "second").mkdir()
    save_file({k: v for k, v in rotations.items() if "oft_" in k}, folder / "second" / "adapter_model.safetensors")
    config = (folder / "with the base's head" / "adapter_config.json").read_text()
    (folder / "second" / "adapter_config.json").write_text(config)
    merged = PeftModel.from_pretrained(load(source, "LlamaForCausalLM"), folder / "first").merge_and_unload()
    live = PeftModel.from_pretrained(merged, folder / "second").eval()
    assert relative(outputs(live), outputs(first)) > 0.1
    return [folder / "first", folder / "second"], live


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("make", [brought_and_rotated, brought_then_rotated])
def test_a_weight_that_was_brought_and_rotated_comes_out_exactly(
    base: Base, tmp_path: Path, make: Callable[[Path, Path], tuple[list[Path], Any]], storage: str
) -> None:
    source = base("LlamaForCausalLM")
    adapters, live = make(source, tmp_path)
    before, wanted = load(source, "LlamaForCausalLM", **settings(storage)), outputs(live)
    folded = quietly(oftsurgery.fold, load(source, "LlamaForCausalLM", **settings(storage)), adapters)
    undo = tmp_path / "fold.undo"
    quietly(oftsurgery.fold_checkpoint, source, adapters, tmp_path / "disk", undo=undo, **fold_settings(storage))
    model = load(tmp_path / "disk", "LlamaForCausalLM")
    assert differing(state(model), state(folded)) == []
    if storage == "fp32":
        assert relative(outputs(model), wanted) < 1e-4
    assert differing(state(oftsurgery.unfold(folded, base=before)), state(before)) == []
    for way, value in (("undo", undo), ("base", source)):
        quietly(oftsurgery.unfold_checkpoint, tmp_path / "disk", tmp_path / way, **{way: value})
        assert differing(state(load(tmp_path / way, "LlamaForCausalLM")), state(before)) == [], way


# --- warnings that are errors -----------------------------------------------------------------------------------------

#: (warning, tied, what is rotated besides, storage)
RAISED: dict[str, tuple[type[Warning], bool, str, str]] = {
    "rounding": (oftsurgery.RoundingWarning, False, "down_proj", "nf4"),
    "untying": (oftsurgery.UntieWarning, True, "lm_head", "fp32"),
}


@pytest.mark.parametrize("again", ["resume", "force"])
@pytest.mark.parametrize("case", RAISED)
def test_a_warning_that_is_an_error_leaves_nothing_on_disk(base: Base, tmp_path: Path, case: str, again: str) -> None:
    """And the fold can be done afterwards, as if it had not been tried."""
    category, tied, more, storage = RAISED[case]
    source = base("LlamaForCausalLM", tie_word_embeddings=tied)
    adapter = saved(trained(load(source, "LlamaForCausalLM"), ["q_proj", more]), tmp_path / "adapter")
    out, undo = tmp_path / "out", tmp_path / "fold.undo"
    with noted():
        warnings.simplefilter("error", category)
        with pytest.raises(category):
            oftsurgery.fold_checkpoint(source, adapter, out, undo=undo, **fold_settings(storage))
    assert not out.exists()
    assert not undo.exists()
    options: dict[str, Any] = {again: True}
    quietly(oftsurgery.fold_checkpoint, source, adapter, out, undo=undo, **options, **fold_settings(storage))
    quietly(oftsurgery.fold_checkpoint, source, adapter, tmp_path / "undisturbed", **fold_settings(storage))
    assert file_bytes(out) == file_bytes(tmp_path / "undisturbed")
    quietly(oftsurgery.unfold_checkpoint, out, tmp_path / "back", undo=undo)


@pytest.mark.parametrize("case", RAISED)
def test_a_warning_that_is_an_error_leaves_the_model_as_it_was(
    base: Base, tmp_path: Path, case: str, snapshot: Callable[[Any], dict[str, Any]]
) -> None:
    category, tied, more, storage = RAISED[case]
    source = base("LlamaForCausalLM", tie_word_embeddings=tied)
    adapter = saved(trained(load(source, "LlamaForCausalLM"), ["q_proj", more]), tmp_path / "adapter")
    model = load(source, "LlamaForCausalLM", **settings(storage))
    before, config, undo = snapshot(model), model.config.to_dict(), tmp_path / "fold.undo"
    with noted():
        warnings.simplefilter("error", category)
        with pytest.raises(category):
            oftsurgery.fold(model, adapter, inplace=True, undo=undo)
    assert snapshot(model) == before
    assert model.config.to_dict() == config
    assert not undo.exists()


def test_a_warning_that_is_an_error_leaves_what_was_there(base: Base, tmp_path: Path) -> None:
    """``force`` replaces a folder and an undo record at the end, or not at all."""
    source = base("LlamaForCausalLM")
    adapter = saved(trained(load(source, "LlamaForCausalLM"), ["q_proj"]), tmp_path / "adapter")
    out, undo = tmp_path / "out", tmp_path / "fold.undo"
    quietly(oftsurgery.fold_checkpoint, source, adapter, out, undo=undo, trained_on="plain")
    before = file_bytes(out) | {"undo": undo.read_bytes()}
    with noted():
        warnings.simplefilter("error", oftsurgery.RoundingWarning)
        with pytest.raises(oftsurgery.RoundingWarning):
            oftsurgery.fold_checkpoint(source, adapter, out, undo=undo, force=True, **fold_settings("nf4"))
    assert file_bytes(out) | {"undo": undo.read_bytes()} == before


# --- tensors of the file that are not the model's own -----------------------------------------------------------------

#: (class, targets, modules_to_save): what transformers does to the file's tensors as it loads them
CONVERTED: dict[str, tuple[str, Any, list[str] | None]] = {
    "NomicBert, a third of Wqkv": ("NomicBertForMaskedLM", ["q_proj"], None),
    "NomicBert, all linears": ("NomicBertForMaskedLM", "all-linear", None),
    "NomicBert, a third of Wqkv trained": ("NomicBertForMaskedLM", ["o_proj"], ["k_proj"]),
    # qkv with biases, up and gate in that order, a prefix
    "Gte": ("GteForMaskedLM", "all-linear", None),
    "Gte, the second half": ("GteForMaskedLM", ["gate_proj", "v_proj"], None),
    # in four
    "HrmText": ("HrmTextForCausalLM", "all-linear", None),
    # in unequal parts; and embeddings of two tensors, one below the other
    "Molmo2": ("Molmo2TextModel", "all-linear", None),
    "Molmo2, embeddings": ("Molmo2TextModel", ["k_proj", "embed_tokens"], None),
    # nn.MultiheadAttention's in_proj_weight, of no module
    "Tipsv2": ("Tipsv2TextModel", "all-linear", None),
    # biases in half too
    "Dinov2": ("Dinov2Model", "all-linear", None),
    # rows in another order
    "Step3p7": ("Step3p7VisionModel", "all-linear", None),
    # experts of the file, one tensor in the model: nothing that is rotated
    "Qwen3Moe": ("Qwen3MoeForCausalLM", ["q_proj", "o_proj"], None),
}


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("case", CONVERTED)
def test_tensors_that_transformers_converts(base: Base, tmp_path: Path, case: str, storage: str) -> None:
    cls, targets, modules = CONVERTED[case]
    source = base(cls)
    before = load(source, cls, **settings(storage))
    if modules and storage != "fp32":  # which peft does not train
        with pytest.raises(RuntimeError, match="only Tensors of floating point dtype can require gradients"):
            trained(before, targets, modules_to_save=modules)
        return
    live = trained(load(source, cls, **settings(storage)), targets, modules_to_save=modules)
    adapter, wanted = saved(live, tmp_path / "adapter"), outputs(live)
    moved = relative(outputs(load(source, cls, **settings(storage))), wanted)
    assert moved > 0.02
    quietly(
        oftsurgery.fold_checkpoint, source, adapter, tmp_path / "disk", undo=tmp_path / "u", **fold_settings(storage)
    )

    model = load(tmp_path / "disk", cls)
    # nf4: rounding takes 0.11 to 0.44 of what the adapter does
    assert relative(outputs(model), wanted) < (1e-4 if storage == "fp32" else 0.6 * moved)
    folded = quietly(oftsurgery.fold, load(source, cls, **settings(storage)), adapter)
    assert differing(state(load(tmp_path / "disk", cls)), state(folded)) == []
    touched = {
        path
        for path, m in live.base_model.model.named_modules()
        if hasattr(m, "oft_R") or hasattr(m, "modules_to_save")
    }
    assert touched
    untouched = {n for n in state(before) if not any(n.startswith(f"{path}.") for path in touched)}
    assert not {n for n in untouched if n in differing(state(load(tmp_path / "disk", cls)), state(before))}

    for way, value in (("base", source), ("undo", tmp_path / "u"), ("adapter", adapter)):
        quietly(oftsurgery.unfold_checkpoint, tmp_path / "disk", tmp_path / f"by {way}", **{way: value})
        back = load(tmp_path / f"by {way}", cls)
        if way != "adapter":
            assert differing(state(back), state(before)) == [], way
            if storage == "fp32":
                assert differing(tensors(tmp_path / f"by {way}"), tensors(source)) == [], way
        elif not modules:
            limit = 1e-5 if storage == "fp32" else 0.6 * moved
            assert relative(outputs(back), outputs(load(source, cls, **settings(storage)))) < limit


# --- weights that are read, of layers that are never called -------------------------------------------------------------

#: class → (targets that are called, targets that are not, by the end of their paths)
READ: dict[str, tuple[list[str], list[str]]] = {
    # given to functional.multi_head_attention_forward
    "WavLMModel": (["intermediate_dense"], ["q_proj", "k_proj", "v_proj", "out_proj"]),
    # weight @ time_step
    "MambaForCausalLM": (["in_proj"], ["dt_proj"]),
    # called where the model was loaded quantised, and there alone
    "FalconMambaForCausalLM": (["in_proj"], ["dt_proj"]),
    "JambaForCausalLM": (["in_proj", "q_proj"], ["dt_proj"]),
    # nn.MultiheadAttention's
    "SiglipVisionModel": (["fc1", "self_attn.out_proj"], ["head.attention.out_proj"]),
    # one matrix with the decoder's
    "MobileBertForMaskedLM": (["transform.dense"], ["predictions.decoder", "predictions.dense"]),
    # a table of biases
    "LayoutLMv3Model": (["query"], ["rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"]),
}


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("cls", READ)
def test_a_rotation_that_does_nothing_live_is_left_out_and_told(
    base: Base, tmp_path: Path, cls: str, where: str
) -> None:
    called, read = READ[cls]
    source = base(cls)
    live = trained(load(source, cls), [*called, *read])
    adapter, wanted = saved(live, tmp_path / "adapter"), outputs(live)
    rotated = [path for path, m in live.base_model.model.named_modules() if hasattr(m, "oft_R")]
    idle = [path for path in rotated if path.endswith(tuple(read))]
    assert len(idle) == len(read)
    assert len(rotated) > len(idle)
    with torch.no_grad():  # truly nothing
        for path in idle:
            live.base_model.model.get_submodule(path).oft_R["default"].weight.zero_()
    assert torch.equal(outputs(live), wanted)
    assert relative(outputs(load(source, cls)), wanted) > 0.02

    with noted() as caught:
        if where == "memory":
            folded = oftsurgery.fold(load(source, cls), adapter)
            record = folded.oftsurgery
        else:
            record = oftsurgery.fold_checkpoint(source, adapter, tmp_path / "disk", trained_on="plain")
            folded = load(tmp_path / "disk", cls)
    assert relative(outputs(folded), wanted) < 1e-4
    assert set(record.modules) == set(rotated) - set(idle)
    before, after = state(load(source, cls)), state(folded)
    for path in idle:
        assert torch.equal(after[f"{path}.weight"], before[f"{path}.weight"]), path
        assert any(path in str(w.message) for w in caught), path


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("cls", ["FalconMambaForCausalLM", "JambaForCausalLM"])
def test_a_layer_that_is_called_in_a_quantised_model_is_rotated_there(
    base: Base, tmp_path: Path, cls: str, where: str
) -> None:
    source = base(cls)
    live = trained(load(source, cls, **settings("int8")), ["in_proj", "dt_proj"])
    adapter, wanted = saved(live, tmp_path / "adapter"), outputs(live)
    if where == "memory":
        folded = quietly(oftsurgery.fold, load(source, cls, **settings("int8")), adapter)
        record = folded.oftsurgery
    else:
        record = quietly(oftsurgery.fold_checkpoint, source, adapter, tmp_path / "disk", format="int8")
        folded = load(tmp_path / "disk", cls)
    assert not record.idle
    assert {path.rpartition(".")[2] for path in record.modules} == {"in_proj", "dt_proj"}
    assert relative(outputs(folded), wanted) < 0.06
    assert relative(outputs(load(source, cls, **settings("int8"))), wanted) > 0.12


@pytest.mark.parametrize("cls", MODELS)
def test_no_layer_that_a_forward_calls_is_idle(base: Base, cls: str) -> None:
    """And what it does not call is idle, or nothing reads its weight either: T5's and BART's `shared`, heads without labels."""
    model = load(base(cls), cls)
    modules, called = dict(model.named_modules()), set()
    layers = {p: m for p, m in modules.items() if isinstance(m, nn.Linear | nn.Embedding)}
    for path, module in layers.items():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    before = outputs(model)
    idle = {path for path in layers if is_idle(modules, path, quantised=False)}
    assert not idle & called
    if cls in READ:
        assert idle
    for path in layers.keys() - called - idle:
        layers[path].weight = nn.Parameter(layers[path].weight.detach() + 1)
    assert relative(outputs(model), before) < 1e-6
