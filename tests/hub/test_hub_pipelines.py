"""Pipelines of diffusers from the Hub, through the real huggingface_hub: what is downloaded, and that the whole pipeline is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import Hub, Repo, serving, talk_to
from image_models import adapted, build
from warned import quietly

import oftsurgery

TOKEN = "hf_" + "Ab3" * 12
NAME = "FluxTransformer2DModel"
#: files that are not read
OTHERS = dict.fromkeys(
    ("flux.safetensors", "vae/diffusion_pytorch_model.bin", "onnx/transformer/model.onnx", "vae/model.msgpack"),
    b"other",
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(Hub({TOKEN: "me"})) as running:
        talk_to(running, TOKEN, tmp_path, monkeypatch)
        monkeypatch.chdir(tmp_path)
        yield running
        huggingface_hub.close_session()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_one_variant_of_a_pipeline_is_downloaded(variant: str | None, server: Hub, tmp_path: Path) -> None:
    local = tmp_path / "local"
    build(NAME).half().save_pretrained(local / "transformer", variant="fp16")
    (local / "transformer" / "diffusion_pytorch_model.fp16.safetensors").rename(tmp_path / "half")
    build(NAME).save_pretrained(local / "transformer")
    (tmp_path / "half").rename(local / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    (local / "scheduler").mkdir()
    (local / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {"transformer": ["diffusers", NAME], "scheduler": ["diffusers", "DDIMScheduler"], "vae": ["diffusers", "X"]}
    (local / "model_index.json").write_text(json.dumps(index))
    adapted(build(NAME)).save_pretrained(tmp_path / "adapter")
    files = {p.relative_to(local).as_posix(): p.read_bytes() for p in local.rglob("*") if p.is_file()}
    repo = server.repos.setdefault("org/flux", Repo(private=False))
    repo.branches["main"] = repo.commit(files | OTHERS, "by hand", "")
    record = quietly(
        oftsurgery.fold_checkpoint,
        "org/flux",
        tmp_path / "adapter",
        tmp_path / "out",
        trained_on="plain",
        variant=variant,
    )
    assert record.base["commit"] == repo.branches["main"]
    asked = {path.rpartition("/")[2] for path in server.asked("GET", "/resolve/")}
    weights = f"diffusion_pytorch_model.{'fp16.' if variant else ''}safetensors"
    assert {name for name in asked if "diffusion" in name} == {weights}
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    new = {"transformer/README.md", "transformer/oftsurgery.json"}
    assert written == {n for n in files if "safetensors" not in n} | new | {f"transformer/{weights}"}
    alone = quietly(
        oftsurgery.fold_checkpoint,
        "org/flux/transformer",
        tmp_path / "adapter",
        tmp_path / "one",
        trained_on="plain",
        variant=variant,
    )
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "out" / "transformer" / weights).read_bytes()
    assert len(alone.modules) == len(record.modules)
