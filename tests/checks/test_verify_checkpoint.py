"""`verify_checkpoint` passes right folds of every kind, and finds one wrong tensor of any kind, by name.

What is wrong is made here by hand, and the records are taken away, whose hashes would tell it: it is found from base and
adapter alone.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    GROUPED,
    MODELS,
    SIZES,
    adapted,
    bnb_config,
    build,
    linearised,
    load,
    quiet_fold,
    quiet_transformers,
    rotations_in,
    scaled_up,
    tensors,
)
from independent import fold
from models import BART
from safetensors.torch import load_file, save_file
from torch import Tensor

import oftsurgery
from oftsurgery.checks import verify_checkpoints
from oftsurgery.cli import main as cli
from oftsurgery.files.checkpoint import open_checkpoint
from oftsurgery.formats import codecs

Tensors = dict[str, Tensor]

UMT5 = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
MAMBA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 1,
    "time_step_rank": 16,
    "pad_token_id": 0,
}
NOMIC = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
#: name → (class, config)
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (cls, config) for name, (cls, config, _) in MODELS.items()},
    "tied": ("LlamaForCausalLM", SIZES | GROUPED | {"tie_word_embeddings": True}),
    "mlm": ("BertForMaskedLM", SIZES),
    "bart": ("BartForConditionalGeneration", BART),
    "umt5": ("UMT5ForConditionalGeneration", UMT5),
    "mamba": ("MambaForCausalLM", MAMBA),
    "nomic": ("NomicBertModel", NOMIC),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft, of adapters on tied layers
        yield


class Places:
    """Bases and adapters, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base, self.adapter = cache(self._base), cache(self._adapter)

    def _model(self, name: str) -> Any:
        cls, config = CLASSES[name]
        torch.manual_seed(0)
        model_class: Any = getattr(transformers, cls)
        return scaled_up(model_class(model_class.config_class(**config))).eval()

    def _base(self, name: str, kind: str = "plain") -> Path:
        """A folder as transformers saves it: ``"plain"``, or ``"nf4"``, ``"nf4 double"``, ``"fp4"``, ``"int8"``."""
        folder = self.root / f"{name} {kind}"
        if kind == "plain":
            self._model(name).save_pretrained(folder)
        else:
            config = bnb_config(kind.split()[0], double="double" in kind)
            load(self.base(name), CLASSES[name][0], quantization_config=config).save_pretrained(folder)
        return folder

    def _adapter(self, name: str, *targets: str, seed: int = 0, **settings: Any) -> Path:
        """As peft saves it; what else is trained differs from the base too."""
        folder = self.root / f"{name} {targets} {seed} {settings}"
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        model = adapted(linearised(self._model(name)), list(targets), seed=seed, **settings)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if parameter.requires_grad and "oft_" not in path:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
        model.save_pretrained(folder)
        return folder


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("places"))


def written(folder: Path, like: Path, found: Mapping[str, Tensor], **config: Any) -> Path:
    """A folder of these tensors, with the config of ``like`` but for ``config``, and without a record."""
    folder.mkdir()
    save_file({n: t.contiguous().clone() for n, t in found.items()}, folder / "model.safetensors", {"format": "pt"})
    text = (like / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(json.loads(text) | config))
    return folder


# --- right folds ------------------------------------------------------------------------------------------------------

