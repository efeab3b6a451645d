""":func:`export_model` exports a model as ONNX: a folder that onnxruntime runs, compared with torch before it appears."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.dtypes import NAMED
from oftsurgery.errors import CheckpointError, ExportError, OFTSurgeryError, StateError, needs, printable
from oftsurgery.files.checkpoint import open_checkpoint
from oftsurgery.files.reading import inside, read_json
from oftsurgery.files.staging import Staging, check_apart
from oftsurgery.files.tokenizer_files import tokenizer_files
from oftsurgery.files.writing import disk_errors, sync_file
from oftsurgery.folding import export
from oftsurgery.folding.beside import beside_model
from oftsurgery.folding.folder_writer import write_other_files
from oftsurgery.formats.base import OPSET
from oftsurgery.live.wrapped_model import live_layers
from oftsurgery.progress import Progress
from oftsurgery.records.record import FoldRecord, plain
from oftsurgery.records.record_file import public_record
from oftsurgery.stores.dequantised import dequantised, from_pretrained
from oftsurgery.stores.live_model import record_of
from oftsurgery.stores.modules import inner_model
from oftsurgery.stores.peft_live import LiveAdapters
from oftsurgery.stores.skeleton import quiet, readable_config

from . import run as onnx_run
from .capture import capture_graph
from .graph import weights_file, write_graph
from .placeholders import Prepared, float32_copy
from .tasks import CacheTask, Task, task_of
from .toolchain import require_onnx

GRAPH = "model.onnx"

_STAGES = 7

#: the dtypes of a graph with the largest difference that passes, relative to the output's largest value; torch always computes in float32
_TOLERANCE = {"float32": 1e-5, "float16": 5e-3}


@dataclass(frozen=True)
class OnnxCheck:
    """One comparison of onnxruntime with torch.

    >>> oftsurgery.OnnxCheck(inputs="batch 2, length 7", errors={"logits": 2e-7}).errors["logits"] < 1e-5
    True

    Attributes:
        inputs: the batch size and the lengths of the inputs.
        errors: ``{output: error}``: the largest absolute difference, divided by the largest absolute value of torch's output in
            all comparisons.
    """

    inputs: str
    errors: Mapping[str, float]


@dataclass(frozen=True)
class OnnxReport:
    """The facts about a graph that :func:`~oftsurgery.export_onnx` wrote, and the graph's distance from torch.

    >>> report = oftsurgery.export_onnx(torch.nn.Linear(8, 4), "OUT-ONNX", example_inputs=torch.randn(2, 8))
    >>> len(report.inputs), report.worst < report.tolerance
    (1, True)

    Attributes:
        dtype: the graph's dtype, ``"float32"`` or ``"float16"``.
        opset: the version of ONNX's own operators.
        inputs: the inputs' names, in order.
        outputs: the outputs' names, in order.
        nbytes: the bytes of the graph's weights.
        quantized: ``{module path: format}`` of the layers whose codes the graph holds.
        dequantized: ``{module path: reason}`` of the quantised layers whose codes a quantised graph does not hold.
        repacked: module paths of 4-bit layers that a CPU forward had repacked before: bitsandbytes has rounded the scales of
            these layers to bfloat16, and the graph holds the rounded scales.
        tolerance: the largest error that ``checks`` may have.
        checks: the comparisons; empty if ``verified`` is False.
        verified: whether the checker and the comparisons were run.
        versions: the versions of the packages that took part.
        generation: whether the folder has a ``genai_config.json`` for onnxruntime-genai.
    """

    dtype: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nbytes: int
    quantized: Mapping[str, str]
    dequantized: Mapping[str, str]
    repacked: tuple[str, ...]
    tolerance: float
    checks: tuple[OnnxCheck, ...]
    verified: bool
    versions: Mapping[str, str]
    generation: bool = False

    def __post_init__(self) -> None:
        for name in ("quantized", "dequantized", "versions"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def worst(self) -> float | None:
        """The largest error of all checks, or None without checks."""
        return max((e for check in self.checks for e in check.errors.values()), default=None)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        return dict(plain(self))


def export_model(
    model: nn.Module,
    destination: Path,
    *,
    dtype: str,
    quantized: bool,
    with_past: bool,
    example_inputs: Any,
    tokenizer: Any,
    record: FoldRecord | None,
    verify: bool,
    force: bool,
    progress: Progress | None,
) -> OnnxReport:
    """Export a model in memory: the core of :func:`oftsurgery.export_onnx`."""
    dtype = _checked_dtype(dtype)
    model = inner_model(model)
    if LiveAdapters(model) or live_layers(model):
        message = "the model carries live adapters"
        raise StateError(message, remedy="fold the adapters first: oftsurgery.export_onnx(oftsurgery.fold(model), …)")
    require_onnx()
    home = export.source_of(model)
    check_apart(destination, "model", [home] if home is not None else [])
    stages = iter(range(_STAGES))

    def step(what: str) -> None:
        if progress is not None:
            progress(next(stages), _STAGES, what)

    with torch.no_grad():
        step("read the model")
        task = task_of(model, example_inputs, with_past=with_past)
        reference = float32_copy(model)
        prepared = Prepared(model, NAMED[dtype], quantized=quantized)
        if quantized and not prepared.kept and not prepared.dequantised:
            message = "no layer of the model is quantised, so the graph has no codes to keep"
            remedy = "leave out quantized=True (choose --format onnx), or quantise the model first (--adapter with --quantize nf4)"
            raise StateError(message, remedy=remedy)
        needed = sum(t.nbytes for t in (*prepared.structure.parameters(), *prepared.structure.buffers()))
        with Staging(destination, "onnx", needed=needed, resume=False, force=force, resumable=False) as staging:
            outputs = _outputs(task, reference)
            inputs = task.inputs(NAMED[dtype])
            graph = capture_graph(task.wrap(prepared.structure), inputs, outputs, prepared.values, step)
            step("write the graph")
            with staging.writing(GRAPH) as path:
                nbytes = write_graph(graph, path)
            for written in staging.folder.glob(f"{GRAPH}*"):
                sync_file(written)
            checks = _prove(task, reference, path, dtype, step) if verify else ()
            genai = _genai_config(model, task) if isinstance(task, CacheTask) else None
            report = OnnxReport(
                dtype=dtype,
                opset=OPSET,
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                nbytes=nbytes,
                quantized=prepared.kept,
                dequantized=prepared.dequantised,
                repacked=tuple(prepared.repacked),
                tolerance=_TOLERANCE[dtype],
                checks=checks,
                verified=verify,
                versions={n: metadata.version(n) for n in ("torch", "onnx", "onnxscript", "onnxruntime")},
                generation=genai is not None,
            )
            with disk_errors(staging.folder):
                _write_rest(staging, model, genai, tokenizer, record or record_of(model), report)
            staging.publish()
    if progress is not None:
        progress(_STAGES, _STAGES, "done")
    return report


def load_model(folder: Path) -> nn.Module:
    """Load the model of a checkpoint's folder with transformers, in the dtype and the quantisation of the files; where another package than
    bitsandbytes quantised the weights, dequantised.

    Raises:
        CheckpointError: transformers does not have the model's class, or the checkpoint lacks weights.
        MissingDependencyError: transformers is not installed.
    """
    with needs("transformers", "pip install 'oftsurgery[peft]'"):
        import transformers
    names = read_json(inside(folder, "config.json")).get("architectures") or ["AutoModel"]
    cls: Any = getattr(transformers, str(names[0]), None)
    if not hasattr(cls, "from_pretrained"):
        message = f"transformers does not have the model's class, {printable(names[0])}"
        remedy = "load the model in Python and call oftsurgery.export_onnx(model, …)"
        raise CheckpointError(message, path=folder, remedy=remedy)
    source = dequantised(open_checkpoint(folder))
    settings: dict[str, Any] = {"dtype": "auto", "trust_remote_code": False, "output_loading_info": True}
    remedy = "`oftsurgery doctor FOLDER` finds what is wrong with the checkpoint"
    try:
        with quiet():
            config = transformers.AutoConfig.for_model(**readable_config(source.config)) if source.stored_as else None
            loaded: Any = from_pretrained(cls, source, config, **settings)
            model, found = loaded
    except (OSError, ValueError, RuntimeError) as error:
        message = f"transformers cannot load the checkpoint: {printable(error, 400)}"
        raise CheckpointError(message, path=folder, remedy=remedy) from error
    missing = [*sorted(found["missing_keys"]), *sorted(str(k) for k in found.get("mismatched_keys", ()))]
    if missing:
        message = f"the checkpoint lacks {len(missing)} of the model's tensors, or their shapes differ"
        raise CheckpointError(message, tensor=missing[0], path=folder, remedy=remedy)
    return model  # type: ignore[no-any-return]


def _outputs(task: Task, reference: nn.Module) -> list[str]:
    """The outputs' names, from a run of the model.

    Raises:
        StateError: the model does not run on the task's inputs, or returns no tensor.
    """
    try:
        names = task.outputs(reference)
    except OFTSurgeryError:
        raise
    except Exception as error:  # the model's own code raises errors of any kind
        listed = ", ".join(task.inputs(torch.float32))
        message = f"the model does not run on the inputs {listed}: {type(error).__name__}: {printable(error, 300)}"
        remedy = "give example inputs on which the model runs: example_inputs={'name': tensor, …}"
        if (
            getattr(task, "pad", 0) is None
            and "pad_token_id" in inspect.unwrap(type(reference).forward).__code__.co_names
        ):
            # a classifier over a decoder looks for the last token of each text in a batch
            remedy = "name the padding token: model.config.pad_token_id = tokenizer.pad_token_id (`pad_token_id` in config.json)"
        raise StateError(message, remedy=remedy) from error
    if not names:
        raise StateError("the model returns no tensor", remedy="wrap the model in a module that returns tensors")
    return names


def _checked_dtype(dtype: str) -> str:
    """The name of the graph's dtype, without the prefix ``torch.``."""
    name = str(dtype).removeprefix("torch.")
    if name in ("bfloat16", "bf16"):
        message = "onnxruntime has no bfloat16 kernels on the CPU, so the CPU could neither run nor check the graph"
        remedy = "choose 'float16', or 'float32' where float16 overflows (--dtype)"
        raise StateError(message, format="bfloat16", remedy=remedy)
    if name not in _TOLERANCE:
        message = f"the dtype {printable(dtype)!r} is not known"
        raise StateError(message, remedy="choose 'float32' or 'float16' (--dtype)")
    return name


