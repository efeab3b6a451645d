"""Small checkpoints that the packages of quantised formats write themselves, and what each package dequantises them to.

``make test-bases`` runs these tests in an environment that has the packages. ``python tests/bases/packages.py`` writes the checkpoints
of :data:`GOLDENS` into ``tests/data/bases``, with the hashes of the dequantised weights, and into ``tests/data/bases-quantised`` what the
packages' quantisers store of one weight; the fast tests read these folders.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

Made = tuple[dict[str, Tensor], Tensor]  # the tensors of a layer by their local names, and the dequantised weight

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LINEARS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}


def quiet_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


# --- one layer of each package ----------------------------------------------------------------------------------------


def gptq(
    weight: Tensor, *, bits: int, group: int, version: str, asymmetric: bool = False, act_order: bool = False
) -> Made:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    out, inputs = weight.shape
    group = inputs if group == -1 else group
    of = torch.arange(inputs) // group
    of = of[torch.randperm(inputs)] if act_order else of
    top, groups = 2**bits - 1, inputs // group
    scales, zeros = torch.empty(groups, out), torch.empty(groups, out)
    for g in range(groups):
        part = weight.float()[:, of == g]
        if asymmetric:  # the first version cannot hold a zero of 0
            low, high = part.amin(1).clamp(max=-1e-3), part.amax(1).clamp(min=1e-3)
            scales[g] = (high - low) / top
            zeros[g] = (-low / scales[g]).round().clamp(1, top)
        else:
            scales[g], zeros[g] = part.abs().amax(1) * 2 / top, (top + 1) // 2
    scales = scales.half().float()

    def module() -> Any:
        made = TorchLinear(bits, group, not asymmetric, act_order, inputs, out, bias=False, register_buffers=True)
        made.optimized = True
        return made

    layer = module()
    layer.pack_block(quiet_linear(weight.float()), scales.t(), zeros.t(), of.to(torch.int32))
    if version == "gptq":
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=group))
    tensors = {name: getattr(layer, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    again = module()
    again.load_state_dict(tensors, strict=False)
    if version == "gptq":
        convert_gptq_v1_to_v2_format_module(again, bits, torch.int32)
    again.post_init()
    return tensors, again.dequantize_weight().t().contiguous()


def _awq_scales(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    parts = weight.float().reshape(weight.shape[0], -1, group)
    low, high = parts.amin(-1), parts.amax(-1)
    scales = ((high - low).clamp(min=1e-5) / 15).half()
    return scales, (-low / scales.float()).round().clamp(0, 15)  # (out, groups)


def _without_models(package: str) -> None:
    """Make the packages in AutoAWQ importable without its models, which need an old transformers."""
    found = None if package in sys.modules else importlib.util.find_spec(package)
    for name in (package, f"{package}.utils", f"{package}.modules", f"{package}.modules.linear") if found else ():
        module = type(sys)(name)
        module.__path__ = [str(Path(found.origin).parent.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module


def awq(weight: Tensor, *, group: int, version: str) -> Made:
    """AutoAWQ's kernels of the layouts gemv run on a GPU alone, so the codes that it packs are the reference there."""
    _without_models("awq")
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.modules.linear.gemv import WQLinear_GEMV
    from awq.modules.linear.gemv_fast import WQLinear_GEMVFast
    from awq.utils.packing_utils import dequantize_gemm

    scales, zeros = _awq_scales(weight, group)
    wide, wide_zeros = (t.float().repeat_interleave(group, 1) for t in (scales, zeros))
    # AutoAWQ packs weights that its search has rounded already, so that no code lies outside 4 bits
    weight = ((torch.round(weight.float() / wide) + wide_zeros).clamp(0, 15) - wide_zeros) * wide
    linear = quiet_linear(weight.half())
    if version == "gemm":
        layer = WQLinear_GEMM.from_linear(
            linear, 4, group, scales=scales.t().contiguous(), zeros=zeros.t().contiguous()
        )
        tensors = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
        return tensors, dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, group).t().contiguous()
    made = {"gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast}[version]
    layer = made.from_linear(linear, 4, group, scales=scales, zeros=zeros)
    tensors = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    codes = torch.round(weight / wide) + wide_zeros
    if version == "gemv":
        return tensors, ((codes - wide_zeros) * wide).half()
    return tensors, (codes * wide + (-(scales * zeros)).half().repeat_interleave(group, 1).float()).half()


def hqq(
    weight: Tensor,
    *,
    bits: float,
    group: int,
    axis: int,
    dtype: torch.dtype = torch.float16,
    wide: bool = False,
    **more: Any,
) -> Made:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis, **more)
    layer = HQQLinear(quiet_linear(weight if wide else weight.to(dtype)), config, compute_dtype=dtype, device="cpu")
    tensors = {name: value for name, value in layer.state_dict().items() if value is not None}
    return {n: t.detach().contiguous() for n, t in tensors.items()}, layer.dequantize().detach()