#: case → (model, kind of base, targets, settings of the adapter, of the fold, how many tensors of which kind)
RIGHT: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "plain": ("llama", "plain", ("q_proj", "down_proj"), {}, {}, {"rotated": 4, "copied": 17}),
    "as bf16": ("llama", "plain", ("q_proj",), {}, {"format": "bf16"}, {"rotated": 2, "converted": 19}),
    "nf4": ("llama", "nf4 double", ("q_proj", "up_proj"), {}, {}, {"rotated": 4, "copied": 17}),
    "fp4": ("llama", "fp4", ("q_proj",), {}, {}, {"rotated": 2, "copied": 19}),
    "int8": ("llama", "int8", ("q_proj",), {}, {}, {"rotated": 2, "copied": 19}),
    "nf4 to fp16": ("llama", "nf4", ("q_proj",), {}, {"format": "fp16"}, {"rotated": 2, "converted": 19}),
    "int8 to fp32": (
        "llama",
        "int8",
        ("q_proj",),
        {},
        {"format": "fp32"},
        {"rotated": 2, "copied": 7, "converted": 12},
    ),
    "to nf4": (
        "llama",
        "plain",
        ("q_proj",),
        {},
        {"format": "nf4", "double_quant": True},
        {"rotated": 2, "copied": 7, "converted": 12},
    ),
    "to int8": ("t5", "plain", ("q", "wo"), {}, {"format": "int8"}, {}),
    "to nf4, loaded as bf16": (
        "llama",
        "plain",
        ("q_proj",),
        {},
        {"format": "nf4", "load_dtype": "bfloat16"},
        {"rotated": 2, "converted": 19},
    ),
    "by way of nf4": ("bert", "plain", ("query",), {}, {"format": "bf16", "quantize": "nf4"}, {}),
    "the original rotated": ("llama", "plain", ("q_proj",), {}, {"format": "nf4", "fold_into": "original"}, {}),
    "modules skipped": (
        "llama",
        "plain",
        ("q_proj",),
        {},
        {"format": "nf4", "skip_modules": ["q_proj", "lm_head"]},
        {},
    ),
    "tied": ("tied", "plain", ("q_proj",), {}, {}, {"rotated": 2, "copied": 18, "tied": 1}),
    "tied, as bf16": ("tied", "plain", ("q_proj",), {}, {"format": "bf16"}, {"rotated": 2, "converted": 18, "tied": 1}),
    "tied, nf4": ("tied", "nf4", ("q_proj",), {}, {}, {"rotated": 2, "copied": 18, "tied": 1}),
    "a tied head": ("tied", "plain", ("lm_head",), {}, {}, {"rotated": 1}),
    "Conv1D": ("gpt2", "plain", ("c_attn", "c_proj"), {}, {}, {"rotated": 6, "copied": 22, "tied": 1}),
    "Conv1D, nf4": ("gpt2", "nf4", ("c_attn",), {}, {}, {}),
    "Conv1D, nf4 to fp32": ("gpt2", "nf4", ("c_attn",), {}, {"format": "fp32"}, {}),
    "Conv1D to int8": ("gpt2", "plain", ("c_attn",), {}, {"format": "int8"}, {}),
    "three tied": ("t5", "plain", ("q", "wi"), {}, {}, {"tied": 3}),
    "an embedding": ("bert", "plain", ("word_embeddings", "query"), {}, {}, {}),
    "biases": ("bert", "plain", ("query",), {"bias": "all"}, {}, {"replaced": 19, "rotated": 2, "copied": 20}),
    "a head": (
        "bert",
        "plain",
        ("query",),
        {"modules_to_save": ("classifier",)},
        {"format": "bf16"},
        {"replaced": 2, "rotated": 2},
    ),
    "exact Cayley": ("llama", "plain", ("q_proj",), {"use_cayley_neumann": False}, {}, {}),
    "COFT, shared": ("llama", "plain", ("q_proj",), {"coft": True, "eps": 1e-3, "block_share": True}, {}, {}),
    "in shards": ("llama", "nf4", ("q_proj",), {}, {"max_shard_size": "30KB"}, {"rotated": 2, "copied": 19}),
    "beside a split tensor": ("nomic", "plain", ("down_proj",), {}, {}, {"rotated": 1}),
}


@pytest.mark.parametrize("record", [True, False], ids=["with its record", "without"])
@pytest.mark.parametrize("case", RIGHT)
def test_right_folds_pass(places: Places, tmp_path: Path, case: str, record: bool) -> None:
    name, kind, targets, settings, options, counts = RIGHT[case]
    if not record and {"quantize", "fold_into"} & options.keys():
        pytest.skip("only the record knows")
    base, adapter = places.base(name, kind), places.adapter(name, *targets, **settings)
    quiet_fold(base, adapter, tmp_path / "out", **options)
    if not record:
        (tmp_path / "out" / "oftsurgery.json").unlink()
    report = oftsurgery.verify_checkpoint(tmp_path / "out", base, adapter)
    assert report.ok, (report.wrong, report.config)
    assert counts.items() <= report.looked_at.items(), report.looked_at
    assert len(report.modules) == report.looked_at["rotated"] == len(rotations_in(adapter))
    model = load(tmp_path / "out", CLASSES[name][0])
    quantised = {n for n in report.tensors if "SCB" in n or ".weight." in n}
    assert quantised == set()
    if not any(hasattr(m, "quant_state") or hasattr(m, "state") for m in model.modules()):
        assert set(report.tensors) == set(model.state_dict())


def test_chains_pass_in_their_order_alone(places: Places, tmp_path: Path) -> None:
    base, first, second = places.base("llama"), *(places.adapter("llama", "q_proj", seed=seed) for seed in (0, 1))
    quiet_fold(base, [first, second], tmp_path / "out")
    assert oftsurgery.verify_checkpoint(tmp_path / "out", base, [first, second]).ok
    report = oftsurgery.verify_checkpoint(tmp_path / "out", base, [second, first])
    assert set(report.wrong) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


