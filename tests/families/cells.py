"""One cell of the sweep: a base, an adapter, and what folding it gives, held against peft's live model.

peft computes what is expected, over a base that transformers loaded: its outputs (in float64 where the base is plain), and each tensor of the live model,
rotations by a float64 computation of the tests' own. A live layer that the forward never calls must not be folded
where the base's weight is read: that is tried out, and no table of classes is asked.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from checkpoints import (
    bnb_config,
    decoded,
    differing,
    linearised,
    quant_state,
    quiet_transformers,
    rotations_in,
    tensors,
    unpacked,
)
from family import Family
from independent import relative
from peft import OFTConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from results import ABSENT, CRASH, REFUSED, STACK, WRONG
from torch import Tensor, nn

import oftsurgery

#: names that linears of attention have
ATTENTION = frozenset(
    "q_proj k_proj v_proj query key value q k v c_attn qkv qkv_proj query_key_value Wqkv q_lin k_lin v_lin query_proj "
    "key_proj value_proj q_a_proj q_b_proj kv_a_proj_with_mqa q_attn fc_q wqkv".split()
)

#: the largest relative error of a rotated weight, and of the outputs, against the live model's
WEIGHTS = {"plain": 1e-5, "nf4": 0.15, "int8": 0.02}
OUTPUTS = {"plain": 1e-5, "nf4": 0.5, "int8": 0.2}


@dataclass(frozen=True)
class Finding:
    """What one step of a cell came to, where it is not right."""

    step: str
    verdict: str
    error: str = ""
    text: str = ""


class StackError(Exception):
    """transformers, peft, bitsandbytes or torch cannot do what the cell asks, without oftsurgery."""

    def __init__(self, what: str, error: BaseException | str) -> None:
        said = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        super().__init__(f"{what}: {' '.join(said.split())[:300]}")


@contextmanager
def stack(what: str) -> Iterator[None]:
    """Any error in the body is the stack's."""
    try:
        yield
    except StackError:
        raise
    except Exception as error:
        raise StackError(what, error) from error


class WrongError(Exception):
    """The result is not what it must be."""


def wrong_unless(condition: bool, text: str) -> None:
    if not condition:
        raise WrongError(text)


# --- models -----------------------------------------------------------------------------------------------------------


def randomised(model: nn.Module) -> nn.Module:
    """Weights of variance 1/in, biases that are not zero."""
    generator = torch.Generator().manual_seed(1)
    convolutions = {id(p) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel() if id(parameter) in convolutions else parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
                if name.endswith((".SelfAttention.q.weight", ".EncDecAttention.q.weight")):
                    parameter.div_(4)  # T5's attention does not divide by the root of the heads' size, 16
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model.eval()


def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Every float tensor that the model returns, in float64."""
    dtype = next((p.dtype for p in model.parameters() if p.dtype == torch.float64), None)
    given = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in inputs.items()}
    torch.manual_seed(0)
    with torch.no_grad():
        return list(_tensors(model(**given)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.double()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def distance(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative difference of any output."""
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return float("inf")
        norm = float(b[finite].norm())
        worst = max(worst, float((a[finite] - b[finite]).norm()) / (norm or 1.0))
    return worst


def doubled(model: Any) -> Any:
    """A copy in float64; torch's grouped product of experts does not take that."""
    found = copy.deepcopy(model).double()
    for module in found.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None):
            module.config._experts_implementation = "eager"
    return found


