"""Models in shells: `torch.compile` of the whole or of parts, data parallel classes, activation checkpointing. Shells have
no part in names, and stay out of files.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import compile_regions
from models import TOKENS, distance, live, llama, logits
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaForCausalLM

import oftsurgery
from oftsurgery.stores.modules import inner_model, modules_of

Shell = Callable[[nn.Module], nn.Module]


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def each(shell: Shell, *ends: str) -> Shell:
    """Put every module whose path ends so in a shell."""

    def put(model: nn.Module) -> nn.Module:
        for path, module in list(model.named_modules()):
            if path.endswith(ends):
                parent, _, name = path.rpartition(".")
                model.get_submodule(parent)._modules[name] = shell(module)
        return model

    return put


SHELLS: dict[str, Shell] = {
    "compiled": compiled,
    "compiled layers": each(compiled, "layers.0", "layers.1"),
    "compiled regions": lambda model: compile_regions(model, backend="eager"),
    "compiled linears": each(compiled, "q_proj", "embed_tokens"),
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compiled DistributedDataParallel": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "averaged": AveragedModel,
    "checkpointed layers": each(checkpoint_wrapper, "layers.0", "layers.1"),
    "checkpointed compiled layers": each(lambda m: checkpoint_wrapper(compiled(m)), "layers.0", "layers.1"),
}
TARGETS = ["q_proj", "embed_tokens"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter and the live logits."""
    folder = tmp_path_factory.mktemp("adapter")
    peft_model = live(llama(), target_modules=TARGETS)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return folder, logits(peft_model)


def outputs(model: nn.Module) -> torch.Tensor:
    """A compiled module calls the module that it was made of; nothing is compiled for that, which takes long."""
    with torch.compiler.set_stance("force_eager"):
        return logits(model)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", SHELLS)
def test_files_fold_into_a_model_in_a_shell(
    name: str, inplace: bool, adapter: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    model = SHELLS[name](llama())
    base = copy.deepcopy({n: p.detach().clone() for n, p in model.named_parameters()})
    folded = oftsurgery.fold(model, adapter[0], inplace=inplace)
    assert distance(outputs(folded), adapter[1]) < 1e-6
    assert set(folded.oftsurgery.modules) == {
        "model.embed_tokens",
        *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)),
    }
    assert inplace or all(torch.equal(p, base[n]) for n, p in model.named_parameters())
    oftsurgery.export_safetensors(folded, tmp_path / "out")
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert distance(logits(loaded.eval()), adapter[1]) < 1e-6


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", SHELLS)
def test_a_model_in_a_shell_is_wrapped_and_folded(name: str, inplace: bool, adapter: tuple[Path, torch.Tensor]) -> None:
    """A compiled module calls the module that it was made of, so a live layer takes the shell's place too."""
    wrapped = oftsurgery.wrap(SHELLS[name](llama()), adapter[0], inplace=inplace)
    assert distance(outputs(wrapped), adapter[1]) < 1e-6
    assert distance(outputs(oftsurgery.fold(wrapped, inplace=inplace)), adapter[1]) < 1e-6


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("around", ["inside peft", "around peft"])
@pytest.mark.parametrize("name", [name for name in SHELLS if name not in ("compiled linears", "averaged")])
def test_live_layers_in_a_shell_fold(name: str, around: str, inplace: bool, adapter: tuple[Path, torch.Tensor]) -> None:
    if around == "inside peft":  # peft itself finds no embedding in a shell
        targets = ["q_proj"] if name == "compiled regions" else TARGETS
        model: Any = live(SHELLS[name](llama()), target_modules=targets)
    else:
        model = SHELLS[name](live(llama(), target_modules=TARGETS))
    expected = outputs(model)
    folded = oftsurgery.fold(model, inplace=inplace)
    assert distance(outputs(folded), expected) < 1e-6
    assert isinstance(inner_model(folded), LlamaForCausalLM)


def test_the_replicas_of_a_copy_are_left_out(adapter: tuple[Path, torch.Tensor]) -> None:
    replicated = nn.DataParallel(llama())
    assert isinstance(oftsurgery.fold(replicated, adapter[0]), LlamaForCausalLM)
    assert oftsurgery.fold(replicated, adapter[0], inplace=True) is replicated


def test_a_module_in_two_shells_has_one_path_each() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(nn.DataParallel(layer), checkpoint_wrapper(nn.DataParallel(layer)))
    assert modules_of(model) == {"": model, "0": layer, "1": layer}


def test_a_shell_of_the_models_own_keeps_its_name() -> None:
    """A module may be called `module` or `_orig_mod` and be the model's own."""

    class DataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(4, 4)

    assert list(modules_of(DataParallel())) == ["", "module"]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("original", [True, False])
def test_fully_sharded_models_are_refused(original: bool, adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """It would overwrite what a fold puts in the place of its views."""
    with pytest.warns((UserWarning, FutureWarning), match="NO_SHARD"):
        sharded = FullyShardedDataParallel(llama(), use_orig_params=original, device_id=torch.device("cpu"))
    for call in (
        lambda: oftsurgery.fold(sharded, adapter[0]),
        lambda: oftsurgery.wrap(sharded, adapter[0]),
        lambda: oftsurgery.export_safetensors(sharded, tmp_path / "out"),
        lambda: oftsurgery.fold(nn.Sequential(sharded), adapter[0]),
    ):
        with pytest.raises(oftsurgery.StateError, match=r"one flat parameter.*Remedy: save the full state dict"):
            call()
    assert not os.listdir(tmp_path)  # noqa: PTH208


@pytest.mark.parametrize("name", ["compiled", "compiled layers", "compiled regions"])
def test_a_fold_of_a_compiled_model_is_verified(name: str, adapter: tuple[Path, torch.Tensor]) -> None:
    """Module by module too, whichever of the two is compiled."""
    shell, plain = SHELLS[name], llama()
    with torch.compiler.set_stance("force_eager"):
        for folded, reference in ((shell(llama()), plain), (llama(), shell(plain))):
            folded = oftsurgery.fold(folded, adapter[0])
            report = oftsurgery.verify(folded, oftsurgery.wrap(reference, adapter[0]), TOKENS)
            assert report.outputs["logits"].relative < 1e-6
            assert report.modules.keys() == folded.oftsurgery.modules.keys()
