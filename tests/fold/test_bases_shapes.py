"""Bases of other packages in the shapes in which they come: shards, tied embeddings, layers that stay plain, experts, Conv1D, missing configs.

transformers' own FP8 quantises the models here, dequantises them, and loads what a fold writes.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from checkpoints import adapted, differing, linearised, load, quiet_fold, rotations_in, tensors
from independent import relative
from package_bases import HOME, changed, opened
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

import oftsurgery
from oftsurgery.cli import main as cli
from oftsurgery.formats.codecs import decode, encode
from oftsurgery.formats.packages.methods import METHODS
from oftsurgery.formats.packages.package_format import PackageFormat
from oftsurgery.formats.packages.stored import Source

FP8 = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(32, 32), scale_fmt="float"))
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FUSED = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1}
GPT2 = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 32}
PLAIN = ("embed", "lm_head", "router", "mlp.gate.", "norm", "wte", "wpe")

#: ``{case: (class, config, modules of the adapter, parts of the names of linears that stay plain)}``
CASES: dict[str, tuple[str, dict[str, Any], list[str], tuple[str, ...]]] = {
    "tied": ("LlamaForCausalLM", SIZES | {"tie_word_embeddings": True}, ["q_proj", "embed_tokens"], ()),
    "shards": ("LlamaForCausalLM", SIZES, ["q_proj", "down_proj"], ()),
    "mixed": (
        "LlamaForCausalLM",
        SIZES,
        ["q_proj", "v_proj"],
        ("layers.0.self_attn.v_proj", "layers.1.self_attn.q_proj"),
    ),
    "experts": ("Qwen3MoeForCausalLM", SIZES | EXPERTS, ["o_proj"], ()),
    "fused experts": ("Llama4ForCausalLM", SIZES | FUSED, ["q_proj"], ()),
    "Conv1D": ("GPT2LMHeadModel", GPT2, ["c_attn", "c_fc"], ()),
}


def made(case: str, folder: Path) -> tuple[Path, Path]:
    """The base in FP8, and the adapter."""
    name, sizes, targets, plain = CASES[case]
    torch.manual_seed(0)
    cls: Any = getattr(transformers, name)
    model = cls(cls.config_class(**sizes)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_().div_(8)
    base = folder / "base"
    model.save_pretrained(base)
    held = load_file(base / "model.safetensors")
    linears = [n for n, t in held.items() if t.ndim >= 2 and not any(part in n for part in (*PLAIN, *plain))]
    held |= Fp8Quantize(FP8).convert({n: held[n] for n in linears})
    held = {n: t.contiguous() for n, t in held.items()}
    skip = ["lm_head", *(f"model.{path}" for path in plain)]
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": skip}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (base / "model.safetensors").unlink()
    count = 3 if case == "shards" else 1  # where a weight and its scale lie in different files
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors" for i in range(count)]
    weight_map = {n: files[i % count] for i, n in enumerate(sorted(held))}
    for file in files:
        save_file({n: held[n] for n in weight_map if weight_map[n] == file}, base / file, metadata={"format": "pt"})
    if count > 1:
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, of tied and saved embeddings
        adapted(linearised(model.float()), targets).save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def dequantised(folder: Path) -> dict[str, Tensor]:
    """What transformers' FP8 makes of the tensors."""
    held = tensors(folder)
    return {
        n: Fp8Dequantize(FP8)._dequantize_one(t, held[f"{n}_scale_inv"], output_dtype=torch.bfloat16)
        if f"{n}_scale_inv" in held
        else t
        for n, t in held.items()
        if not n.endswith("_scale_inv")
    }


@pytest.mark.parametrize("case", CASES)
def test_a_base_is_folded_in_every_shape_or_refused(case: str, tmp_path: Path) -> None:
    base, adapter = made(case, tmp_path)
    before, turns = dequantised(base), rotations_in(adapter)
    embedded = {path for path in turns if "embed" in path}
    for kind, within in (("bf16", 0.003), ("same", 0.03)):
        out = tmp_path / kind
        if case == "Conv1D" and kind == "same":
            with pytest.raises(
                oftsurgery.StateError, match=r"holds this weight \(in, out\), and no quantiser of fp8 does"
            ):
                quiet_fold(base, adapter, out)
            continue
        more = {"max_shard_size": 20_000} if case == "shards" else {}
        record = quiet_fold(base, adapter, out, format=kind, **more)
        assert record.modules.keys() == turns.keys()
        after = dequantised(out)
        for path, turn in turns.items():
            if path in embedded:
                continue
            was, now = (held[f"{path}.weight"].double() for held in (before, after))
            was, now = (was.t(), now.t()) if case == "Conv1D" else (was, now)
            assert relative(now, was @ turn.t()) < within
        rest = [n for n in before if n.removesuffix(".weight") not in turns]
        assert not differing({n: before[n] for n in rest}, {n: after[n] for n in rest})
        report = oftsurgery.verify_checkpoint(out, base, adapter)
        assert report.ok, report.wrong
        assert not [f for f in oftsurgery.doctor(out, base=base) if f.severity != "note"]
        if (case, kind) != ("fused experts", "same"):  # transformers 5.23 does not read the scales of the base either
            live = load(out, CASES[case][0]).state_dict()
            assert all(torch.equal(live[f"{path}.weight"], after[f"{path}.weight"]) for path in turns)
        if kind == "same":
            plain = [p for p in turns if f"{p}.weight_scale_inv" not in tensors(base)]
            assert len(plain) == {"tied": 1, "mixed": 2}.get(case, 0)
            oftsurgery.unfold_checkpoint(out, tmp_path / "back", base=base)
            assert not differing(tensors(base), tensors(tmp_path / "back"))