def compressed(
    weight: Tensor, *, format: str, dtype: torch.dtype = torch.bfloat16, wide: bool = False, **scheme: Any
) -> Made:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**scheme)
    whole = QuantizationScheme(targets=["Linear"], weights=args)
    out, inputs = weight.shape
    rows, columns = {
        "tensor": (out, inputs),
        "channel": (1, inputs),
        "group": (1, args.group_size or 0),
        "block": tuple(args.block_structure or (0, 0)),
    }[args.strategy]
    padded = nn.functional.pad(weight.float(), (0, -inputs % columns, 0, -out % rows))
    parts = padded.reshape(padded.shape[0] // rows, rows, -1, columns)
    own = torch.float32 if wide else dtype
    scale, zero = calculate_qparams(parts.amin((1, 3)).to(own), parts.amax((1, 3)).to(own), args)
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    given = {"weight": weight.to(own), "weight_scale": scale.to(dtype), "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(format)
    tensors = compressor.compress(given, whole)
    return dict(tensors), compressor.decompress(dict(tensors), whole)["weight"]


def fp8(
    weight: Tensor, *, block: tuple[int, int] | None = None, dtype: torch.dtype = torch.bfloat16, wide: bool = False
) -> Made:
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    settings = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt="float"))
    made = Fp8Quantize(settings).convert({"x.weight": weight if wide else weight.to(dtype)})
    codes, scale = made["x.weight"], made["x.weight_scale_inv"]
    back = Fp8Dequantize(settings)._dequantize_one(codes, scale, output_dtype=dtype)
    return {"weight": codes, "weight_scale_inv": scale}, back


def torchao(weight: Tensor, *, config: str, **settings: Any) -> tuple[Made, dict[str, str], dict[str, Any]]:
    """Also the header's texts, and ``quantization_config``."""
    from torchao import quantization
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from transformers import TorchAoConfig

    holder = nn.Sequential(quiet_linear(weight))
    asked = getattr(quantization, config)(**settings)
    quantization.quantize_(holder, asked)
    tensors, header = flatten_tensor_state_dict({"x.weight": holder[0].weight})
    made = {name.removeprefix("x."): tensor for name, tensor in tensors.items()}
    return (made, holder[0].weight.dequantize()), header, TorchAoConfig(asked).to_dict()


# --- cases ------------------------------------------------------------------------------------------------------------


def _gptq_case(bits: int, group: int, version: str, *, asymmetric: bool = False, act_order: bool = False) -> Any:
    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": not asymmetric,
        "desc_act": act_order,
        "checkpoint_format": version,
    }
    make = partial(gptq, bits=bits, group=group, version=version, asymmetric=asymmetric, act_order=act_order)
    return settings, make, torch.float16


def _awq_case(version: str, group: int) -> Any:
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": version, "zero_point": True}
    return settings, partial(awq, group=group, version=version), torch.float16


def _hqq_case(bits: float, group: int, axis: int, dtype: torch.dtype = torch.float16, **more: Any) -> Any:
    params = {"nbits": bits, "group_size": group, "axis": axis, "view_as_float": False} | more
    settings = {"quant_method": "hqq", "quant_config": {"weight_quant_params": params}, "skip_modules": ["lm_head"]}
    return settings, partial(hqq, bits=bits, group=group, axis=axis, dtype=dtype, **more), dtype


def _compressed_case(format: str, dtype: torch.dtype = torch.bfloat16, **scheme: Any) -> Any:
    settings = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "format": format}},
    }
    return settings, partial(compressed, format=format, dtype=dtype, **scheme), dtype


def _fp8_case(block: tuple[int, int] | None) -> Any:
    settings = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": None if block is None else list(block),
        "modules_to_not_convert": ["lm_head"],
    }
    return settings, partial(fp8, block=block), torch.bfloat16


def _torchao_case(config: str, dtype: torch.dtype = torch.bfloat16, **given: Any) -> Any:
    from_names = {"IntxWeightOnlyConfig": _intx}.get(config, dict)
    return {"quant_method": "torchao"}, lambda weight: torchao(weight, config=config, **from_names(**given)), dtype


