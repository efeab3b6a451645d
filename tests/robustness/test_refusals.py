"""Bad input: for each cause a typed error that says what is wrong, where, and what to do; and a model that is as it
was.

One table. Each case builds a model and does one thing wrong; what must hold for all of them is asserted in one place.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

import oftsurgery
from oftsurgery import errors as e

KEY = "base_model.model.{}.oft_R.weight"
CONFIG: dict[str, Any] = {
    "peft_type": "OFT",
    "peft_version": "0.21.2",
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
    "oft_block_size": 16,
    "base_model_name_or_path": "org/base",
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 64)
        self.out_proj = nn.Linear(64, 48, bias=False)


class Net(nn.Module):
    """A bit of everything: ``layers.{0,1}.{q_proj,out_proj}``, ``embed``, ``conv``, ``norm``, ``lstm``, ``head``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.conv = nn.Conv2d(16, 8, 1)
        self.wide = nn.Conv2d(16, 8, 3)
        self.grouped = nn.Conv2d(16, 8, 1, groups=2)
        self.norm = nn.LayerNorm(64)
        self.lstm = nn.LSTM(64, 64)
        self.head = nn.Linear(48, 5)
        self.norm.register_forward_hook(lambda *args: None)
        self.register_buffer("positions", torch.arange(4))