NO_CONFIG = {
    "gptq-4-gptq": "GPTQ or AWQ",
    "awq-gemm-g32": "GPTQ or AWQ",
    "hqq-4-bf16": "HQQ",
    "ct-int4-group-asym": "compressed-tensors",
    "ct-int8-fp16": "compressed-tensors",
    "torchao-int8": "torchao",
    "fp8-block": None,
}


@pytest.mark.parametrize("name", NO_CONFIG)
def test_a_config_without_its_quantization_config_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(HOME / name, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config))
    adapted(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)), ["q_proj"]).save_pretrained(
        tmp_path / "a"
    )
    message = (
        rf"tensors are those of {NO_CONFIG[name]}.*restore the config.json" if NO_CONFIG[name] else "stored in fp8"
    )
    with pytest.raises(oftsurgery.FormatError, match=message):
        oftsurgery.fold_checkpoint(base, tmp_path / "a", tmp_path / "out", format="bf16", trained_on="plain")
    assert cli.main(["doctor", str(base)]) == 1 or name == "fp8-block"
    assert not (tmp_path / "out").exists()


def test_groups_of_several_numbers_of_bits(tmp_path: Path) -> None:
    """compressed-tensors may store some layers in 4 bits and others in 8."""
    eight = load_file(HOME / "ct-int8-fp16" / "model.safetensors")
    path = "model.layers.0.self_attn.q_proj."
    own: dict[str, Any] = {n.removeprefix(path): t for n, t in eight.items() if n.startswith(path)}
    gone = dict.fromkeys(("weight_packed", "weight_shape"))
    config = json.loads((HOME / "ct-int4-group-asym" / "config.json").read_text())["quantization_config"]
    other = json.loads((HOME / "ct-int8-fp16" / "config.json").read_text())["quantization_config"]
    groups = {"a": config["config_groups"]["group_0"], "b": other["config_groups"]["group_0"]}
    settings = {"format": "mixed-precision", "config_groups": groups}
    base = changed("ct-int4-group-asym", tmp_path / "base", settings, **gone, **own)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{k: v for k, v in json.loads((base / "config.json").read_text()).items() if k != "quantization_config"}
        )
    )
    adapted(model, ["q_proj", "k_proj"]).save_pretrained(tmp_path / "adapter")
    for kind in ("bf16", "same"):
        quiet_fold(base, tmp_path / "adapter", tmp_path / kind, format=kind)
        report = oftsurgery.verify_checkpoint(tmp_path / kind, base, tmp_path / "adapter")
        assert report.ok, report.wrong
    labels = {
        n.rpartition("self_attn.")[2]: s.label for n, s in opened(tmp_path / "same").held.items() if "self_attn" in n
    }
    assert labels["q_proj.weight"].startswith("compressed-tensors, 8 bits")
    assert labels["k_proj.weight"].startswith("compressed-tensors, 4 bits")


def test_scales_that_are_powers_of_two_stay_so(tmp_path: Path) -> None:
    """DeepSeek V3.1 and its kin: ``scale_fmt: ue8m0``."""
    held = load_file(HOME / "fp8-block" / "model.safetensors")
    powers = {n: torch.exp2(torch.ceil(torch.log2(t))) for n, t in held.items() if n.endswith("_scale_inv")}
    base = changed("fp8-block", tmp_path / "base", {"scale_fmt": "ue8m0"})
    save_file(held | powers, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    adapted(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)), ["q_proj"]).save_pretrained(
        tmp_path / "a"
    )
    quiet_fold(base, tmp_path / "a", tmp_path / "out", rounding="nearest")
    name = "model.layers.0.self_attn.q_proj.weight"
    scale = tensors(tmp_path / "out")[f"{name}_scale_inv"]
    assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))
    turn = rotations_in(tmp_path / "a")["model.layers.0.self_attn.q_proj"]
    exact = opened(base).read(name).double() @ turn.t()
    theirs = Fp8Quantize(
        SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(32, 32), scale_fmt="ue8m0"))
    )
    stored = theirs.convert({"x.weight": exact.float()})
    assert torch.equal(stored["x.weight_scale_inv"].float(), scale)
    far = (stored["x.weight"].float() != tensors(tmp_path / "out")[name].float()).float().mean()
    assert far < 0.01  # the exact values in float64, and those of the fold in float32
    assert oftsurgery.verify_checkpoint(tmp_path / "out", base, tmp_path / "a").ok