class Bench:
    """A family's plain base in a folder, and what transformers loads from it."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.cls: Any = getattr(transformers, family.cls)
        with stack("transformers builds, saves and loads the model"):
            torch.manual_seed(0)
            randomised(self.cls(self.cls.config_class(**family.config))).save_pretrained(self.plain)
            self.base_keys = self.loaded(self.plain)[1]

    @property
    def plain(self) -> Path:
        return self.folder / "base"

    def loaded(self, folder: Path, **options: Any) -> tuple[Any, dict[str, list[str]]]:
        """The model, and the keys that are missing or too many."""
        model, info = self.cls.from_pretrained(folder, output_loading_info=True, **options)
        found = {
            k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]
        }
        return unpacked(model), found

    def base(self, kind: str, skip: tuple[str, ...] = ()) -> Any:
        """The plain base, or one that transformers quantised, without the modules to skip."""
        if kind == "plain":
            return self.loaded(self.plain)[0]
        more = {"llm_int8_skip_modules": list(skip)} if skip else {}
        return self.loaded(self.plain, quantization_config=bnb_config(kind, double=kind == "nf4", **more))[0]

    def reloaded(self, folder: Path) -> Any:
        """What transformers loads from a folder of ours, with no other missing or superfluous keys than the base has."""
        model, keys = self.loaded(folder)
        wrong_unless(keys == self.base_keys, f"keys of the output: {json.dumps(keys)[:300]}")
        return model

    def stack_reloads(self, kind: str) -> tuple[str, set[str]]:
        """Why transformers does not load what it saves of a base itself, or nothing; and the tensors that it loses."""
        if kind not in self._reloads:
            saved = self.folder / f"stack-{kind}"
            try:
                base = self.base(kind)
                if kind == "plain":
                    randomised(base)
                before = dict(base.state_dict())
                base.save_pretrained(saved)
                model, keys = self.loaded(saved)
                lost = set(differing(dict(model.state_dict()), before))
                outputs(model, self.family.inputs)
                told = f"loads its own folder with {json.dumps(keys)[:200]}, {len(lost)} tensors differ: {sorted(lost)[:2]}"
                self._reloads[kind] = (told if keys != self.base_keys or lost else "", lost)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the stack's
                self._reloads[kind] = (f"{type(error).__name__}: {error}", set())
        return self._reloads[kind]

    @cached_property
    def _reloads(self) -> dict[str, tuple[str, set[str]]]:
        return {}


# --- adapters ---------------------------------------------------------------------------------------------------------


def path_of(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((path for path, m in model.named_modules() if m is wanted), "")


def called_modules(model: nn.Module, inputs: Mapping[str, Tensor]) -> set[nn.Module]:
    called: set[nn.Module] = set()
    hooks = [m.register_forward_hook(lambda m, *_: called.add(m)) for m in model.modules()]
    outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    return called


def head_path(family: Family, model: Any) -> str:
    return family.head or path_of(model, model.get_output_embeddings())


def embedding_path(family: Family, model: Any) -> str:
    """Of the input embeddings; where they stand under several names, of the module that the forward calls."""
    if family.embedding:
        return family.embedding
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return ""
    if not isinstance(found, nn.Module):
        return ""
    weight = getattr(found, "weight", None)
    same = [
        m
        for m in model.modules()
        if weight is not None and getattr(m, "weight", None) is weight and type(m) is type(found)
    ]
    called = called_modules(model, family.inputs)
    return path_of(model, next((m for m in same if m in called), found))


def short_name(model: nn.Module, path: str) -> str:
    """The last part of a path, as people write it, where it means this module alone."""
    leaf = path.rpartition(".")[2]
    return leaf if sum(p == leaf or p.endswith(f".{leaf}") for p, _ in model.named_modules()) == 1 else path


def linears_of(family: Family, model: nn.Module) -> tuple[list[str], bool]:
    """Paths of the linears that peft can turn, and whether that is all of them: peft 0.21 takes an input of four
    dimensions for an image, and raises.
    """
    linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    images: set[nn.Module] = set()

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor) and given[0].ndim == 4:
            images.add(module)

    hooks = [m.register_forward_pre_hook(note) for m in linears.values()]
    outputs(model, family.inputs)
    for hook in hooks:
        hook.remove()
    return [p for p, m in linears.items() if m not in images], not images


def all_linears(family: Family, model: Any, head: str) -> str | list[str]:
    """``"all-linear"``, or paths where peft raises at that: it asks for the input embeddings, which not every class has."""
    if not isinstance(family.linears, str):
        return list(family.linears)
    linears, all_of_them = linears_of(family, model)
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        all_of_them = False
    return family.linears if all_of_them else [p for p in linears if p != head]


def adapter_settings(family: Family, model: Any, which: str) -> dict[str, Any] | None:
    """peft's settings of the adapter, None where the family has no such part."""
    head, embedding = head_path(family, model), embedding_path(family, model)
    if which == "linears":
        return {"target_modules": all_linears(family, model, head)}
    linears = [p for p in linears_of(family, model)[0] if p != head]
    names = sorted({p.rpartition(".")[2] for p in linears} & ATTENTION)
    targets = names or (list(family.linears) if isinstance(family.linears, tuple) else linears)
    if which == "ends rotated":
        modules = dict(model.named_modules())
        ends = [
            short_name(model, p) for p in (embedding, head) if p and isinstance(modules[p], (nn.Embedding, nn.Linear))
        ]
        return {"target_modules": [*targets, *ends]} if ends else None
    saved = head if which == "head saved" else embedding
    if not saved:
        return None
    task = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    kind = next((t for end, t in task.items() if family.cls.endswith(end)), None)
    if which == "head saved" and kind:
        return {"target_modules": targets, "task_type": kind}  # peft saves the head by itself
    return {"target_modules": targets, "modules_to_save": [short_name(model, saved)]}


