"""Adapters that lack modules which their own config targets: what peft makes live says which ones these are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert, distance, live, llama, logits
from peft import OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration
from warned import noted, quietly

import oftsurgery
from oftsurgery import AdapterError, SourceWarning
from oftsurgery.adapters.targets import missing_modules
from oftsurgery.cli import main as cli
from oftsurgery.files.checkpoint import open_checkpoint
from oftsurgery.stores.folder import FolderStore
from oftsurgery.stores.live_model import LiveStore

TENSORS = "adapter_model.safetensors"


def cut(folder: Path, keep: Callable[[str], bool]) -> None:
    """Leave the keys of an adapter's file that ``keep`` names."""
    found = load_file(folder / TENSORS)
    save_file({key: tensor for key, tensor in found.items() if keep(key)}, folder / TENSORS)


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def missing(store: Any, folder: Path) -> set[str]:
    adapter = oftsurgery.load_adapter(folder)
    found = store.locate(f"{path}.weight" for path in adapter.modules)
    mine = {path: found[f"{path}.weight"].removesuffix(".weight") for path in adapter.modules}
    return set(missing_modules(adapter, mine, store.adaptable))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """One stage's part: the first layer of two."""
    live(llama()).save_pretrained(tmp_path / "part")
    shutil.copytree(tmp_path / "part", tmp_path / "whole")
    cut(tmp_path / "part", lambda key: ".layers.0." in key)
    return tmp_path / "part"


LOST = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj")

