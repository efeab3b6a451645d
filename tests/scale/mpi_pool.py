"""Folds by two workers of mpi4py's MPIPoolExecutor. ``make test-scale`` runs this program with ``mpiexec -n 3``, in an environment
with mpi4py; pytest does not collect this file.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from checkpoints import adapted, bnb_config, build, file_bytes, load, quiet_fold
from mpi4py.futures import MPIPoolExecutor

import oftsurgery


def main() -> None:
    with tempfile.TemporaryDirectory() as place, MPIPoolExecutor() as executor:
        folder = Path(place)
        build("llama").save_pretrained(folder / "plain")
        load(folder / "plain", "LlamaForCausalLM", quantization_config=bnb_config("nf4", double=True)).save_pretrained(
            folder / "base"
        )
        adapted(build("llama"), ["q_proj", "down_proj"]).save_pretrained(folder / "adapter")
        base, adapter = folder / "base", folder / "adapter"
        tokens = torch.randint(0, 64, (4, 8, 24), generator=torch.Generator().manual_seed(0))
        ways = {"rounded": {}, "calibrated": {"calibration": [{"input_ids": batch} for batch in tokens]}}
        for name, settings in ways.items():
            one, many = folder / f"{name} one", folder / f"{name} many"
            quiet_fold(base, adapter, one, **settings)
            quiet_fold(base, adapter, many, **settings, executor=executor)
            assert file_bytes(many) == file_bytes(one), name
            assert oftsurgery.verify_checkpoint(many, base, adapter, executor=executor).ok, name
            sys.stdout.write(f"{name}: the workers of MPI wrote the same bytes\n")


if __name__ == "__main__":
    main()
