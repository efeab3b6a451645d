"""The agreement table: model family × what is rotated × what is trained besides × how the base is stored. In every case
the fold in memory, the fold on disk and peft's live model agree, and each way of unfolding gives the base back.

The reference is peft's own model over a base that transformers loaded, with all that trains in it changed at random:
its outputs, and its tensors one by one, rotations from a float64 computation of the tests' own.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    bnb_config,
    decoded,
    differing,
    linearised,
    load,
    outputs,
    quant_state,
    quiet_transformers,
    rotations_in,
    scaled_up,
    tensors,
)
from independent import relative
from models import SIZES
from peft import OFTConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from warned import noted, quietly

import oftsurgery


@dataclass(frozen=True)
class Family:
    cls: str
    config: dict[str, Any] = field(hash=False)
    linears: tuple[str, ...]
    head: str
    embedding: str


GROUPED = SIZES | {"num_key_value_heads": 2}
FAMILIES = {
    "llama tied": Family(
        "LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}, ("q_proj", "down_proj"), "lm_head", "embed_tokens"
    ),
    "llama": Family("LlamaForCausalLM", GROUPED, ("q_proj", "down_proj"), "lm_head", "embed_tokens"),
    # Conv1D
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64},
        ("c_attn", "c_fc"),
        "lm_head",
        "wte",
    ),
    # the decoder's bias is tied too
    "bert": Family("BertForMaskedLM", SIZES, ("query", "dense"), "decoder", "word_embeddings"),
    # four tensors that are one; `shared` is never called
    "t5": Family(
        "T5ForConditionalGeneration",
        {
            "vocab_size": 96,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        ("q", "wi"),
        "lm_head",
        "embed_tokens",
    ),
    # the file has Wqkv, the model q_proj, k_proj and v_proj, and other names for the rest
    "nomic": Family("NomicBertForMaskedLM", SIZES, ("q_proj", "up_proj"), "decoder", "word_embeddings"),
}
TARGETS = ("linears", "head too", "embedding too")
SAVES = ("nothing", "head", "embedding", "biases")
STORAGES = ("fp32", "nf4", "int8")

# peft 0.21.2 builds and saves every one of these, so there is no table of what it refuses: a case that it refuses some
# day fails. Where a module is both targeted and saved, peft rotates nothing and trains a copy; models without biases
# take bias="all" and train none.

#: the largest relative error of the outputs against the live model: rounding takes at most 0.16 of it in NF4 and 0.022
#: in int8, and the adapter moves the outputs by 0.17 to 0.74
OUTPUTS = {"fp32": 1e-4, "nf4": 0.2, "int8": 0.03}
#: and of one rotated weight (folded, or rotated back): at most 0.087 and 0.0066; rotations move each by 0.3
WEIGHTS = {"fp32": 1e-5, "nf4": 0.1, "int8": 0.01}


@dataclass(frozen=True)
class Case:
    family: str
    targets: str
    saves: str
    storage: str

    @property
    def fast(self) -> bool:
        """24 of 216, in which each two of a family, its targets, what is saved and the storage meet."""
        f, t, s, q = (
            list(names).index(own)
            for names, own in (
                (FAMILIES, self.family),
                (TARGETS, self.targets),
                (SAVES, self.saves),
                (STORAGES, self.storage),
            )
        )
        return t == (f + s) % 3 and q == (f + 2 * s) % 3

    def __str__(self) -> str:
        return f"{self.family}, {self.targets}, {self.saves} saved, {self.storage}"


CASES = [Case(*names) for names in product(FAMILIES, TARGETS, SAVES, STORAGES)]


class Outcome:
    """What a fold gave: a value or an error, and the warnings on the way."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.error: Exception | None = None
        self._value: Any = None
        with noted() as caught:
            try:
                self._value = call()
            except Exception as error:
                self.error = error
        ours = (w.category for w in caught if w.category.__module__ == "oftsurgery.errors")
        self.warnings = sorted(category.__name__ for category in ours)

    @property
    def value(self) -> Any:
        if self.error is not None:
            raise self.error
        return self._value