@pytest.mark.parametrize("variant", ["peft-0.13.2", "peft-0.15.2", "peft-0.21.2"])
def test_older_adapters_on_a_checkpoint_of_no_class(tmp_path: Path, variant: str) -> None:
    golden = Path(__file__).parents[1] / "golden" / variant
    (tmp_path / "base").mkdir()
    shutil.copy(golden / "base.safetensors", tmp_path / "base" / "model.safetensors")
    for adapter in sorted(p.parent for p in golden.glob("*/adapter_config.json")):
        quiet_fold(tmp_path / "base", adapter, tmp_path / adapter.name)
        report = oftsurgery.verify_checkpoint(tmp_path / adapter.name, tmp_path / "base", adapter)
        assert report.ok, (adapter, report.wrong)
        assert set(report.tensors) == set(tensors(tmp_path / "base"))
        found = tensors(tmp_path / adapter.name)
        name = next(n for n in found if report.tensors[n].kind == "copied")
        found[name][0] += 1
        save_file(found, tmp_path / adapter.name / "model.safetensors", {"format": "pt"})
        report = oftsurgery.verify_checkpoint(tmp_path / adapter.name, tmp_path / "base", adapter)
        assert report.wrong == {name: "the tensor differs from the source's"}


@pytest.mark.parametrize("targets", ["bare", "whole"])
def test_an_adapter_of_the_bare_model_or_of_one_with_a_head(places: Places, tmp_path: Path, targets: str) -> None:
    model = build("llama") if targets == "whole" else build("llama").model
    adapted(model, ["q_proj"]).save_pretrained(tmp_path / "adapter")
    build("llama").model.save_pretrained(tmp_path / "bare")
    for base in (places.base("llama"), tmp_path / "bare"):
        quiet_fold(base, tmp_path / "adapter", tmp_path / f"out {base.name}")
        report = oftsurgery.verify_checkpoint(tmp_path / f"out {base.name}", base, tmp_path / "adapter")
        assert report.ok
        assert report.looked_at["rotated"] == 2
        assert next(iter(report.modules)).startswith("model.") == (targets == "whole")


def test_experts_that_the_checkpoint_holds_one_by_one(tmp_path: Path) -> None:
    """An adapter that names the files' tensors, which the model merges: those are looked at as they are stored."""
    config = SIZES | GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**config)).save_pretrained(tmp_path / "base")
    path = "model.layers.0.block_sparse_moe.experts.1.w1"
    (tmp_path / "adapter").mkdir()
    row = {f"base_model.model.{path}.oft_R.weight": 0.03 * torch.randn(4, 120)}
    save_file(row, tmp_path / "adapter" / "adapter_model.safetensors")
    peft = {"peft_type": "OFT", "use_cayley_neumann": False, "peft_version": "0.21.2"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(peft))
    places = (tmp_path / "base", tmp_path / "adapter")
    quiet_fold(*places, tmp_path / "out")
    report = oftsurgery.verify_checkpoint(tmp_path / "out", *places)
    assert report.ok, report.wrong
    assert report.tensors[f"{path}.weight"].kind == "rotated"
    # those of a group are looked at one by one, the other group as the model has it
    assert {n for n in report.tensors if "experts" in n} == {
        *(f"model.layers.0.block_sparse_moe.experts.{i}.{w}.weight" for i in (0, 1) for w in ("w1", "w3")),
        "model.layers.0.mlp.experts.down_proj",
    }
    found = tensors(tmp_path / "out")
    other = path.replace("w1", "w2")
    found[f"{other}.weight"][0, 0] += 1
    written(tmp_path / "wrong", tmp_path / "out", found)
    wrong = oftsurgery.verify_checkpoint(tmp_path / "wrong", *places).wrong
    assert set(wrong) == {"model.layers.0.mlp.experts.down_proj"}


@pytest.mark.parametrize("kind", ["plain", "nf4 double", "int8"])
def test_a_fold_in_memory_that_was_exported(places: Places, tmp_path: Path, kind: str) -> None:
    """Of a float32 base that was loaded as bfloat16, and what that base is."""
    base, adapter, dtype = places.base("gpt2"), places.adapter("gpt2", "c_attn"), torch.bfloat16
    settings = {} if kind == "plain" else {"quantization_config": bnb_config(kind.split()[0], double="double" in kind)}
    folded = fold(load(base, "GPT2LMHeadModel", dtype=dtype, **settings), adapter)
    oftsurgery.export_safetensors(folded, tmp_path / "out")
    report = oftsurgery.verify_checkpoint(tmp_path / "out", base, adapter)
    assert report.ok, report.wrong
    assert report.looked_at == {"rotated": 2, "converted": 26, "tied": 1}


