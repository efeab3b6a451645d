"""The steps of :mod:`gpu_check` on single weights: the device's results beside the CPU's reference."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from gpu_step import Step, differing, folded, formats, quiet_fold, rotation_of, tiny, weight_in
from image_goldens import GOLDENS, model_of, relative
from models import quantise

import oftsurgery


def codes(step: Step) -> None:
    for name, f in formats(step.small).items():
        encoded = weight_in(f)
        for kind, amplitude in (("exact", 0.0), ("bent", 0.02)):
            with step.case(f"{name}, {kind}") as figures:
                rotation = rotation_of(f.shape[1], amplitude)
                want, reference = folded(encoded, rotation, "nearest", "reference", "cpu")
                got, mine = folded(encoded, rotation, "nearest", "triton", step.device)
                other = differing(mine, reference)
                figures |= {"backend": got.backend, "weights": encoded.tensors["weight"].numel(), "differing": other}
                figures |= {"error": got.error, "reference_error": want.error}
                assert got.backend == "triton", f"the backend is {got.backend}"
                # double quantisation takes the mean of the scales, whose last bits depend on the order of a sum; Triton's
                # interpreter cuts bfloat16 off, where a GPU rounds
                bytes_ = [n for k, n in other.items() if not (f.nested_blocksize and k != "weight")]
                cut = step.small and name == "bfloat16"
                assert cut or abs(got.error - want.error) <= 1e-3 * want.error + 3e-7, "the errors differ"
                if kind == "exact":
                    assert not any(bytes_), f"other bytes: {other}"
                elif f.quantised:
                    assert other["weight"] <= 2 + 1e-5 * figures["weights"], f"too many other codes: {other}"


def reference(step: Step) -> None:
    for name, f in formats(step.small, rows=256).items():
        encoded = weight_in(f)
        # the last factor makes some blocks strong
        ways = [
            ("grid", 0.02, 1),
            ("mse", 0.02, 1),
            ("preserve", 0.0005, 1),
            ("preserve", 0.006, 1),
            ("preserve", 0.0005, 1.15),
        ]
        for rounding, amplitude, factor in ways if f.quantised else []:
            with step.case(f"{name}, {rounding}, {amplitude}, {factor}") as figures:
                scale = torch.ones(f.shape[0])
                scale[5:9] = factor
                rotation = replace(rotation_of(f.shape[1], amplitude), scale=scale)
                want, theirs = folded(encoded, rotation, rounding, "reference", "cpu")
                got, mine = folded(encoded, rotation, rounding, "triton", step.device)
                pairs = [
                    (getattr(got, key), getattr(want, key)) for key in ("error", "rho", "kept", "change", "nearest")
                ]
                far = max(abs(a - b) / abs(b) for a, b in pairs if a is not None and b)
                share = differing(mine, theirs)["weight"] / mine.tensors["weight"].numel()
                figures |= {"backend": got.backend, "rounding": got.rounding, "far": far, "other_codes": share}
                assert (got.rounding, got.relaxation) == (want.rounding, want.relaxation), "another rounding"
                assert far < 1e-3, "the figures differ"
                assert share < 1e-3, "the codes differ"
                assert rounding == "mse" or got.backend == "triton", f"the backend is {got.backend}"
    with step.case("calibrated") as figures:
        kept = {}
        for device in ("cpu", step.device):
            model, adapter, tokens = tiny(device, "nf4", tokens=64)
            record = quiet_fold(
                model, adapter, rounding="calibrated", calibration=[{"input_ids": t} for t in tokens.split(8)]
            )
            kept[device] = [m.output_kept for m in record.oftsurgery.modules.values()]
        figures["kept"] = kept
        pairs = zip(kept["cpu"], kept[step.device], strict=True)
        assert all((a is None) == (b is None) and (a is None or abs(a - b) < 0.05) for a, b in pairs), (
            "the figures differ"
        )


def images(step: Step) -> None:
    """Adapters that image tools wrote, folded on the device: what the tools' own layers compute, and the way back."""
    for golden in GOLDENS:
        exact = golden.effective(1)
        if exact is None or golden.always or (step.small and "lycoris" not in golden.folder):
            continue
        with step.case(golden.folder) as figures, tempfile.TemporaryDirectory() as folder:
            model, adapter = model_of(golden.base_tensors()).to(step.device), golden.adapter()
            result = quiet_fold(model, adapter, undo=Path(folder) / "undo")
            got = result.state_dict()
            assert all(t.device.type == torch.device(step.device).type for t in got.values()), "a tensor has moved"
            figures["far"] = max(relative(got[name].cpu(), t) for name, t in exact.items())
            assert figures["far"] <= 2e-6, "the fold is not what the tool computes"
            back = oftsurgery.unfold(result, undo=Path(folder) / "undo").state_dict()
            assert all(torch.equal(back[name], t) for name, t in model.state_dict().items()), "not every byte is back"
            quantised = quantise(model_of(golden.base_tensors()), "nf4").to(step.device)
            there = quiet_fold(quantised, adapter, rounding="nearest")
            here = quiet_fold(copy.deepcopy(quantised).to("cpu"), adapter, rounding="nearest")
            figures["other_codes"] = max(
                float((a.cpu() != b).double().mean())
                for (name, a), b in zip(there.state_dict().items(), here.state_dict().values(), strict=True)
                if a.dtype == torch.uint8 and name.endswith(".weight")
            )
            assert figures["other_codes"] < 1e-3, "the codes differ"
