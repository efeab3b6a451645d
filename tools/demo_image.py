"""``make demo-image`` shows what a fold into an image model changes: the same noise through the live adapter and through folds.

The models are a tiny Flux and a tiny U-Net of diffusers' own classes, with random weights: the pictures show how near the models'
computations are, and no objects. diffusers and peft put an OFT adapter on the Flux and save it; the adapter of the U-Net is a
LyCORIS diag-oft with an active limit and a trained scale, on linear layers and convolutions, and its live layer is stated here in
float64. oftsurgery folds both on disk, into fp16 and into NF4, and diffusers loads the folds. Nothing is downloaded.

The tests use the functions of this file too.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy
import torch
from change import compute_in_float32
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from peft import OFTConfig
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

import oftsurgery

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "image-demo.png"

BASE, LIVE, FP16, NF4 = "the base", "live", "folded fp16", "folded nf4"


# --- the models -------------------------------------------------------------------------------------------------------


def make_flux(side: int) -> nn.Module:
    """A Flux transformer for pictures of ``side`` × ``side`` latent pixels, one token each."""
    del side
    return _made(
        diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=(8, 12, 12),
        )
    )


def make_unet(side: int) -> nn.Module:
    """A U-Net as that of Stable Diffusion, with two levels."""
    return _made(
        diffusers.UNet2DConditionModel(
            sample_size=side,
            block_out_channels=(64, 128),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=32,
        )
    )


def _made(model: nn.Module) -> nn.Module:
    """Random weights that keep the size of their inputs: diffusers' own start makes outputs near zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return model.eval()


# --- the adapters -----------------------------------------------------------------------------------------------------


def adapt_flux(model: Any, folder: Path) -> Path:
    """Put an adapter on ``model`` by diffusers and peft, which stays live, and save it as diffusers does."""
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "net.2", "add_k_proj"]
    model.add_adapter(OFTConfig(oft_block_size=32, target_modules=targets, use_cayley_neumann=False))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_R" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.06)
    model.save_lora_adapter(folder)
    return folder / "pytorch_lora_weights.safetensors"


class DiagOFT(nn.Module):
    """LyCORIS' live layer: ``g ⊙ blockdiag(K(Q)) rows(W)``, with ``Q = B - Bᵀ`` limited to ``alpha`` times the outputs."""

    def __init__(self, blocks: Tensor, alpha: float, rescale: Tensor) -> None:
        super().__init__()
        b, g = blocks.double(), rescale.double()
        q = b - b.mT
        norm, limit = q.norm() + 1e-8, alpha * b.shape[0] * b.shape[1]
        q = q * limit / norm if norm > limit else q
        eye = torch.eye(b.shape[-1], dtype=torch.float64)
        self.matrix = g.reshape(-1, 1) * torch.block_diag(*(torch.linalg.inv(eye + x) @ (eye - x) for x in q))

    def forward(self, weight: Tensor) -> Tensor:
        """The live weight, from ``weight: (out, in)`` or ``(out, in, kh, kw)``."""
        return (self.matrix @ weight.double().flatten(1)).reshape(weight.shape).to(weight.dtype)