# --- one wrong tensor of each kind ------------------------------------------------------------------------------------

Q, K, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"
BIAS = "bert.encoder.layer.0.output.dense.bias"
Damage = Callable[[Tensors, dict[str, Any]], object]


def off(name: str, by: float = 1.0) -> Damage:
    """One element of a tensor is another."""

    def damage(found: Tensors, config: dict[str, Any]) -> None:
        flat = found[name].reshape(-1)
        flat[1] = flat[1] ^ 1 if not flat.dtype.is_floating_point else flat[1] + by
        found[name] = flat.reshape(found[name].shape)

    return damage


def state(name: str, **fields: Any) -> Damage:
    """Other values in the JSON of a 4-bit weight."""

    def damage(found: Tensors, config: dict[str, Any]) -> None:
        key = next(n for n in found if n.startswith(f"{name}.quant_state"))
        blob = json.loads(bytes(found[key].tolist())) | fields
        found[key] = torch.tensor(list(json.dumps(blob).encode()), dtype=torch.uint8)

    return damage


def unquantised(name: str) -> Damage:
    """A quantised weight is stored plain, and the config does not know of it."""

    def damage(found: Tensors, config: dict[str, Any]) -> None:
        for n in [n for n in found if n.startswith(f"{name}.")]:
            del found[n]
        found[name] = torch.zeros(64, 64)

    return damage


LLAMA = ("llama", ("q_proj",), {})
BERT = ("bert", ("query",), {"bias": "all", "modules_to_save": ("classifier",)})
TIED = ("tied", ("q_proj",), {})

