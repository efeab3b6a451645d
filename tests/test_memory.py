"""The memory of a fold on disk is bounded by the largest tensor, whatever the model's size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from big import write_adapter, write_checkpoint

HIDDEN, INTERMEDIATE = 4096, 11008
LARGEST = 4 * HIDDEN * INTERMEDIATE

MEASURE = """
import json, resource, sys, warnings
warnings.simplefilter("ignore")
import bitsandbytes, oftsurgery, oftsurgery.checkpoint, safetensors.torch, torch, transformers
from transformers import LlamaForCausalLM, conversion_mapping, core_model_loading
import transformers.quantizers.base

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
oftsurgery.fold_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], format=sys.argv[4], max_shard_size="300MB")
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "sizes"), [("same", (9, 18)), ("bf16", (2, 4))])
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path, format_: str, sizes: tuple[int, int]) -> None:
    """The larger source of the first case is 2 GB; decoding all of it, as the second does, would take minutes more."""
    peaks = []
    for layers in sizes:
        base, adapter, out = tmp_path / f"base {layers}", tmp_path / f"adapter {layers}", tmp_path / f"out {layers}"
        nbytes = write_checkpoint(base, layers=layers, shards=min(8, layers), hidden=HIDDEN, intermediate=INTERMEDIATE)
        assert nbytes > layers * 110e6
        paths = {f"model.layers.{i}.self_attn.q_proj": HIDDEN for i in range(layers)} | {"model.layers.1.mlp.down_proj": INTERMEDIATE}
        write_adapter(adapter, paths)
        result = subprocess.run([sys.executable, "-c", MEASURE, base, adapter, out, format_], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        peaks.append(json.loads(result.stdout.splitlines()[-1]))
        for folder in (base, out):
            for path in folder.iterdir():
                path.unlink()
    print(f"{format_}: {peaks[0] / 1e6:.0f} MB, and {peaks[1] / 1e6:.0f} MB at twice the size; allowed {(4 * LARGEST + 300e6) / 1e6:.0f} MB")  # noqa: T201
    assert max(peaks) <= 4 * LARGEST + 300e6
    assert peaks[1] < peaks[0] + 0.2 * LARGEST + 100e6