def live_tensor(live: Any, name: str, rotations: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """What the parameter ``name`` of the plain model is in the live one, and whether it is rotated there (then float64)."""
    path, _, leaf = name.rpartition(".")
    module = live.base_model.model
    for part in path.split("."):
        module = getattr(module, part)
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save["default"]
    inner = module.base_layer if hasattr(module, "base_layer") else module
    if leaf != "weight" or inner is module:
        return getattr(inner, leaf).detach(), False
    if isinstance(inner, nn.Embedding):
        with torch.no_grad():
            return module(torch.arange(inner.num_embeddings)).double(), True
    return decoded(inner.state_dict(), "weight") @ rotations[path].T, True


def config_of(model: Any) -> dict[str, Any]:
    """Without where it came from; NomicBert's does not write the default of ``tie_word_embeddings``."""
    found = model.config.to_dict() | {"tie_word_embeddings": model.config.tie_word_embeddings}
    return {k: v for k, v in found.items() if k not in ("_name_or_path", "transformers_version")}


def ties(model: nn.Module) -> set[frozenset[str]]:
    """The names of parameters that are one."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


class Run:
    """One case, its parts made when they are first asked for."""

    def __init__(self, case: Case, plain: Path, folder: Path) -> None:
        self.case, self.plain, self.folder = case, plain, folder
        self.family = FAMILIES[case.family]

    def base(self) -> Any:
        """As the trainer had it."""
        q = self.case.storage
        return load(
            self.plain,
            self.family.cls,
            **({} if q == "fp32" else {"quantization_config": bnb_config(q, double=q == "nf4")}),
        )

    @cached_property
    def base_state(self) -> dict[str, Tensor]:
        return dict(self.base().state_dict())

    @cached_property
    def adapter(self) -> Path:
        """As peft saves it; with it come ``wanted``, the live outputs, and ``live``, tensor by tensor: the value, and
        whether it is rotated.
        """
        family, case = self.family, self.case
        more = {"head too": [family.head], "embedding too": [family.embedding]}.get(case.targets, [])
        saved = {"head": family.head, "embedding": family.embedding}.get(case.saves)
        settings: dict[str, Any] = {"modules_to_save": [saved]} if saved else {}
        if case.saves == "biases":
            settings["bias"] = "all"
        config = OFTConfig(
            oft_block_size=16, use_cayley_neumann=True, target_modules=[*family.linears, *more], **settings
        )
        base = self.base()
        names = [name for name, _ in base.named_parameters(remove_duplicate=False)]
        with warnings.catch_warnings():
            for message in ("Model has `tie_word_embeddings=True`", "Setting `save_embedding_layers`"):
                warnings.filterwarnings("ignore", message, UserWarning)
            live = get_peft_model(linearised(base) if case.storage == "fp32" else base, config).eval()
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for name, parameter in live.named_parameters():
                    if parameter.requires_grad:
                        parameter.add_(
                            torch.randn(parameter.shape, generator=generator) * (0.04 if "oft_" in name else 0.05)
                        )
            live.save_pretrained(self.folder / "adapter")
        rotations = rotations_in(self.folder / "adapter")
        self.live = {name: live_tensor(live, name, rotations) for name in names}
        self.wanted = outputs(live)
        return self.folder / "adapter"

    @cached_property
    def replaced(self) -> set[str]:
        """Tensors that the adapter brings, not rotated."""
        _ = self.adapter
        return {
            name
            for name, (value, rotated) in self.live.items()
            if not rotated and differing({"": self.base_state[name]}, {"": self.in_file_order(name, value)})
        }

    def in_file_order(self, name: str, value: Tensor) -> Tensor:
        """gpt2's Conv1D weights are (in, out)."""
        conv = self.case.family == "gpt2" and self.case.storage == "fp32"
        return value.t() if conv and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else value

    @cached_property
    def memory(self) -> Outcome:
        return Outcome(
            lambda: oftsurgery.fold(self.base(), self.adapter, undo=self.folder / "memory.undo"),
        )

    @cached_property
    def disk(self) -> Outcome:
        """The record; the model is in "disk"."""
        q = self.case.storage
        settings: dict[str, Any] = {"trained_on": "plain"} if q == "fp32" else {"format": q, "double_quant": q == "nf4"}
        adapter, undo = self.adapter, self.folder / "disk.undo"
        return Outcome(
            lambda: oftsurgery.fold_checkpoint(self.plain, adapter, self.folder / "disk", undo=undo, **settings)
        )

    def reloaded(self) -> Any:
        """What transformers loads from what was folded on disk; no missing keys."""
        _ = self.disk.value
        return load(self.folder / "disk", self.family.cls)

    def check_computes(self, model: Any) -> None:
        """Each tensor, and the outputs."""
        _ = self.adapter
        state, q = dict(model.state_dict()), self.case.storage
        for name, (value, rotated) in self.live.items():
            if rotated:
                got = self.in_file_order(name, decoded(state, name))
                assert relative(got, value) < WEIGHTS[q if stored_in_codes(state, name) else "fp32"], name
            else:
                assert differing({"": state[name]}, {"": self.in_file_order(name, value)}) == [], name
        rest = {
            name
            for name in state.keys() & self.base_state.keys() - self.live.keys()
            if not any(
                name.startswith((f"{n}.", n.removesuffix("weight") + "SCB")) for n, (_, r) in self.live.items() if r
            )
        }
        assert differing({n: state[n] for n in rest}, {n: self.base_state[n] for n in rest}) == []
        assert state.keys() == self.base_state.keys()
        assert relative(outputs(model), self.wanted) < OUTPUTS[q]

    def check_restored(self, model: Any) -> None:
        """Every byte of the base, its ties and its config."""
        base = self.base()
        assert differing(dict(model.state_dict()), dict(base.state_dict())) == []
        assert ties(model) == ties(base)
        assert config_of(model) == config_of(base)

    def check_rotated_back(self, model: Any) -> None:
        """Near the base, but for what the adapter brought."""
        state = dict(model.state_dict())
        for name, (value, rotated) in self.live.items():
            if rotated:
                limit = WEIGHTS[self.case.storage if stored_in_codes(state, name) else "fp32"]
                assert relative(decoded(state, name), decoded(self.base_state, name)) < limit, name
            else:
                assert differing({"": state[name]}, {"": self.in_file_order(name, value)}) == [], name


def stored_in_codes(state: dict[str, Tensor], name: str) -> bool:
    return state[name].dtype == torch.int8 or quant_state(state, name) is not None


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's plain base, made once."""
    root = tmp_path_factory.mktemp("agreement")

    @cache
    def base(name: str) -> Path:
        torch.manual_seed(0)
        cls = getattr(transformers, FAMILIES[name].cls)
        scaled_up(cls(cls.config_class(**FAMILIES[name].config))).eval().save_pretrained(root / name)
        return root / name

    return base


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id=str(case), marks=() if case.fast else pytest.mark.slow) for case in CASES],
)
def run(request: pytest.FixtureRequest, bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(request.param, bases(request.param.family), tmp_path_factory.mktemp("case"))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


def test_in_memory_as_live(run: Run) -> None:
    run.check_computes(run.memory.value)


def test_on_disk_as_live(run: Run) -> None:
    run.check_computes(run.reloaded())


def test_one_refuses_what_the_other_refuses(run: Run) -> None:
    """By an error of the same class, and of ours."""
    errors = [outcome.error for outcome in (run.memory, run.disk)]
    assert type(errors[0]) is type(errors[1]), errors
    assert errors[0] is None or isinstance(errors[0], oftsurgery.OFTSurgeryError)


def test_memory_and_disk_agree_bit_by_bit(run: Run) -> None:
    """Loaded by transformers, what was folded on disk, and what was folded in memory and exported."""
    expected = dict(run.memory.value.state_dict())
    assert differing(dict(run.reloaded().state_dict()), expected) == []
    oftsurgery.export_safetensors(run.memory.value, run.folder / "exported")
    exported = load(run.folder / "exported", run.family.cls)
    assert differing(dict(exported.state_dict()), expected) == []


def test_records_agree(run: Run) -> None:
    """But for what they say of where."""

    def what(record: oftsurgery.FoldRecord) -> dict[str, Any]:
        found = json.loads(record.to_json())
        for adapter in found["adapters"]:
            del adapter["source"], adapter["base_model"]
        modules = found.pop("modules")
        found |= {f"{path}: {field}": value for path, m in modules.items() for field, value in m.items()}
        return {k: v for k, v in found.items() if k not in ("base", "files", "sizes", "versions")}

    memory, disk = what(run.memory.value.oftsurgery), what(run.disk.value)
    assert memory.keys() == disk.keys()
    off = {k: (v, disk[k]) for k, v in memory.items() if disk[k] != v}
    assert not off, off


def test_warnings_agree(run: Run) -> None:
    _ = run.memory.value, run.disk.value
    assert run.memory.warnings == run.disk.warnings


WAYS = ("base", "undo", "the other's undo", "adapter")


@pytest.mark.parametrize("by", WAYS)
def test_unfolded_in_memory(run: Run, by: str) -> None:
    folded = run.memory.value
    if by == "adapter":
        run.check_rotated_back(quietly(oftsurgery.unfold, folded, run.adapter))
    elif by == "base":
        run.check_restored(oftsurgery.unfold(folded, base=run.base()))
        if run.case.storage == "fp32":
            run.check_restored(oftsurgery.unfold(folded, base=run.plain))
    elif by == "undo":
        run.check_restored(oftsurgery.unfold(folded, undo=run.folder / "memory.undo"))
    else:
        _ = run.disk.value
        run.check_restored(oftsurgery.unfold(folded, undo=run.folder / "disk.undo"))


@pytest.mark.parametrize("by", WAYS)
def test_unfolded_on_disk(run: Run, by: str, tmp_path: Path) -> None:
    """A plain source that was quantised comes back quantised."""
    _ = run.disk.value
    if by == "the other's undo":
        _ = run.memory.value
    given: dict[str, Any] = {
        "base": {"base": run.plain},
        "undo": {"undo": run.folder / "disk.undo"},
        "the other's undo": {"undo": run.folder / "memory.undo"},
        "adapter": {"adapter": run.adapter},
    }[by]
    with noted() as caught:
        oftsurgery.unfold_checkpoint(run.folder / "disk", tmp_path / "back", **given)
    back = load(tmp_path / "back", run.family.cls)
    if by == "adapter":
        run.check_rotated_back(back)
        return
    assert not caught
    run.check_restored(back)
    if run.case.storage == "fp32":
        assert differing(tensors(tmp_path / "back"), tensors(run.plain)) == []
        was, now = (json.loads((folder / "config.json").read_text()) for folder in (run.plain, tmp_path / "back"))
        # a config that says nothing of it ties
        assert was.get("tie_word_embeddings", True) == now.get("tie_word_embeddings", True)
