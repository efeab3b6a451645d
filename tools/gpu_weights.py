"""The steps of :mod:`gpu_check` on single weights: the device's results beside the CPU's reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from gpu_step import Step, differing, folded, formats, quiet_fold, rotation_of, tiny, weight_in


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
