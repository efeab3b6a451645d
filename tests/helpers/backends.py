"""Backends in other processes, and what a weight holds."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import torch

from oftsurgery import EncodedWeight, Rotation
from oftsurgery.formats import codecs


def exact(encoded: EncodedWeight, chain: tuple[Rotation, ...], *, inverse: bool) -> torch.Tensor:
    """The rotated weight in float64, by dense matrices."""
    weight = codecs.decode(encoded).double()
    right = [r for r in chain if r.side == "input"][::-1]
    left = [r for r in chain if r.side != "input"]
    order = left + right
    for r in order[::-1] if inverse else order:
        count = (weight.shape[0] if r.side == "output" else weight.shape[1]) // r.block_size
        blocks = r.blocks if r.blocks.shape[0] == count else r.blocks.expand(count, -1, -1)
        whole = torch.block_diag(*blocks)
        whole = torch.linalg.inv(whole) if inverse else whole
        scale = torch.ones(weight.shape[0]).double() if r.scale is None else r.scale.double()
        scale = (1 / scale if inverse else scale).unsqueeze(-1)
        if r.side == "output":
            weight = scale * (whole.t() @ weight)
        else:
            weight = scale * (weight @ (whole.t() if r.side == "input" else whole))
    return weight


def codes_of(e: EncodedWeight) -> torch.Tensor:
    """One code a weight, in the order of their levels."""
    w = e.tensors["weight"]
    if e.format.codec in ("nf4", "fp4"):
        octets = w.contiguous().view(torch.uint8).reshape(-1)
        order = e.format.kind.levels(octets.device)[2]
        return torch.argsort(order)[torch.stack([octets >> 4, octets & 15], -1).reshape(-1).long()]
    return w.reshape(-1).double() if e.format.codec == "dense" else w.reshape(-1).long()


def in_process(code: str, **environment: str) -> str:
    """Standard output of Python ``code`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
