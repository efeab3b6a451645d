"""Adapters: what the installed peft writes, against its own live layers; dialects; and what no peft release writes."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import oftsurgery
from oftsurgery import rotations
from oftsurgery.adapters.from_peft import parse_adapter
from oftsurgery.errors import AdapterError, DialectError, MatchError, NonFiniteError, OFTSurgeryError, ShapeError

Config = Callable[..., dict[str, Any]]


# --- what the installed peft writes -----------------------------------------------------------------------------------


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=40, num_labels=3
    )
    return BertForSequenceClassification(config)


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=40,
        )
    )


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(100, 24), nn.Tanh(), nn.Linear(24, 10, bias=False))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(24, 10, 1), nn.ReLU(), nn.Conv2d(10, 4, 1, bias=False))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 24), nn.Linear(24, 5))


def tokens() -> Tensor:
    return torch.randint(1, 20, (2, 7))


@dataclasses.dataclass
class Case:
    build: Callable[[], nn.Module]
    config: dict[str, Any]
    inputs: Callable[[], Tensor]
    modules: int
    saved: int = 0
    warns: str | None = None


LINEARS = ["query", "value", "dense"]
CASES: dict[str, Case] = {
    "bert, list of names": Case(bert, {"target_modules": LINEARS, "oft_block_size": 8}, tokens, 11),
    "bert, regex": Case(bert, {"target_modules": r".*\.0\..*(query|key)", "oft_block_size": 8}, tokens, 2),
    "bert, all-linear, bias all": Case(bert, {"target_modules": "all-linear", "oft_block_size": 16, "bias": "all"}, tokens, 14, saved=19),
    "bert, bias of the layers": Case(bert, {"target_modules": ["query", "value"], "oft_block_size": 16, "bias": "oft_only"}, tokens, 4, saved=4),
    "bert, head saved": Case(bert, {"target_modules": ["query"], "oft_block_size": 16, "modules_to_save": ["classifier"]}, tokens, 2, saved=2),
    "bert, head saved and all biases": Case(
        bert, {"target_modules": ["query"], "oft_block_size": 16, "modules_to_save": ["classifier"], "bias": "all"}, tokens, 2, saved=20
    ),
    "bert, task type saves the head": Case(bert, {"target_modules": ["query"], "oft_block_size": 16, "task_type": "SEQ_CLS"}, tokens, 2, saved=2),
    "bert, module excluded": Case(bert, {"target_modules": LINEARS, "exclude_modules": ["pooler.dense"], "oft_block_size": 8}, tokens, 10),
    "bert, exclusion as regex": Case(bert, {"target_modules": LINEARS, "exclude_modules": r".*\.1\..*", "oft_block_size": 8}, tokens, 6),
    "llama, some layers": Case(llama, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2], "oft_block_size": 8}, tokens, 4),
    "llama, one layer": Case(
        llama, {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers", "oft_block_size": 8}, tokens, 1
    ),
    "llama, ranks": Case(llama, {"target_modules": ["q_proj", "down_proj"], "r": 4, "oft_block_size": 0}, tokens, 6),
    "llama, embeddings": Case(llama, {"target_modules": ["embed_tokens", "q_proj"], "oft_block_size": 8}, tokens, 4, saved=1, warns="embedding"),
    "llama, head": Case(llama, {"target_modules": ["lm_head"], "oft_block_size": 8}, tokens, 1, saved=1, warns="embedding"),
    "plain, sizes adjusted": Case(
        sequential, {"target_modules": ["0", "2"], "oft_block_size": 16}, lambda: torch.randn(4, 100), 2, warns="Adjusted `oft_block_size`"
    ),
    "plain, rank adjusted": Case(
        sequential, {"target_modules": ["0", "2"], "r": 8, "oft_block_size": 0}, lambda: torch.randn(4, 100), 2, warns="Adjusted `r`"
    ),
    "plain, one block for all": Case(
        sequential, {"target_modules": ["0", "2"], "oft_block_size": 4, "block_share": True}, lambda: torch.randn(4, 100), 2
    ),
    "plain, COFT": Case(sequential, {"target_modules": ["0", "2"], "oft_block_size": 4, "coft": True, "eps": 0.3}, lambda: torch.randn(4, 100), 2),
    "plain, COFT shared": Case(
        sequential,
        {"target_modules": ["0", "2"], "oft_block_size": 4, "coft": True, "eps": 0.1, "block_share": True},
        lambda: torch.randn(4, 100),
        2,
    ),
    "plain, exact": Case(
        sequential, {"target_modules": ["0", "2"], "oft_block_size": 4, "use_cayley_neumann": False}, lambda: torch.randn(4, 100), 2
    ),
    "plain, dropout of blocks": Case(
        sequential, {"target_modules": ["0", "2"], "oft_block_size": 4, "module_dropout": 0.5}, lambda: torch.randn(4, 100), 2
    ),
    "1×1 convolutions": Case(
        convolution, {"target_modules": ["0", "2"], "oft_block_size": 2}, lambda: torch.randn(2, 24, 5, 5), 2
    ),
    "embedding": Case(embedding, {"target_modules": ["0", "1"], "oft_block_size": 8}, lambda: torch.randint(0, 20, (2, 7)), 2),
} | {
    f"plain, {n} terms": Case(
        sequential, {"target_modules": ["0", "2"], "oft_block_size": 4, "num_cayley_neumann_terms": n}, lambda: torch.randn(4, 100), 2
    )
    for n in (0, 1, 2, 3, 4, 5, 6, 8)
}  # fmt: skip


@dataclasses.dataclass
class Trained:
    model: PeftModel
    inputs: Tensor


def train(case: Case, folder: Path) -> Trained:
    """A live peft model with random rotations, biases and heads, saved to ``folder``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each case's expected ones are asserted below
        live = get_peft_model(case.build(), OFTConfig(init_weights=False, **case.config)).eval()
    for parameter in live.parameters():
        if parameter.requires_grad and parameter.ndim != 2:
            parameter.data.normal_(std=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live.save_pretrained(folder)
    return Trained(live, case.inputs())


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return (out if isinstance(out, Tensor) else out.logits).double()


def live_layers(model: PeftModel) -> dict[str, Any]:
    return {path: m for path, m in model.base_model.model.named_modules() if hasattr(m, "oft_R")}


def live_matrix(layer: Any) -> Tensor:
    """peft's own rotation ``(features, features)``, computed by its code with the generator in float64."""
    held = layer.oft_R if "default" in layer.oft_R else layer.oft_embedding_R
    module = copy.deepcopy(held["default"]).double()
    with torch.no_grad():
        if layer.__class__.__name__ == "Conv2d":
            return module.get_weight()
        return module(torch.eye(layer.in_features, dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_adapters_of_the_installed_peft(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    trained = train(case, tmp_path)
    expected = output(trained.model, trained.inputs)
    adapter = oftsurgery.load_adapter(tmp_path)
    layers = live_layers(trained.model)
    assert adapter.dialect == "peft-0.21"
    assert set(adapter.modules) == set(layers)
    assert (len(adapter.modules), len(adapter.saved)) == (case.modules, case.saved)
    for path, rotation in adapter.modules.items():
        matrix = live_matrix(layers[path])
        features = matrix.shape[0]
        blocks = rotation.blocks
        r = torch.block_diag(*([*blocks] * (features // blocks.shape[-1] if len(blocks) == 1 else 1)))
        # the exact map's identity is float32 in peft, the rest of its arithmetic float64 here
        torch.testing.assert_close(r, matrix, rtol=0, atol=1e-6 if case.config.get("coft") else 1e-13)
        assert rotation.side == ("embedding" if isinstance(layers[path].get_base_layer(), nn.Embedding) else "input")
    # the whole model: folded live, and, where nothing but rotations was trained, from the file into the bare base
    models = [oftsurgery.fold(trained.model)]
    if not case.saved:
        models.append(oftsurgery.fold(trained.model.unload(), adapter))
    for folded in models:
        torch.testing.assert_close(
            output(folded, trained.inputs), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.saved])
def test_saved_tensors_reach_a_fresh_base(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    fresh = case.build().eval()
    trained = train(dataclasses.replace(case, build=lambda: copy.deepcopy(fresh)), tmp_path)
    adapter = oftsurgery.load_adapter(tmp_path)
    for key, tensor in adapter.saved.items():
        assert fresh.get_parameter(key).shape == tensor.shape
    folded = oftsurgery.fold(fresh, adapter)
    torch.testing.assert_close(
        output(folded, trained.inputs), output(trained.model, trained.inputs), rtol=1e-4, atol=1e-5
    )
    assert (output(fresh, trained.inputs) - output(trained.model, trained.inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.warns])
def test_what_peft_warns_of_in_these_cases(name: str, tmp_path: Path) -> None:
    """The cases are what they claim to be: peft itself says that it adjusted a size, or that it saves the embeddings."""
    with pytest.warns(UserWarning, match=CASES[name].warns):
        get_peft_model(CASES[name].build(), OFTConfig(**CASES[name].config)).save_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_adapters_saved_in_another_dtype(
    dtype: torch.dtype, tmp_path: Path, write_adapter: Callable[..., Path], oft_config: Config
) -> None:
    case = CASES["plain, 5 terms"]
    trained = train(case, tmp_path / "full")
    stored = {k: v.to(dtype) for k, v in load_file(tmp_path / "full" / "adapter_model.safetensors").items()}
    adapter = oftsurgery.load_adapter(write_adapter(stored, oft_config()))
    for path, layer in live_layers(trained.model).items():
        layer.oft_R["default"].weight.data = stored[f"base_model.model.{path}.oft_R.weight"].double()
        torch.testing.assert_close(
            torch.block_diag(*adapter.modules[path].blocks), live_matrix(layer), rtol=0, atol=1e-13
        )
        assert adapter.modules[path].generator.dtype == dtype


# --- dialects ---------------------------------------------------------------------------------------------------------

NEW = {"base_model.model.m.oft_R.weight": torch.full((2, 6), 0.1)}
EMBEDDING = {"base_model.model.m.oft_embedding_R.weight": torch.full((2, 6), 0.1)}
OLD = {"base_model.model.m.oft_r": torch.full((2, 4, 4), 0.1).triu()}
SCALED = OLD | {"base_model.model.m.oft_s": torch.ones(8, 1)}
CURRENT, FIRST = oftsurgery.Cayley(5, True), oftsurgery.Cayley(5, False)
EXACT = oftsurgery.Cayley()

DETECTED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str, oftsurgery.Cayley, str]] = {
    "0.21.2": (NEW, {}, "peft-0.21", CURRENT, "input"),
    "0.18.0": (NEW, {"peft_version": "0.18.0"}, "peft-0.21", CURRENT, "input"),
    "1.0": (NEW, {"peft_version": "1.0"}, "peft-0.21", CURRENT, "input"),
    "0.18.1.dev0": (NEW, {"peft_version": "0.18.1.dev0@1234abcd"}, "peft-0.21", CURRENT, "input"),
    "0.19.0.dev0": (NEW, {"peft_version": "0.19.0.dev0"}, "peft-0.21", CURRENT, "input"),
    "no version": (NEW, {"peft_version": ...}, "peft-0.17", FIRST, "input"),
    "version null": (NEW, {"peft_version": None}, "peft-0.17", FIRST, "input"),
    "exact, 0.21.2": (NEW, {"use_cayley_neumann": False}, "peft-0.21", EXACT, "input"),
    "exact, no version": (NEW, {"use_cayley_neumann": False, "peft_version": ...}, "peft-0.17", EXACT, "input"),
    "exact, a dev version": (
        NEW,
        {"use_cayley_neumann": False, "peft_version": "0.18.0.dev0"},
        "peft-0.21",
        EXACT,
        "input",
    ),
    "embedding, 0.21.2": (EMBEDDING, {}, "peft-0.21", CURRENT, "embedding"),
    "embedding, version lost": (EMBEDDING, {"peft_version": ...}, "peft-0.21", CURRENT, "embedding"),
    "0.15": (SCALED, {"use_cayley_neumann": ..., "peft_version": ...}, "peft-0.15", EXACT, "input"),
    "0.13": (
        OLD,
        {"use_cayley_neumann": ..., "peft_version": ..., "oft_block_size": ...},
        "peft-0.13",
        EXACT,
        "output",
    ),
}


@pytest.mark.parametrize("name", DETECTED)
def test_dialects_are_told(name: str, oft_config: Config) -> None:
    tensors, changes, dialect, cayley, side = DETECTED[name]
    adapter = parse_adapter(oft_config(**changes), tensors)
    rotation = adapter.modules["m"]
    assert (adapter.dialect, rotation.cayley, rotation.side) == (dialect, cayley, side)
    assert (rotation.scale is not None) == (tensors is SCALED)
    # naming the dialect that the files tell changes nothing
    assert parse_adapter(oft_config(**changes), tensors, dialect=dialect).fingerprint == adapter.fingerprint  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "version", ["0.18.0.dev0", "0.18.0.dev0@abc", "0.18.0dev1", "0.17.2.dev0", "0.17.1", "nonsense", ""]
)
def test_an_ambiguous_version_is_refused_until_named(version: str, oft_config: Config) -> None:
    config = oft_config(peft_version=version)
    with pytest.raises(DialectError) as caught:
        parse_adapter(config, NEW, source="here")
    assert str(caught.value) == (
        f"the files do not tell the dialect: it is peft-0.17 or peft-0.21 (config: use_cayley_neumann=True, peft_version='{version}') [at here] "
        "Remedy: name the dialect, load_adapter(…, dialect=…), by the peft release that trained the adapter"
    )
    assert parse_adapter(config, NEW, dialect="peft-0.17").modules["m"].cayley == FIRST
    assert parse_adapter(config, NEW, dialect="peft-0.21").modules["m"].cayley == CURRENT


def test_a_named_dialect_reaches_the_parser(write_adapter: Callable[..., Path], oft_config: Config) -> None:
    folder = write_adapter(NEW, oft_config(peft_version="0.18.0.dev0"))
    with pytest.raises(DialectError, match="the files do not tell the dialect"):
        oftsurgery.load_adapter(folder)
    assert oftsurgery.load_adapter(folder, dialect="peft-0.17").dialect == "peft-0.17"


@pytest.mark.parametrize(
    ("tensors", "changes", "named", "message"),
    [
        (
            NEW,
            {},
            "peft-0.17",
            "the named dialect is peft-0.17, but the files are of peft-0.21 .*leave the dialect out",
        ),
        (NEW, {"peft_version": ...}, "peft-0.21", "the named dialect is peft-0.21, but the files are of peft-0.17"),
        (SCALED, {}, "peft-0.13", "the named dialect is peft-0.13, but the files are of peft-0.15"),
        (
            NEW,
            {"peft_version": "0.17.1"},
            "peft-0.13",
            "the named dialect is peft-0.13, but the files are of peft-0.17 or peft-0.21",
        ),
        (NEW, {}, "peft-9", "unknown dialect 'peft-9' Remedy: use one of peft-0.13, peft-0.15, peft-0.17, peft-0.21"),
        (
            NEW,
            {"use_cayley_neumann": ...},
            None,
            "has no `use_cayley_neumann`, so the map is unknown.*Remedy: restore the adapter_config.json",
        ),
        (
            SCALED,
            {"oft_block_size": ...},
            None,
            "has oft_s, but the config has no `oft_block_size`.*neither peft ≤ 0.13 nor 0.14/0.15 writes that",
        ),
        (
            NEW | {"base_model.model.n.oft_r": torch.zeros(2, 4, 4)},
            {},
            None,
            "has keys of several dialects: oft_R.weight, oft_r .*Remedy: save the whole adapter with one release",
        ),
    ],
)
def test_dialects_that_are_refused(
    tensors: dict[str, Tensor], changes: dict[str, Any], named: Any, message: str, oft_config: Config
) -> None:
    with pytest.raises(DialectError, match=message) as caught:
        parse_adapter(oft_config(**changes), tensors, dialect=named)
    assert caught.value.remedy


def test_the_dialects_differ_where_it_matters(oft_config: Config) -> None:
    """Naming the wrong series would be a silent error of this size."""
    a, b = (
        parse_adapter(oft_config(peft_version="0.17.1"), NEW, dialect=d).modules["m"].blocks
        for d in ("peft-0.17", "peft-0.21")
    )  # type: ignore[arg-type]
    assert (a - b).abs().max() > 1e-4


# --- COFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.2, 50.0])
def test_coft_clamps_the_skew_matrix(rows: int, eps: float, oft_config: Config) -> None:
    """peft ≥ 0.16: ‖Q‖ ≤ eps / √rows for each block."""
    v = torch.randn(rows, 6) * 0.2
    got = parse_adapter(oft_config(coft=True, eps=eps), {"base_model.model.m.oft_R.weight": v}).modules["m"].generator
    norms = (2 * (v.double() ** 2).sum(-1, keepdim=True)).sqrt()
    torch.testing.assert_close(got, v.double() * (eps / rows**0.5 / norms).clamp(max=1), rtol=1e-12, atol=1e-15)


def test_coft_of_a_zero_block_stays_zero(oft_config: Config) -> None:
    got = parse_adapter(oft_config(coft=True), {"base_model.model.m.oft_R.weight": torch.zeros(2, 6)}).modules["m"]
    assert torch.equal(got.generator, torch.zeros(2, 6, dtype=torch.float64))


@pytest.mark.parametrize("dialect", ["peft-0.13", "peft-0.15"])
@pytest.mark.parametrize("shared", [False, True])
def test_coft_of_old_releases_clamps_the_raw_matrix(dialect: str, shared: bool, oft_config: Config) -> None:
    """peft ≤ 0.15: ‖A‖ ≤ eps · ⌈out/r⌉² / √rows, A being what is stored, with its symmetric part."""
    rows, b, out, eps = 1 if shared else 3, 4, 8, 2e-3
    a = torch.randn(rows, b, b)
    tensors, changes = (
        {"base_model.model.m.oft_r": a},
        {"coft": True, "eps": eps, "block_share": shared, "use_cayley_neumann": ...},
    )
    if dialect == "peft-0.13":
        config, width = oft_config(**changes, oft_block_size=...), b  # ⌈out/r⌉ is the block size
    else:
        tensors["base_model.model.m.oft_s"] = torch.ones(out, 1)
        config, width = oft_config(**changes), 3  # ⌈8/3⌉
    if shared and dialect == "peft-0.15":
        with pytest.raises(
            DialectError,
            match=r"clamps by the number of blocks a row, which its files do not hold.*Remedy: run one forward in peft 0.15",
        ):
            parse_adapter(config, tensors)
        return
    radius = eps * width**2 / rows**0.5
    clamped = torch.stack([m * min(1.0, radius / float(m.norm())) for m in a.double()])
    got = parse_adapter(config, tensors).modules["m"].generator
    torch.testing.assert_close(rotations.skew(got), (clamped - clamped.mT) / 2, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "variant", ["peft-0.13.2/coft_clamped", "peft-0.15.2/coft_clamped", "peft-0.17.1/coft", "peft-0.21.2/coft"]
)
def test_coft_matters_in_the_goldens(variant: str, golden: Path) -> None:
    """These adapters were saved unclamped: without the clamp their generators differ."""
    config = json.loads((golden / variant / "adapter_config.json").read_text())
    tensors = load_file(golden / variant / "adapter_model.safetensors")
    assert parse_adapter(config, tensors).fingerprint != parse_adapter(config | {"coft": False}, tensors).fingerprint


# --- identity and immutability ----------------------------------------------------------------------------------------


def fingerprint(config: dict[str, Any], tensors: dict[str, Tensor], **more: Any) -> str:
    return parse_adapter(config, tensors, **more).fingerprint


def test_equal_adapters_have_equal_fingerprints(oft_config: Config, write_adapter: Callable[..., Path]) -> None:
    first = fingerprint(oft_config(), NEW)
    assert first.startswith("xxh3:")
    assert first == fingerprint(
        oft_config(r=7, bias="all", extra=1), {k: v.clone() for k, v in NEW.items()}, source="elsewhere", sha256="0"
    )
    assert first == oftsurgery.load_adapter(write_adapter(NEW, oft_config())).fingerprint
    two = {"base_model.model.a.oft_R.weight": torch.ones(1, 6), "base_model.model.b.oft_R.weight": torch.zeros(1, 6)}
    assert fingerprint(oft_config(), two) == fingerprint(oft_config(), dict(reversed(two.items())))
    # the exact map is one map, whichever release wrote it
    exact = {"use_cayley_neumann": False}
    assert fingerprint(oft_config(**exact), NEW) == fingerprint(oft_config(**exact, peft_version=...), NEW)


@pytest.mark.parametrize(
    ("changes", "tensors"),
    [
        ({"num_cayley_neumann_terms": 6}, NEW),
        ({"use_cayley_neumann": False}, NEW),
        ({"peft_version": ...}, NEW),
        ({"coft": True}, NEW),
        ({}, {"base_model.model.n.oft_R.weight": torch.full((2, 6), 0.1)}),
        ({}, {"base_model.model.m.oft_R.weight": torch.full((2, 6), 0.1000001)}),
        ({}, EMBEDDING),
        ({}, NEW | {"base_model.model.m.bias": torch.zeros(8)}),
        ({"use_cayley_neumann": ...}, SCALED),
        ({"use_cayley_neumann": ...}, SCALED | {"base_model.model.m.oft_s": torch.full((8, 1), 2.0)}),
    ],
    ids=["terms", "exact", "series", "clamp", "path", "value", "side", "bias", "old", "scale"],
)
def test_other_adapters_have_other_fingerprints(
    changes: dict[str, Any], tensors: dict[str, Tensor], oft_config: Config
) -> None:
    others = {
        fingerprint(oft_config(), NEW),
        fingerprint(oft_config(use_cayley_neumann=...), SCALED | {"base_model.model.m.bias": torch.ones(8)}),
    }
    assert fingerprint(oft_config(**changes), tensors) not in others


def test_adapters_are_immutable(oft_config: Config) -> None:
    config, tensors = oft_config(), dict(NEW)
    adapter = parse_adapter(config, tensors)
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.dialect = "peft-0.13"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.modules["m"].generator = torch.zeros(1)  # type: ignore[misc]
    for mapping in (adapter.modules, adapter.saved, adapter.config):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["m"] = None  # type: ignore[index]
    config["r"], tensors["other"] = 99, torch.zeros(1)
    assert adapter.config["r"] == 0
    assert set(adapter.modules) == {"m"}


def test_repr_is_short_and_printable(oft_config: Config) -> None:
    adapter = parse_adapter(oft_config(), NEW, source="a\x1b[31mb")
    assert repr(adapter) == r"OFTAdapter(1 modules, block size 4, peft-0.21, source='a\\x1b[31mb')"


# --- what no peft release writes --------------------------------------------------------------------------------------

KEY = "base_model.model.m.oft_R.weight"
BAD_CONFIGS: dict[str, tuple[dict[str, Any], type[OFTSurgeryError], str]] = {
    "no peft_type": (
        {"peft_type": ...},
        AdapterError,
        "has no `peft_type` .*adapter_config.json.*Remedy: give a folder",
    ),
    "LoRA": (
        {"peft_type": "LORA"},
        DialectError,
        "the adapter is a LORA adapter, not an OFT adapter Remedy: .* merge others with peft's merge_and_unload",
    ),
    "LoHa": ({"peft_type": "LOHA"}, DialectError, "the adapter is a LOHA adapter, not an OFT adapter"),
    "PSOFT": (
        {"peft_type": "PSOFT"},
        DialectError,
        "the adapter is a PSOFT adapter, not an OFT adapter: .* are not stored",
    ),
    "a type that is a list": ({"peft_type": ["OFT"]}, DialectError, r"the adapter is a \['OFT'\] adapter"),
    "eps a string": (
        {"eps": "small"},
        AdapterError,
        "has eps = 'small', but the value must be of type int or float .*Remedy: restore the config",
    ),
    "eps NaN": (
        {"coft": True, "eps": float("nan")},
        AdapterError,
        "has eps = nan, but the value must be a finite number from 0 on",
    ),
    "eps negative": (
        {"coft": True, "eps": -1.0},
        AdapterError,
        "has eps = -1.0, but the value must be a finite number from 0 on",
    ),
    "a flag that is a number": (
        {"block_share": 1},
        AdapterError,
        "has block_share = '1', but the value must be of type bool",
    ),
    "terms a flag": (
        {"num_cayley_neumann_terms": True},
        AdapterError,
        "has num_cayley_neumann_terms = 'True', but the value must be of type int",
    ),
    "terms without end": (
        {"num_cayley_neumann_terms": 10**9},
        AdapterError,
        "num_cayley_neumann_terms = 1000000000, but the value must be at most 1000",
    ),
    "version a number": (
        {"peft_version": 0.18},
        AdapterError,
        "has peft_version = '0.18', but the value must be of type str",
    ),
    "modules_to_save a string": (
        {"modules_to_save": "head"},
        AdapterError,
        "has modules_to_save = 'head', but the value must be of type list",
    ),
    "modules_to_save of numbers": (
        {"modules_to_save": [1]},
        AdapterError,
        r"has modules_to_save = \[1\], but the value must be a list of names .*Remedy: restore",
    ),
    "replicated layers": (
        {"layer_replication": [[0, 2]]},
        DialectError,
        "`layer_replication` is not supported Remedy: replicate the layers",
    ),
    "DoRA": ({"use_dora": True}, DialectError, "sets `use_dora`, which no peft release computes for OFT"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configs_that_are_refused(name: str, oft_config: Config) -> None:
    changes, error, message = BAD_CONFIGS[name]
    with pytest.raises(error, match=message) as caught:
        parse_adapter(oft_config(**changes), NEW)
    assert type(caught.value) is error


OLD_CONFIG = {"use_cayley_neumann": ..., "peft_version": ...}
BAD_TENSORS: dict[str, tuple[dict[str, Tensor], dict[str, Any], type[OFTSurgeryError], str]] = {
    "none": ({}, {}, AdapterError, "holds no tensor .*Remedy: save it again"),
    "no rotation": ({"base_model.model.m.bias": torch.ones(3)}, {}, AdapterError, "has 1 tensors, but none is a rotation .*Remedy: check that"),
    "a foreign prefix": ({"m.oft_R.weight": NEW[KEY]}, {}, AdapterError, r"the key is unknown: .* start with 'base_model.model.' \[tensor 'm.oft_R.weight'"),
    "integers": ({KEY: torch.ones(2, 6, dtype=torch.int64)}, {}, AdapterError, "must be float32, .* the tensor is torch.int64 .*m.oft_R.weight"),
    "float8": ({KEY: torch.ones(2, 6).to(torch.float8_e4m3fn)}, {}, AdapterError, "must be float32, .* the tensor is torch.float8_e4m3fn"),
    "complex": ({KEY: torch.ones(2, 6, dtype=torch.complex64)}, {}, AdapterError, "the tensor is torch.complex64"),
    "NaN": ({KEY: torch.full((2, 6), float("nan"))}, {}, NonFiniteError, "holds NaN or infinity .*m.oft_R.weight.*Remedy: retrain"),
    "infinite bias": (NEW | {"base_model.model.m.bias": torch.full((3,), float("inf"))}, {}, NonFiniteError, "infinity .*'base_model.model.m.bias'"),
    "LoRA keys": (NEW | {"base_model.model.m.lora_A.weight": torch.ones(2, 2)}, {}, DialectError, "holds 'lora_A', which is no part"),
    "BOFT keys": (NEW | {"base_model.model.m.boft_R": torch.ones(2, 2)}, {}, DialectError, "holds 'boft_R'"),
    "one tensor twice": (
        NEW | {"base_model.model.m.bias": torch.ones(3), "base_model.model.m.base_layer.bias": torch.zeros(3)},
        {},
        MatchError,
        r"two keys name one tensor of the model .*Remedy: remove one",
    ),
    "no triangle": ({KEY: torch.ones(2, 5)}, {}, ShapeError, r"5 elements is no upper triangle .*module 'm', tensor 'oft_R.weight', shape 2×5"),
    "three dimensions": ({KEY: torch.ones(2, 2, 3)}, {}, ShapeError, r"must be \(blocks, b\(b-1\)/2\) .*shape 2×2×3"),
    "no block": ({KEY: torch.ones(0, 6)}, {}, AdapterError, "has no elements: training .*Remedy: save the adapter with whole tensors"),
    "shared, but two rows": (NEW, {"block_share": True}, ShapeError, "`block_share` is set, but the generator has more than one row .*shape 2×6"),
    "two kinds in one module": (NEW | EMBEDDING, {}, AdapterError, r"one module has both oft_R\.weight and oft_embedding_R\.weight .*module 'm'"),
    "oft_s alone": ({"base_model.model.m.oft_s": torch.ones(8, 1)}, OLD_CONFIG, AdapterError, "save oft_r and oft_s; oft_r is missing .*module 'm'"),
    "oft_r alone": (OLD, OLD_CONFIG, AdapterError, "save oft_r and oft_s; oft_s is missing .*Remedy: restore the whole file"),
    "oft_r not square": (
        SCALED | {"base_model.model.m.oft_r": torch.ones(2, 4, 3)}, OLD_CONFIG, ShapeError, r"oft_r must be \(blocks, b, b\) .*shape 2×4×3"
    ),
    "oft_s of a row": (SCALED | {"base_model.model.m.oft_s": torch.ones(1, 8)}, OLD_CONFIG, ShapeError, r"oft_s must be \(out, 1\) .*shape 1×8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_are_refused(name: str, oft_config: Config) -> None:
    tensors, changes, error, message = BAD_TENSORS[name]
    with pytest.raises(error, match=message) as caught:
        parse_adapter(oft_config(**changes), tensors, source="here")
    assert type(caught.value) is error
    assert caught.value.remedy
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "other", [torch.zeros(3), torch.ones(3, dtype=torch.float64), torch.ones(4)], ids=["values", "dtype", "shape"]
)
def test_a_tensor_under_two_keys_is_one_if_equal(other: Tensor, oft_config: Config) -> None:
    """With bias="all", peft 0.21 saves the biases of `modules_to_save` under two keys."""
    first, second = "base_model.model.m.bias", "base_model.model.m.base_layer.bias"
    assert set(parse_adapter(oft_config(), NEW | {first: torch.ones(3), second: torch.ones(3)}).saved) == {"m.bias"}
    with pytest.raises(
        MatchError, match=r"two keys name one tensor of the model \[tensor 'base_model.model.m.base_layer.bias'\]"
    ):
        parse_adapter(oft_config(), NEW | {first: torch.ones(3), second: other})


def test_names_of_tensors_do_not_reach_a_message_raw(oft_config: Config) -> None:
    with pytest.raises(AdapterError) as caught:
        parse_adapter(oft_config(), {"\x1b]0;owned\x07\nm\u202e": torch.ones(1)})
    assert str(caught.value).isprintable()
    assert r"\\x1b]0;owned\\x07\\nm\\u202e" in str(caught.value)


def test_control_characters_in_a_config_do_not_reach_a_message_raw(oft_config: Config) -> None:
    for changes in ({"peft_type": "\x1b[2J"}, {"eps": "\x1b[2J"}, {"peft_version": "0.17\x1b[2J"}):
        with pytest.raises(AdapterError) as caught:
            parse_adapter(oft_config(**changes), NEW)
        assert str(caught.value).isprintable()


ODD: list[Any] = [None, True, 0, -3, 1.5, 1e300, "", "x", [], [1], ["a", None], {}, {"a": 1}]
FIELDS = [
    "peft_type", "peft_version", "r", "oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms", "block_share", "coft", "eps", "bias",
    "modules_to_save", "target_modules", "base_model_name_or_path", "fan_in_fan_out", "layer_replication", "module_dropout",
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_odd_values_in_a_config_give_a_typed_error_or_a_whole_fold(field: str, oft_config: Config) -> None:
    """Never another exception, never a result that holds NaN, and always a record that is JSON."""
    for tensors in (NEW, SCALED, OLD, EMBEDDING):
        for value in ODD:
            model = nn.Sequential()
            model.add_module("m", nn.Embedding(5, 8) if EMBEDDING.keys() <= tensors.keys() else nn.Linear(8, 8))
            tensors |= {"base_model.model.m.weight": torch.ones_like(model.m.weight)}
            refused = None
            try:
                folded = oftsurgery.fold(model, parse_adapter(oft_config(**{field: value}), tensors))
            except OFTSurgeryError as error:
                refused = error
            if refused is None:
                assert torch.isfinite(folded.m.weight).all(), (field, value)
                json.loads(folded.oftsurgery.to_json())
            else:
                assert refused.remedy, (field, value)
                assert str(refused).isprintable(), (field, value)


def test_an_adapter_of_an_unknown_dialect_is_refused() -> None:
    with pytest.raises(DialectError, match=r"unknown dialect 'peft-9' .*Remedy: use one of peft-0.13, "):
        oftsurgery.OFTAdapter({}, dialect="peft-9")
