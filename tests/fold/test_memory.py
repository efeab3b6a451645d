"""The memory of a fold on disk is bounded by the largest tensor, whatever the model's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from big import write_adapter, write_checkpoint

HIDDEN, INTERMEDIATE = 4096, 11008
LARGEST = 4 * HIDDEN * INTERMEDIATE

# The peak is VmHWM, reset after the imports: ru_maxrss would begin with what this process's parent held.
# The kernels are not among the imports: the fold loads and compiles them, and what this process takes for that counts.
MEASURE = """
import json, pathlib, sys, warnings
warnings.simplefilter("ignore")
import bitsandbytes, oftsurgery, oftsurgery.folding.disk_run, safetensors.torch, torch, transformers
from transformers import LlamaForCausalLM, conversion_mapping, core_model_loading
import transformers.quantizers.base

def peak():
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

pathlib.Path("/proc/self/clear_refs").write_text("5")
assert "numba" not in sys.modules
before = peak()
oftsurgery.fold_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], format=sys.argv[4], max_shard_size="300MB")
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("backend", ["numba", "tiled"])
@pytest.mark.parametrize(("format_", "sizes"), [("same", (9, 18)), ("bf16", (2, 4))])
def test_peak_memory_does_not_grow_with_the_model(
    tmp_path: Path, format_: str, sizes: tuple[int, int], backend: str
) -> None:
    """The larger source of the first case is 2 GB; the second writes four times what it reads."""
    peaks = []
    for layers in sizes:
        base, adapter, out = tmp_path / f"base {layers}", tmp_path / f"adapter {layers}", tmp_path / f"out {layers}"
        shards = min(8, layers)
        nbytes = write_checkpoint(base, layers=layers, shards=shards, hidden=HIDDEN, intermediate=INTERMEDIATE)
        assert nbytes > layers * 110e6
        paths = {f"model.layers.{i}.self_attn.q_proj": HIDDEN for i in range(layers)}
        write_adapter(adapter, paths | {"model.layers.1.mlp.down_proj": INTERMEDIATE})
        # an empty cache: the kernels are compiled in the fold, which takes more than loading them
        cache = tmp_path / f"kernels {layers}"
        environment = {**os.environ, "OFTSURGERY_BACKEND": backend, "NUMBA_CACHE_DIR": str(cache)} | {
            "XDG_CACHE_HOME": str(tmp_path)
        }
        command = [sys.executable, "-c", MEASURE, base, adapter, out, format_]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        peaks.append(json.loads(result.stdout.splitlines()[-1]))
        assert any(cache.rglob("*.nbc")) == (backend == "numba")
        for folder in (base, out):
            for path in folder.iterdir():
                path.unlink()
    mb = [f"{n / 1e6:.0f}" for n in (*peaks, 4 * LARGEST + 300e6)]
    print(f"{format_}, {backend}: {mb[0]} MB, and {mb[1]} MB at twice the size; allowed {mb[2]} MB")  # noqa: T201
    assert max(peaks) <= 4 * LARGEST + 300e6
    assert peaks[1] < peaks[0] + 0.2 * LARGEST + 100e6