#: what peft is told to target → fields that its saved config is given on top
RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a list": ({"target_modules": ["q_proj", "down_proj"]}, {}),
    "whole paths": ({"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]}, {}),
    "a pattern": ({"target_modules": r".*\.layers\.\d+\.(self_attn|mlp)\.(q_proj|up_proj)"}, {}),
    "a pattern with a look-ahead, as ms-swift's": ({"target_modules": r"^(model)(?=\.).*\.(q_proj|o_proj)$"}, {}),
    "all-linear, as peft saves it": ({"target_modules": "all-linear"}, {}),
    "all-linear, as it was asked for": ({"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
    "one layer": ({"target_modules": ["q_proj"], "layers_to_transform": 1}, {}),
    "layers by a name": ({"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}, {}),
    "layers by two names": ({"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}, {}),
    "but excluded ones": ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]}, {}),
    "but an excluded pattern": ({"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}, {}),
    "an embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "a head that is saved": ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("rule", RULES)
def test_what_the_config_targets_is_what_peft_makes_live(rule: str, base: Path, tmp_path: Path) -> None:
    settings, fields = RULES[rule]
    peft = live(llama(), **settings)
    peft.save_pretrained(tmp_path / "adapter")
    configure(tmp_path / "adapter", **fields)
    targets = set(peft.base_model.targeted_module_names)
    for store in (LiveStore(llama()), FolderStore(open_checkpoint(base))):
        assert missing(store, tmp_path / "adapter") == set()
    # each module alone in the file, the others are missing
    alone = sorted(targets)[len(targets) // 2]
    cut(tmp_path / "adapter", lambda key: f".{alone}." in key)
    saved = set(settings.get("modules_to_save", ()))
    for store in (LiveStore(llama()), FolderStore(open_checkpoint(base))):
        assert missing(store, tmp_path / "adapter") == (targets - {alone}) | saved


def test_a_part_is_refused_in_memory_and_on_disk(base: Path, part: Path, tmp_path: Path) -> None:
    text = (
        r"the adapter lacks 2 of the 4 modules that its own config targets \(model.layers.1.self_attn.q_proj, "
        r"model.layers.1.mlp.down_proj\).*Remedy: give the whole adapter, gathered from all ranks.*--partial"
    )
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half = quietly(oftsurgery.load_adapter(part).scaled, 0.5)
    for refused in (
        lambda: oftsurgery.fold(model, part, inplace=True),
        lambda: oftsurgery.wrap(model, part, inplace=True),
        lambda: oftsurgery.fold(model, half),
        lambda: oftsurgery.fold_checkpoint(base, part, tmp_path / "out", trained_on="plain"),
    ):
        with pytest.raises(AdapterError, match=text) as caught:
            refused()
        assert caught.value.module == LOST[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "out").exists()
    assert [f.code for f in oftsurgery.doctor(base, adapter=part)] == ["adapter-files"]


def test_who_insists_gets_what_peft_makes_of_the_part(base: Path, part: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft = PeftModel.from_pretrained(llama(), part).eval()
    with noted() as said:
        folded = oftsurgery.fold(llama(), part, partial=True)
        record = oftsurgery.fold_checkpoint(base, part, tmp_path / "out", partial=True, trained_on="plain")
    assert [w.category for w in said] == [SourceWarning, SourceWarning]
    assert "the adapters lack 2 modules that their own configs target; these modules stay as in the base" in str(
        said[0].message
    )
    assert folded.oftsurgery.missing == record.missing == LOST
    assert distance(logits(folded), logits(peft)) < 1e-6
    assert oftsurgery.verify_checkpoint(tmp_path / "out", base, part).ok
    found = oftsurgery.doctor(tmp_path / "out", base=base, adapter=part)
    assert {f.code: f.severity for f in found} == {"kept": "note", "partial-adapter": "note"}
    # whoever folded it by other means has no such record
    (tmp_path / "out" / "oftsurgery.json").unlink()
    found = oftsurgery.doctor(tmp_path / "out", base=base, adapter=part)
    assert {f.code: f.severity for f in found} == {"partial-adapter": "error", "kept": "note"}
    # back out again, by the adapter too
    back = quietly(oftsurgery.unfold, folded, part)
    assert distance(logits(back), logits(llama())) < 1e-6


def test_a_live_model_lacks_what_its_layers_lack(part: Path) -> None:
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft = PeftModel.from_pretrained(llama(), part).eval()
    assert oftsurgery.fold(peft).oftsurgery.missing == ()
    with pytest.warns(SourceWarning):
        wrapped = oftsurgery.wrap(llama(), part, partial=True)
    assert len(oftsurgery.fold(wrapped).oftsurgery.modules) == 2


def test_the_flag_and_the_record(base: Path, part: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fold", str(base), str(part), str(tmp_path / "out"), "--trained-on", "plain"]
    assert cli.main(words) == 2
    assert cli.main(["plan", str(base), str(part), "--trained-on", "plain"]) == 2
    capsys.readouterr()
    assert cli.main(["plan", str(base), str(part), "--partial", "--trained-on", "plain"]) == 0
    assert (
        "missing in the adapter: model.layers.1.self_attn.q_proj, model.layers.1.mlp.down_proj"
        in capsys.readouterr().out
    )
    assert cli.main([*words, "--partial"]) == 0
    assert "SourceWarning: the adapters lack 2 modules that their own configs target" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "oftsurgery.json").read_text())["missing"] == list(LOST)
    assert cli.main(["show", str(tmp_path / "out")]) == 0
    assert (
        "missing in the adapter: model.layers.1.self_attn.q_proj, model.layers.1.mlp.down_proj"
        in capsys.readouterr().out
    )


def test_a_head_that_the_file_lacks(tmp_path: Path) -> None:
    """peft saves the head of a classifier by itself; a part without it would fold with a random one."""
    peft = get_peft_model(bert(), OFTConfig(task_type="SEQ_CLS", oft_block_size=16, target_modules=["query"])).eval()
    peft.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == [
        "classifier",
        "score",
    ]
    assert oftsurgery.fold(bert(), tmp_path / "adapter").oftsurgery.missing == ()
    cut(tmp_path / "adapter", lambda key: "classifier" not in key)
    with pytest.raises(AdapterError, match=r"lacks 1 of the 3 modules .*\(classifier\)"):
        oftsurgery.fold(bert(), tmp_path / "adapter")


def test_an_adapter_of_another_class_of_the_model_is_whole(base: Path, tmp_path: Path) -> None:
    """Names without the prefix, and a class that is a part of the base: only what that class has is its config's."""
    inner = live(llama().model, target_modules=["q_proj", "down_proj"])
    inner.save_pretrained(tmp_path / "inner")
    assert len(oftsurgery.fold(llama(), tmp_path / "inner").oftsurgery.modules) == 4
    cut(tmp_path / "inner", lambda key: ".layers.0." in f".{key}")
    assert missing(FolderStore(open_checkpoint(base)), tmp_path / "inner") == set(LOST)
    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    encoder, whole = T5EncoderModel(config), T5ForConditionalGeneration(config)
    live(encoder, target_modules=["q"]).save_pretrained(tmp_path / "encoder")
    whole.save_pretrained(tmp_path / "t5")
    for store in (LiveStore(whole), FolderStore(open_checkpoint(tmp_path / "t5"))):
        assert missing(store, tmp_path / "encoder") == set()


def test_a_config_that_is_not_of_the_file_says_nothing(base: Path, tmp_path: Path) -> None:
    live(llama()).save_pretrained(tmp_path / "adapter")
    for targets in ([], None, ["v_proj"], "nothing_of_it"):
        configure(tmp_path / "adapter", target_modules=targets)
        assert missing(FolderStore(open_checkpoint(base)), tmp_path / "adapter") == set()


@pytest.mark.parametrize("verb", [["convert"], ["scale", "0.5"], ["compose"]])
def test_what_is_made_of_a_part_is_a_part(verb: list[str], base: Path, part: Path, tmp_path: Path) -> None:
    name, *more = verb
    for source, lost in ((part, set(LOST)), (tmp_path / "whole", set())):
        assert cli.main(["adapter", name, str(source), *more, str(tmp_path / "made"), "--force"]) == 0
        assert missing(FolderStore(open_checkpoint(base)), tmp_path / "made") == lost
        config = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
        assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]


def test_what_is_saved_of_other_modules_than_the_config_targets(base: Path, tmp_path: Path) -> None:
    """A pattern of these modules and no other: of an adapter that somebody put together, or of one that says all-linear."""
    live(llama()).save_pretrained(tmp_path / "adapter")
    for fields in ({"target_modules": ["up_proj"]}, {"target_modules": None}, {"target_modules": "all-linear"}):
        configure(tmp_path / "adapter", **fields)
        quietly(oftsurgery.load_adapter(tmp_path / "adapter").save, tmp_path / "saved", force=True)
        assert missing(FolderStore(open_checkpoint(base)), tmp_path / "saved") == set()
        peft = PeftModel.from_pretrained(llama(), tmp_path / "saved")
        assert len(peft.base_model.targeted_module_names) == 4
