"""Names that wrappers of a model leave in keys: in adapters' files, and in those of a base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import load
from models import bert, distance, live, llama, logits
from peft import OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from warned import noted, quietly

import oftsurgery
from oftsurgery import AdapterError, CheckpointError, MatchError, SourceWarning
from oftsurgery.api.checkpoints import plan_fold
from oftsurgery.api.fold_settings import FoldSettings
from oftsurgery.calibrate.checkpoint_model import load_model
from oftsurgery.files.wrappers import plain_names, unwrapped, without_peft

TENSORS = "adapter_model.safetensors"

#: who leaves such names → what becomes of a key
WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda k: f"_orig_mod.{k}",
    "torch.compile of the model inside": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "torch.compile of each layer": lambda k: k.replace(".self_attn", "._orig_mod.self_attn").replace(".mlp", "._orig_mod.mlp"),
    "DDP": lambda k: f"module.{k}",
    "DDP in DataParallel": lambda k: f"module.module.{k}",
    "DDP of the model inside": lambda k: k.replace("base_model.model.", "base_model.model.module.", 1),
    "DDP of the layers": lambda k: k.replace(".layers.", ".module.layers."),
    "FSDP": lambda k: f"_fsdp_wrapped_module.{k}",
    "FSDP of each layer": lambda k: k.replace(".self_attn", "._fsdp_wrapped_module.self_attn").replace(".mlp", "._fsdp_wrapped_module.mlp"),
    "checkpointing": lambda k: k.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "peft in peft": lambda k: k.replace("base_model.model.", "base_model.model." * 3, 1),
    "a model's whole state": lambda k: k.replace(".oft_R.weight", ".oft_R.default.weight"),
    "a whole state of another adapter": lambda k: k.replace(".oft_R.weight", ".oft_R.sft-v2.weight"),
    "all of them": lambda k: "module._orig_mod.base_model.model._fsdp_wrapped_module.base_model.model._orig_mod."
    + k.removeprefix("base_model.model.")
    .replace(".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn")
    .replace(".oft_R.weight", ".oft_R.default.weight"),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BASE, ADAPTER, and what peft computes of the two."""
    folder = tmp_path_factory.mktemp("keys")
    llama().save_pretrained(folder / "BASE")
    model = live(llama())
    model.save_pretrained(folder / "ADAPTER")
    torch.save(logits(model), folder / "logits.pt")
    return folder


@pytest.fixture
def truth(place: Path) -> torch.Tensor:
    return torch.load(place / "logits.pt")


