"""Live adapters, however they came into the model: by transformers itself, by peft's classes around each other, by peft's
`inject_adapter_in_model`. What a fold gives is the plain base model, and is saved by its own names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import distance, live, llama, logits, shake
from old_names import build
from peft import OFTConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import oftsurgery
from oftsurgery import RoundingWarning, StateError


def oft(*targets: str, **settings: Any) -> OFTConfig:
    return OFTConfig(oft_block_size=16, target_modules=list(targets), use_cayley_neumann=True, **settings)


def peft_model(model: Any, *targets: str, name: str = "default", **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a second adapter
        return get_peft_model(model, oft(*targets, **settings), adapter_name=name)


def unloaded() -> Any:
    """peft's class is left around a model that has no adapter any more."""
    inner = peft_model(llama(), "q_proj")
    inner.base_model.unload()
    return peft_model(inner, "down_proj")


LIVE: dict[str, Callable[[], Any]] = {
    "one in another": lambda: peft_model(peft_model(llama(), "q_proj"), "down_proj"),
    "one in another by another name": lambda: peft_model(peft_model(llama(), "q_proj", name="a"), "q_proj", name="b"),
    "one in another, with a head": lambda: peft_model(
        peft_model(llama(), "q_proj", modules_to_save=["lm_head"]), "down_proj", modules_to_save=["lm_head"]
    ),
    "around an empty one": unloaded,
    "mixed": lambda: get_peft_model(llama(), oft("q_proj"), mixed=True),
    "the tuner alone": lambda: peft_model(llama(), "q_proj").base_model,
    "injected": lambda: inject_adapter_in_model(oft("q_proj"), llama()),
}


def reloaded(model: Any, folder: Path, cls: Any = LlamaForCausalLM) -> Any:
    oftsurgery.export_safetensors(model, folder)
    found, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return found.eval()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", LIVE)
def test_the_plain_base_model_comes_out(name: str, inplace: bool, tmp_path: Path) -> None:
    model = LIVE[name]().eval()
    for adapter in ("default", "a", "b"):
        shake(model, 1, adapter)
    expected = logits(model)
    folded = oftsurgery.fold(model, inplace=inplace)
    assert type(folded) is LlamaForCausalLM
    assert distance(logits(folded), expected) < 1e-6
    assert all(path.startswith("model.layers.") for path in folded.oftsurgery.modules)
    assert distance(logits(reloaded(folded, tmp_path / "out")), expected) < 1e-6


# --- by transformers itself -------------------------------------------------------------------------------------------


def loaded(folder: Path, cls: Any, **options: Any) -> Any:
    return cls.from_pretrained(folder / "adapter", **options).eval()


def added(folder: Path, cls: Any, **options: Any) -> Any:
    model = cls.from_pretrained(folder / "base", **options)
    model.load_adapter(str(folder / "adapter"))
    return model.eval()


@pytest.fixture(scope="module", params=["llama", "mixtral", "llava", "bert"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, Any]:
    """A folder with `base` and `adapter`, the live logits, and the class. transformers merges Mixtral's experts, and
    renames Llava's tensors, as it loads them; Bert's head is trained.
    """
    folder = tmp_path_factory.mktemp("trained")
    base = build(request.param)
    base.save_pretrained(folder / "base")
    settings = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"} if request.param == "bert" else {}
    model = live(type(base).from_pretrained(folder / "base"), target_modules=["q_proj", "query"], **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    model.save_pretrained(folder / "adapter")
    return folder, logits(model), type(base)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("how", [loaded, added])
def test_what_transformers_loaded_is_saved_by_plain_names(
    how: Callable[..., Any], inplace: bool, trained: tuple[Path, torch.Tensor, Any], tmp_path: Path
) -> None:
    folder, expected, cls = trained
    folded = oftsurgery.fold(how(folder, cls), inplace=inplace)
    assert distance(logits(folded), expected) < 1e-6
    assert distance(logits(reloaded(folded, tmp_path / "out", cls)), expected) < 1e-6
    folded.save_pretrained(tmp_path / "saved")
    names = [
        load_file(at / "model.safetensors").keys() for at in (folder / "base", tmp_path / "out", tmp_path / "saved")
    ]
    assert names[0] == names[1] == names[2]


@pytest.mark.parametrize("how", [loaded, added])
def test_over_a_quantised_base(
    how: Callable[..., Any], trained: tuple[Path, torch.Tensor, Any], tmp_path: Path
) -> None:
    folder, _, cls = trained
    skipped = ["classifier", "lm_head"]  # transformers has no place for a trained head over a quantised one
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    with pytest.warns(RoundingWarning):
        folded = oftsurgery.fold(how(folder, cls, quantization_config=settings))
    found = reloaded(folded, tmp_path / "out", cls)
    assert distance(logits(found), logits(folded)) < 1e-6


def test_an_error_leaves_the_model_as_transformers_loaded_it(trained: tuple[Path, torch.Tensor, Any]) -> None:
    model = added(trained[0], trained[2])
    path, layer = next((path, m) for path, m in model.named_modules() if hasattr(m, "oft_R"))
    with torch.no_grad():
        layer.base_layer.weight[0, 0] = float("nan")
    before = {name: value for name, value in model.__dict__.items() if "peft" in name or "conversions" in name}
    with pytest.raises(oftsurgery.NonFiniteError):
        oftsurgery.fold(model, inplace=True)
    assert before == {name: value for name, value in model.__dict__.items() if "peft" in name or "conversions" in name}
    assert len(before) == 3
    assert model.get_submodule(path) is layer


# --- refused ----------------------------------------------------------------------------------------------------------


def deleted() -> Any:
    model = llama()
    model.add_adapter(oft("q_proj"))
    model.delete_adapter("default")
    return model


def deleted_by_peft() -> Any:
    model = peft_model(llama(), "q_proj")
    model.delete_adapter("default")
    return model


def unnamed() -> Any:
    model = inject_adapter_in_model(oft("q_proj"), llama())
    del model.peft_config
    return model


@pytest.mark.parametrize("make", [deleted, deleted_by_peft, unnamed])
def test_layers_without_an_adapter_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(StateError, match=r"`peft_config` names no adapter.*Remedy: load the plain base model"):
        oftsurgery.fold(make())


def test_a_part_in_a_shell_is_named_as_get_submodule_takes_it() -> None:
    model = torch.nn.Sequential(torch.nn.DataParallel(live(llama())))
    with pytest.raises(StateError, match=r"get_submodule\('0\.module\.base_model'\)"):
        oftsurgery.fold(model)
    assert type(oftsurgery.fold(model.get_submodule("0.module.base_model"))) is transformers.LlamaForCausalLM
