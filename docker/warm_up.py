"""A small fold in each format, so that numba's cache holds the compiled kernels when the image is built."""

import warnings

import bitsandbytes as bnb
import torch
from torch import nn

import oftsurgery


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    rotation = oftsurgery.Rotation(torch.randn(8, 496, generator=generator) * 0.01)
    for layer in (
        bnb.nn.Linear4bit(256, 256, quant_type="nf4", compress_statistics=True),
        bnb.nn.Linear4bit(256, 256, quant_type="fp4"),
        bnb.nn.Linear8bitLt(256, 256, has_fp16_weights=False),
        nn.Linear(256, 256),
    ):
        model = nn.Sequential(layer).to("cpu")
        adapter = oftsurgery.OFTAdapter({"0": rotation})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            oftsurgery.fold(model, adapter, inplace=True)
    state = oftsurgery.backends()["numba"]
    if state != "ready":
        raise SystemExit(f"numba's kernels are not there: {state}")


if __name__ == "__main__":
    main()