#: case → (model, targets and settings of the adapter), kind of base, options of the fold, what is done to the folder's
#: tensors and config, which tensors are wrong, a part of what is said of the first
WRONG: dict[str, tuple[tuple[str, tuple[str, ...], dict[str, Any]], str, dict[str, Any], Damage, set[str], str]] = {
    "rotated": (LLAMA, "plain", {}, off(Q), {Q}, "the relative error is "),
    "rotated, a shape": (LLAMA, "plain", {}, lambda t, c: t.update({Q: t[Q][:, :32]}), {Q}, "the weight's shape is"),
    "rotated, NaN": (LLAMA, "plain", {}, off(Q, float("nan")), {Q}, "NaN"),
    "rotated, a dtype": (
        LLAMA,
        "plain",
        {},
        lambda t, c: t.update({Q: t[Q].double()}),
        {Q},
        "the tensor is stored as torch.float64",
    ),
    "rotated, missing": (
        LLAMA,
        "plain",
        {},
        lambda t, c: t.pop(Q),
        {Q},
        "lacks the tensor, and transformers would fill it with random numbers",
    ),
    "copied": (LLAMA, "plain", {}, off(NORM, 1e-6), {NORM}, "the tensor differs from the source's"),
    "copied, a weight": (LLAMA, "plain", {}, off(K, 1e-6), {K}, "the tensor differs from the source's"),
    "copied, a dtype": (
        LLAMA,
        "plain",
        {},
        lambda t, c: t.update({NORM: t[NORM].half()}),
        {NORM},
        "the tensor is stored as torch.float16",
    ),
    "copied, missing": (
        LLAMA,
        "plain",
        {},
        lambda t, c: t.pop(NORM),
        {NORM},
        "lacks the tensor, and transformers would fill it with random numbers",
    ),
    "added": (
        LLAMA,
        "plain",
        {},
        lambda t, c: t.update({"x": torch.ones(2)}),
        {"x"},
        "the source does not have the tensor",
    ),
    "cast": (LLAMA, "plain", {"format": "bf16"}, off(K), {K}, "the tensor differs from the source's"),
    "cast, not cast": (
        LLAMA,
        "plain",
        {"format": "fp16"},
        lambda t, c: t.update({NORM: t[NORM].bfloat16()}),
        {NORM},
        "the tensor is stored as torch.bfloat16",
    ),
    "dequantised": (LLAMA, "nf4", {"format": "fp32"}, off(K, 1e-3), {K}, "the tensor differs from the source's"),
    "replaced, a bias": (
        BERT,
        "plain",
        {},
        off(BIAS, 1e-3),
        {BIAS},
        "the tensor does not hold the adapter's own values",
    ),
    "replaced, a head": (
        BERT,
        "plain",
        {},
        off("classifier.weight"),
        {"classifier.weight"},
        "the tensor does not hold the adapter's own values",
    ),
    "tied, to what is wrong": (
        TIED,
        "plain",
        {},
        off("model.embed_tokens.weight"),
        {"model.embed_tokens.weight", "lm_head.weight"},
        "the tensor differs from the source's",
    ),
    "tied, no more": (
        TIED,
        "plain",
        {},
        lambda t, c: t.update({"lm_head.weight": torch.ones(64, 64)}),
        {"lm_head.weight"},
        "the tensor differs from the source's",
    ),
    "tied, the flag is gone": (
        TIED,
        "plain",
        {},
        lambda t, c: c.update(tie_word_embeddings=False),
        {"lm_head.weight"},
        "lacks the tensor, and transformers",
    ),
    "quantised": (LLAMA, "nf4", {}, off(K), {K}, "the tensor weight differs from the source's"),
    "quantised, absmax": (LLAMA, "nf4", {}, off(f"{K}.absmax"), {K}, "the tensor weight.absmax differs"),
    "quantised, quant_map": (LLAMA, "nf4", {}, off(f"{K}.quant_map", 1e-4), {K}, "the tensor weight.quant_map differs"),
    "quantised, state": (
        LLAMA,
        "nf4",
        {},
        state(K, dtype="bfloat16"),
        {K},
        "the tensor weight.quant_state.bitsandbytes__nf4 differs",
    ),
    "quantised, a companion missing": (
        LLAMA,
        "nf4",
        {},
        lambda t, c: t.pop(f"{K}.quant_map"),
        {K},
        "the tensor weight.quant_map is missing",
    ),
    "quantised, statistics missing": (
        LLAMA,
        "nf4",
        {},
        lambda t, c: t.pop(f"{K}.absmax"),
        {K},
        "lacks this tensor of statistics",
    ),
    "int8, SCB": (LLAMA, "int8", {}, off(f"{K[:-6]}SCB"), {K}, "the tensor SCB differs"),
    "int8, SCB missing": (
        LLAMA,
        "int8",
        {},
        lambda t, c: t.pop(f"{K[:-6]}SCB"),
        {K},
        "lacks its SCB statistics",
    ),
    "rotated nf4": (LLAMA, "nf4", {}, off(f"{Q}.absmax"), {Q}, "the relative error is "),
    "rotated nf4, quant_map": (
        LLAMA,
        "nf4",
        {},
        off(f"{Q}.quant_map", 1e-4),
        {Q},
        "the tensor weight.quant_map differs from its format's",
    ),
    "rotated nf4, nested map": (LLAMA, "nf4 double", {}, off(f"{Q}.nested_quant_map", 1e-3), {Q}, ""),
    "rotated nf4, state": (
        LLAMA,
        "nf4",
        {},
        state(Q, dtype="bfloat16"),
        {Q},
        "the weight is stored with other settings",
    ),
    "rotated nf4, no map": (
        LLAMA,
        "nf4",
        {},
        lambda t, c: t.pop(f"{Q}.quant_map"),
        {Q},
        "the tensor weight.quant_map is missing",
    ),
    "converted": (LLAMA, "plain", {"format": "nf4"}, off(K), {K}, "the tensor weight"),
    "converted, quant_map": (
        LLAMA,
        "plain",
        {"format": "nf4"},
        off(f"{K}.quant_map", 1e-4),
        {K},
        "the tensor weight.quant_map differs",
    ),
    "converted, int8": (LLAMA, "plain", {"format": "int8"}, off(f"{K[:-6]}SCB", 1e-4), {K}, "the tensor SCB differs"),
    "beside what is quantised": (
        LLAMA,
        "plain",
        {"format": "nf4"},
        off(NORM, 1e-6),
        {NORM},
        "the tensor differs from the source's",
    ),
    "plain among quantised ones": (LLAMA, "nf4", {}, unquantised(K), {K}, "the model cannot run"),
    "quantised, the config does not know": (
        LLAMA,
        "nf4",
        {},
        lambda t, c: c["quantization_config"].update(llm_int8_skip_modules=["k_proj"]),
        {K, K.replace("0", "1"), "lm_head.weight"},
        "the model cannot run",
    ),
    "Conv1D": (
        ("gpt2", ("c_attn",), {}),
        "plain",
        {},
        lambda t, c: t.update({"transformer.h.0.mlp.c_fc.weight": t["transformer.h.0.mlp.c_fc.weight"].t()}),
        {"transformer.h.0.mlp.c_fc.weight"},
        "the tensor differs from the source's",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_wrong_tensor_is_found_and_named(
    places: Places, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (name, targets, settings), kind, options, damage, wrong, said = WRONG[case]
    base, adapter = places.base(name, kind), places.adapter(name, *targets, **settings)
    quiet_fold(base, adapter, tmp_path / "out", **options)
    found, config = tensors(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    damage(found, config)
    folder = written(tmp_path / "wrong", tmp_path / "out", found, **config)
    report = oftsurgery.verify_checkpoint(folder, base, adapter)
    assert not report.ok
    assert set(report.wrong) == wrong, report.wrong
    assert said in next(iter(report.wrong.values()))
    assert report.config is None
    assert cli.main(["verify", str(folder), str(base), str(adapter)]) == 1
    out = capsys.readouterr().out
    assert all(f"{n}: {why}" in out for n, why in report.wrong.items())
    assert f"; {len(wrong)} of them wrong" in out
    assert report.to_dict()["tensors"][min(wrong)]["why"] == report.wrong[min(wrong)]


# --- folds that were wrong and passed ---------------------------------------------------------------------------------


def turned(base: Path, adapter: Path, *but: str) -> Tensors:
    """The base's tensors, those of the adapter's modules rotated in float64, ``but`` for some."""
    found = tensors(base)
    for path, rotation in rotations_in(adapter).items():
        if not path.endswith(but or ("\0",)):
            found[f"{path}.weight"] = (found[f"{path}.weight"].double() @ rotation.T).float()
    return found


def own(adapter: Path, module: str) -> Tensor:
    (value,) = (t for n, t in load_file(adapter / "adapter_model.safetensors").items() if f"{module}.weight" in n)
    return value


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("saved", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens")], ids=" and ".join)
def test_what_is_trained_of_two_that_are_tied(places: Places, tmp_path: Path, saved: tuple[str, ...]) -> None:
    """peft copies a module of ``modules_to_save``: what was tied to it stays as it was."""
    base, adapter = places.base("tied"), places.adapter("tied", "q_proj", modules_to_save=saved)
    found = turned(base, adapter)
    found[HEAD] = own(adapter, "lm_head") if "lm_head" in saved else found[EMBED]
    found[EMBED] = own(adapter, "embed_tokens") if "embed_tokens" in saved else found[EMBED]
    for flag in (True, False):  # with the flag and two different tensors, transformers ties nothing
        folder = written(tmp_path / f"right {flag}", base, found, tie_word_embeddings=flag)
        report = oftsurgery.verify_checkpoint(folder, base, adapter)
        assert report.ok, report.wrong
        assert report.looked_at == {"rotated": 2, "replaced": len(saved), "copied": 19 - len(saved)}
    # the values in the one tensor that is there, and still tied: what fold_checkpoint wrote
    one = {n: t for n, t in found.items() if n != HEAD} | {EMBED: found[HEAD if "lm_head" in saved else EMBED]}
    report = oftsurgery.verify_checkpoint(written(tmp_path / "wrong", base, one), base, adapter)
    assert set(report.wrong) == {HEAD if saved == ("embed_tokens",) else EMBED}


def test_a_head_that_is_untied_by_a_flag_that_ties_others_too(places: Places, tmp_path: Path) -> None:
    base, adapter = places.base("bart"), places.adapter("bart", "q_proj", modules_to_save=("lm_head",))
    found = turned(base, adapter) | {HEAD: own(adapter, "lm_head")}
    others = [f"model.{part}.embed_tokens.weight" for part in ("encoder", "decoder")]
    report = oftsurgery.verify_checkpoint(
        written(tmp_path / "wrong", base, found, tie_word_embeddings=False), base, adapter
    )
    assert report.wrong == dict.fromkeys(
        others, "the folded checkpoint lacks the tensor, and transformers would fill it with random numbers"
    )
    found |= dict.fromkeys(others, found["model.shared.weight"])
    right = written(tmp_path / "right", base, found, tie_word_embeddings=False)
    assert oftsurgery.verify_checkpoint(right, base, adapter).ok
    model = load(right, "BartForConditionalGeneration")
    assert torch.equal(model.model.encoder.embed_tokens.weight, found["model.shared.weight"])


def test_a_flag_that_the_model_computes_by(places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = places.base("umt5"), places.adapter("umt5", "q", modules_to_save=("lm_head",))
    found = turned(base, adapter) | {HEAD: own(adapter, "lm_head")}
    shared = found["shared.weight"]
    found |= {f"{part}.embed_tokens.weight": shared for part in ("encoder", "decoder")}
    assert oftsurgery.verify_checkpoint(written(tmp_path / "right", base, found), base, adapter).ok
    wrong = written(tmp_path / "wrong", base, found, tie_word_embeddings=False)
    report = oftsurgery.verify_checkpoint(wrong, base, adapter)
    assert (report.ok, report.wrong) == (False, {})
    assert report.config is not None
    assert "tie_word_embeddings" in report.config
    assert report.to_dict()["config"] == report.config
    assert cli.main(["verify", str(wrong), str(base), str(adapter)]) == 1
    assert f"config.json: {report.config}" in capsys.readouterr().out


def test_one_part_of_a_tensor_that_the_model_splits(places: Places, tmp_path: Path) -> None:
    """q_proj is the first third of NomicBert's Wqkv: a rotation of the whole turns k and v too."""
    base, adapter = places.base("nomic"), places.adapter("nomic", "q_proj")
    (rotation,) = rotations_in(adapter).values()
    found = tensors(base)
    (name,) = (n for n in found if "Wqkv" in n)
    whole = (found[name].double() @ rotation.T).float()
    right = written(tmp_path / "right", base, found | {name: torch.cat([whole[:64], found[name][64:]])})
    report = oftsurgery.verify_checkpoint(right, base, adapter)
    assert report.ok, report.wrong
    assert report.tensors["layers.0.self_attn.q_proj.weight"].kind == "rotated"
    report = oftsurgery.verify_checkpoint(written(tmp_path / "wrong", base, found | {name: whole}), base, adapter)
    assert report.wrong == dict.fromkeys(
        (f"layers.0.self_attn.{n}_proj.weight" for n in "kv"), "the tensor differs from the source's"
    )
    # quantised as one tensor, which transformers cannot split
    quantised = oftsurgery.WeightFormat("nf4", (192, 64), blocksize=64)
    parts = quantised.kind.to_checkpoint(name, codecs.encode(whole, quantised))
    folder = written(tmp_path / "quantised", base, {n: t for n, t in found.items() if n != name} | parts)
    report = oftsurgery.verify_checkpoint(folder, base, adapter)
    assert set(report.wrong) == {name, *(f"layers.0.self_attn.{n}_proj.weight" for n in "qkv")}


def test_a_trained_head_that_is_plain_where_the_config_has_it_quantised(places: Places, tmp_path: Path) -> None:
    base, adapter = places.base("bert"), places.adapter("bert", "query", modules_to_save=("classifier",))
    quiet_fold(base, places.adapter("bert", "query"), tmp_path / "out", format="nf4")
    found = tensors(tmp_path / "out")
    assert any(n.startswith("classifier.weight.") for n in found)
    found = {n: t for n, t in found.items() if not n.startswith("classifier")}
    values = {n: t for n, t in load_file(adapter / "adapter_model.safetensors").items() if "classifier" in n}
    found |= {n.removeprefix("base_model.model."): t for n, t in values.items()}
    report = oftsurgery.verify_checkpoint(written(tmp_path / "wrong", tmp_path / "out", found), base, adapter)
    assert set(report.wrong) == {"classifier.weight"}
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    settings["llm_int8_skip_modules"] = ["classifier"]
    right = written(tmp_path / "right", tmp_path / "out", found, quantization_config=settings)
    assert oftsurgery.verify_checkpoint(right, base, adapter).ok


def test_a_trained_bias_goes_wherever_it_is_tied_to(places: Places, tmp_path: Path) -> None:
    base, adapter = places.base("mlm"), places.adapter("mlm", "query", bias="all")
    saved = load_file(adapter / "adapter_model.safetensors")
    biases = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): t for n, t in saved.items() if "bias" in n
    }
    right = {n: biases.get(n, t) for n, t in turned(base, adapter).items()}
    report = oftsurgery.verify_checkpoint(written(tmp_path / "right", base, right), base, adapter)
    assert report.ok, report.wrong
    assert {report.tensors[f"cls.predictions.{n}"].kind for n in ("bias", "decoder.bias")} == {"replaced"}
    right["cls.predictions.bias"] = tensors(base)["cls.predictions.bias"]
    report = oftsurgery.verify_checkpoint(written(tmp_path / "wrong", base, right), base, adapter)
    assert set(report.wrong) == {"cls.predictions.bias", "cls.predictions.decoder.bias"}


def test_a_module_that_is_read_and_not_called_is_not_rotated(places: Places, tmp_path: Path) -> None:
    base, adapter = places.base("mamba"), places.adapter("mamba", "dt_proj", "out_proj")
    folder = written(tmp_path / "out", base, turned(base, adapter, "dt_proj"))
    assert oftsurgery.verify_checkpoint(folder, base, adapter).ok
    asked = []

    def idle(model: Any, path: str) -> bool:
        asked.append(type(model.get_submodule(path)).__name__)
        return path.endswith("dt_proj")

    parts = (open_checkpoint(folder), open_checkpoint(base), [oftsurgery.load_adapter(adapter)])
    report = verify_checkpoints.check_checkpoint(*parts)
    assert set(report.wrong) == {"backbone.layers.0.mixer.dt_proj.weight"}
    report = verify_checkpoints.check_checkpoint(*parts, idle=idle)
    assert report.ok, report.wrong
    assert list(report.modules) == ["backbone.layers.0.mixer.out_proj"]
    assert report.tensors["backbone.layers.0.mixer.dt_proj.weight"].kind == "copied"
    assert asked == ["Linear", "Linear"]


# --- without transformers, and what does not belong together ----------------------------------------------------------


def test_without_transformers_names_are_those_in_the_files(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = places.base("gpt2"), places.adapter("gpt2", "c_attn")
    quiet_fold(base, adapter, tmp_path / "out")
    found = tensors(tmp_path / "out")
    name = "transformer.h.0.ln_1.bias"
    wrong = written(tmp_path / "wrong", base, found | {name: found[name] + 1})
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = oftsurgery.verify_checkpoint(tmp_path / "out", base, adapter)
    assert report.ok
    assert set(report.tensors) == set(found)
    assert set(oftsurgery.verify_checkpoint(wrong, base, adapter).wrong) == {name}


def test_a_base_and_an_adapter_that_do_not_belong_together(places: Places, tmp_path: Path) -> None:
    base, adapter = places.base("llama"), places.adapter("llama", "q_proj")
    with pytest.raises(
        oftsurgery.MatchError, match=r"names a tensor that the base does not have.*give the base that"
    ) as caught:
        oftsurgery.verify_checkpoint(base, places.base("bert"), adapter)
    assert caught.value.tensor == Q.replace("layers.0", "layers.0")
    build("llama", hidden_size=128, intermediate_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(oftsurgery.ShapeError, match="do not cover the 128 input features") as refused:
        oftsurgery.verify_checkpoint(tmp_path / "wide", tmp_path / "wide", adapter)
    assert refused.value.module == Q.removesuffix(".weight")
    twice = [places.adapter("bert", "query", seed=seed, bias="all") for seed in (0, 1)]
    with pytest.raises(oftsurgery.MatchError, match="two adapters bring their own values for one tensor"):
        oftsurgery.verify_checkpoint(places.base("bert"), places.base("bert"), twice)


def test_a_record_that_says_nonsense(places: Places, tmp_path: Path) -> None:
    base, adapter = places.base("llama"), places.adapter("llama", "q_proj")
    quiet_fold(base, adapter, tmp_path / "out", format="nf4")
    record = json.loads((tmp_path / "out" / "oftsurgery.json").read_text())
    for field, value in (("skip_modules", "["), ("skip_modules", '["("]'), ("skip_modules", "7"), ("dtype", "load")):
        said = record | {"base": record["base"] | {field: value}}
        (tmp_path / "out" / "oftsurgery.json").write_text(json.dumps(said))
        if value in ("7", "load"):
            assert oftsurgery.verify_checkpoint(tmp_path / "out", base, adapter).ok
        elif value == "[":
            with pytest.raises(oftsurgery.CheckpointError, match="`skip_modules` is not valid JSON"):
                oftsurgery.verify_checkpoint(tmp_path / "out", base, adapter)


def test_the_page_shows_what_is_wrong(places: Places, tmp_path: Path) -> None:
    base, adapter = places.base("llama"), places.adapter("llama", "q_proj")
    quiet_fold(base, adapter, tmp_path / "out")
    right = oftsurgery.report(tmp_path / "out", verified=oftsurgery.verify_checkpoint(tmp_path / "out", base, adapter))
    assert "The check looked at all 21 tensors of the model." in right
    assert "Not as it should be." not in right
    found = tensors(tmp_path / "out")
    found[NORM] += 1
    found[Q][0] += 1
    save_file(found, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    report = oftsurgery.verify_checkpoint(tmp_path / "out", base, adapter)
    assert report.tensors[Q].why is not None
    assert "the record has another hash" in report.tensors[Q].why
    page = oftsurgery.report(tmp_path / "out", verified=json.loads(json.dumps(report.to_dict())))
    assert f"{NORM}: the tensor differs from the source&#39;s" in page
    assert page.count(f"{Q}: ") == 0  # which is in the table of weights that failed
    assert "Not as it should be." in page