def rows(n: int = 4, b: int = 16, value: float | None = None) -> Tensor:
    return torch.full((n, b * (b - 1) // 2), value) if value is not None else torch.randn(n, b * (b - 1) // 2) * 0.05


@dataclass
class Bench:
    """What a case works on: a folder for files and a model; ``act`` is what must be refused."""

    tmp: Path
    model: nn.Module = field(default_factory=Net)
    watched: list[nn.Module] = field(default_factory=list)

    def adapter(self, tensors: dict[str, Tensor] | None = None, name: str = "adapter", **config: Any) -> Path:
        folder = self.tmp / name
        folder.mkdir()
        fields = {k: v for k, v in (CONFIG | config).items() if v is not ...}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        save_file(
            tensors if tensors is not None else {KEY.format("layers.0.q_proj"): rows()},
            folder / "adapter_model.safetensors",
        )
        return folder

    def fold(self, adapter: Any = None, **options: Any) -> Callable[[], object]:
        return lambda: oftsurgery.fold(self.model, adapter, **options)

    def on(self, path: str, n: int = 4, b: int = 16, **config: Any) -> Callable[[], object]:
        """A fold of an adapter over a good layer and then the one at ``path``."""
        return self.fold(self.adapter({KEY.format("layers.0.q_proj"): rows(), KEY.format(path): rows(n, b)}, **config))


Case = Callable[[Bench], Callable[[], object]]
CASES: dict[str, tuple[type[e.OFTSurgeryError], str, Case]] = {}


def case(name: str, error: type[e.OFTSurgeryError], message: str) -> Callable[[Case], Case]:
    def add(build: Case) -> Case:
        assert name not in CASES
        CASES[name] = (error, message, build)
        return build

    return add


# --- files ------------------------------------------------------------------------------------------------------------


@case(
    "the folder does not exist",
    e.AdapterError,
    r"the folder does not exist \[at .*nowhere\] Remedy: give the folder that peft's save_pretrained wrote, or a Hub id",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.tmp / "nowhere")


@case(
    "a file instead of its folder",
    e.AdapterError,
    r"the path is the tensors' file of an adapter's folder, beside adapter_config\.json .*Remedy: give the folder",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter() / "adapter_model.safetensors")


@case("an empty folder", e.AdapterError, r"the folder is empty .*Remedy: give the folder")
def _(t: Bench) -> Callable[[], object]:
    (t.tmp / "empty").mkdir()
    return t.fold(t.tmp / "empty")


@case(
    "a Hub id, offline",
    e.AdapterError,
    r"neither a folder nor a Hub repository that can be read .*at nobody/nothing.*Remedy: check the name",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold("nobody/nothing-of-that-name")


@case("no config", e.AdapterError, r"the folder has no adapter_config\.json .*Remedy")
def _(t: Bench) -> Callable[[], object]:
    folder = t.adapter()
    (folder / "adapter_config.json").unlink()
    return t.fold(folder)


@case("config is no JSON", e.AdapterError, r"the file holds no JSON .*adapter_config\.json.*Remedy: restore")
def _(t: Bench) -> Callable[[], object]:
    folder = t.adapter()
    (folder / "adapter_config.json").write_text("{")
    return t.fold(folder)


@case("config is a list", e.AdapterError, r"the file holds a JSON list, not an object .*Remedy: restore")
def _(t: Bench) -> Callable[[], object]:
    folder = t.adapter()
    (folder / "adapter_config.json").write_text("[]")
    return t.fold(folder)


@case("config without peft_type", e.AdapterError, r"has no `peft_type` .*Remedy: give a folder")
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter(peft_type=...))


@case(
    "config of wrong types",
    e.AdapterError,
    r"has coft = 'yes', but the value must be of type bool .*Remedy: restore the config",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter(coft="yes"))


@case(
    "a pickle only",
    e.AdapterError,
    r"adapter_model\.bin is a pickle, which could run code when read.*Remedy: load the adapter with the peft release that wrote it",
)
def _(t: Bench) -> Callable[[], object]:
    folder = t.adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return t.fold(folder)


@case(
    "tensors missing", e.AdapterError, r"the folder has no adapter_model\.safetensors .*Remedy: save the adapter again"
)
def _(t: Bench) -> Callable[[], object]:
    folder = t.adapter()
    (folder / "adapter_model.safetensors").unlink()
    return t.fold(folder)


@case(
    "tensors truncated",
    e.AdapterError,
    r"the tensors cannot be read: the file is truncated, or is no safetensors file .*Remedy: copy or download the file again",
)
def _(t: Bench) -> Callable[[], object]:
    path = t.adapter() / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return t.fold(path.parent)


# --- another kind of adapter ------------------------------------------------------------------------------------------


@case(
    "a LoRA adapter",
    e.DialectError,
    r"the adapter is a LORA adapter, not an OFT adapter Remedy: .*merge others with peft's merge_and_unload",
)
def _(t: Bench) -> Callable[[], object]:
    get_peft_model(Net(), LoraConfig(target_modules=["q_proj"])).save_pretrained(t.tmp / "lora")
    return t.fold(t.tmp / "lora")


@case(
    "half a BOFT adapter", e.AdapterError, r"the module lacks boft_s .*Remedy: restore the whole file that peft saved"
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter({"base_model.model.layers.0.q_proj.boft_R": torch.ones(1, 2, 4, 4)}, peft_type="BOFT"))


@case(
    "LoRA keys under an OFT config",
    e.DialectError,
    r"the adapter holds 'lora_A', which is no part of an OFT adapter .*q_proj\.lora_A",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(
        t.adapter(
            {KEY.format("layers.0.q_proj"): rows(), "base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 64)}
        )
    )


@case(
    "a dialect that cannot be told",
    e.DialectError,
    r"the files do not tell the dialect: it is peft-0.17 or peft-0.21 .*Remedy: name the dialect, load_adapter\(",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter(peft_version="0.18.0.dev0"))


@case("an unknown dialect", e.DialectError, r"unknown dialect 'peft-1' Remedy: use one of peft-0\.13, ")
def _(t: Bench) -> Callable[[], object]:
    folder = t.adapter()
    return lambda: oftsurgery.load_adapter(folder, dialect="peft-1")  # type: ignore[arg-type]


@case(
    "the wrong dialect named",
    e.DialectError,
    r"the named dialect is peft-0\.13, but the files are of peft-0\.21 .*Remedy: leave the dialect out",
)
def _(t: Bench) -> Callable[[], object]:
    folder = t.adapter()
    return lambda: oftsurgery.load_adapter(folder, dialect="peft-0.13")


# --- tensors that no adapter has --------------------------------------------------------------------------------------


@case("no tensor", e.AdapterError, r"the adapter holds no tensor .*Remedy: save it again")
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter({}))


@case(
    "no rotation",
    e.AdapterError,
    r"has 1 tensors, but none is a rotation .*Remedy: check that the adapter was saved after training",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter({"base_model.model.head.bias": torch.ones(5)}))


@case(
    "oft_s missing",
    e.AdapterError,
    r"save oft_r and oft_s; oft_s is missing .*module 'layers\.0\.q_proj'.*Remedy: restore the whole file",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(
        t.adapter(
            {"base_model.model.layers.0.q_proj.oft_r": torch.zeros(4, 16, 16)}, peft_version=..., use_cayley_neumann=...
        )
    )


@case(
    "an unknown key",
    e.AdapterError,
    r"the key is unknown: .*start with 'base_model\.model\.' \[tensor 'layers\.0\.q_proj\.oft_R\.weight'.*Remedy",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter({"layers.0.q_proj.oft_R.weight": rows()}))


@case(
    "an integer tensor",
    e.AdapterError,
    r"must be float32, float16, .* the tensor is torch\.int32 .*q_proj\.oft_R\.weight.*Remedy: restore",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter({KEY.format("layers.0.q_proj"): rows().int()}))


@case(
    "NaN in the adapter",
    e.NonFiniteError,
    r"the adapter's tensor holds NaN or infinity .*layers\.1\.q_proj\.oft_R\.weight.*Remedy: retrain",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(
        t.adapter({KEY.format("layers.0.q_proj"): rows(), KEY.format("layers.1.q_proj"): rows(value=float("nan"))})
    )


@case("infinity in a saved bias", e.NonFiniteError, r"the adapter's tensor holds NaN or infinity .*head\.bias")
def _(t: Bench) -> Callable[[], object]:
    return t.fold(
        t.adapter({KEY.format("layers.0.q_proj"): rows(), "base_model.model.head.bias": torch.full((5,), float("inf"))})
    )


@case(
    "a row that is no triangle",
    e.ShapeError,
    r"5 elements is no upper triangle .*module 'layers\.0\.q_proj'.*shape 4×5.*Remedy: restore the file",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter({KEY.format("layers.0.q_proj"): torch.zeros(4, 5)}))


@case(
    "block_share with several rows",
    e.ShapeError,
    r"`block_share` is set, but the generator has more than one row .*shape 4×120.*Remedy",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter(block_share=True))


# --- an adapter that does not fit the model ---------------------------------------------------------------------------


@case(
    "a key that matches nothing",
    e.MatchError,
    r"1 of the adapter's 2 modules match nothing in the model; nearest in the model: .*layers\.1\.q_proj.*module 'model\.layers\.1\.q_proj'"
    r".*Remedy: use the model that the adapter was trained on, of the same class, from org/base",
)
def _(t: Bench) -> Callable[[], object]:
    return t.on("model.layers.1.q_proj")


@case(
    "blocks that do not cover the inputs",
    e.ShapeError,
    r"3 blocks of size 16 do not cover the 64 input features \[module 'layers\.1\.q_proj', shape 64×64",
)
def _(t: Bench) -> Callable[[], object]:
    return t.on("layers.1.q_proj", 3)


@case(
    "blocks that do not divide the inputs",
    e.ShapeError,
    r"4 blocks of size 12 do not cover the 64 input features .*Remedy: use the base model",
)
def _(t: Bench) -> Callable[[], object]:
    return t.on("layers.1.q_proj", 4, 12)


@case("one block of a narrower base", e.ShapeError, r"1 blocks of size 16 do not cover the 64 input features")
def _(t: Bench) -> Callable[[], object]:
    return t.on("layers.1.q_proj", 1)


@case(
    "blocks that do not cover the outputs",
    e.ShapeError,
    r"4 blocks of size 16 do not cover the 48 output features .*module 'layers\.0\.out_proj'",
)
def _(t: Bench) -> Callable[[], object]:
    old = {"base_model.model.layers.0.out_proj.oft_r": torch.zeros(4, 16, 16)}
    return t.fold(t.adapter(old, peft_version=..., use_cayley_neumann=..., oft_block_size=...))


@case(
    "oft_s of another width",
    e.ShapeError,
    r"oft_s does not fit the output features \[module 'layers\.0\.out_proj', tensor 'oft_s', shape 64, expected 48\]",
)
def _(t: Bench) -> Callable[[], object]:
    old = {
        "base_model.model.layers.0.out_proj.oft_r": torch.zeros(4, 16, 16),
        "base_model.model.layers.0.out_proj.oft_s": torch.ones(64, 1),
    }
    return t.fold(t.adapter(old, peft_version=..., use_cayley_neumann=...))


@case(
    "an embedding's rotation on a linear",
    e.MatchError,
    r"the adapter's rotation is on the embedding side, but the module's kind is linear .*'layers\.0\.q_proj'",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter({"base_model.model.layers.0.q_proj.oft_embedding_R.weight": rows()}))


@case(
    "a linear's rotation on an embedding",
    e.MatchError,
    r"the adapter's rotation is on the input side, but the module's kind is embedding \[module 'embed'\]",
)
def _(t: Bench) -> Callable[[], object]:
    return t.on("embed")


@case(
    "two keys for one shared module",
    e.MatchError,
    r"'layers\.0\.q_proj' and 'layers\.1\.q_proj', are one module of the model \[module 'layers\.1\.q_proj'\]",
)
def _(t: Bench) -> Callable[[], object]:
    t.model.layers[1].q_proj = t.model.layers[0].q_proj  # type: ignore[index,union-attr]
    return t.on("layers.1.q_proj")


@case(
    "a saved tensor that the model lacks",
    e.MatchError,
    r"brings a tensor that the model does not have; nearest: head\.bias.*'heads\.bias'.*Remedy",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter({KEY.format("layers.0.q_proj"): rows(), "base_model.model.heads.bias": torch.ones(5)}))


@case(
    "a saved tensor of another shape",
    e.ShapeError,
    r"do not fit the model's tensor \[tensor 'head\.weight', shape 7×48, expected 5×48.*number of labels",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter({KEY.format("layers.0.q_proj"): rows(), "base_model.model.head.weight": torch.ones(7, 48)}))


# --- layers that cannot be folded -------------------------------------------------------------------------------------


@case(
    "a 3×3 convolution",
    e.FormatError,
    r"a 3×3 convolution cannot be folded: .*live layer overlaps its patches.*module 'wide'.*`exclude_modules`",
)
def _(t: Bench) -> Callable[[], object]:
    return t.on("wide", 9)


@case(
    "a grouped convolution",
    e.FormatError,
    r"a grouped convolution cannot be folded, .* \d+ groups \[module 'grouped'\] Remedy: .*`exclude_modules`",
)
def _(t: Bench) -> Callable[[], object]:
    return t.on("grouped", 1)


@case(
    "a LayerNorm",
    e.FormatError,
    r"a LayerNorm has no weight that oftsurgery can rotate .*module 'norm'.*Remedy: rotate torch's Linear",
)
def _(t: Bench) -> Callable[[], object]:
    return t.on("norm")


@case("a module without any weight", e.FormatError, r"a ModuleList has no weight .*module 'layers'")
def _(t: Bench) -> Callable[[], object]:
    return t.on("layers")


@case("a recurrent layer", e.FormatError, r"a LSTM has no weight that oftsurgery can rotate .*module 'lstm'")
def _(t: Bench) -> Callable[[], object]:
    return t.on("lstm")


@case(
    "a weight of integers",
    e.FormatError,
    r"a Linear with a weight of torch\.int8 is stored in a way .*module 'layers\.1\.q_proj', shape 64×64",
)
def _(t: Bench) -> Callable[[], object]:
    t.model.layers[1].q_proj.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)  # type: ignore[index,union-attr]
    return t.on("layers.1.q_proj")


@case(
    "a parametrised weight",
    e.StateError,
    r"the weight is parametrised .*module 'layers\.1\.q_proj'.*Remedy: call remove_parametrizations",
)
def _(t: Bench) -> Callable[[], object]:
    nn.utils.parametrizations.weight_norm(t.model.layers[1].q_proj)  # type: ignore[index,union-attr]
    return t.on("layers.1.q_proj")


@case(
    "a model on the meta device",
    e.StateError,
    r"the weight is on the meta device and has no values \[module 'layers\.0\.q_proj'\] Remedy: load",
)
def _(t: Bench) -> Callable[[], object]:
    t.model.to("meta")
    return t.fold(t.adapter())


def quantised(t: Bench, kind: str) -> Any:
    """Put a quantised layer at ``layers.1.q_proj``."""
    source: nn.Linear = t.model.layers[1].q_proj  # type: ignore[index,union-attr,assignment]
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type=kind)
    layer.load_state_dict(source.state_dict())
    t.model.layers[1].q_proj = layer  # type: ignore[index,union-attr]
    return layer


@case(
    "a 4-bit layer not quantised yet",
    e.StateError,
    r"the 4-bit layer is not quantised yet \[module 'layers\.1\.q_proj'\] Remedy: move the model",
)
def _(t: Bench) -> Callable[[], object]:
    quantised(t, "nf4")
    return t.on("layers.1.q_proj")


@case(
    "an 8-bit layer not quantised yet",
    e.StateError,
    r"the 8-bit layer is not quantised yet \[module 'layers\.1\.q_proj'\] Remedy: move the model",
)
def _(t: Bench) -> Callable[[], object]:
    quantised(t, "int8")
    return t.on("layers.1.q_proj")


@case(
    "a lost quant_state",
    e.FormatError,
    r"the 4-bit layer has lost its quant_state \[module 'layers\.1\.q_proj', format 4-bit\] Remedy: reload",
)
def _(t: Bench) -> Callable[[], object]:
    layer = quantised(t, "nf4").to("cpu")
    layer.weight.quant_state = layer.quant_state = None
    return t.on("layers.1.q_proj")


@case(
    "a lost SCB",
    e.FormatError,
    r"the int8 layer has lost its SCB statistics \[module 'layers\.1\.q_proj', tensor 'SCB', format int8\] Remedy: reload",
)
def _(t: Bench) -> Callable[[], object]:
    quantised(t, "int8").to("cpu").weight.SCB = None
    return t.on("layers.1.q_proj")


@case(
    "a foreign quant_map",
    e.FormatError,
    r"quant_map is not the format's own.*module 'layers\.1\.q_proj', tensor 'quant_map', format nf4.*quantise the",
)
def _(t: Bench) -> Callable[[], object]:
    state = quantised(t, "nf4").to("cpu").weight.quant_state
    state.code = torch.linspace(-1, 1, 16)
    return t.on("layers.1.q_proj")


@case(
    "an unknown 4-bit type",
    e.FormatError,
    r"the 4-bit type is unknown \[module 'layers\.1\.q_proj', format int4\] Remedy: quantise with nf4 or fp4",
)
def _(t: Bench) -> Callable[[], object]:
    quantised(t, "nf4").to("cpu").weight.quant_state.quant_type = "int4"
    return t.on("layers.1.q_proj")


@case(
    "packed codes cut short",
    e.ShapeError,
    r"the packed codes have another number of bytes than the weight needs .*'layers\.1\.q_proj'.*shape 2000, expected 2048",
)
def _(t: Bench) -> Callable[[], object]:
    layer = quantised(t, "nf4").to("cpu")
    layer.weight.data = layer.weight.data[:2000]
    return t.on("layers.1.q_proj")


# --- values -----------------------------------------------------------------------------------------------------------


@case(
    "NaN in the base",
    e.NonFiniteError,
    r"the stored weight holds NaN or infinity \[module 'layers\.1\.q_proj', format float32\] Remedy: reload the base",
)
def _(t: Bench) -> Callable[[], object]:
    t.model.layers[1].q_proj.weight.data[3, 5] = float("nan")  # type: ignore[index,union-attr]
    return t.on("layers.1.q_proj")


@case(
    "NaN in a quantised base",
    e.NonFiniteError,
    r"the stored weight holds NaN or infinity \[module 'layers\.1\.q_proj', format nf4 \(double",
)
def _(t: Bench) -> Callable[[], object]:
    quantised(t, "nf4").to("cpu").weight.quant_state.offset.fill_(float("nan"))
    return t.on("layers.1.q_proj")


@case(
    "float16 overflow",
    e.NonFiniteError,
    r"the weight is not finite in float16 \[module 'layers\.1\.q_proj', format float16\] Remedy: fold into a wider",
)
def _(t: Bench) -> Callable[[], object]:
    t.model.layers[1].q_proj.weight.data = torch.full((64, 64), 6e4).half()  # type: ignore[index,union-attr]
    return t.on("layers.1.q_proj")


# --- what the model carries -------------------------------------------------------------------------------------------


@case(
    "folded already",
    e.StateError,
    r"this adapter is folded into the model already \[at .*adapter\] Remedy: use the model as it is, unfold the adapter first",
)
def _(t: Bench) -> Callable[[], object]:
    folder = t.adapter()
    oftsurgery.fold(t.model, folder, inplace=True)
    return t.fold(folder)


@case(
    "one adapter twice",
    e.StateError,
    r"the same adapter is given twice \[at .*adapter\] Remedy: give each adapter once",
)
def _(t: Bench) -> Callable[[], object]:
    folder = t.adapter()
    return t.fold([folder, oftsurgery.load_adapter(folder)])


@case(
    "two adapters with biases",
    e.MatchError,
    r"two adapters bring their own values for one tensor \[tensor 'head\.bias'\] Remedy: fold one of them alone",
)
def _(t: Bench) -> Callable[[], object]:
    both = [
        t.adapter({KEY.format("layers.0.q_proj"): rows(), "base_model.model.head.bias": torch.ones(5)}, name)
        for name in "ab"
    ]
    return t.fold(both)


@case(
    "no adapter for a plain model",
    e.StateError,
    r"no adapter to fold was given, and the model carries no live peft adapter Remedy: give an OFTAdapter",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold()


@case("an empty list of adapters", e.MatchError, r"no adapter to fold was given Remedy: give an OFTAdapter")
def _(t: Bench) -> Callable[[], object]:
    return t.fold([])


def live(t: Bench, **config: Any) -> PeftModel:
    t.model = get_peft_model(
        t.model, OFTConfig(target_modules=["q_proj"], oft_block_size=16, init_weights=False, **config)
    )
    return t.model


@case(
    "a live model and files",
    e.StateError,
    r"carries live peft adapters, and an adapter to fold was given too Remedy: fold\(peft_model\) folds the active",
)
def _(t: Bench) -> Callable[[], object]:
    live(t)
    return t.fold(t.adapter())


@case(
    "merged by peft",
    e.StateError,
    r"peft has merged this adapter into the base weights already \[module 'layers\.0\.q_proj'\] Remedy: reload the base",
)
def _(t: Bench) -> Callable[[], object]:
    live(t).merge_adapter()
    return t.fold()


@case(
    "adapters disabled",
    e.StateError,
    r"the adapters are disabled, so the model computes what its base computes .*Remedy: call enable_adapter_layers\(\)",
)
def _(t: Bench) -> Callable[[], object]:
    live(t).base_model.disable_adapter_layers()
    return t.fold()


@case(
    "no active adapter",
    e.StateError,
    r"the model has no active adapter Remedy: activate one of the model's adapters with set_adapter\(\): default",
)
def _(t: Bench) -> Callable[[], object]:
    live(t).base_model.set_adapter([])
    return t.fold()


@case(
    "layers with different active adapters",
    e.StateError,
    r"the model's layers have different active adapters: .*default.*other.* Remedy: name the adapters to fold",
)
def _(t: Bench) -> Callable[[], object]:
    model = live(t)
    model.add_adapter("other", OFTConfig(target_modules=["q_proj"], oft_block_size=8))
    model.base_model.model.layers[0].q_proj.set_adapter("other")
    return t.fold()


@case(
    "a LoRA in a live model",
    e.StateError,
    r"the model carries a live Linear of peft\.tuners\.lora\.layer \[module 'layers\.0\.q_proj'\] Remedy: merge or",
)
def _(t: Bench) -> Callable[[], object]:
    t.model = get_peft_model(t.model, LoraConfig(target_modules=["q_proj"]))
    return t.fold()


@case(
    "an unknown rounding",
    e.StateError,
    r"the rounding 'up' is not known Remedy: choose 'preserve', 'nearest', 'grid', 'mse' or 'calibrated'",
)
def _(t: Bench) -> Callable[[], object]:
    return t.fold(t.adapter(), rounding="up")


# --- unfolding --------------------------------------------------------------------------------------------------------


def folded(t: Bench) -> tuple[nn.Module, Path]:
    """The base, and its adapter; ``t.model`` is the folded one."""
    base, folder = (
        t.model,
        t.adapter({KEY.format("layers.0.q_proj"): rows(), "base_model.model.head.bias": torch.ones(5)}, "folded"),
    )
    t.model = oftsurgery.fold(base, folder)
    t.watched.append(base)
    return base, folder


@case(
    "unfold with neither",
    e.StateError,
    r"unfold needs one of the adapter, the base and an undo record, but 0 of these were given Remedy: call unfold\(model, adapter\)",
)
def _(t: Bench) -> Callable[[], object]:
    folded(t)
    return lambda: oftsurgery.unfold(t.model)


@case("unfold with both", e.StateError, r"unfold needs one of the adapter, the base and an undo")
def _(t: Bench) -> Callable[[], object]:
    base, folder = folded(t)
    return lambda: oftsurgery.unfold(t.model, folder, base=base)


@case(
    "unfold with another adapter",
    e.StateError,
    r"the model's last fold is of .*folded, not of .*adapter Remedy: unfold the last fold first",
)
def _(t: Bench) -> Callable[[], object]:
    folded(t)
    other = t.adapter()
    return lambda: oftsurgery.unfold(t.model, other)


@case(
    "unfold without a record",
    e.StateError,
    r"the model has no record of a fold Remedy: give the adapter in place of the base",
)
def _(t: Bench) -> Callable[[], object]:
    base = copy.deepcopy(t.model)
    t.watched.append(base)
    return lambda: oftsurgery.unfold(t.model, base=base)


@case(
    "restore from another base",
    e.IntegrityError,
    r"the base's weight is not the one that was folded \[module 'layers\.0\.q_proj', format float32\]",
)
def _(t: Bench) -> Callable[[], object]:
    base, _ = folded(t)
    base.layers[0].q_proj.weight.data[0, 0] += 1  # type: ignore[index,union-attr]
    return lambda: oftsurgery.unfold(t.model, base=base)


@case(
    "restore from a base with another bias",
    e.IntegrityError,
    r"the base's tensor is not the one that was replaced \[tensor 'head\.bias'\]",
)
def _(t: Bench) -> Callable[[], object]:
    base, _ = folded(t)
    base.head.bias.data[0] += 1  # type: ignore[index,union-attr,operator]
    return lambda: oftsurgery.unfold(t.model, base=base)


@case(
    "restore from a base without the module",
    e.MatchError,
    r"the base lacks a folded module \[module 'layers\.0\.q_proj'\] Remedy: give the model",
)
def _(t: Bench) -> Callable[[], object]:
    folded(t)
    return lambda: oftsurgery.unfold(t.model, base=nn.Linear(3, 3))


@case(
    "unfold by a singular rotation",
    e.NonFiniteError,
    r"singular or too ill-conditioned to solve \[module 'layers\.0\.q_proj'\]",
)
def _(t: Bench) -> Callable[[], object]:
    folder = t.adapter({KEY.format("layers.0.q_proj"): rows(32, 2, value=1.0)})  # five terms at θ = 1: R = 0
    t.model = oftsurgery.fold(t.model, folder)
    return lambda: oftsurgery.unfold(t.model, folder)


# --- what holds for all -----------------------------------------------------------------------------------------------


def test_there_are_enough_causes() -> None:
    assert len(CASES) >= 60
    assert len({message for _, message, _ in CASES.values()}) >= 60


@pytest.mark.parametrize("name", CASES)
def test_refused_and_nothing_changed(
    name: str, tmp_path: Path, snapshot: Callable[[nn.Module], dict[str, Any]]
) -> None:
    error, message, build = CASES[name]
    bench = Bench(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's and torch's own, while the case is built
        act = build(bench)
    before = [snapshot(m) for m in (bench.model, *bench.watched)]
    record = bench.model.__dict__.get("oftsurgery")
    with pytest.raises(error, match=message) as caught:
        act()
    assert type(caught.value) is error
    assert caught.value.remedy, "an error without a remedy"
    assert str(caught.value).isprintable()
    assert [snapshot(m) for m in (bench.model, *bench.watched)] == before
    assert bench.model.__dict__.get("oftsurgery") is record


INPLACE = [name for name, (_, _, build) in CASES.items() if not name.startswith(("unfold", "restore"))]


@pytest.mark.parametrize("name", INPLACE)
def test_refused_in_place_and_nothing_changed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Callable[..., dict[str, Any]]
) -> None:
    error, message, build = CASES[name]
    monkeypatch.setattr(
        Bench,
        "fold",
        lambda self, adapter=None, **options: lambda: oftsurgery.fold(self.model, adapter, inplace=True, **options),
    )
    bench = Bench(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        act = build(bench)
    before = snapshot(bench.model)
    with pytest.raises(error, match=message):
        act()
    assert snapshot(bench.model) == before


def test_the_bench_itself_folds(tmp_path: Path, snapshot: Callable[[nn.Module], dict[str, Any]]) -> None:
    """Without the fault, the same steps succeed, and the snapshot sees what a fold does."""
    bench = Bench(tmp_path)
    before = snapshot(bench.model)
    bench.on("layers.1.q_proj")()
    assert snapshot(bench.model) == before
    bench.fold(tmp_path / "adapter", inplace=True)()
    assert snapshot(bench.model) != before
