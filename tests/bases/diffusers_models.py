"""Denoisers that diffusers itself quantises with torchao, alone and in a pipeline: each weight is read as torchao dequantises it.

``make test-bases`` runs this file in an environment that has the packages.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torchao import quantization

import oftsurgery
from oftsurgery.files.checkpoint import open_checkpoint
from oftsurgery.stores.dequantised import dequantised

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers")]

from checkpoints import rotations_in  # noqa: E402
from image_models import adapted, build  # noqa: E402
from warned import quietly  # noqa: E402

CONFIGS: dict[str, Any] = {
    "int8": lambda: quantization.Int8WeightOnlyConfig(),
    "float8": lambda: quantization.Float8WeightOnlyConfig(),
    "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_denoiser_of_a_pipeline_that_torchao_quantised(name: str, tmp_path: Path) -> None:
    build("FluxTransformer2DModel").to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    adapted(build("FluxTransformer2DModel")).save_pretrained(tmp_path / "adapter")
    config = diffusers.TorchAoConfig(CONFIGS[name]())
    kinds = {"quantization_config": config, "torch_dtype": torch.bfloat16}
    model: Any = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "plain", **kinds)
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(base / "scheduler")
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
    }
    (base / "model_index.json").write_text(json.dumps(index))
    source = dequantised(open_checkpoint(base / "transformer"))
    want = {n: t.dequantize() if hasattr(t, "qdata") else t for n, t in model.state_dict().items()}
    assert source.entries.keys() == want.keys()
    assert sum(hasattr(t, "qdata") for t in model.state_dict().values()) == 28
    for weight, tensor in want.items():
        assert torch.equal(source.read(weight), tensor), weight
    with pytest.raises(oftsurgery.StateError, match="stored as torchao, which oftsurgery reads and does not write"):
        oftsurgery.fold_checkpoint(base, tmp_path / "adapter", out)
    record = quietly(oftsurgery.fold_checkpoint, base, tmp_path / "adapter", out, format="bf16")
    assert len(record.modules) == 16
    folded = diffusers.FluxTransformer2DModel.from_pretrained(out / "transformer").state_dict()
    for path, turn in rotations_in(tmp_path / "adapter").items():
        exact = want[f"{path}.weight"].double() @ turn.t()
        rounding = (exact.bfloat16().double() - exact).norm()
        assert (folded[f"{path}.weight"].double() - exact).norm() <= 1.05 * rounding
    report = quietly(oftsurgery.verify_checkpoint, out, base, tmp_path / "adapter")
    assert report.ok, report.wrong
    quietly(oftsurgery.fold_checkpoint, base, tmp_path / "adapter", tmp_path / "nf4", format="nf4")
    assert quietly(oftsurgery.verify_checkpoint, tmp_path / "nf4", base, tmp_path / "adapter").ok