# --- proof ------------------------------------------------------------------------------------------------------------


def _prove(
    task: Task, reference: nn.Module, path: Path, dtype: str, step: Callable[[str], None]
) -> tuple[OnnxCheck, ...]:
    """The comparisons of the graph with torch, which all kept the tolerance.

    Raises:
        ExportError: the graph is not valid, or computes something else.
    """
    import onnx

    step("check the graph")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        message = f"the written graph is not valid ONNX: {printable(error, 400)}"
        raise ExportError(message, remedy="report this error together with the model's config.json") from error
    step("compare with torch")
    with onnx_run.Process(path, lean=weights_file(path).exists()) as process:
        given, made = process.inputs, process.outputs
        axes = {v.name: v.shape for v in (*given, *made)}
        dtypes = {v.name: v.dtype for v in given}

        def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
            arrays = {n: t.numpy().astype(dtypes[n], copy=False) for n, t in feeds.items() if n in dtypes}
            return {v.name: torch.from_numpy(a) for v, a in zip(made, process.run(arrays), strict=True)}

        found = [
            (case.label, {n: _difference(n, got, expected) for n, (got, expected) in case.pairs.items()})
            for case in task.cases(reference, run, axes)
        ]
    # the scale is taken over all comparisons, since a regression's single number for one text may be near zero
    scale = {n: max(values[n][1] for _, values in found) or 1.0 for n in found[0][1]}
    checks = [OnnxCheck(label, {n: d / scale[n] for n, (d, _) in values.items()}) for label, values in found]
    bad = [(e, n, check.inputs) for check in checks for n, e in check.errors.items() if not e <= _TOLERANCE[dtype]]
    if bad:
        largest, name, inputs = max(bad, key=lambda b: b[0])
        raise ExportError(
            f"onnxruntime does not compute what torch computes: the largest difference is {largest:.1e} of the largest value, and the limit is "
            f"{_TOLERANCE[dtype]:.0e}, at {inputs} (and in {len({i for _, _, i in bad}) - 1} more of {len(checks)} comparisons)",
            tensor=name,
            format=dtype,
            remedy="choose dtype='float32' (--dtype float32)"
            if dtype == "float16"
            else "report this error together with the model's config.json; verify=False (--no-verify) writes the graph all the same",
        )
    return tuple(checks)


