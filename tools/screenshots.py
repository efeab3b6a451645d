"""``PYTHONPATH=tests/helpers python tools/screenshots.py [FOLDER]`` makes the pictures of the report in ``docs/pictures/``. The script needs
Debian's chromium. The models and adapters of the script stay in FOLDER, and a second run uses them again.

The pictures show two real folds. The first fold is MiniLM in NF4 with an adapter that ``tools/demo.py`` trains here (in
about a minute); the script compares the fold end to end with the live adapter. The second fold is a llama of 32 layers
(of random weights, 64 wide), folded on disk, with a peft adapter whose rotations grow from layer to layer.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from io import BytesIO
from pathlib import Path

import browser
import demo
import torch
from PIL import Image
from records import trained
from transformers import LlamaConfig, LlamaForCausalLM

import oftsurgery

DOCS = Path(__file__).parent.parent / "docs" / "pictures"


def minilm(folder: Path) -> Path:
    adapter = folder / "sentences-qoft"
    if not adapter.exists():
        list(demo.fine_tune("NF4", adapter, steps=60, rate=4e-3, size=16))
    folded = oftsurgery.fold(demo.load_base("NF4"), adapter)
    text = demo.tokenizer()(demo.held_out(16), padding=True, return_tensors="pt")
    live = demo.compute_in_float32(demo.load_live("NF4", adapter))
    checked = oftsurgery.verify(demo.compute_in_float32(folded), live, dict(text))
    oftsurgery.report(folded.oftsurgery, folder / "minilm.html", png=folder, verified=checked, force=True)
    return folder / "minilm.html"


def llama(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=32, **sizes))
    model.save_pretrained(folder / "base")
    trained(model, "all-linear").save_pretrained(folder / "chat-qoft")
    settings = {"format": "nf4", "trained_on": "nf4", "force": True}
    oftsurgery.fold_checkpoint(folder / "base", folder / "chat-qoft", folder / "chat-nf4", **settings)
    checked = oftsurgery.verify_checkpoint(folder / "chat-nf4", folder / "base", folder / "chat-qoft")
    (folder / "verify.json").write_text(json.dumps(checked.to_dict()))
    oftsurgery.report(folder / "chat-nf4", folder / "llama.html", verified=folder / "verify.json", force=True)
    return folder / "llama.html"


def save(data: bytes, name: str) -> None:
    """Save the picture as a PNG of 256 colours; the page has fewer colours."""
    DOCS.mkdir(exist_ok=True)
    Image.open(BytesIO(data)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(DOCS / name, optimize=True)
    print(f"docs/pictures/{name}: {(DOCS / name).stat().st_size / 1000:.0f} kB")


def main() -> None:
    warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else place)
        first, second = minilm(folder), llama(folder)
        for page in (first, second):
            print(f"{page.name}: {page.stat().st_size / 1000:.0f} kB")
        with browser.chromium() as driver:
            for scheme in ("light", "dark"):
                browser.show(driver, first, scheme=scheme, width=1240)
                save(browser.photograph(driver, height=1350), f"report-{scheme}.png")
            browser.show(driver, first, width=360)
            save(browser.photograph(driver, height=1500), "report-narrow.png")
            browser.show(driver, second, width=1240)
            save(browser.photograph(driver, height=2000), "report-32-layers.png")
        for name in ("errors", "angles"):
            save((folder / f"{name}.png").read_bytes(), f"card-{name}.png")


if __name__ == "__main__":
    main()
