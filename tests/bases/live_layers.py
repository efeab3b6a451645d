"""peft's live layers over the layers of the packages, on a CPU: what :func:`oftsurgery.fold` makes of them computes the same.

``make test-bases`` runs this file in an environment that has the packages.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import oftsurgery
from oftsurgery.files.checkpoint import open_checkpoint
from oftsurgery.stores.dequantised import dequantised as dequantised_checkpoint
from oftsurgery.stores.package_layers import package_of

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]

from checkpoints import TOKENS, adapted, differing, load, outputs, rotations_in, tensors  # noqa: E402
from packages import CONFIG, gptq, write  # noqa: E402

TOKENS.remainder_(CONFIG["vocab_size"])
TARGETS = ["q_proj", "k_proj", "down_proj"]


def hqq_layer(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    return HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu")


def gptq_layer(linear: nn.Linear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    out, inputs = linear.weight.shape
    tensors, _ = gptq(linear.weight.data, bits=4, group=32, version="gptq_v2", asymmetric=True, act_order=True)
    layer = TorchLinear(4, 32, False, True, inputs, out, bias=False, register_buffers=True)
    layer.load_state_dict(tensors, strict=False)
    layer.optimized = True
    layer.post_init()
    return layer.eval()


def awq_layer(linear: nn.Linear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from packages import awq

    out, inputs = linear.weight.shape
    tensors, _ = awq(linear.weight.data, group=32, version="gemm")
    layer = AwqTorchLinear(4, 32, False, False, inputs, out, bias=False, register_buffers=True)
    layer.load_state_dict(tensors, strict=False)
    layer.post_init()
    return layer.eval()


def autoawq_layer(linear: nn.Linear) -> nn.Module:
    from packages import awq

    out, inputs = linear.weight.shape
    tensors, _ = awq(linear.weight.data, group=32, version="gemm")
    from awq.modules.linear.gemm import WQLinear_GEMM

    layer = WQLinear_GEMM(4, 32, inputs, out, False, "cpu")
    layer.load_state_dict(tensors)
    return layer


LAYERS: dict[str, Callable[[nn.Linear], nn.Module]] = {"hqq": hqq_layer, "gptq": gptq_layer, "awq": awq_layer}
#: ``{name: config of torchao, with which transformers loads the model}``
TORCHAO = {"torchao-int8": "Int8WeightOnlyConfig", "torchao-float8": "Float8WeightOnlyConfig"}
NAMES = (*LAYERS, *TORCHAO)


def dequantised(module: Any) -> Tensor:
    """float64: what the package itself says of the weight."""
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().t().double()
    if hasattr(module, "qweight"):
        from awq.utils.packing_utils import dequantize_gemm

        return dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, 32).t().double()
    return (module if hasattr(module, "dequantize") else module.weight).dequantize().double()


def model_of(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG | {"dtype": "float32"})).float().eval()
    linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) and p != "lm_head"}
    with torch.no_grad():
        for linear in linears.values():
            linear.weight.normal_().div_(8)
    if name in TORCHAO:
        from torchao import quantization
        from transformers import TorchAoConfig

        model.save_pretrained(folder)
        config = TorchAoConfig(getattr(quantization, TORCHAO[name])())
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=config).eval()
    for path, linear in linears.items():
        model.set_submodule(path, (LAYERS | {"awq-autoawq": autoawq_layer})[name](linear))
    model.config.quantization_config = {"quant_method": name}
    return model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_fold_of_peft_s_live_layers_computes_the_same(name: str, inplace: bool, tmp_path: Path) -> None:
    model = model_of(name, tmp_path / "plain")
    live = adapted(model, TARGETS)
    live.save_pretrained(tmp_path / "adapter")
    turns = rotations_in(tmp_path / "adapter")
    exact = {}
    for path, module in live.get_base_model().named_modules():
        if path.removesuffix(".base_layer") in turns and path.endswith(".base_layer"):
            path = path.removesuffix(".base_layer")
            exact[path] = dequantised(module) @ turns[path].t()
    assert len(exact) == 3
    want = outputs(live)
    folded: Any = oftsurgery.fold(live, format="fp32", inplace=inplace)
    for path, weight in exact.items():
        got = folded.get_submodule(path)
        assert type(got) is nn.Linear
        assert got.weight.dtype == torch.float32
        assert (got.weight.double() - weight).norm() < 1e-6 * weight.norm()
    assert {type(m) for p, m in folded.named_modules() if p.endswith("_proj")} == {nn.Linear}
    assert getattr(folded.config, "quantization_config", None) is None
    far = (outputs(folded) - want).norm() / want.norm()
    assert far < (2e-2 if name == "awq" else 2e-3)  # live layers of these packages compute in float16 or bfloat16
    folded.save_pretrained(tmp_path / "out")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(again), outputs(folded))


@pytest.mark.parametrize("name", [*NAMES, "awq-autoawq"])
def test_an_adapter_from_files_and_four_bits(name: str, tmp_path: Path) -> None:
    model = model_of(name, tmp_path / "plain")
    adapted(LlamaForCausalLM(LlamaConfig(**CONFIG)), TARGETS).save_pretrained(tmp_path / "adapter")
    with pytest.raises(oftsurgery.StateError, match=r"stored as .*reads and does not write.*format='bf16'"):
        oftsurgery.fold(model, tmp_path / "adapter")
    turns = rotations_in(tmp_path / "adapter")
    exact = {path: dequantised(model.get_submodule(path)) @ r.t() for path, r in turns.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        folded: Any = oftsurgery.fold(model, tmp_path / "adapter", format="nf4", rounding="nearest")
    import bitsandbytes as bnb

    for path, weight in exact.items():
        got = folded.get_submodule(path)
        state = got.weight.quant_state
        packed, stated = bnb.functional.quantize_4bit(weight.float(), quant_type="nf4", blocksize=state.blocksize)
        found = bnb.functional.dequantize_4bit(got.weight, state).double()
        best = bnb.functional.dequantize_4bit(packed, stated).double()
        assert (found - weight).norm() <= 1.001 * (best - weight).norm()
    assert package_of(model.get_submodule("model.layers.0.mlp.up_proj")) == name.partition("-")[0]


#: the cases that transformers loads on a CPU, with the settings that choose torch's own kernels
LOADED: dict[str, dict[str, Any]] = {
    "gptq-4-gptq": {"backend": "torch"},
    "gptq-3-gptq-asym-act": {"backend": "torch"},
    "gptq-2-gptq_v2-asym-act": {"backend": "torch"},
    "gptq-8-gptq_v2": {"backend": "torch"},
    "awq-gemm-g32": {"backend": "torch_awq"},
    "ct-int4-group": {"dequantize": True},
    "ct-int3-group": {"dequantize": True},
    "ct-int8-fp16": {"dequantize": True},
    "ct-int8-channel": {},
    "ct-float8-channel": {"dequantize": True},
    "ct-float8-block": {"dequantize": True},
    "torchao-int8": {},
    "torchao-float8": {},
    "torchao-int4-group": {},
    "fp8-tensor": {},
    "fp8-block": {},
}


@pytest.mark.parametrize("name", LOADED)
def test_memory_disk_and_the_live_model_agree(name: str, tmp_path: Path) -> None:
    """The model as transformers and the package load the checkpoint, with an adapter live in it; the fold of this live model; and the
    fold of the checkpoint on disk.
    """
    write(name, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] |= LOADED[name]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    adapted(LlamaForCausalLM(LlamaConfig(**CONFIG)), TARGETS).save_pretrained(tmp_path / "adapter")
    live = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for format_ in ("bf16", "nf4"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
            options: dict[str, Any] = {"format": format_, "rounding": "nearest"}
            oftsurgery.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / format_, **options)
            folded = oftsurgery.fold(live, **options)
        oftsurgery.export_safetensors(folded, tmp_path / f"live-{format_}")
        assert not differing(tensors(tmp_path / format_), tensors(tmp_path / f"live-{format_}"))
    want = outputs(live)  # some packages unpack their weights now
    far = (outputs(load(tmp_path / "bf16", "LlamaForCausalLM")) - want).norm() / want.norm()
    assert far < 0.02  # the live layers compute in 16 bits
    if name == "ct-int8-channel":
        with pytest.raises(oftsurgery.StateError, match=r"into a store of compressed-tensors.*dequantize=True"):
            oftsurgery.fold(live, format="bf16")
        return
    after = oftsurgery.fold(live, format="bf16")
    oftsurgery.export_safetensors(after, tmp_path / "after")
    assert not differing(tensors(tmp_path / "bf16"), tensors(tmp_path / "after"))


@pytest.mark.parametrize(
    "name", [*(n for n in LOADED if n.startswith(("ct", "fp8"))), "ct-int4-group-asym", "hqq-4-g64-axis1"]
)
def test_the_package_loads_what_a_fold_has_stored(name: str, tmp_path: Path) -> None:
    """The fold in the base's own format; transformers with the package dequantises each weight to what oftsurgery reads. transformers 5.23
    does not load HQQ's files, and hqq's own layers load them here.
    """
    write(name, tmp_path / "base")
    adapted(LlamaForCausalLM(LlamaConfig(**CONFIG)), TARGETS).save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        record = oftsurgery.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert len(record.modules) == 3
    source = dequantised_checkpoint(open_checkpoint(tmp_path / "out"))
    if name.startswith("hqq"):
        from hqq.core.quantize import HQQLinear

        held = load_file(tmp_path / "out" / "model.safetensors")
        for path in record.modules:
            layer = HQQLinear(None, None, compute_dtype=torch.float16, device="cpu", initialize=False)
            layer.load_state_dict({n.removeprefix(f"{path}."): t for n, t in held.items() if n.startswith(f"{path}.")})
            assert torch.equal(layer.dequantize(), source.read(f"{path}.weight"))
        return
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"] |= LOADED.get(name, {"dequantize": True})
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    outputs(model)  # compressed-tensors unpacks its weights at the first forward
    for path in record.modules:
        found, want = model.get_submodule(path).weight, source.read(f"{path}.weight")
        assert torch.equal(found, want.to(found.dtype)), path


@pytest.mark.parametrize("name", ["ct-int4-group", "ct-int3-group", "ct-float8-block"])
def test_compressed_layers_before_their_first_forward(name: str, tmp_path: Path) -> None:
    """peft cannot wrap a layer without a weight, so the adapter comes from files."""
    write(name, tmp_path / "base")
    adapted(LlamaForCausalLM(LlamaConfig(**CONFIG)), TARGETS).save_pretrained(tmp_path / "adapter")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert package_of(model.model.layers[0].mlp.up_proj) == "compressed-tensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        oftsurgery.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", format="bf16")
        oftsurgery.export_safetensors(oftsurgery.fold(model, tmp_path / "adapter", format="bf16"), tmp_path / "live")
    assert not differing(tensors(tmp_path / "disk"), tensors(tmp_path / "live"))


def test_gptq_of_a_class_that_holds_its_weights_turned(tmp_path: Path) -> None:
    """GPT-2's own layers hold ``(in, out)``, and gptqmodel's layers, which take their places, ``(out, in)``."""
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 32, "n_inner": 128}
    torch.manual_seed(0)
    live: Any = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False)).eval()
    held = live.state_dict()
    for path, module in list(live.named_modules()):
        if type(module).__name__ == "Conv1D":
            with torch.no_grad():
                module.weight.normal_().div_(8)
            layer = gptq_packed(module)
            held |= {f"{path}.{n}": getattr(layer, n).clone() for n in ("qweight", "qzeros", "scales", "g_idx")}
            del held[f"{path}.weight"]
            layer.optimized = True
            layer.post_init()
            live.set_submodule(path, layer.eval())
    (tmp_path / "base").mkdir()
    save_file(held, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"}
    config = live.config.to_dict() | {"architectures": ["GPT2LMHeadModel"], "quantization_config": settings}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    live = adapted(live, ["c_attn", "c_proj"])
    live.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        oftsurgery.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format="fp32")
        oftsurgery.export_safetensors(oftsurgery.fold(live, format="fp32"), tmp_path / "live")
    assert not differing(tensors(tmp_path / "out"), tensors(tmp_path / "live"))
    want = outputs(live)
    assert (outputs(load(tmp_path / "out", "GPT2LMHeadModel")) - want).norm() < 2e-3 * want.norm()
    assert oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", tmp_path / "adapter").ok


def gptq_packed(conv1d: Any) -> Any:
    """gptqmodel's layer for one of GPT-2's layers, which gptqmodel itself packs."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    inputs, out = conv1d.weight.shape
    parts = conv1d.weight.detach().t().reshape(out, -1, 32)
    scales = parts.abs().amax(-1) * 2 / 15
    layer = TorchLinear(4, 32, True, False, inputs, out, bias=True, register_buffers=True)
    index = (torch.arange(inputs) // 32).to(torch.int32)
    layer.pack_block(copy.deepcopy(conv1d).float(), scales.half().float(), torch.full_like(scales, 8), index)
    return layer
