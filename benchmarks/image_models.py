"""This benchmark times folds of image models on disk, as users run them, beside a copy of the file and LyCORIS' own merge.

``python benchmarks/image_models.py --lycoris /path/to/python`` writes, to a temporary folder, checkpoints with the names and the
shapes of the real classes of diffusers, and random values:

* ``sdxl``: the U-Net of SDXL, a folder of diffusers in fp16 (2.57 billion weights, without ``--blocks``);
* ``flux``: a transformer of Flux' width, in NF4 as diffusers' loading quantises, with ``--blocks`` blocks of each kind (Flux.1 has 19
  and 38).

The adapters are of kohya's ``networks.oft`` and ``networks.oft_flux`` with dim 4 (blocks of 160 to 320, and of 768) on the attention's
projections, and of LyCORIS' diag-oft with dim 8 on the same layers. For each of them these ways run in turn, in ``--repeats`` rounds:

* ``cp -r`` of the checkpoint, which does not wait for the disk;
* the whole command ``oftsurgery fold``, from the start of the process to its end, which waits for the disk;
* for LyCORIS' adapters, with ``--lycoris``: a Python with ``lycoris-lora``, torch and diffusers loads the plain checkpoint, merges with
  LyCORIS' ``merge_to`` and saves, without the time of the imports. LyCORIS does not merge into 4-bit weights.

With ``--layers``, single weights are timed by the kernels and by the readable path. Each way's time is that of the clock and that of the
processors, which on a shared machine says more. Medians go to the terminal and to ``benchmarks/results/image_models.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timing import processor
from torch import Tensor, nn

HERE = Path(__file__).parent
#: the modules that kohya's OFT trains, by the ends of their paths in diffusers
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def skeleton(model: str, blocks: int) -> nn.Module:
    """The model on the meta device, with so many blocks of each kind, or in the deepest attentions of SDXL."""
    import diffusers

    with torch.device("meta"):
        if model == "sdxl":
            return diffusers.UNet2DConditionModel(**SDXL, transformer_layers_per_block=(1, 2, blocks))
        return diffusers.FluxTransformer2DModel(num_layers=blocks, num_single_layers=blocks, guidance_embeds=True)


def random_tensor(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values of a weight's size, from a short run of random numbers, which takes less time than all of them would."""
    count = shape.numel()
    some = torch.randn(min(count, 1 << 20), generator=generator).half().mul_(0.02)
    return some.repeat(-(-count // len(some)))[:count].reshape(shape).clone()


def write_base(model: str, folder: Path, blocks: int) -> nn.Module:
    """The checkpoint, and its model on the meta device."""
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file

    made, generator = skeleton(model, blocks), torch.Generator().manual_seed(0)
    folder.mkdir()
    linears = {f"{path}.weight" for path, module in made.named_modules() if isinstance(module, nn.Linear)}
    tensors: dict[str, Tensor] = {}
    for name, parameter in made.state_dict().items():
        tensor = random_tensor(parameter.shape, generator)
        if model == "flux" and name in linears:
            codes, state = quantize_4bit(tensor, quant_type="nf4")
            tensors |= {name: codes, **{f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {**made.config, "_class_name": type(made).__name__}
    if model == "flux":
        config["quantization_config"] = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "float16", "_load_in_4bit": True, "_load_in_8bit": False,
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return made


def write_adapter(model: str, tool: str, made: nn.Module, file: Path) -> int:
    """An adapter's file; returns the size of its largest block."""
    from safetensors.torch import save_file

    generator, tensors, largest = torch.Generator().manual_seed(1), dict[str, Tensor](), 0
    for path, module in made.named_modules():
        if not path.endswith(PROJECTIONS):
            continue
        out = module.weight.shape[0]
        b = out // 4 if tool == "kohya" else 8
        largest = max(largest, b)
        name = ("oft_unet_" if tool == "kohya" else "lycoris_") + path.replace(".", "_")
        part = ".0" if (model, tool) == ("flux", "kohya") else ""
        blocks = torch.randn(out // b, b, b, generator=generator) * (0.05 / b**0.5)
        tensors |= {f"{name}.oft_blocks{part}": blocks, f"{name}.alpha": torch.tensor(1e3 if tool == "kohya" else 0.0)}
    networks = {"kohya": "networks.oft" + "_flux" * (model == "flux"), "lycoris": "lycoris.kohya"}
    save_file(tensors, file, {"ss_network_module": networks[tool]})
    return largest


def merge_by_lycoris(base: Path, adapter: Path, out: Path) -> None:
    """Run LyCORIS' merge in this process, and print the seconds without the imports."""
    import diffusers
    from lycoris import create_lycoris_from_weights  # type: ignore[import-not-found]
    from safetensors.torch import load_file, save_file

    start = time.perf_counter()
    config = json.loads((base / "config.json").read_text())
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
    unet.load_state_dict(load_file(base / "diffusion_pytorch_model.safetensors"), assign=True)
    network, _ = create_lycoris_from_weights(1.0, str(adapter), unet)
    network.merge_to(1.0)
    save_file(unet.state_dict(), out)
    print(json.dumps({"seconds": time.perf_counter() - start}))


#: name → (out, in, size of the blocks, format)
LAYERS = {
    "SDXL 1280×1280, kohya dim 4": (1280, 1280, 320, "fp16"),
    "SDXL 1280×2048, LyCORIS b = 32": (1280, 2048, 32, "fp16"),
    "Flux 3072×3072, kohya dim 4": (3072, 3072, 768, "nf4"),
    "Flux 3072×3072, LyCORIS dim 8": (3072, 3072, 8, "nf4"),
    "Flux 12288×3072, LyCORIS b = 96": (12288, 3072, 96, "nf4"),
}


def time_layers() -> list[dict[str, Any]]:
    """Processor seconds of one weight's fold, by the kernel and by the readable path, which folded such weights before: the least of
    three, the rotation's matrices included.
    """
    import oftsurgery
    from oftsurgery.adapters.output_blocks import OutputBlocks
    from oftsurgery.formats import codecs
    from oftsurgery.weights.fold import fold_encoded

    rows = []
    for name, (out, features, b, storage) in LAYERS.items():
        generator = torch.Generator().manual_seed(0)
        weight = codecs.dense((torch.randn(out, features, generator=generator) * 0.02).half())
        if storage == "nf4":
            shape = (out, features)
            weight = codecs.encode(
                weight.tensors["weight"].float(), oftsurgery.WeightFormat("nf4", shape, blocksize=64)
            )
        rotation = OutputBlocks(torch.randn(out // b, b, b, generator=generator) * (0.05 / b**0.5), 0.0, "lycoris")
        row: dict[str, Any] = {"layer": name, "format": storage, "block": b}
        for backend in ("reference", "numba"):
            times = []
            for _ in range(3):
                with oftsurgery.use_backend(backend):
                    start = time.process_time()
                    fold_encoded(weight, [rotation.resolved()], rounding="preserve")
                    times.append(time.process_time() - start)
            row[backend] = min(times)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def ways(base: Path, adapter: Path, out: Path, lycoris: str | None) -> Iterator[tuple[str, list[str]]]:
    """``(way, command)``."""
    yield "cp", ["cp", "-r", str(base), str(out)]
    trained = [] if "flux" in base.name else ["--trained-on", "plain"]
    yield "fold", [sys.executable, "-m", "oftsurgery", "fold", str(base), str(adapter), str(out), *trained, "--quiet"]
    if lycoris is not None and "lycoris" in adapter.name and "sdxl" in base.name:
        yield "LyCORIS", [lycoris, __file__, "--merge", str(base), str(adapter), str(out)]


def measured(way: str, command: list[str], out: Path) -> dict[str, float]:
    """The figures of one run; what it wrote is removed."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(["/usr/bin/env", *command], capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode:
        raise SystemExit(f"{way} failed: {done.stderr[-2000:]}")
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    own = json.loads(done.stdout.splitlines()[-1]) if way == "LyCORIS" else {"seconds": seconds}
    return {"processor_seconds": worked, **own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=["sdxl", "flux"], choices=["sdxl", "flux"])
    text = "blocks of each kind of Flux (Flux.1 has 19 and 38), and in the deepest attentions of SDXL (SDXL has 10)"
    parser.add_argument("--blocks", type=int, help=f"{text}; default: 4 of Flux, all of SDXL")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lycoris", metavar="PYTHON", help="a Python that has lycoris-lora, torch and diffusers")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "image_models.json")
    parser.add_argument("--layers", action="store_true", help="time single weights too, by the processor's time")
    parser.add_argument("--merge", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.merge:
        merge_by_lycoris(*map(Path, args.merge))
        return
    layers = time_layers() if args.layers else []
    rows: list[dict[str, Any]] = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as place:
            base, out = Path(place) / model, Path(place) / "out"
            made = write_base(model, base, args.blocks or {"sdxl": 10, "flux": 4}[model])
            size = sum(path.stat().st_size for path in base.iterdir())
            for tool in ("kohya", "lycoris"):
                adapter = Path(place) / f"{tool}.safetensors"
                largest = write_adapter(model, tool, made, adapter)
                found: dict[str, list[dict[str, float]]] = {}
                for _ in range(args.repeats):
                    for way, command in ways(base, adapter, out, args.lycoris):
                        found.setdefault(way, []).append(measured(way, command, out))
                row = {"model": model, "gigabytes": size / 1e9, "tool": tool, "largest_block": largest}
                row["ways"] = {
                    way: {key: statistics.median(one[key] for one in each) for key in ("seconds", "processor_seconds")}
                    for way, each in found.items()
                }
                pairs = zip(found["fold"], found["cp"], strict=True)
                row["times_cp"] = statistics.median(f["seconds"] / c["seconds"] for f, c in pairs)
                rows.append(row)
                print(json.dumps(row), flush=True)
    machine = {"cpu": processor(), "threads": torch.get_num_threads()}
    args.out.write_text(
        json.dumps({"machine": machine, "repeats": args.repeats, "layers": layers, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
