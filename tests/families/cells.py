"""One cell of the sweep folds an adapter into a base, and compares every result with peft's live model.

peft computes the expected values over a base that transformers loaded: the outputs (in float64 if the base is plain), and
each tensor of the live model; a float64 computation of the tests' own gives the rotations. A live layer that the forward
never calls must not be folded if the forward reads the base's weight: a run shows this, and no table of classes is asked.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import onnxruntime
import torch
import transformers
from bench import Bench, StackError, WrongError, distance, doubled, outputs, stack, wrong_unless
from checkpoints import decoded, differing, linearised, quant_state, quiet_transformers, tensors
from family import BOTH, TEXTS, Family
from independent import relative
from live_adapters import Live, adapter_settings, head_path, saved_adapter, trained
from peft import PeftModel
from results import ABSENT, CRASH, REFUSED, STACK, WRONG
from torch import Tensor, nn

import oftsurgery

#: the largest relative error of a rotated weight against the live model's
WEIGHTS = {"plain": 1e-5, "nf4": 0.15, "int8": 0.02}
#: the largest relative error of the outputs: against the live model (plain), or against a plain model with the values of the
#: same codes; in int8 activations are rounded too
OUTPUTS = {"plain": 1e-5, "nf4": 1e-3, "int8": 0.3}


@dataclass(frozen=True)
class Finding:
    """The result of one step of a cell, if the result is not right."""

    step: str
    verdict: str
    error: str = ""
    text: str = ""


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
            if graphs and self.which == "linears" and self.kind == "plain":
                self._step("onnx", self._onnx)
        if disk is not None:
            self._step("undo on disk", self._undo_on_disk)
        return self.findings

    def _prepare(self) -> bool:
        """Make the adapter's folder and the live model; False if the family lacks the part that the adapter trains."""
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
        """The modules that transformers must leave plain, since peft cannot train a quantised head whole: transformers' own
        choice, and the head.
        """
        head = head_path(self.family, base)
        if self.which != "head saved" or self.kind == "plain" or not head:
            return ()
        linears = [m for p, m in base.named_modules() if p == head or p.startswith(f"{head}.")]
        quantised = any(type(m) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt) for m in linears)
        return (*base.hf_quantizer.modules_to_not_convert, head) if quantised else ()

    def _step(self, name: str, call: Callable[[], Any]) -> Any:
        """The call's result; after an error None, and a finding."""
        try:
            return call()
        except WrongError as error:
            finding = Finding(name, WRONG, "WrongError", str(error))
        except StackError as error:
            finding = Finding(name, STACK, "StackError", str(error))
        except oftsurgery.OFTSurgeryError as error:
            finding = Finding(name, REFUSED, type(error).__name__, " ".join(str(error).split())[:500])
        except Exception as error:
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
            {"trained_on": "plain"}
            if self.kind == "plain"
            else {"format": self.kind, "double_quant": self.kind == "nf4"}
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
        """The model in a folder that oftsurgery wrote. If neither this folder nor the stack's own folder of the base loads, the
        error is the stack's.
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
        """Check that two models have the same bytes and the same outputs."""
        found = differing(dict(model.state_dict()), dict(other.state_dict()))
        if found:
            reason, lost = self.bench.stack_reloads(self.kind)
            if set(found) <= lost:
                raise StackError("transformers saves and loads the base alone", reason)
        wrong_unless(not found, f"{len(found)} tensors are not those of memory: {found[:4]}")
        off = distance(outputs(model, self.family.inputs), outputs(other, self.family.inputs))
        wrong_unless(off < 1e-6, f"outputs are {off:.1e} from memory's, whose bytes are the same")

    def _check_as_live(self, model: Any, idle: tuple[str, ...]) -> None:
        """Check each tensor and the outputs of a folded model against the live model."""
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
        if self.kind == "plain":
            off = distance(outputs(doubled(model), self.family.inputs), self.live.wanted)
            wrong_unless(off < OUTPUTS["plain"], f"outputs are {off:.2g} from the live ones")
        elif self._off_codes(self._base()) < OUTPUTS[self.kind] / 2:
            off = self._off_codes(model)
            wrong_unless(off < OUTPUTS[self.kind], f"outputs are {off:.2g} from what the codes stand for")

    def _off_codes(self, model: Any) -> float:
        """The distance of a quantised model's outputs from the outputs of a plain model with the values of the same codes. Of a
        base the distance can be large: bitsandbytes' CPU kernel is wrong if the number of a layer's inputs is not a multiple
        of the block size, and int8 rounds activations too.
        """
        wanted = outputs(self._plain_with(dict(model.state_dict())), self.family.inputs)
        return distance(outputs(model, self.family.inputs), wanted)

    def _plain_with(self, state: dict[str, Tensor]) -> nn.Module:
        """The plain base in float64 with the values of the codes in ``state``. The live model's outputs are no measure for a
        quantised fold, since some models make a small rounding of weights a large change of outputs.
        """
        model = doubled(self.bench.base("plain"))
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            value = decoded(state, name)
            value = value.T if type(module).__name__ == "Conv1D" and leaf == "weight" else value
            setattr(module, leaf, nn.Parameter(value.reshape(parameter.shape)))
        return model

    def _belongs_to_rotated(self, name: str) -> bool:
        """Whether the tensor holds statistics of a rotated weight."""
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
        """Export a graph, without example inputs if the model takes texts alone, and with example inputs if torch fixes an axis."""
        texts = self.family.inputs is TEXTS or self.family.inputs is BOTH
        try:
            self._graph("onnx", None if texts else dict(self.family.inputs))
        except oftsurgery.ExportError as error:
            if texts and self._graph_of_fixed_sizes():
                raise oftsurgery.ExportError(f"with example inputs alone: {error}") from error
            self._torch_exports()
            raise

    def _graph_of_fixed_sizes(self) -> bool:
        try:
            self._graph("fixed", dict(self.family.inputs))
        except oftsurgery.OFTSurgeryError:
            return False
        return True

    def _graph(self, name: str, examples: dict[str, Tensor] | None) -> None:
        oftsurgery.export_onnx(self.memory, self.folder / name, dtype="float32", example_inputs=examples)

    def _torch_exports(self) -> None:
        """Raise StackError unless, without oftsurgery, torch writes a graph of the plain base and onnxruntime runs the graph."""
        base = self.bench.base("plain")
        base.config.use_cache = False
        with stack("torch computes the same twice"):
            if distance(outputs(base, self.family.inputs, seed=1), outputs(base, self.family.inputs)) > 0:
                raise ValueError("the model draws random numbers in its forward")
        path = self.folder / "alone.onnx"
        with stack("torch.onnx.export of the plain base alone"):
            torch.onnx.export(
                base, (), path, kwargs=dict(self.family.inputs), dynamo=True, opset_version=20, verbose=False
            )
        with stack("onnxruntime of torch's own graph of the plain base"):
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            names = {i.name for i in session.get_inputs()}
            session.run(None, {n: t.numpy() for n, t in self.family.inputs.items() if n in names})


def run_family(
    family: Family, folder: Path, cells: list[tuple[str, str]], *, graphs: bool = True
) -> dict[str, list[Finding]]:
    """``{"base, adapter": findings}`` of the given cells; a cell without findings is right."""
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