def _intx(bits: int, group: int) -> dict[str, Any]:
    from torchao.quantization import PerGroup

    return {"weight_dtype": getattr(torch, f"int{bits}"), "granularity": PerGroup(group)}


_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}

#: ``{name: (quantization_config, function that makes a layer, dtype of the plain tensors)}``
CASES: dict[str, tuple[dict[str, Any], Any, torch.dtype]] = {
    **{
        f"gptq-{bits}-{version}{'-asym' * asym}{'-act' * act}{'' if group == 32 else f'-g{group}'}": _gptq_case(
            bits, group, version, asymmetric=asym, act_order=act
        )
        for bits in (2, 3, 4, 8)
        for version in ("gptq", "gptq_v2")
        for asym, act, group in ((False, False, 32), (True, True, 32), (True, False, -1))
    },
    **{f"awq-{v}-g{g}": _awq_case(v, g) for v in ("gemm", "gemv", "gemv_fast") for g in (32, 64)},
    **{
        f"hqq-{bits:g}-g{group}-axis{axis}": _hqq_case(bits, group, axis)
        for bits in (8, 4, 3, 2, 1)
        for group in (32, 64)
        for axis in (0, 1)
    },
    "hqq-4-bf16": _hqq_case(4, 64, 1, torch.bfloat16),
    "hqq-4-as-float": _hqq_case(4, 64, 1, view_as_float=True),
    "ct-int4-group": _compressed_case("pack-quantized", **_INT4, symmetric=True),
    "ct-int4-group-asym": _compressed_case("pack-quantized", **_INT4, symmetric=False),
    "ct-int4-channel-asym": _compressed_case(
        "pack-quantized", num_bits=4, type="int", strategy="channel", symmetric=False
    ),
    "ct-int3-group": _compressed_case(
        "pack-quantized", num_bits=3, type="int", strategy="group", group_size=32, symmetric=True
    ),
    **{
        f"ct-int{bits}-group": _compressed_case(
            "pack-quantized", num_bits=bits, type="int", strategy="group", group_size=32, symmetric=bits % 2 == 0
        )
        for bits in (2, 5, 6, 7)
    },
    "ct-int8-packed": _compressed_case("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "ct-int8-channel": _compressed_case("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "ct-int8-fp16": _compressed_case(
        "int-quantized", torch.float16, num_bits=8, type="int", strategy="channel", symmetric=False
    ),
    "ct-int8-group": _compressed_case(
        "int-quantized", num_bits=8, type="int", strategy="group", group_size=32, symmetric=True
    ),
    "ct-float8-tensor": _compressed_case("float-quantized", **_FLOAT8, strategy="tensor"),
    "ct-float8-channel": _compressed_case("float-quantized", **_FLOAT8, strategy="channel"),
    "ct-float8-block": _compressed_case("float-quantized", **_FLOAT8, strategy="block", block_structure=[32, 32]),
    "ct-float8-ragged-block": _compressed_case(
        "float-quantized", **_FLOAT8, strategy="block", block_structure=[48, 48]
    ),
    "torchao-int8": _torchao_case("Int8WeightOnlyConfig"),
    "torchao-int8-fp16": _torchao_case("Int8DynamicActivationInt8WeightConfig", torch.float16),
    "torchao-float8": _torchao_case("Float8WeightOnlyConfig"),
    "torchao-int4-group": _torchao_case("IntxWeightOnlyConfig", bits=4, group=32),
    "torchao-int2-fp16": _torchao_case("IntxWeightOnlyConfig", torch.float16, bits=2, group=16),
    "fp8-tensor": _fp8_case(None),
    "fp8-block": _fp8_case((32, 32)),
}

#: the cases that the fast tests read from ``tests/data/bases``
GOLDENS = (
    "gptq-4-gptq", "gptq-3-gptq-asym-act", "gptq-2-gptq_v2-asym-act", "gptq-8-gptq_v2", "awq-gemm-g32", "awq-gemv-g64", "awq-gemv_fast-g64",
    "hqq-4-g64-axis1", "hqq-3-g32-axis0", "hqq-4-bf16", "ct-int4-group-asym", "ct-int3-group", "ct-int8-fp16", "ct-float8-channel",
    "ct-float8-ragged-block", "torchao-int8", "torchao-float8", "torchao-int4-group", "fp8-tensor", "fp8-block",
)  # fmt: skip


#: the packages that store a fold's result
QUANTISERS = ("hqq", "ct", "fp8")


def wavy() -> Tensor:
    """Values ``(32, 64)`` float32 for a quantiser, the same on every machine."""
    at = torch.arange(32 * 64, dtype=torch.float32).reshape(32, 64)
    return (at * 37 % 101 - 50) * (at % 7 + 1) / 2048


def write(name: str, folder: Path) -> dict[str, Tensor]:
    """Write the case into ``folder``. The result is ``{name of a weight: what the package dequantises it to}``."""
    settings, make, dtype = CASES[name]
    torch.manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    h, v = CONFIG["hidden_size"], CONFIG["vocab_size"]
    tensors = {"model.embed_tokens.weight": torch.randn(v, h), "lm_head.weight": torch.randn(v, h) / 8}
    layer = "model.layers.0."
    norms = ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm")
    tensors |= {f"{norm}.weight": 1 + torch.randn(h) / 8 for norm in norms}
    tensors = {n: t.to(dtype) for n, t in tensors.items()}
    dequantised, header = {}, {"format": "pt"}
    for path, shape in LINEARS.items():
        weight = torch.randn(shape) * torch.rand(shape[0], 1).add(0.5) / 8
        made = make(weight.to(dtype))
        if settings["quant_method"] == "torchao":
            made, said, settings = made
            header[f"{layer}{path}.weight"] = said["x.weight"]
        made, back = made
        tensors |= {f"{layer}{path}.{local}": t.contiguous() for local, t in made.items()}
        dequantised[f"{layer}{path}.weight"] = back
    if settings["quant_method"] == "torchao":
        plain = {name: json.dumps({"_type": "Tensor"}) for name in tensors if "._weight_" not in name}
        header |= plain | {"tensor_names": json.dumps([*plain, *dequantised])}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata=header)
    config = CONFIG | {"dtype": str(dtype).removeprefix("torch."), "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return dequantised


def facts_of(tensor: Tensor) -> list[str]:
    """The dtype and the hash of a tensor's bytes."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype), hashlib.sha256(data).hexdigest()]


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_decoded_as_its_package_decodes_it(name: str, tmp_path: Path) -> None:
    from oftsurgery.checks.package_weights import read_again
    from oftsurgery.files.checkpoint import open_checkpoint
    from oftsurgery.stores.dequantised import dequantised

    want = write(name, tmp_path / "base")
    source = dequantised(open_checkpoint(tmp_path / "base"))
    second = read_again(source, idle=False)  # the code of `verify`
    assert source.stored_as == CASES[name][0]["quant_method"]
    assert len(source.entries) == len(LINEARS) + 5
    for weight, expected in want.items():
        got = source.read(weight)
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape == source.entries[weight].shape
        assert torch.equal(got, expected), (got.float() - expected.float()).abs().max()
        assert torch.equal(second.read(weight), expected)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(QUANTISERS)])
def test_values_are_stored_as_the_package_s_quantiser_stores_them(name: str, tmp_path: Path) -> None:
    """The values are those of a fold, float32, with rows of zeros, one large value, and equal values among them."""
    from oftsurgery.files.checkpoint import open_checkpoint
    from oftsurgery.formats.codecs import encode
    from oftsurgery.stores.dequantised import DequantisedCheckpoint, dequantised

    write(name, tmp_path / "base")
    source = dequantised(open_checkpoint(tmp_path / "base"))
    assert isinstance(source, DequantisedCheckpoint)
    make: Any = CASES[name][1]
    for path, shape in LINEARS.items():
        values = torch.randn(shape) / 8
        values[3], values[5, 7], values[6] = 0, 4, 0.25
        form = source.format(f"model.layers.0.{path}.weight")
        ours = encode(values, form)
        theirs, back = make.func(values, **make.keywords, wide=True)
        places = form.kind.tensor_names("")
        for local, tensor in ours.tensors.items():
            want = theirs[places[local].removeprefix(f"model.layers.0.{path}.")]
            assert facts_of(tensor) == facts_of(want), (path, local)
        assert torch.equal(form.kind.values(ours), back), path  # type: ignore[attr-defined]


def _main() -> Iterator[str]:
    home, quantised = (Path(__file__).parents[1] / "data" / name for name in ("bases", "bases-quantised"))
    for folder in (home, quantised):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for name in GOLDENS:
        found = {n: facts_of(t) for n, t in write(name, home / name).items()}
        (home / name / "dequantised.json").write_text(json.dumps(found, indent=1) + "\n")
        yield f"{name}: {sum(f.stat().st_size for f in (home / name).iterdir())} bytes"
        if name.startswith(QUANTISERS):
            made, _ = CASES[name][1].func(wavy(), **CASES[name][1].keywords, wide=True)
            save_file({n: t.contiguous() for n, t in made.items()}, quantised / f"{name}.safetensors")


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in _main())