def _integers(out: int, inputs: int, bits: int, of: tuple[int, ...], *, symmetric: bool) -> Any:
    """The tensors of compressed-tensors' packed layout, and its settings."""
    found = {
        "weight_packed": torch.zeros(out, -(-inputs * bits // 32), dtype=torch.int32),
        "weight_scale": torch.zeros(of),
        "weight_shape": torch.tensor([out, inputs]),
    }
    if not symmetric:
        found["weight_zero_point"] = torch.zeros(-(-out * bits // 32), of[1], dtype=torch.int32)
    scheme = {"num_bits": bits, "symmetric": symmetric}
    return "compressed-tensors", found, {"config_groups": {"": {"weights": scheme}}}


def _hqq(out: int, inputs: int, bits: int, group: int, axis: int) -> Any:
    rows, columns = (group, out * inputs // group) if axis == 0 else (out * inputs // group, group)
    words = {8: (1, torch.uint8, "8bit_u8"), 4: (2, torch.uint8, "4bit_u8"), 3: (10, torch.int32, "3bit_32")}
    count, dtype, packing = words[bits]

    def text(of: str) -> Tensor:
        return torch.tensor(list(of.encode()), dtype=torch.uint8)

    facts = {"shape": [out, inputs], "nbits": bits, "group_size": group, "axis": axis}
    scales = torch.zeros((1, columns) if axis == 0 else (rows, 1))
    found = {"W_q": torch.zeros(-(-rows // count), columns, dtype=dtype), "scale": scales, "zero": scales.clone()}
    found |= {name: torch.tensor(fact) for name, fact in facts.items()}
    return "hqq", found | {"packing": text(packing), "compute_dtype": text("torch.float32")}, {}


def _float8(out: int, inputs: int, block: tuple[int, int] | None, of: tuple[int, ...]) -> Any:
    found = {"weight": torch.zeros(out, inputs, dtype=torch.float8_e4m3fn), "weight_scale_inv": torch.zeros(of)}
    return "fp8", found, {"weight_block_size": block}


ODD: dict[str, Any] = {
    "int4, groups of 8": lambda: _integers(5, 24, 4, (5, 3), symmetric=False),
    "int3, rows of 37": lambda: _integers(7, 37, 3, (7, 1), symmetric=True),
    "int5, one scale": lambda: _integers(6, 20, 5, (1,), symmetric=True),
    "int2, one row": lambda: _integers(1, 40, 2, (1, 5), symmetric=False),
    "hqq, groups of 8": lambda: _hqq(6, 24, 4, 8, 1),
    "hqq, columns of 24": lambda: _hqq(6, 40, 8, 24, 0),
    "hqq, 3 bits, columns of 16": lambda: _hqq(6, 40, 3, 16, 0),
    "fp8, blocks of 3 × 5": lambda: _float8(7, 11, (3, 5), (3, 3)),
    "fp8, rows": lambda: _float8(7, 11, None, (7, 1)),
    "fp8, one scale": lambda: _float8(7, 11, None, ()),
    "fp8, blocks larger than the weight": lambda: _float8(7, 11, (128, 128), (1, 1)),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_groups_and_shapes(case: str) -> None:
    """Each value comes back within half a step: in float64, from the codes, scales and zeros that are stored."""
    method, parts, settings = ODD[case]()
    entries = {f"x.{n}": (t.dtype, tuple(t.shape)) for n, t in parts.items()}
    source = Source(entries, settings, torch.float32, lambda name: parts[name.removeprefix("x.")])
    stored = METHODS[method](source)["x.weight"]
    layout = {local: entries[name] for local, name in stored.tensors.items()}
    form = PackageFormat(method, stored.shape, torch.float32, stored=stored, entries=layout)
    values = torch.randn(stored.shape, generator=torch.Generator().manual_seed(5))
    encoded = encode(values, form)
    for local, tensor in encoded.tensors.items():
        assert (tensor.dtype, tuple(tensor.shape)) == layout[local], local
    far = (decode(encoded).double() - values.double()).abs()
    grid = form.kind.quantiser.grid(encoded.tensors)
    steps = grid.steps(values).double()
    assert bool((far <= 0.5 * steps * 1.0001 + 1e-6).float().mean() > 0.95)  # hqq clips some of the largest
    again = form.kind.with_numbers(encoded, grid.nearest(decode(encoded)))
    assert torch.equal(decode(again), decode(encoded))