def _difference(name: str, got: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest absolute difference (infinite where there is a NaN), and the largest finite absolute value."""
    if got.shape != expected.shape:
        return float("inf"), 0.0
    if not expected.numel():
        return 0.0, 0.0
    if bool(torch.isnan(expected).any()):
        remedy = "look for NaN among the weights; verify=False (--no-verify) writes the graph all the same"
        raise ExportError("torch's own output holds NaN", tensor=name, remedy=remedy)
    got, expected = got.double(), expected.double()
    same = got == expected  # equal infinities count too, since models mask their outputs with infinities
    difference = float(torch.where(same, 0, got - expected).abs().max())
    finite = expected[torch.isfinite(expected)].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return difference if difference == difference else float("inf"), largest  # NaN is not equal to NaN


# --- the files beside the graph ---------------------------------------------------------------------------------------


def _write_rest(
    staging: Staging,
    model: Any,
    genai: dict[str, Any] | None,
    tokenizer: Any,
    record: FoldRecord | None,
    report: OnnxReport,
) -> None:
    """Write the files beside the graph: configs, tokenizer, record and card."""
    jsons = export.config_files(model, NAMED[report.dtype])
    if genai is not None:
        jsons["genai_config.json"] = genai
    home = export.source_of(model)
    with beside_model(home, record, tokenizer, getattr(model, "config", None)) as found:
        carried = replace(found, files=tokenizer_files(found), code=(), left_out=(), lost={})
        record = FoldRecord((), {}) if record is None else public_record(record)
        record = replace(record, extra={**record.extra, "onnx": report.to_dict()})
        write_other_files(staging, (), record, source=home, jsons=jsons, carried=carried, exact=False)


def _genai_config(model: Any, task: CacheTask) -> dict[str, Any] | None:
    """``genai_config.json`` for onnxruntime-genai; None if the layers' shapes differ, since the file has one shape for all layers."""
    shapes = {part for layer in task.layers for part in layer}
    if len(shapes) != 1:
        return None
    ((heads, size),) = shapes
    config = model.config.get_text_config()
    generation = getattr(model, "generation_config", None)

    def tokens(name: str) -> list[int]:
        """The tokens of a setting that lie in the vocabulary; onnxruntime-genai refuses other tokens, which a shrunk model may name."""
        found = getattr(generation, name, None)
        found = getattr(config, name, None) if found is None else found
        found = found if isinstance(found, (list, tuple)) else [found]
        return [t for t in found if isinstance(t, int) and 0 <= t < int(config.vocab_size)]

    bos, eos, pad = (tokens(f"{name}_token_id") for name in ("bos", "eos", "pad"))
    length = int(getattr(config, "max_position_embeddings", None) or 0)
    length = length if length > 0 else 4096
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": (bos or [0])[0],
            "eos_token_id": eos[0] if len(eos) == 1 else eos,
            "pad_token_id": (pad or eos or [0])[0],
            "context_length": length,
            "vocab_size": int(config.vocab_size),
            "decoder": {
                "filename": GRAPH,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": size,
                "hidden_size": int(config.hidden_size),
                "num_attention_heads": int(config.num_attention_heads),
                "num_hidden_layers": len(task.layers),
                "num_key_value_heads": heads,
                "inputs": {
                    **{name: name for name in task.names},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