def renamed(source: Path, folder: Path, file: str, change: Callable[[str], str]) -> Path:
    """A copy of ``source`` whose ``file`` has other keys."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    found = load_file(folder / file)
    new = {change(key): tensor for key, tensor in found.items()}
    assert new.keys() != found.keys()
    save_file(new, folder / file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("who", WRAPPED)
def test_an_adapter_means_the_same_under_a_wrappers_names(
    who: str, place: Path, truth: torch.Tensor, tmp_path: Path
) -> None:
    adapter = renamed(place / "ADAPTER", tmp_path / "adapter", TENSORS, WRAPPED[who])
    assert distance(logits(oftsurgery.fold(llama(), adapter)), truth) < 1e-6
    oftsurgery.fold_checkpoint(place / "BASE", adapter, tmp_path / "out", trained_on="plain")
    assert distance(logits(load(tmp_path / "out", "LlamaForCausalLM")), truth) < 1e-6
    assert oftsurgery.verify_checkpoint(tmp_path / "out", place / "BASE", adapter).ok
    assert [f.code for f in oftsurgery.doctor(tmp_path / "out", base=place / "BASE", adapter=adapter)] == ["kept"]


def test_a_modules_own_values_in_a_whole_state(tmp_path: Path) -> None:
    """Of a classifier peft saves the head: in a model's state its name has the adapter's in it."""
    config = OFTConfig(task_type="SEQ_CLS", oft_block_size=16, target_modules=["query"])
    model = get_peft_model(bert(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.5)
    model.save_pretrained(tmp_path / "saved")
    state = {k: v.contiguous() for k, v in model.state_dict().items() if ".oft_R." in k or ".modules_to_save." in k}
    assert {k for k in state if "modules_to_save" in k} == {
        f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")
    }
    (tmp_path / "state").mkdir()
    save_file(state, tmp_path / "state" / TENSORS)
    (tmp_path / "state" / "adapter_config.json").write_bytes((tmp_path / "saved" / "adapter_config.json").read_bytes())
    one, other = (oftsurgery.load_adapter(tmp_path / name) for name in ("saved", "state"))
    assert one.fingerprint == other.fingerprint
    assert set(other.saved) == {"classifier.weight", "classifier.bias"}
    assert distance(logits(oftsurgery.fold(bert(), other)), logits(model)) < 1e-6


def test_keys_that_mean_one_thing_twice_are_refused(place: Path, tmp_path: Path) -> None:
    found = load_file(place / "ADAPTER" / TENSORS)
    first = sorted(found)[0]
    folder = renamed(place / "ADAPTER", tmp_path / "adapter", TENSORS, WRAPPED["DDP"])
    save_file(found | {f"module.{first}": found[first].clone()}, folder / TENSORS)
    assert len(oftsurgery.load_adapter(folder).modules) == 4  # the same values say nothing else
    save_file(found | {f"module.{first}": found[first] + 1}, folder / TENSORS)
    with pytest.raises(MatchError, match=r"two keys name one rotation .*Remedy: remove one of the keys"):
        oftsurgery.load_adapter(folder)
    two = {
        key.replace("oft_R.weight", f"oft_R.{name}.weight"): found[key].clone() for key in found for name in ("a", "b")
    }
    save_file(two, folder / TENSORS)
    with pytest.raises(
        AdapterError, match=r"the file holds 2 adapters: a, b .*Remedy: save each adapter into its own folder"
    ):
        oftsurgery.load_adapter(folder)


#: of a base: "DDP of the layers" has no plain meaning, for it is a name of the model's own
OF_BASES: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda k: f"_orig_mod.{k}",
    "DDP": lambda k: f"module.{k}",
    "FSDP of each layer": lambda k: k.replace(".layers.", ".layers._fsdp_wrapped_module."),
    "checkpointing of each layer": lambda k: k.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "peft, merged and not unloaded": lambda k: f"base_model.model.{k}",
    "all of them": lambda k: f"module._orig_mod.base_model.model.{k}".replace(".self_attn", "._orig_mod.self_attn"),
}


@pytest.mark.parametrize("who", OF_BASES)
def test_a_base_under_a_wrappers_names_is_written_under_its_own(
    who: str, place: Path, truth: torch.Tensor, tmp_path: Path
) -> None:
    base = renamed(place / "BASE", tmp_path / "base", "model.safetensors", OF_BASES[who])
    with pytest.warns(
        SourceWarning, match=r"hold segments of wrappers, .* is read as .*the output has the plain names"
    ):
        oftsurgery.fold_checkpoint(base, place / "ADAPTER", tmp_path / "out", trained_on="plain")
    assert distance(logits(load(tmp_path / "out", "LlamaForCausalLM")), truth) < 1e-6
    with noted():
        assert oftsurgery.verify_checkpoint(tmp_path / "out", base, place / "ADAPTER").ok
        oftsurgery.unfold_checkpoint(tmp_path / "out", tmp_path / "back", base=base)
        found = oftsurgery.doctor(base)
    assert [f.code for f in found] == ["wrapped-names"]
    before, back = (load_file(folder / "model.safetensors") for folder in (place / "BASE", tmp_path / "back"))
    assert before.keys() == back.keys()
    assert all(torch.equal(before[name], back[name]) for name in before)


def test_transformers_finds_none_of_a_wrappers_names_so_nothing_that_needs_it_goes_on(
    place: Path, tmp_path: Path
) -> None:
    base = renamed(place / "BASE", tmp_path / "base", "model.safetensors", OF_BASES["torch.compile"])
    with (
        pytest.raises(oftsurgery.CalibrationError, match="hold segments of wrappers, which transformers does not load"),
        noted(),
    ):
        load_model(plan_fold(base, place / "ADAPTER", FoldSettings(trained_on="plain")), {"": "cpu"})
    with pytest.raises(CheckpointError, match="hold segments of wrappers, so transformers finds none"), noted():
        oftsurgery.verify_checkpoint(base, place / "BASE", place / "ADAPTER")


def test_a_class_that_is_not_transformers_may_have_a_module_of_its_own(place: Path, tmp_path: Path) -> None:
    base = renamed(place / "BASE", tmp_path / "base", "model.safetensors", OF_BASES["DDP"])
    (base / "config.json").write_text(json.dumps({"architectures": ["Mine"]}))
    adapter = renamed(place / "ADAPTER", tmp_path / "adapter", TENSORS, WRAPPED["DDP of the model inside"])
    quietly(oftsurgery.fold_checkpoint, base, adapter, tmp_path / "out", trained_on="plain")
    assert all(name.startswith("module.") for name in load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a.module.b", "a.module.b"),
        ("a_orig_mod.b", "a_orig_mod.b"),
        ("_orig_mod", ""),
        ("a._orig_mod._orig_mod.b", "a.b"),
        ("_checkpoint_wrapped_module.x.weight", "x.weight"),
    ],
)
def test_segments(name: str, plain: str) -> None:
    assert unwrapped(name) == plain


def test_what_stands_first() -> None:
    assert without_peft("module.module.base_model.model.a.module.b") == ("a.module.b", True)
    assert without_peft("base_model.model.module.a") == ("module.a", True)
    assert without_peft("model.layers.0") == ("model.layers.0", False)
    assert plain_names(["module.a", "module.b"], whole=True) == {"module.a": "a", "module.b": "b"}
    assert plain_names(["module.a", "b"], whole=True) == {"module.a": "module.a", "b": "b"}
    assert plain_names(["module.a"], whole=False) == {"module.a": "module.a"}
    assert plain_names([], whole=True) == {}
