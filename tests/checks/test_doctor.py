"""doctor(): each kind of damage made as it is made in the wild, found by its code, with numbers; and nothing found
where nothing is wrong.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import pytest
import torch
from checkpoints import TOKENS, adapted, bnb_config, build, load, quiet_fold, quiet_transformers, rotations_in
from independent import decode_4bit, make_layer, relative
from peft import OFTConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_bnb_weight
from rotated import CONFIG
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import oftsurgery
from oftsurgery.checks.doctor import doctor
from oftsurgery.checks.findings import Finding

Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain llama, the same in NF4 and in NF4 with double quantisation, an adapter for it, and folds of all three."""
    root = tmp_path_factory.mktemp("doctor")
    model = build("llama")
    model.save_pretrained(root / "plain")
    adapted(model, ["q_proj", "down_proj"]).save_pretrained(root / "adapter")
    empty = {"adapter": root / "adapter"}
    for name, more in (("nf4", {}), ("double", {"double_quant": True}), ("int8", {})):
        quiet_fold(
            root / "plain",
            root / "adapter",
            root / f"{name}-folded",
            format="nf4" if name == "double" else name,
            **more,
        )
        with quiet_transformers():
            quantised = load(
                root / "plain",
                "LlamaForCausalLM",
                quantization_config=bnb_config("int8" if name == "int8" else "nf4", double=bool(more)),
            )
        folder = root / name
        folder.mkdir()
        config = json.loads((root / f"{name}-folded" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config))
        state = quantised.state_dict()
        save_file(
            {k: v.contiguous() for k, v in state.items() if isinstance(v, Tensor)},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        quiet_fold(folder, root / "adapter", root / f"{name}-refolded")
        empty |= {
            name: folder,
            f"{name}-folded": root / f"{name}-refolded",
            f"{name}-on-the-fly": root / f"{name}-folded",
        }
    quiet_fold(root / "plain", root / "adapter", root / "plain-folded")
    return empty | {"plain": root / "plain", "plain-folded": root / "plain-folded"}


def copied(source: Path, to: Path) -> Path:
    to.mkdir()
    for path in source.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def changed(source: Path, to: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a one-file checkpoint whose tensors ``change`` has edited."""
    folder = copied(source, to)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit_json(path: Path, **fields: Any) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (value | fields).items() if v is not ...}))


def without_kept(findings: list[Finding]) -> list[Finding]:
    """The findings but for the note that the adapter is in the weights, which there must be."""
    assert [f.severity for f in findings if f.code == "kept"] == ["note"], findings
    return [f for f in findings if f.code != "kept"]


def only(findings: list[Finding], code: str) -> Finding:
    assert [f.code for f in findings] == [code], findings
    return findings[0]


# --- nothing wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["plain", "nf4", "double", "int8", "plain-folded", "nf4-folded", "double-folded", "int8-folded", "nf4-on-the-fly"],
)
def test_nothing_is_found_in_a_sound_checkpoint(made: dict[str, Path], name: str) -> None:
    assert doctor(made[name]) == []


@pytest.mark.parametrize(
    ("folded", "base"),
    [
        ("plain-folded", "plain"),
        ("nf4-folded", "nf4"),
        ("double-folded", "double"),
        ("int8-folded", "int8"),
        ("nf4-on-the-fly", "plain"),  # quantised first: the base given is the plain one
        ("double-on-the-fly", "plain"),
        ("int8-on-the-fly", "plain"),
    ],
)
def test_nothing_is_found_in_a_right_fold(made: dict[str, Path], folded: str, base: str) -> None:
    assert without_kept(doctor(made[folded], base=made[base], adapter=made["adapter"])) == []


@pytest.mark.parametrize("variant", ["block16", "block16_exact", "coft", "shared", "adjusted20", "rank4"])
@pytest.mark.parametrize("release", ["peft-0.18.1", "peft-0.21.2"])
def test_nothing_is_found_in_a_sound_adapter(golden: Path, release: str, variant: str) -> None:
    assert doctor(golden / release / variant) == []


@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
def test_nothing_is_found_in_a_sound_model(kind: str) -> None:
    assert doctor(nn.Sequential(make_layer(kind, 64), nn.LayerNorm(64))) == []


def test_nothing_is_found_in_an_adapter_that_fits(made: dict[str, Path]) -> None:
    assert doctor(made["adapter"], base=made["nf4"]) == []
    assert doctor(made["adapter"], base=build("llama")) == []
    assert doctor(made["plain"], adapter=made["adapter"]) == []


# --- peft's merge -----------------------------------------------------------------------------------------------------


def merge_of_018(layer: Any, oft_data: Tensor) -> None:
    """What `Linear4bit.merge` and `Linear8bitLt.merge` of peft 0.16 to 0.20 do (peft/tuners/oft/bnb.py of 0.18.1), line
    by line.
    """
    weight = layer.weight
    if isinstance(weight, bnb.nn.Int8Params):
        state = layer.state
        if state.SCB is None:
            state.SCB = weight.SCB
        output = dequantize_bnb_weight(weight, state=state)
    else:
        kwargs = weight.__dict__
        output = decode_4bit(
            weight, weight.quant_state
        ).float()  # `dequantize_bnb_weight` of this bitsandbytes may be off on CPUs
    output = torch.transpose(output, 0, 1)
    w_data = torch.mm(oft_data, output.to(oft_data.dtype))
    w_data = torch.transpose(w_data, 0, 1)
    w_data = output.to(oft_data.dtype).to(oft_data.device)
    if isinstance(weight, bnb.nn.Int8Params):
        layer.weight = bnb.nn.Int8Params(
            w_data.to("cpu").contiguous(), requires_grad=False, has_fp16_weights=weight.has_fp16_weights
        ).to(weight.device)
        state.reset_grads()
        return
    if "bnb_quantized" in kwargs:
        kwargs["bnb_quantized"] = False
    kwargs["requires_grad"] = False
    kwargs.pop("data", None)
    kwargs = {k: v for k, v in kwargs.items() if not k.startswith("_")}
    layer.weight = bnb.nn.Params4bit(w_data.to("cpu"), **kwargs).to(weight.device)


@pytest.fixture(scope="module", params=["nf4", "double", "int8"])
def damaged(
    request: pytest.FixtureRequest, made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A checkpoint whose targets went through that merge."""
    kind = request.param
    folder = copied(made[kind], tmp_path_factory.mktemp("damaged") / kind)
    tensors = load_file(folder / "model.safetensors")
    for path, r in rotations_in(made["adapter"]).items():
        stats = {n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")}
        if kind == "int8":
            layer: Any = bnb.nn.Linear8bitLt(8, 8, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(
                stats["weight"], requires_grad=False, has_fp16_weights=False, CB=stats["weight"], SCB=stats["SCB"]
            )
        else:
            layer = bnb.nn.Linear4bit(8, 8, bias=False, quant_type="nf4", compress_statistics=kind == "double")
            layer.weight = bnb.nn.Params4bit.from_prequantized(
                stats["weight"],
                {f"weight.{n}" if "." in n else n: t for n, t in stats.items() if n != "weight"},
                device="cpu",
                module=layer,
            )
        merge_of_018(layer, r.float())
        tensors = {n: t for n, t in tensors.items() if not n.startswith(f"{path}.")}
        tensors |= {f"{path}.{n}": t.contiguous() for n, t in layer.state_dict().items() if isinstance(t, Tensor)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return kind, folder


def test_weights_that_peft_0_18_merged_are_found(made: dict[str, Path], damaged: tuple[str, Path]) -> None:
    kind, folder = damaged
    finding = only(doctor(folder, base=made[kind], adapter=made["adapter"]), "transposed")
    assert finding.severity == "error"
    assert {finding.subject, *finding.others} == set(rotations_in(made["adapter"]))
    assert "peft 0.16 to 0.20" in finding.message
    assert "oftsurgery fold BASE ADAPTER OUTPUT" in finding.remedy
    # the base's own weight, transposed: within the format's rounding of it, and nothing like the fold
    assert finding.evidence["from_the_base_transposed"] < 0.15
    assert finding.evidence.get("from_the_right_fold", 1.4) > 1
    assert finding.evidence["format"] == {"nf4": "nf4", "double": "nf4 (double quantisation)", "int8": "int8"}[kind]


def test_numbers_of_a_square_weight_are_those_of_an_independent_computation(
    made: dict[str, Path], tmp_path: Path
) -> None:
    """Unrotated: what two of those merges leave (transposed twice)."""
    base = load_file(made["plain"] / "model.safetensors")
    folder = copied(made["plain-folded"], tmp_path / "unrotated")
    tensors = load_file(folder / "model.safetensors")
    for path in rotations_in(made["adapter"]):
        tensors[f"{path}.weight"] = base[f"{path}.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "oftsurgery.json").unlink()
    finding = only(doctor(folder, base=made["plain"], adapter=made["adapter"]), "unrotated")
    rotation = rotations_in(made["adapter"])[finding.subject]
    weight = base[f"{finding.subject}.weight"].double()
    assert finding.evidence["from_the_base"] == 0
    assert finding.evidence["from_the_right_fold"] == pytest.approx(relative(weight, weight @ rotation.T), rel=1e-5)
    assert len(finding.others) == 3


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_a_weight_folded_twice_is_found(made: dict[str, Path], tmp_path: Path, kind: str) -> None:
    once = copied(made[f"{kind}-folded"], tmp_path / "once")
    (once / "oftsurgery.json").unlink()
    quiet_fold(once, made["adapter"], tmp_path / "twice")
    (tmp_path / "twice" / "oftsurgery.json").unlink()
    finding = only(doctor(tmp_path / "twice", base=made[kind], adapter=made["adapter"]), "folded-twice")
    assert (
        finding.evidence["from_the_fold_twice"] <= 1.6 * finding.evidence["rounding"] + 1e-5
    )  # stored twice: √2 of one rounding
    assert finding.evidence["from_the_right_fold"] > 0.2


def test_a_fold_of_another_adapter_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    adapted(build("llama"), ["q_proj", "down_proj"], seed=9).save_pretrained(tmp_path / "other")
    finding = only(doctor(made["plain-folded"], base=made["plain"], adapter=tmp_path / "other"), "not-the-fold")
    assert finding.severity == "error"
    assert finding.evidence["from_the_right_fold"] > 0.1


def test_a_fold_that_was_rounded_more_coarsely_is_a_warning(made: dict[str, Path], tmp_path: Path) -> None:
    quiet_fold(made["nf4"], made["adapter"], tmp_path / "first")
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    dense = load_file(made["plain"] / "model.safetensors")
    for path in rotations_in(made["adapter"]):
        state = bnbf.QuantState.from_dict(
            {n: t for n, t in tensors.items() if n.startswith(f"{path}.weight.")}, device=torch.device("cpu")
        )
        dense[f"{path}.weight"] = decode_4bit(tensors[f"{path}.weight"], state).half()
    folder = copied(made["plain"], tmp_path / "dense")
    save_file(dense, folder / "model.safetensors", {"format": "pt"})
    finding = only(without_kept(doctor(folder, base=made["plain"], adapter=made["adapter"])), "coarse-fold")
    assert finding.severity == "warning"
    assert finding.evidence["rounding"] < 1e-3 < finding.evidence["from_the_right_fold"] < 0.2


@pytest.mark.parametrize("trained_on", ["plain", "nf4-double", "nf4", "fp4-double", "fp4", "int8"])
@pytest.mark.parametrize("format_", ["bf16", "nf4"])
def test_the_right_fold_of_a_plain_base_has_nothing_wrong(
    trained_on: str, format_: Any, made: dict[str, Path], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        oftsurgery.fold_checkpoint(
            made["plain"], made["adapter"], tmp_path / "out", format=format_, trained_on=trained_on
        )
    for recorded in (True, False):
        assert not without_kept(doctor(tmp_path / "out", base=made["plain"], adapter=made["adapter"])), recorded
        (tmp_path / "out" / "oftsurgery.json").unlink(missing_ok=True)


def test_a_live_layer_that_peft_0_18_merged_is_found(made: dict[str, Path]) -> None:
    wide, square = make_layer("nf4", 128, 64), make_layer("nf4", 64, 64)
    model = nn.ModuleDict({"wide": wide, "square": square})
    base = copy.deepcopy(model)
    for layer in (wide, square):
        merge_of_018(layer, torch.eye(layer.in_features))
    wide_finding = only(doctor(model), "transposed")  # its shape alone shows it
    assert wide_finding.subject == "wide"
    assert wide_finding.evidence == {"shape": "128×64", "layer": "64×128"}
    rows = torch.randn(4, 120) * 0.1
    adapter = oftsurgery.OFTAdapter({"square": oftsurgery.Rotation(rows, shared=False)})
    found = doctor(model, base=base, adapter=adapter)
    assert [(f.code, f.subject) for f in found] == [("transposed", "wide"), ("transposed", "square")]
    assert found[1].evidence["from_the_base_transposed"] < 0.15


# --- CPU packing ------------------------------------------------------------------------------------------------------

CAN_PACK = bnbf.has_avx512bf16()


def after_forward(layer: Any) -> Any:
    with torch.no_grad():
        layer.eval()(torch.randn(2, layer.in_features))
    assert layer.weight.quant_state.packing_format_for_cpu
    return layer


@pytest.mark.skipif(not CAN_PACK, reason="this CPU has no AVX512-BF16: bitsandbytes packs nothing")
@pytest.mark.parametrize(("export", "code"), [("raw", "cpu-packed"), ("state_dict", "absmax-transposed")])
def test_weights_saved_in_cpu_packing_are_found(tmp_path: Path, export: str, code: str) -> None:
    layer = make_layer("nf4", 128, 64, bias=False)
    before = decode_4bit(layer.weight, layer.weight.quant_state)
    after_forward(layer)
    if export == "raw":
        state = layer.weight.quant_state
        tensors = {"weight": layer.weight.data, **{f"weight.{n}": t for n, t in state.as_dict(packed=True).items()}}
    else:
        tensors = layer.state_dict()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    save_file({f"layer.{n}": t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    finding = only(doctor(folder), code)
    assert finding.severity == "error"
    assert finding.subject == "layer.weight"
    assert finding.evidence["absmax_shape"] == "2×64"
    assert finding.evidence["absmax_dtype"] == "BF16"
    assert finding.evidence["weight_shape"] == ("64×64" if export == "raw" else "4096×1")
    # what a reader of checkpoints makes of it, by bitsandbytes' own decoding of these very tensors
    wrong = bnbf.QuantState(
        tensors["weight.absmax"].reshape(-1).float(), shape=torch.Size((64, 128)), blocksize=64, quant_type="nf4"
    )
    assert finding.evidence["relative_error"] == pytest.approx(
        relative(decode_4bit(tensors["weight"], wrong), before), rel=0.02
    )
    assert finding.evidence["relative_error"] > 0.1
    # and no fold reads it
    rows = {"base_model.model.layer.oft_R.weight": torch.randn(8, 120) * 0.03}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", "use_cayley_neumann": False}))
    save_file(rows, adapter / "adapter_model.safetensors")
    with pytest.raises(oftsurgery.FormatError, match="packing for CPUs"):
        oftsurgery.fold_checkpoint(folder, adapter, tmp_path / "out")


@pytest.mark.skipif(not CAN_PACK, reason="this CPU has no AVX512-BF16: bitsandbytes packs nothing")
def test_live_layers_in_cpu_packing_are_found() -> None:
    model = nn.ModuleDict({"a": after_forward(make_layer("nf4", 128)), "b": make_layer("nf4", 128)})
    finding = only(doctor(model), "cpu-packed")
    assert (finding.severity, finding.subject, finding.others) == ("warning", "a", ())
    assert "support_avx512bf16_for_cpu = False" in finding.remedy


@pytest.mark.skipif(not CAN_PACK, reason="this CPU has no AVX512-BF16: bitsandbytes packs nothing")
def test_live_layers_spoilt_by_state_dict_are_found() -> None:
    layer = after_forward(make_layer("nf4", 128))
    layer.state_dict()
    finding = only(doctor(nn.ModuleDict({"a": layer})), "state")
    assert "absmax transposed" in finding.message
    assert finding.evidence["shape"] == "2×64"


# --- config, companions, index, values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "config_of", "says", "message"),
    [
        ("plain", "nf4", "4-bit", "all weights are plain"),
        ("plain", "int8", "int8", "all weights are plain"),
        ("nf4", "plain", None, "no `quantization_config`"),
        ("int8", "plain", None, "no `quantization_config`"),
        ("nf4", "int8", "int8", "a quantisation that the weights do not have"),
    ],
)
def test_a_stale_quantization_config_is_found(
    made: dict[str, Path], tmp_path: Path, source: str, config_of: str, says: str, message: str
) -> None:
    folder = copied(made[source], tmp_path / "stale")
    (folder / "config.json").write_bytes((made[config_of] / "config.json").read_bytes())
    finding = only(doctor(folder), "stale-config")
    assert finding.evidence["config_says"] == says
    assert finding.evidence["4-bit_weights"] == (14 if source == "nf4" else 0)
    assert finding.evidence["int8_weights"] == (14 if source == "int8" else 0)
    assert message in finding.message


@pytest.mark.parametrize(
    ("kind", "lost", "subject"),
    [
        ("nf4", f"{Q_PROJ}.weight.absmax", f"{Q_PROJ}.weight"),
        ("nf4", f"{Q_PROJ}.weight.quant_map", f"{Q_PROJ}.weight"),
        ("nf4", f"{Q_PROJ}.weight.quant_state.bitsandbytes__nf4", f"{Q_PROJ}.weight"),
        ("double", f"{Q_PROJ}.weight.nested_absmax", f"{Q_PROJ}.weight"),
        ("double", f"{Q_PROJ}.weight.nested_quant_map", f"{Q_PROJ}.weight"),
        ("int8", f"{DOWN}.SCB", f"{DOWN}.weight"),
    ],
)
def test_missing_companions_are_found(
    made: dict[str, Path], tmp_path: Path, kind: str, lost: str, subject: str
) -> None:
    finding = only(doctor(changed(made[kind], tmp_path / "lost", lambda t: t.pop(lost))), "missing-companions")
    assert (finding.severity, finding.subject, finding.evidence["tensor"]) == ("error", subject, lost)


def test_a_weight_that_is_missing_beside_its_companions_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    finding = only(
        doctor(changed(made["nf4"], tmp_path / "lost", lambda t: t.pop(f"{DOWN}.weight"))), "missing-companions"
    )
    assert finding.subject == f"{DOWN}.weight"
    assert "has statistics of a weight, but not the weight" in finding.message


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("plain", f"{Q_PROJ}.weight"),
        ("plain", "model.norm.weight"),
        ("nf4", f"{Q_PROJ}.weight.absmax"),
        ("int8", f"{DOWN}.SCB"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(
    made: dict[str, Path], tmp_path: Path, kind: str, name: str, value: float
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3:5] = value

    finding = only(doctor(changed(made[kind], tmp_path / "nan", spoil)), "non-finite")
    assert finding.subject.replace("weight.SCB", "SCB") == name
    assert finding.evidence["values"] == 2


def test_a_nested_offset_that_is_no_number_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    name = f"{Q_PROJ}.weight.quant_state.bitsandbytes__nf4"

    def spoil(tensors: dict[str, Tensor]) -> None:
        fields = json.loads(bytes(tensors[name].numpy()))
        tensors[name] = torch.tensor(
            list(json.dumps(fields | {"nested_offset": float("nan")}).encode()), dtype=torch.uint8
        )

    finding = only(doctor(changed(made["double"], tmp_path / "nan", spoil)), "non-finite")
    assert finding.subject == f"{Q_PROJ}.weight.nested_offset"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert doctor(tmp_path / "sharded") == []
    return tmp_path / "sharded"


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_an_index_that_disagrees_with_its_shards_is_found(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    names = sorted(index["weight_map"])
    files = [p.name for p in shards_of(sharded)]
    moved, gone = names[0], names[1]
    index["weight_map"][moved] = next(f for f in files if f != index["weight_map"][moved])
    del index["weight_map"][gone]
    index["weight_map"]["model.ghost.weight"] = files[0]
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    finding = only(doctor(sharded), "index")
    assert finding.severity == "error"
    assert {finding.subject, *finding.others} == {moved, gone, "model.ghost.weight"}
    assert finding.evidence == {
        "shards": len(files),
        "shards_missing_or_damaged": 0,
        "tensors_listed": len(names),
        "absent_from_their_shard": 1,
        "in_another_shard": 1,
        "not_listed": 1,
        "in_two_shards": 0,
    }


def test_missing_truncated_and_double_shards_are_found(sharded: Path) -> None:
    first, second = shards_of(sharded)[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-8])
    finding = only(doctor(sharded), "index")
    assert finding.evidence["shards_missing_or_damaged"] == 2
    assert {first.name, second.name} <= {finding.subject, *finding.others}


def test_two_checkpoints_in_one_folder_are_found(sharded: Path) -> None:
    (sharded / "model.safetensors").write_bytes(shards_of(sharded)[0].read_bytes())
    assert "two checkpoints" in only(doctor(sharded), "checkpoint-files").message


def test_a_stray_shard_and_a_wrong_size_are_notes(sharded: Path) -> None:
    save_file({"old": torch.zeros(2)}, sharded / "model-00009-of-00009.safetensors")
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    size = index["metadata"]["total_size"]
    path.write_text(json.dumps(index | {"metadata": {"total_size": size + 1}}))
    found = doctor(sharded)
    assert [(f.severity, f.code) for f in found] == [("note", "index-size"), ("note", "stray-shard")]
    assert found[0].evidence == {"stated_bytes": size + 1, "held_bytes": size}
    assert found[1].subject == "model-00009-of-00009.safetensors"


@pytest.mark.parametrize(
    ("rope", "add"),
    [
        ({"rope_type": "default", "rope_theta": 500000.0}, {"rope_theta": 500000.0}),
        (
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
    ],
)
def test_rope_settings_that_transformers_4_ignores_are_found(
    tmp_path: Path, rope: dict[str, Any], add: dict[str, Any]
) -> None:
    build("llama", rope_parameters=rope).save_pretrained(tmp_path / "model")
    finding = only(doctor(tmp_path / "model"), "rope")
    assert (finding.severity, finding.subject) == ("warning", "config.json")
    assert finding.evidence["rope_theta"] == rope["rope_theta"]
    assert finding.evidence["transformers_4_uses"] == 10000.0
    assert json.dumps(add, sort_keys=True) in finding.remedy
    # the remedy is one
    edit_json(tmp_path / "model" / "config.json", **add)
    assert doctor(tmp_path / "model") == []


# --- the record -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "nf4", "int8"])
def test_a_record_that_does_not_fit_the_weights_is_found(made: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = copied(made[kind], tmp_path / "base")
    record = made[f"{kind}-folded"] / "oftsurgery.json"
    (folder / "oftsurgery.json").write_bytes(record.read_bytes())
    finding = only(doctor(folder), "record")
    assert "but the weight is the base's" in finding.message
    assert finding.evidence["found"] == finding.evidence["base"] != finding.evidence["recorded"]
    assert len(finding.others) == 3

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.weight"].view(torch.uint8).view(-1)[100] ^= 1

    finding = only(doctor(changed(made[f"{kind}-folded"], tmp_path / "changed", spoil)), "record")
    assert finding.subject == Q_PROJ
    assert "the weight is not the weight in the record" in finding.message
    assert finding.others == ()


def test_a_damaged_record_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made["plain-folded"], tmp_path / "folded")
    edit_json(folder / "oftsurgery.json", modules=...)
    assert "record of an earlier fold cannot be read" in only(doctor(folder), "checkpoint-files").message


def test_an_adapter_that_is_folded_already_is_found(made: dict[str, Path]) -> None:
    finding = only(doctor(made["plain-folded"], adapter=made["adapter"]), "already-folded")
    assert finding.severity == "warning"
    assert "oftsurgery unfold" in finding.remedy
    folded = oftsurgery.fold(build("llama"), made["adapter"])
    assert only(doctor(folded, adapter=made["adapter"]), "already-folded").severity == "warning"


def test_an_adapter_that_the_record_names_twice_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made["plain-folded"], tmp_path / "folded")
    record = json.loads((folder / "oftsurgery.json").read_text())
    (folder / "oftsurgery.json").write_text(json.dumps(record | {"earlier": [record]}))
    finding = only(doctor(folder), "folded-twice")
    assert finding.evidence == {"times": 2}


# --- adapters ---------------------------------------------------------------------------------------------------------


class Golden(nn.Module):
    """The model that the golden adapters were made on."""

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        weights = load_file(base)
        for name in ("q_proj", "up_proj", "down_proj"):
            out, features = weights[f"layers.0.{name}.weight"].shape
            setattr(self.layers[0], name, nn.Linear(features, out, bias=name == "up_proj"))
        self.load_state_dict(weights)


def installed_peft(folder: Path) -> tuple[Golden, list[str]]:
    """What the installed peft makes of an adapter: a live model, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(Golden(folder.parent / "base.safetensors"), folder)
    return model.base_model.model, [str(w.message) for w in caught]


def weight_of(layer: Any) -> Tensor:
    """What a live layer computes, its bias left out."""
    with torch.no_grad():
        features = layer.base_layer.in_features
        return (layer(torch.eye(features)) - layer(torch.zeros(1, features))).T


@pytest.mark.parametrize("variant", ["block16", "coft", "coft_clamped", "rank4", "adjusted20", "shared"])
def test_an_adapter_that_newer_peft_loads_as_the_identity_is_found(golden: Path, variant: str) -> None:
    folder = golden / "peft-0.15.2" / variant
    model, said = installed_peft(folder)
    for layer in (model.layers[0].q_proj, model.layers[0].up_proj, model.layers[0].down_proj):
        assert relative(weight_of(layer), layer.base_layer.weight.detach()) < 1e-6  # so it is: the base
    assert any("missing adapter keys" in text for text in said)
    finding = only(doctor(folder), "loads-as-identity")
    assert finding.severity == "warning"
    assert finding.evidence["modules"] == 3
    assert finding.evidence["largest_angle"] > 0.01
    assert "oftsurgery fold" in finding.remedy


@pytest.mark.parametrize("variant", ["coft", "coft_clamped", "rank4", "rank6_cropped", "shared"])
def test_an_adapter_that_newer_peft_refuses_is_found(golden: Path, variant: str) -> None:
    folder = golden / "peft-0.13.2" / variant
    with pytest.raises(ValueError, match="retrain"):
        installed_peft(folder)
    assert only(doctor(folder), "refused-by-newer-peft").severity == "warning"


@pytest.mark.parametrize(
    "variant", ["block16", "block16_exact", "block16_neumann2", "block16_neumann3", "block16_neumann8", "coft", "rank4"]
)
def test_an_adapter_that_newer_peft_computes_by_another_series_is_found(golden: Path, variant: str) -> None:
    """Where, and only where, the installed peft's live layers differ from those of the release that wrote the adapter."""
    folder = golden / "peft-0.17.1" / variant
    model, _ = installed_peft(folder)
    effective = load_file(folder / "effective.safetensors")
    apart = {
        n: relative(weight_of(getattr(model.layers[0], n)), effective[f"layers.0.{n}.weight"])
        for n in ("q_proj", "up_proj", "down_proj")
    }
    found = doctor(folder)
    if max(apart.values()) < 1e-6:
        assert found == []
        return
    finding = only(found, "other-series")
    # a weight cannot differ by more than the rotations do
    assert finding.evidence["largest_difference_of_R"] >= max(apart.values()) * 0.999
    assert finding.evidence["worst_module"].startswith("layers.0.")


@pytest.mark.parametrize("release", ["peft-0.17.1", "peft-0.18.1", "peft-0.21.2"])
def test_an_adapter_of_one_neumann_term_changes_nothing(golden: Path, release: str) -> None:
    finding = only(doctor(golden / release / "block16_neumann1"), "no-effect")
    assert "one term is the identity" in finding.message
    assert finding.evidence["neumann_terms"] == 1


def test_an_untrained_adapter_changes_nothing(tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), OFTConfig(oft_block_size=16, target_modules=["q_proj"]))
    assert "untrained" in only(doctor(model), "no-effect").message
    model.save_pretrained(tmp_path)
    assert "untrained" in only(doctor(tmp_path), "no-effect").message


@pytest.mark.parametrize("live", [False, True])
def test_a_convolution_adapter_is_found(tmp_path: Path, live: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.point = nn.Conv2d(16, 8, 3), nn.Conv2d(16, 8, 1)

    model = get_peft_model(Net(), OFTConfig(oft_block_size=16, target_modules=["wide", "point"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_R" in name:
                parameter.normal_(std=0.05)
    if live:
        finding = only(doctor(model), "convolution")
    else:
        model.save_pretrained(tmp_path / "adapter")
        assert doctor(tmp_path / "adapter") == []  # the files alone do not tell
        (tmp_path / "base").mkdir()
        save_file(Net().state_dict(), tmp_path / "base" / "model.safetensors")
        finding = only(doctor(tmp_path / "adapter", base=tmp_path / "base"), "convolution")
        assert only(doctor(tmp_path / "adapter", base=Net()), "convolution") == finding
    assert (finding.severity, finding.subject, finding.evidence) == ("error", "wide", {"kernel": "3×3"})


def test_an_adapter_with_values_that_are_not_finite_is_found(golden: Path, tmp_path: Path) -> None:
    folder = copied(golden / "peft-0.21.2" / "block16", tmp_path / "nan")
    tensors = load_file(folder / "adapter_model.safetensors")
    names = sorted(tensors)
    tensors[names[0]][0, 0] = float("nan")
    tensors[names[1]][0, :3] = float("inf")
    save_file(tensors, folder / "adapter_model.safetensors")
    finding = only(doctor(folder), "non-finite")
    assert (finding.subject, finding.others) == (names[1], (names[0],))  # the worst first
    assert finding.evidence["values"] == 3


def test_an_adapter_of_another_base_is_found(made: dict[str, Path], golden: Path) -> None:
    finding = only(doctor(golden / "peft-0.21.2" / "block16", base=made["plain"]), "no-match")
    assert "match nothing in the model" in finding.message


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter-files"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter-files"),
        (lambda folder: edit_json(folder / "adapter_config.json", peft_type="LORA"), "dialect"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x08"), "adapter-files"),
    ],
)
def test_an_adapter_that_cannot_be_read_is_found(
    golden: Path, tmp_path: Path, damage: Callable[[Path], object], code: str
) -> None:
    folder = copied(golden / "peft-0.21.2" / "block16", tmp_path / "adapter")
    damage(folder)
    assert only(doctor(folder), code).severity == "error"


# --- live models ------------------------------------------------------------------------------------------------------


def test_a_layer_that_lost_its_state_is_found() -> None:
    model = nn.ModuleDict({"four": make_layer("nf4", 64), "eight": make_layer("int8", 64)})
    model["four"].weight.quant_state = None
    model["four"].quant_state = None
    model["eight"].weight.SCB = None
    model["eight"].state.SCB = None
    found = {f.subject: f for f in doctor(model)}
    assert found.keys() == {"four", "eight"}
    assert "lost its quant_state" in found["four"].message
    assert "lost its SCB" in found["eight"].message


def test_values_of_a_live_model_that_are_not_finite_are_found() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), make_layer("nf4", 64))
    with torch.no_grad():
        model[0].weight[1, 1] = float("nan")
        model[1].running_mean[0] = float("inf")
        model[2].weight.quant_state.absmax[0] = float("nan")
    found = doctor(model)
    assert {f.subject for f in found} | {o for f in found for o in f.others} == {"0.weight", "1.running_mean", "2"}
    assert {f.code for f in found} == {"non-finite"}


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_layers_that_peft_merged_are_found(kind: str) -> None:
    model = adapted(nn.ModuleDict({"layer": make_layer(kind, 64)}), ["layer"])
    assert doctor(model) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    finding = only(doctor(model), "peft-merged")
    assert finding.subject == "layer"
    assert finding.severity == ("warning" if kind == "nf4" else "note")


def test_a_live_model_that_differs_from_its_record_is_found(made: dict[str, Path]) -> None:
    folded = oftsurgery.fold(build("llama"), made["adapter"])
    assert doctor(folded) == []
    with torch.no_grad():
        folded.get_submodule(DOWN).weight[0, 0] += 1
    assert only(doctor(folded), "record").subject == DOWN


def test_a_live_fold_against_its_base(made: dict[str, Path]) -> None:
    model = build("llama")
    folded = oftsurgery.fold(model, made["adapter"])
    assert without_kept(doctor(folded, base=model, adapter=made["adapter"])) == []
    assert without_kept(doctor(folded, base=made["plain"], adapter=made["adapter"])) == []
    finding = only(doctor(model, base=model, adapter=made["adapter"]), "unrotated")
    assert len(finding.others) == 3
    folded(TOKENS)  # examining changes nothing


# --- findings, and what is refused ------------------------------------------------------------------------------------


def test_a_finding_is_frozen_plain_data_and_readable(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made["plain"], tmp_path / "stale")
    (folder / "config.json").write_bytes((made["nf4"] / "config.json").read_bytes())
    finding = only(doctor(folder), "stale-config")
    with pytest.raises(FrozenInstanceError):
        finding.code = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        finding.evidence["x"] = 1  # type: ignore[index]
    data = json.loads(json.dumps(finding.to_dict()))
    assert data["code"] == "stale-config"
    assert data["evidence"] == dict(finding.evidence)
    text = str(finding)
    assert text.startswith("error: stale-config: config.json\n")
    assert "4-bit weights 0" in text
    assert 'remedy: remove "quantization_config" from config.json' in text


def test_names_from_files_never_reach_the_terminal_raw(tmp_path: Path) -> None:
    save_file({"\x1b[31mred\n.weight": torch.full((2, 2), float("nan"))}, tmp_path / "model.safetensors")
    finding = only(doctor(tmp_path), "non-finite")
    assert "\x1b" not in str(finding)
    assert "\\x1b[31mred\\n.weight" in str(finding)


def test_findings_come_worst_first(made: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(made["plain"], tmp_path / "bad", lambda t: t["model.norm.weight"].fill_(float("nan")))
    edit_json(folder / "config.json", rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    save_file({"old": torch.zeros(2)}, folder / "model-00009-of-00009.safetensors")
    assert [f.severity for f in doctor(folder)] == ["error", "warning", "note"]


def test_what_does_not_exist_is_refused(tmp_path: Path, made: dict[str, Path]) -> None:
    with pytest.raises(oftsurgery.CheckpointError, match="the folder does not exist"):
        doctor(tmp_path / "nowhere")
    with pytest.raises(oftsurgery.AdapterError, match="the folder does not exist"):
        doctor(made["plain"], adapter=tmp_path / "nowhere")
    with pytest.raises(oftsurgery.CheckpointError, match="the folder does not exist"):
        doctor(made["plain"], base=tmp_path / "nowhere", adapter=made["adapter"])


def test_examining_changes_nothing(made: dict[str, Path], snapshot: Callable[[nn.Module], Any]) -> None:
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in made["nf4-folded"].iterdir()}
    doctor(made["nf4-folded"], base=made["nf4"], adapter=made["adapter"])
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in made["nf4-folded"].iterdir()}
    model = nn.ModuleDict({"a": make_layer("nf4", 64, nested=True), "b": make_layer("int8", 64)})
    state = snapshot(model)
    doctor(model)
    assert snapshot(model) == state


@pytest.mark.parametrize(("rounding", "code"), [("nearest", "adapter-lost"), ("preserve", "kept")])
@pytest.mark.parametrize("base", ["quantised", "plain"])
def test_anybodys_merge_of_a_weak_adapter_is_told_by_what_it_keeps(base: str, rounding: str, code: str) -> None:
    """Without a record, and with the base as it was trained on or as its config names it."""
    weight = torch.randn(128, 256)
    plain, model = nn.Sequential(nn.Linear(256, 128, bias=False)), nn.Sequential(make_layer("nf4", 256, 128))
    plain[0].weight.data = weight
    model[0].weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    rotation = oftsurgery.Rotation(generator=0.003 * torch.randn(8, 32 * 31 // 2))
    adapter = oftsurgery.OFTAdapter({"0": rotation}, {}, "peft-0.21", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        merged = oftsurgery.fold(model, adapter, rounding=rounding)
    del merged.oftsurgery
    finding = only(doctor(merged, base=plain if base == "plain" else model, adapter=adapter), code)
    assert finding.severity == ("warning" if rounding == "nearest" else "note")
    assert abs(finding.evidence["kept"] - (rounding == "preserve")) < 0.1
    assert finding.message.startswith(
        f"{round(finding.evidence['kept'], 2) + 0.0:.0%} of what the adapter changes is in the merged"
    )


def test_an_adapter_of_merged_experts_is_a_finding(tmp_path: Path, write_adapter: Callable[..., Path]) -> None:
    """Which the checkpoint holds one by one, and the model as one."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    path = "base_model.model.model.layers.0.mlp.experts.gate_up_proj"
    adapter = write_adapter({f"{path}.oft_R.weight": torch.full((2, 120), 0.01)}, CONFIG | {"oft_block_size": 16})
    finding = only(doctor(tmp_path / "base", base=tmp_path / "base", adapter=adapter), "format")
    assert "merges this weight from 4 tensors" in finding.message
