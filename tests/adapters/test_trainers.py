"""Output folders of other trainers, laid out as their documentation has them: which adapter in them is read.

The trainers themselves are not installed. What they leave is peft's two files, in places and beside files of their own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from models import live, llama
from warned import noted

import oftsurgery
from oftsurgery import AdapterError, SourceWarning
from oftsurgery.cli.main import main as cli

# what transformers' Trainer leaves in each checkpoint, read by nobody here; the pickles are none
STATE = dict.fromkeys(("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"), b"\x80\x04N.") | {
    "trainer_state.json": b'{"best_model_checkpoint": null, "global_step": 10}',
    "README.md": b"---\nlibrary_name: peft\n---\n",
    "tokenizer_config.json": b"{}",
}
# fields of configs that peft's other methods, newer releases and the trainers themselves have written
EXTRA: dict[str, Any] = {
    "corda_config": None,
    "eva_config": {"rho": 2.0},
    "lora_alpha": 16,
    "megatron_config": None,
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "ensure_weight_tying": False,
    "unsloth_fixed": True,
    "a_later_field": [1, {"b": None}],
}

#: layout → ({path: bytes, or the seed of an adapter}, the folder that is given, the subfolder that is read)
READ: dict[str, tuple[Mapping[str, Any], str, str]] = {
    "TRL and transformers' Trainer: the end beside checkpoints": (
        {"out": 9, "out/checkpoint-10": 1, "out/checkpoint-20": 2},
        "out",
        "out",
    ),
    "TRL's DPO with a reference adapter": ({"out": 9, "out/ref": 1}, "out", "out"),
    "axolotl, merged": (
        {"out": 9, "out/checkpoint-10": 1, "out/merged/model.safetensors": b"x", "out/merged/config.json": b"{}", "out/debug.log": b""},
        "out",
        "out",
    ),
    "LLaMA-Factory": (
        {"saves/lora/sft": 9, "saves/lora/sft/checkpoint-10": 1, "saves/lora/sft/trainer_log.jsonl": b"{}\n", "saves/lora/sft/all_results.json": b"{}"},
        "saves/lora/sft",
        "saves/lora/sft",
    ),
    "a run with one checkpoint and no end": ({"out/checkpoint-10": 9, "out/runs/events": b""}, "out", "out/checkpoint-10"),
    "ms-swift": (
        {"output/v0-20250412-163248/checkpoint-10": 9, "output/v0-20250412-163248/args.json": b"{}", "output/v0-20250412-163248/logging.jsonl": b""},
        "output",
        "output/v0-20250412-163248/checkpoint-10",
    ),
    "ms-swift 1: the adapter's name below": ({"v08-2024/default": 9, "v08-2024/sft_args.json": b"{}"}, "v08-2024", "v08-2024/default"),
    "peft: an adapter that is not called default": ({"saved/sft": 9}, "saved", "saved/sft"),
    "peft: two, one of them default": ({"saved": 9, "saved/dpo": 1}, "saved", "saved"),
}  # fmt: skip

#: layout → (as above, what is listed)
LISTED: dict[str, tuple[Mapping[str, Any], str, str]] = {
    "a run with checkpoints and no end": (
        {"out/checkpoint-1000": 1, "out/checkpoint-90": 2, "out/checkpoint-200": 3},
        "out",
        "3 adapters, each in a subfolder: checkpoint-90, checkpoint-200, checkpoint-1000 .*subfolder='checkpoint-1000'",
    ),
    "ms-swift, two runs": (
        {"output/v0-20250412-163248/checkpoint-10": 1, "output/v1-20250412-171522/checkpoint-5": 2},
        "output",
        "2 adapters, .*v0-20250412-163248/checkpoint-10, v1-20250412-171522/checkpoint-5 ",
    ),
    "peft: two, neither of them default": (
        {"saved/sft": 1, "saved/dpo": 2},
        "saved",
        "2 adapters, each in a subfolder: dpo, sft ",
    ),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Adapters by seeds, whose configs have fields that nobody here knows."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed in (1, 2, 3, 9):
        live(llama(), seed=seed).save_pretrained(folder / str(seed))
        path = folder / str(seed) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | EXTRA))
    return {int(path.name): path for path in folder.iterdir()}


def lay_out(files: Mapping[str, Any], adapters: dict[int, Path], root: Path) -> None:
    for name, what in files.items():
        if isinstance(what, int):
            shutil.copytree(adapters[what], root / name, dirs_exist_ok=True)
            for beside, data in STATE.items():
                (root / name / beside).write_bytes(data)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(what)


@pytest.mark.parametrize("layout", READ)
def test_the_adapter_of_a_run_is_read(layout: str, adapters: dict[int, Path], tmp_path: Path) -> None:
    files, given, read = READ[layout]
    lay_out(files, adapters, tmp_path)
    with noted() as said:
        found = oftsurgery.load_adapter(tmp_path / given)
        folded = oftsurgery.fold(llama(), tmp_path / given)
        findings = oftsurgery.doctor(tmp_path / given)
    assert found.fingerprint == oftsurgery.load_adapter(adapters[9]).fingerprint
    assert found.source == folded.oftsurgery.adapters[0].source == str(tmp_path / read)
    texts = {str(w.message) for w in said}
    below = read.removeprefix(f"{given}/")
    assert texts == (
        {f"{tmp_path / given} holds one adapter, in its subfolder {below}; this adapter is read"}
        if below != read
        else set()
    )
    assert findings == []


@pytest.mark.parametrize("layout", LISTED)
def test_adapters_of_several_checkpoints_or_runs_are_listed(
    layout: str, adapters: dict[int, Path], tmp_path: Path
) -> None:
    files, given, text = LISTED[layout]
    lay_out(files, adapters, tmp_path)
    with pytest.raises(AdapterError, match=text):
        oftsurgery.load_adapter(tmp_path / given)
    with pytest.raises(AdapterError, match=text):
        oftsurgery.doctor(tmp_path / given)
    one = next(iter(files))
    below = one.removeprefix(f"{given}/")
    assert oftsurgery.load_adapter(tmp_path / given, subfolder=below).source == str(tmp_path / one)
    assert cli(["adapter", "show", str(tmp_path / given), "--adapter-subfolder", below, "-q"]) == 0


def test_the_folder_of_a_model_in_the_place_of_an_adapter(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    text = r"neither the folder nor a subfolder has adapter_config.json; the folder holds a model .*Remedy: give the adapter's folder in this place"
    with pytest.raises(AdapterError, match=text):
        oftsurgery.load_adapter(tmp_path / "model")


def test_a_folder_on_the_command_line(
    adapters: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out({"saved/sft": 9}, adapters, tmp_path)
    llama().save_pretrained(tmp_path / "base")
    words = ["fold", str(tmp_path / "base"), str(tmp_path / "saved"), str(tmp_path / "out"), "--trained-on", "plain"]
    assert cli(words) == 0
    assert "SourceWarning: " in capsys.readouterr().err
    with pytest.warns(SourceWarning, match="in its subfolder sft"):
        assert oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", tmp_path / "saved").ok
    assert (
        cli([*words[:3], str(tmp_path / "out-2"), *words[4:], "--adapter-subfolder", "sft/"]) == 0
    )  # as shells complete it
    assert "SourceWarning" not in capsys.readouterr().err
    for wrong, text in (("../saved/sft", "is no path inside the folder"), ("dpo", "the folder has no subfolder 'dpo'")):
        assert cli([*words[:3], str(tmp_path / "out-3"), "--adapter-subfolder", wrong]) == 2
        assert text in capsys.readouterr().err


def test_one_adapter_for_each_component_of_a_diffusers_pipeline(adapters: dict[int, Path], tmp_path: Path) -> None:
    """peft's example for diffusers: the pipeline's components have adapters of their own."""
    lay_out({"out/unet": 9, "out/text_encoder": 1}, adapters, tmp_path)
    with pytest.raises(AdapterError, match="2 adapters, each in a subfolder: text_encoder, unet"):
        oftsurgery.load_adapter(tmp_path / "out")
    assert (
        oftsurgery.load_adapter(tmp_path / "out" / "unet").fingerprint
        == oftsurgery.load_adapter(adapters[9]).fingerprint
    )
    pipeline = tmp_path / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    (pipeline / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    for folder in (pipeline, pipeline / "unet"):
        with pytest.raises(oftsurgery.CheckpointError, match=r"is damaged .*unet/diffusion_pytorch_model.safetensors"):
            oftsurgery.fold_checkpoint(folder, tmp_path / "out" / "unet", tmp_path / "folded")