def adapt_unet(model: nn.Module, folder: Path) -> Path:
    """Put a diag-oft on ``model``, live, and save it in the form of LyCORIS."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    ends = ("to_q", "to_k", "to_v", "to_out.0", "net.2", "conv1", "conv2")
    for path, module in [(p, m) for p, m in model.named_modules() if p.endswith(ends)]:
        out, b = len(module.weight), 16
        blocks = torch.randn(out // b, b, b, generator=generator) * 0.1
        rescale = 1 + 0.1 * torch.randn(out, *[1] * (module.weight.ndim - 1), generator=generator)
        alpha = 0.02
        own = {"oft_blocks": blocks, "alpha": torch.tensor(alpha), "rescale": rescale}
        tensors |= {f"lycoris_{path.replace('.', '_')}.{end}": t.contiguous() for end, t in own.items()}
        parametrize.register_parametrization(module, "weight", DiagOFT(blocks, float(own["alpha"]), rescale))
    save_file(tensors, folder / "unet.safetensors", {"ss_network_module": "lycoris.kohya"})
    return folder / "unet.safetensors"


# --- pictures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_flux(model: Any, side: int, steps: int) -> Tensor:
    """``(side, side, channels)`` float64: diffusers' Euler steps from noise."""
    generator = torch.Generator().manual_seed(5)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    sample = _noise(64, side, generator).flatten(2).mT.contiguous()  # bitsandbytes' CPU kernel misreads other layouts
    text = {"encoder_hidden_states": torch.randn(1, 8, 64, generator=generator)}
    text |= {"pooled_projections": torch.randn(1, 64, generator=generator), "txt_ids": torch.zeros(8, 3)}
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    ids = torch.cat([torch.zeros(side * side, 1), place.float()], dim=1)
    for t in scheduler.timesteps:
        moved = model(hidden_states=sample, timestep=(t / 1000).reshape(1), img_ids=ids, **text).sample
        sample = scheduler.step(moved, t, sample).prev_sample
    return sample.reshape(side, side, 64).double()


@torch.no_grad()
def draw_unet(model: Any, side: int, steps: int) -> Tensor:
    """``(side, side, channels)`` float64: diffusers' DDIM steps from noise."""
    generator = torch.Generator().manual_seed(5)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    sample = _noise(4, side, generator)
    text = torch.randn(1, 8, 64, generator=generator)
    for t in scheduler.timesteps:
        noise = model(sample, t, encoder_hidden_states=text).sample
        sample = scheduler.step(noise, t, sample).prev_sample
    return sample[0].permute(1, 2, 0).double()