def saved_adapter(base: Any, settings: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """Write an adapter with all that trains in it changed at random, as peft saves it; what peft trained."""
    live = get_peft_model(base, OFTConfig(oft_block_size=16, use_cayley_neumann=True, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.04 if "oft_" in name else 0.05))
    live.save_pretrained(folder)
    return trained(live)


def trained(live: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in live.named_parameters() if "oft_" in n or ".modules_to_save." in n}


class Live:
    """What the live model is: its tensors by the plain model's names, what it computes, and which layers it calls."""

    def __init__(
        self, model: PeftModel, names: list[str], adapter: Path, inputs: Mapping[str, Tensor], *, plain: bool
    ) -> None:
        self.model, self.inputs = model, inputs
        self.rotations = rotations_in(adapter)
        self.values = {name: self._value(name) for name in names}
        model.eval()
        reference = doubled(model) if plain else unpacked(model)
        self.wanted = outputs(reference, inputs)
        self.must_stay = self._read_and_not_called()

    def _module(self, path: str) -> Any:
        module: Any = self.model.base_model.model
        for part in path.split(".") if path else []:
            module = getattr(module, part)
            if isinstance(module, ModulesToSaveWrapper):
                module = module.modules_to_save["default"]
        return module

    def _value(self, name: str) -> tuple[Tensor, bool]:
        """The tensor, and whether it is rotated (then in float64)."""
        path, _, leaf = name.rpartition(".")
        module = self._module(path)
        inner = module.base_layer if hasattr(module, "base_layer") else module
        if leaf != "weight" or path not in self.rotations:
            return getattr(inner, leaf).detach(), False
        if isinstance(inner, nn.Embedding):
            return inner.weight.detach().double() @ self.rotations[path], True
        return decoded(inner.state_dict(), "weight") @ self.rotations[path].T, True

    def _read_and_not_called(self) -> set[str]:
        """Paths of targeted layers that the forward does not call, and whose weight it reads; other layers that it does
        not call take no part in these inputs, and ``unused`` has them.
        """
        called = called_modules(self.model, self.inputs)
        idle = [p for p in self.rotations if self._module(p) not in called]
        before = outputs(self.model, self.inputs)
        found = {path for path in idle if self._is_read(self._module(path).base_layer, before)}
        self.unused = set(idle) - found
        return found

    def _is_read(self, layer: nn.Module, before: list[Tensor]) -> bool:
        """Whether the outputs follow the layer's own weight, apart from others that are tied to it."""
        kept = layer.weight
        layer.weight = copy.deepcopy(kept)
        layer.weight.data.zero_()
        after = outputs(self.model, self.inputs)
        layer.weight = kept
        return distance(after, before) > 0


# --- one cell ---------------------------------------------------------------------------------------------------------


class Cell:
    """One base and one adapter of a family."""

    def __init__(self, bench: Bench, kind: str, which: str, folder: Path) -> None:
        self.bench, self.kind, self.which, self.folder = bench, kind, which, folder
        self.family = bench.family
        self.findings: list[Finding] = []

    def run(self, *, graphs: bool = True) -> list[Finding]:
        try:
            if not self._prepare():
                return [Finding("adapter", ABSENT)]
        except StackError as error:
            return [Finding("adapter", STACK, "StackError", str(error))]
        self.memory = self._step("memory", self._fold_in_memory)
        disk = self._step("disk", self._fold_on_disk)
        if self.memory is not None:
            self._step("undo", self._undo_in_memory)
            self._step("export", self._export)
            if graphs and self.which == "linears" and self.kind != "int8":
                self._step("onnx", self._onnx)
        if disk is not None:
            self._step("undo on disk", self._undo_on_disk)
        return self.findings

    def _prepare(self) -> bool:
        """The adapter's folder and the live model; False where the family has no such part."""
        with stack("transformers loads and runs the base"):
            base = self.bench.base(self.kind)
            self.skip = self._trained_whole(base)
            base = self._base()
            self.base_state = {n: t.detach().clone() for n, t in base.state_dict().items()}
            self.base_outputs = outputs(base, self.family.inputs)
            if not all(t[t.isfinite()].numel() or not t.numel() for t in self.base_outputs):
                raise StackError("the base computes", "no finite value")
        base = self._base()
        names = [n for n, _ in base.named_parameters(remove_duplicate=False)]
        self.conv1d = {f"{p}.weight" for p, m in base.named_modules() if type(m).__name__ == "Conv1D"}
        with stack("peft makes, saves and loads the adapter"):
            settings = adapter_settings(self.family, linearised(base), self.which)
            if settings is None:
                return False
            written = saved_adapter(base, settings, self.folder / "adapter")
            live = PeftModel.from_pretrained(linearised(self._base()), self.folder / "adapter").eval()
            lost = differing(trained(live), written)
            if lost:
                raise StackError("peft loads what it saved", f"{len(lost)} tensors differ: {lost[:3]}")
            self.live = Live(live, names, self.folder / "adapter", self.family.inputs, plain=self.kind == "plain")
        return True

    def _base(self) -> Any:
        return self.bench.base(self.kind, self.skip)

    def _trained_whole(self, base: Any) -> tuple[str, ...]:
        """What transformers must not quantise, because peft trains the quantised head whole and cannot: transformers'
        own choice, and the head.
        """
        head = head_path(self.family, base)
        if self.which != "head saved" or self.kind == "plain" or not head:
            return ()
        linears = [m for p, m in base.named_modules() if p == head or p.startswith(f"{head}.")]
        quantised = any(type(m) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt) for m in linears)
        return (*base.hf_quantizer.modules_to_not_convert, head) if quantised else ()

    def _step(self, name: str, call: Callable[[], Any]) -> Any:
        """What the call gives, or None with a finding."""
        try:
            return call()
        except WrongError as error:
            finding = Finding(name, WRONG, "WrongError", str(error))
        except StackError as error:
            finding = Finding(name, STACK, "StackError", str(error))
        except oftsurgery.OFTSurgeryError as error:
            finding = Finding(name, REFUSED, type(error).__name__, " ".join(str(error).split())[:500])
        except Exception as error:  # noqa: BLE001 - that is a finding
            finding = Finding(name, CRASH, type(error).__name__, " ".join(str(error).split())[:500])
        self.findings.append(finding)
        return None

    # --- folds

    def _fold_in_memory(self) -> Any:
        folded = oftsurgery.fold(self._base(), self.folder / "adapter", undo=self.folder / "memory.undo")
        self._check_as_live(folded, folded.oftsurgery.idle)
        return folded

    def _fold_on_disk(self) -> Any:
        settings: dict[str, Any] = (
            {} if self.kind == "plain" else {"format": self.kind, "double_quant": self.kind == "nf4"}
        )
        out = self.folder / "disk"
        record = oftsurgery.fold_checkpoint(
            self.bench.plain, self.folder / "adapter", out, undo=self.folder / "disk.undo", **settings
        )
        model = self._loads(out)
        if self.memory is not None:
            self._check_same(model, self.memory)
        else:
            self._check_as_live(model, record.idle)
        return model

    def _loads(self, folder: Path) -> Any:
        """The model in a folder of ours. Where it does not load and the stack's own folder of the base does not either,
        that is the stack's.
        """
        try:
            model = self.bench.reloaded(folder)
            outputs(model, self.family.inputs)
            return model
        except Exception as error:
            reason, _ = self.bench.stack_reloads(self.kind)
            if reason:
                raise StackError("transformers saves and loads the base alone", reason) from error
            if isinstance(error, WrongError):
                raise
            raise WrongError(
                f"the output does not load or run: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error

    def _check_same(self, model: Any, other: Any) -> None:
        """Byte for byte, and the same outputs."""
        found = differing(dict(model.state_dict()), dict(other.state_dict()))
        if found:
            reason, lost = self.bench.stack_reloads(self.kind)
            if set(found) <= lost:
                raise StackError("transformers saves and loads the base alone", reason)
        wrong_unless(not found, f"{len(found)} tensors are not those of memory: {found[:4]}")
        off = distance(outputs(model, self.family.inputs), outputs(other, self.family.inputs))
        wrong_unless(off < 1e-6, f"outputs are {off:.1e} from memory's, whose bytes are the same")

    def _check_as_live(self, model: Any, idle: tuple[str, ...]) -> None:
        state = dict(model.state_dict())
        for name, (value, rotated) in self.live.values.items():
            path = name.rpartition(".")[0]
            base, got = self.base_state[name], state[name]
            if rotated and (path in self.live.must_stay or (path in self.live.unused and path in idle)):
                wrong_unless(not differing({"": got}, {"": base}), f"{name} is read and not called, and was folded")
            elif rotated:
                in_codes = got.dtype == torch.int8 or quant_state(state, name) is not None
                off = relative(
                    decoded(state, name).reshape(value.shape) if name not in self.conv1d else decoded(state, name).T,
                    value,
                )
                wrong_unless(
                    off < WEIGHTS[self.kind if in_codes else "plain"], f"{name} is {off:.2g} from the live one"
                )
            else:
                expected = value.t() if name in self.conv1d else value
                wrong_unless(not differing({"": got}, {"": expected}), f"{name} is not the live one")
        same = {n for n in state if n not in self.live.values and not self._belongs_to_rotated(n)}
        changed = differing({n: state[n] for n in same}, {n: t for n, t in self.base_state.items() if n in same})
        wrong_unless(not changed, f"tensors that nobody trained have changed: {changed[:4]}")
        wrong_unless(
            state.keys() == self.base_state.keys(), f"names differ: {sorted(state.keys() ^ self.base_state.keys())[:4]}"
        )
        off = distance(outputs(doubled(model) if self.kind == "plain" else model, self.family.inputs), self.live.wanted)
        wrong_unless(off < OUTPUTS[self.kind], f"outputs are {off:.2g} from the live ones")

    def _belongs_to_rotated(self, name: str) -> bool:
        """Statistics of a rotated weight."""
        return any(
            name.startswith(f"{n}.") or name == n.removesuffix("weight") + "SCB"
            for n, (_, rotated) in self.live.values.items()
            if rotated
        )

    # --- ways back and out

    def _undo_in_memory(self) -> None:
        back = oftsurgery.unfold(self.memory, undo=self.folder / "memory.undo")
        found = differing(dict(back.state_dict()), self.base_state)
        wrong_unless(not found, f"{len(found)} tensors are not the base's: {found[:4]}")

    def _undo_on_disk(self) -> None:
        back = self.folder / "back"
        oftsurgery.unfold_checkpoint(self.folder / "disk", back, undo=self.folder / "disk.undo")
        found = differing(dict(self._loads(back).state_dict()), self.base_state)
        wrong_unless(not found, f"{len(found)} tensors are not the base's: {found[:4]}")
        if self.kind == "plain":
            found = differing(tensors(back), tensors(self.bench.plain))
            wrong_unless(not found, f"{len(found)} tensors in the files are not the base's: {found[:4]}")

    def _export(self) -> None:
        oftsurgery.export_safetensors(self.memory, self.folder / "exported")
        self._check_same(self._loads(self.folder / "exported"), self.memory)

    def _onnx(self) -> None:
        named = set(self.family.inputs) <= {"input_ids", "decoder_input_ids"}
        try:
            oftsurgery.export_onnx(
                self.memory,
                self.folder / "onnx",
                dtype="float32",
                example_inputs=None if named else dict(self.family.inputs),
            )
        except oftsurgery.OFTSurgeryError:
            self._torch_exports()
            raise

    def _torch_exports(self) -> None:
        """torch captures the plain base without oftsurgery, or it is the stack that cannot."""
        base = self.bench.base("plain")
        base.config.use_cache = False
        with stack("torch.export of the plain base alone"):
            torch.export.export(base, (), kwargs=dict(self.family.inputs), strict=False)


def run_family(
    family: Family, folder: Path, cells: list[tuple[str, str]], *, graphs: bool = True
) -> dict[str, list[Finding]]:
    """``{"base, adapter": findings}`` of the cells asked for; a cell without findings is right."""
    found: dict[str, list[Finding]] = {}
    transformers.utils.logging.disable_progress_bar()
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            bench = Bench(family, folder / "family")
        except StackError as error:
            return {f"{kind}, {which}": [Finding("base", STACK, "StackError", str(error))] for kind, which in cells}
        for kind, which in cells:
            place = folder / "cell"
            found[f"{kind}, {which}"] = Cell(bench, kind, which, place).run(graphs=graphs)
            shutil.rmtree(place, ignore_errors=True)
    return found