def _noise(channels: int, side: int, generator: torch.Generator) -> Tensor:
    """Noise ``(1, channels, side, side)`` that is smooth, so that eyes can compare what becomes of it."""
    small = torch.randn(1, channels, side // 4, side // 4, generator=generator)
    return 1.5 * nn.functional.interpolate(small, (side, side), mode="bicubic")


@dataclass(frozen=True)
class Drawn:
    """What one model drew.

    Attributes:
        pictures: ``{name: (side, side, channels)}`` of :data:`BASE`, :data:`LIVE`, :data:`FP16` and :data:`NF4`.
        rounding: ``‖picture - base‖ / ‖base‖`` of the base that diffusers itself quantised to NF4, without an adapter.
        seconds: ``{name: seconds}`` of the folds.
        change: the relative change of the adapted weights, ``‖W' - W‖ / ‖W‖``.
    """

    model: str
    pictures: dict[str, Tensor]
    rounding: float
    seconds: dict[str, float]
    change: float

    def distance(self, name: str) -> float:
        """``‖picture - live‖ / ‖live‖``."""
        live = self.pictures[LIVE]
        return float((self.pictures[name] - live).norm() / live.norm())


Make = Callable[[int], nn.Module]
Adapt = Callable[[Any, Path], Path]
Draw = Callable[[Any, int, int], Tensor]
MODELS: dict[str, tuple[Make, Adapt, Draw]] = {
    "Flux, OFT by diffusers and peft": (make_flux, adapt_flux, draw_flux),
    "U-Net, diag-oft of LyCORIS": (make_unet, adapt_unet, draw_unet),
}


def compare(name: str, side: int, steps: int) -> Drawn:
    """Draw with the base, the live adapter, and both folds from disk."""
    make, adapt, draw = MODELS[name]
    pictures, seconds = {}, {}
    with tempfile.TemporaryDirectory() as place, _quiet():
        folder = Path(place)
        model: Any = make(side)
        model.save_pretrained(folder / "base")
        pictures[BASE] = draw(model, side, steps)
        adapter = adapt(model, folder)
        pictures[LIVE] = draw(model, side, steps)
        for kind, storage in ((FP16, "fp16"), (NF4, "nf4")):
            out, start = folder / storage, time.perf_counter()
            how: Any = {"format": storage, "trained_on": "plain"}
            record = oftsurgery.fold_checkpoint(folder / "base", adapter, out, **how)
            seconds[kind] = time.perf_counter() - start
            pictures[kind] = draw(_loaded(type(model), out), side, steps)
        settings = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        rounded = _loaded(type(model), folder / "base", quantization_config=settings)
        off = draw(rounded, side, steps) - pictures[BASE]
        whole = oftsurgery.fold(make(side), oftsurgery.load_adapter(adapter)).state_dict()
        base = {n: t for n, t in make(side).state_dict().items() if n.removesuffix(".weight") in record.modules}
        changed = sum(float((whole[n] - t).square().sum()) for n, t in base.items())
        change = (changed / sum(float(t.square().sum()) for t in base.values())) ** 0.5
    return Drawn(name, pictures, float(off.norm() / pictures[BASE].norm()), seconds, change)


def _loaded(kind: Any, folder: Path, **more: Any) -> Any:
    """The model that diffusers loads, with float32 arithmetic."""
    with _without_gpu():
        return compute_in_float32(kind.from_pretrained(folder, torch_dtype=torch.float32, **more).eval())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings on what NF4's rounding costs: the table says it."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _without_gpu() -> Iterator[None]:
    """diffusers refuses to load bitsandbytes' weights without a GPU; everything that it does besides runs on the CPU."""
    kind = bnb_quantizer.BnB4BitDiffusersQuantizer
    with (
        mock.patch.object(kind, "validate_environment"),
        mock.patch.object(kind, "update_device_map", lambda _, given: given),
    ):
        yield


# --- what is shown ----------------------------------------------------------------------------------------------------


def format_table(drawn: list[Drawn]) -> str:
    """The distances as a table in Markdown."""
    head = "| model | change of the weights | base | live | folded fp16 | folded nf4 | nf4 of the base, from the base | seconds |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for one in drawn:
        far = " | ".join(f"{one.distance(name):.2g}" for name in (BASE, LIVE, FP16, NF4))
        times = ", ".join(f"{one.seconds[name]:.1f}" for name in (FP16, NF4))
        lines.append(f"| {one.model} | {one.change:.0%} | {far} | {one.rounding:.2g} | {times} |")
    return "\n".join(lines)


def contact_sheet(drawn: list[Drawn], path: Path, size: int = 180) -> None:
    """Write the pictures side by side, three channels as colours in the live picture's range, with the folds' distances to live ten
    times as large.
    """
    columns = [BASE, LIVE, FP16, NF4, f"10·|{FP16} - live|", f"10·|{NF4} - live|"]
    gap, head = 8, 22
    sheet = Image.new("RGB", (gap + len(columns) * (size + gap), gap + len(drawn) * (size + head + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, one in enumerate(drawn):
        top = gap + row * (size + head + gap)
        live = one.pictures[LIVE][..., :3]
        low, wide = live.quantile(0.01), live.quantile(0.99) - live.quantile(0.01)
        shown = [(one.pictures[name][..., :3] - low) / wide for name in columns[:4]]
        shown += [10 * (one.pictures[name][..., :3] - live).abs() / wide for name in (FP16, NF4)]
        for column, (name, picture) in enumerate(zip(columns, shown, strict=True)):
            left = gap + column * (size + gap)
            label = name if column else f"{one.model.partition(',')[0]}: {name}"
            pen.text((left, top + 4), label, fill="black")
            pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy().astype(numpy.uint8)
            sheet.paste(Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST), (left, top + head))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(192).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw with live and folded adapters of tiny image models.")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="contact sheet to write")
    parser.add_argument("--side", type=int, default=32, help="latent pixels of a side")
    parser.add_argument("--steps", type=int, default=12, help="steps of the sampler")
    args = parser.parse_args()
    print("The models have random weights: the pictures show how near the computations are, and no objects.\n")
    drawn = [compare(name, args.side, args.steps) for name in MODELS]
    contact_sheet(drawn, args.picture)
    print("‖picture - live‖ / ‖live‖, from the same noise:\n")
    print(format_table(drawn))
    print(f"\nwrote {args.picture}")


if __name__ == "__main__":
    main()
