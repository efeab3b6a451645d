"""The single files of image tools: dialects, names, and each refusal with its remedy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from image_goldens import GOLDENS, IMAGE, model_of
from safetensors.torch import save_file
from torch import Tensor, nn

import oftsurgery
from oftsurgery import AdapterError, DialectError, FormatError, MatchError, NonFiniteError, ShapeError, StateError
from oftsurgery.cli.main import main

DIALECTS = {
    "kohya-sd-scripts-flux": "kohya-flux",
    "kohya-sd-scripts": "kohya",
    "lycoris-2.0": "lycoris-2.0",
    "lycoris": "lycoris",
    "onetrainer-2025": "onetrainer-2025-11-14",
    "onetrainer": "onetrainer",
    "peft-0.13.2": "peft-boft-0.13",
    "peft-0.21.2/boft": "peft-boft",
    "peft-0.21.2/hra": "peft-hra",
    "peft-0.21.2/road": "peft-road",
    "diffusers": "peft-0.21",
}

TURNED = {"lycoris_a.oft_blocks": torch.randn(4, 2, 2), "lycoris_a.alpha": torch.tensor(0.0)}
KOHYA = {"oft_unet_a.oft_blocks": torch.randn(4, 2, 2), "oft_unet_a.alpha": torch.tensor(0.01)}
VECTORS = torch.randn(2, 6)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
        save_file(dict(tensors), tmp_path / "adapter.safetensors", dict(metadata or {}))
        return tmp_path / "adapter.safetensors"

    return written


@pytest.mark.parametrize("golden", [g for g in GOLDENS if not g.always], ids=lambda g: g.folder)
def test_the_file_shows_its_dialect(golden: Any) -> None:
    adapter = golden.adapter()
    assert adapter.dialect == next(d for start, d in DIALECTS.items() if golden.folder.startswith(start))
    assert adapter.bias == (golden.how.get("bias", "kept") if adapter.dialect in ("kohya", "lycoris") else None)
    assert adapter.fingerprint == golden.adapter().fingerprint


def test_whole_networks_are_read() -> None:
    one = oftsurgery.load_adapter(IMAGE / "lycoris-4.1.3-names" / "kohya_two.safetensors")
    assert one.dialect == "lycoris"
    assert {name.split("_")[1] for name in one.modules} == {"unet", "te1", "te2"}
    assert len(oftsurgery.load_adapter(IMAGE / "lycoris-4.1.3-names" / "wrapper_boft.safetensors").modules) == 4


def test_a_file_in_a_folder(write: Callable[..., Path]) -> None:
    path = write(TURNED)
    by_name = oftsurgery.load_adapter(path.parent, filename=path.name)
    assert by_name.fingerprint == oftsurgery.load_adapter(path).fingerprint
    assert by_name.sha256 == oftsurgery.load_adapter(path).sha256
    assert by_name.source == str(path)
    with pytest.raises(AdapterError, match=r"there is no file 'other\.safetensors'"):
        oftsurgery.load_adapter(path.parent, filename="other.safetensors")
    with pytest.raises(AdapterError, match=r"the file 'adapter\.ckpt' is a pickle.*save the adapter as \.safetensors"):
        oftsurgery.load_adapter(path.parent, filename="adapter.ckpt")
    with pytest.raises(AdapterError, match="no path inside the folder"):
        oftsurgery.load_adapter(path.parent, filename="../adapter.safetensors")


FIRST = {"ot_revision": "1336b9b8aa", "ot_branch": "master"}
REFUSED: dict[str, tuple[Mapping[str, Tensor], Mapping[str, str], Mapping[str, Any], type[Exception], str]] = {
    "a DoRA scale": (
        TURNED | {"lycoris_a.dora_scale": torch.ones(8, 1)},
        {},
        {},
        DialectError,
        "has a DoRA scale.*Remedy: fold a file that a release",
    ),
    "the norms of an unreleased DoRA": (
        TURNED | {"lycoris_a.initial_norm": torch.ones(1)},
        {},
        {},
        DialectError,
        r"unreleased branch of OneTrainer wrote.*DoRA",
    ),
    "a DoRA multiplier": (
        TURNED | {"lycoris_a.dora_log_multiplier": torch.ones(1)},
        {},
        {},
        DialectError,
        r"unreleased branch",
    ),
    "a clipped OFT": (
        {"transformer.a.oft_R.weight": VECTORS, "transformer.a.oft_R.clipped_oft": torch.ones(1)},
        {},
        {},
        DialectError,
        "unreleased branch of OneTrainer",
    ),
    "CANS": (
        {"transformer.a.oft_R.weight": VECTORS, "transformer.a.oft_R.cans_oft": torch.ones(1)},
        {},
        {},
        DialectError,
        "unreleased branch of OneTrainer",
    ),
    "a scale of one dimension": (
        TURNED | {"lycoris_a.rescale": torch.ones(8)},
        {},
        {},
        DialectError,
        "scaled the columns of square layers.*train the adapter with a later",
    ),
    "no alpha": (
        {"lycoris_a.oft_blocks": torch.randn(4, 2, 2)},
        {},
        {},
        DialectError,
        r"have no alpha.*load_adapter\(…, constraint=0\.01\)",
    ),
    "no alpha for BOFT": ({"lycoris_a.oft_blocks": torch.randn(2, 2, 4, 4)}, {}, {}, DialectError, "have no alpha"),
    "finished BOFT": (
        {"lycoris_a.oft_diag": torch.randn(2, 2, 4, 4)},
        {},
        {},
        DialectError,
        "oft_diag has four dimensions",
    ),
    "PSOFT": (
        {"a.psoft_R": torch.ones(2, 2)},
        {},
        {},
        DialectError,
        "PSOFT, whose other matrices come from a decomposition",
    ),
    "LoRA beside it": (
        TURNED | {"lycoris_b.lora_down.weight": torch.ones(2, 2)},
        {},
        {},
        DialectError,
        "belongs to no OFT adapter: the file mixes kinds.*a file of their own",
    ),
    "LoKr beside it": (
        TURNED | {"lycoris_b.lokr_w1": torch.ones(2, 2)},
        {},
        {},
        DialectError,
        "'lycoris_b.lokr_w1' belongs to no OFT adapter",
    ),
    "norms alone": ({"lycoris_b.w_norm": torch.ones(2)}, {}, {}, AdapterError, "normalisation layers and no rotation"),
    "norms of another tool": (
        KOHYA | {"oft_unet_b.w_norm": torch.ones(2)},
        {},
        {},
        DialectError,
        "changes of normalisation layers, which only LyCORIS trains, and is of kohya",
    ),
    "embeddings beside it": (
        TURNED | {"bundle_emb.word.string_to_param.*": torch.ones(2, 2)},
        {},
        {},
        DialectError,
        r"bundle_emb: word.*without_embeddings=True.*--without-embeddings",
    ),
    "bare oft_R": (
        {"blocks.0.to_q.oft_R.weight": VECTORS},
        {},
        {},
        DialectError,
        "does not tell the dialect.*onetrainer or onetrainer-2025-11-14.*dialect='onetrainer'",
    ),
    "OneTrainer's first days": (
        {"transformer.a.oft_R.weight": VECTORS},
        {"modelspec.date": "2025-11-16T10:00:00"},
        {},
        DialectError,
        "does not tell the dialect",
    ),
    "kohya's file under another prefix": (
        {"lora_unet_a.oft_blocks": torch.randn(4, 2, 2), "lora_unet_a.alpha": torch.tensor(0.0)},
        {"ss_network_module": "networks.oft"},
        {},
        DialectError,
        "it is kohya or lycoris",
    ),
    "kohya before its biases stayed": (
        KOHYA,
        {"ss_training_started_at": "1720000000.0", "ss_network_module": "networks.oft"},
        {},
        DialectError,
        r"trained on 2024-07-03.*load_adapter\(…, bias='kept'\) or load_adapter\(…, bias='rotated'\)",
    ),
    "bypass mode": (
        TURNED,
        {"ss_network_args": '{"bypass_mode": "True"}'},
        {},
        DialectError,
        "trained in bypass mode.*bias='kept'",
    ),
    "biases of OneTrainer": (
        {"transformer.a.oft_R.weight": VECTORS},
        {},
        {"bias": "rotated"},
        DialectError,
        "no release of the tool .onetrainer. turns biases",
    ),
    "an unknown bias": (TURNED, {}, {"bias": "both"}, AdapterError, "bias is 'both'.*choose bias='kept'"),
    "an infinite constraint": (
        TURNED,
        {},
        {"constraint": float("inf")},
        AdapterError,
        "the constraint is inf.*a finite number",
    ),
    "a contradiction": (
        TURNED,
        {},
        {"dialect": "onetrainer"},
        DialectError,
        "named dialect is onetrainer, but the file is of kohya or lycoris",
    ),
    "two kinds": (
        TURNED | {"transformer.a.oft_R.weight": VECTORS},
        {},
        {},
        DialectError,
        "modules of several kinds: oft_R.weight, oft_blocks",
    ),
    "NaN": (
        {"lycoris_a.oft_blocks": torch.full((4, 2, 2), float("nan")), "lycoris_a.alpha": torch.tensor(0.0)},
        {},
        {},
        NonFiniteError,
        "NaN or infinity.*earlier checkpoint",
    ),
    "an infinite alpha": (
        TURNED | {"lycoris_a.alpha": torch.tensor(float("inf"))},
        {},
        {},
        NonFiniteError,
        "NaN or infinity",
    ),
    "a negative alpha": (
        TURNED | {"lycoris_a.alpha": torch.tensor(-1.0)},
        {},
        {},
        AdapterError,
        "alpha is -1, and a limit is not negative",
    ),
    "an alpha of two numbers": (
        TURNED | {"lycoris_a.alpha": torch.ones(2)},
        {},
        {},
        ShapeError,
        "alpha must be one number",
    ),
    "integers": (
        TURNED | {"lycoris_a.alpha": torch.ones((), dtype=torch.int64)},
        {},
        {},
        AdapterError,
        "must be float32, float16",
    ),
    "blocks that are not square": (
        {"lycoris_a.oft_blocks": torch.randn(4, 2, 3), "lycoris_a.alpha": torch.tensor(0.0)},
        {},
        {},
        ShapeError,
        r"the blocks must be \(n, b, b\)",
    ),
    "BOFT of three blocks": (
        {"lycoris_a.oft_blocks": torch.randn(2, 3, 4, 4), "lycoris_a.alpha": torch.tensor(0.0)},
        {},
        {},
        ShapeError,
        "2 factors of BOFT need blocks of an even size, and a multiple of 2 of them",
    ),
    "a scale of other rows": (
        TURNED | {"lycoris_a.rescale": torch.ones(9, 1)},
        {},
        {},
        ShapeError,
        r"the scale must be \(8, 1\)",
    ),
    "a part that is missing": (
        {"oft_unet_a.oft_blocks.1": torch.randn(2, 2, 2), "oft_unet_a.alpha": torch.tensor(1.0)},
        {},
        {},
        DialectError,
        "also has oft_blocks.1",
    ),
    "no rotation": ({"lycoris_a.alpha": torch.tensor(1.0)}, {}, {}, AdapterError, "has alpha and no rotation"),
    "a generator of another size": (
        {"transformer.a.oft_R.weight": torch.randn(2, 7)},
        {},
        {},
        ShapeError,
        "7 elements is no upper triangle",
    ),
    "metadata that is no config": (
        {"a.oft_R.weight": VECTORS},
        {"lora_adapter_metadata": "[]"},
        {},
        AdapterError,
        "is no config of peft",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, write: Callable[..., Path]) -> None:
    tensors, metadata, how, error, message = REFUSED[case]
    with pytest.raises(error, match="(?s)" + message) as caught:
        oftsurgery.load_adapter(write(tensors, metadata), **how)
    assert caught.value.remedy  # type: ignore[attr-defined]


def test_what_the_caller_says_settles_a_refusal(write: Callable[..., Path]) -> None:
    bare = {"lycoris_a.oft_blocks": torch.randn(4, 2, 2)}
    assert oftsurgery.load_adapter(write(bare), constraint=0).modules["lycoris_a"].facts()["limit"] == 0
    path = write(bare, {"ss_network_args": json.dumps({"constrain": "0.01"})})
    assert oftsurgery.load_adapter(path).modules["lycoris_a"].facts()["limit"] == pytest.approx(0.08)
    path = write({"a.to_q.oft_R.weight": VECTORS})
    assert oftsurgery.load_adapter(path, dialect="onetrainer").dialect == "onetrainer"
    assert (
        oftsurgery.load_adapter(write({"a.to_q.oft_R.weight": VECTORS}, {"ot_branch": "master"})).dialect
        == "onetrainer"
    )
    path = write({"transformer.a.oft_R.weight": VECTORS}, FIRST)
    assert oftsurgery.load_adapter(path).dialect == "onetrainer-2025-11-14"
    path = write({"transformer.a.oft_R.weight": VECTORS}, {"modelspec.date": "2025-11-15T10:00:00"})
    assert oftsurgery.load_adapter(path).dialect == "onetrainer-2025-11-14"
    path = write({"transformer.a.oft_R.weight": VECTORS}, {"modelspec.date": "2025-11-17T10:00:00"})
    assert oftsurgery.load_adapter(path).dialect == "onetrainer"
    path = write(KOHYA, {"ss_training_started_at": "1720000000.0"})
    assert oftsurgery.load_adapter(path, bias="rotated").modules["oft_unet_a"].turns_bias
    assert oftsurgery.load_adapter(path, bias="kept").bias == "kept"


def test_a_convolution_of_peft_boft_needs_a_version() -> None:
    with pytest.raises(
        DialectError, match=r"formula changed in peft 0\.14.*'peft-boft' \(≥ 0\.14\) or 'peft-boft-0\.13'"
    ):
        oftsurgery.load_adapter(IMAGE / "peft-0.13.2-boft" / "conv1")
    old, new = (
        oftsurgery.load_adapter(IMAGE / "peft-0.13.2-boft" / "conv1", dialect=d)
        for d in ("peft-boft-0.13", "peft-boft")
    )  # type: ignore[arg-type]
    assert old.fingerprint != new.fingerprint


def test_a_convolution_with_peft_oft_stays_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    adapter = oftsurgery.OFTAdapter({"0": oftsurgery.Rotation(torch.randn(9, 6))})
    with pytest.raises(FormatError, match="a 3×3 convolution cannot be folded: peft"):
        oftsurgery.fold(model, adapter)


def test_a_module_that_the_model_lacks(write: Callable[..., Path]) -> None:
    adapter = oftsurgery.load_adapter(
        write(TURNED | {"lycoris_b_c.oft_blocks": torch.randn(4, 2, 2), "lycoris_b_c.alpha": torch.tensor(0.0)})
    )
    model = model_of({"a.weight": torch.randn(8, 4), "b.d.weight": torch.randn(8, 4)})
    with pytest.raises(MatchError, match=r"1 of the adapter's 2 modules match nothing.*lycoris_b_c"):
        oftsurgery.fold(model, adapter)


def test_rows_that_do_not_fit(write: Callable[..., Path]) -> None:
    adapter = oftsurgery.load_adapter(write(TURNED))
    with pytest.raises(ShapeError, match="4 blocks of size 2 cover 8 output features, but the weight has 6"):
        oftsurgery.fold(model_of({"a.weight": torch.randn(6, 4)}), adapter)


def test_strengths_are_checked(write: Callable[..., Path]) -> None:
    adapter = oftsurgery.load_adapter(write(TURNED))
    model = model_of({"a.weight": torch.randn(8, 4)})
    with pytest.raises(StateError, match=r"the strength mode 'half' is not known.*choose one of 'angle', 'linear'"):
        oftsurgery.fold(model, adapter, strength=0.5, strength_mode="half")  # type: ignore[arg-type]
    with pytest.raises(StateError, match="the strength 'nan' is no finite number"):
        oftsurgery.fold(model, adapter, strength=float("nan"))
    with pytest.raises(
        AdapterError, match=r"'kohya' has no meaning for this kind of adapter.*'lycoris', 'webui', 'comfyui'"
    ):
        oftsurgery.fold(model, adapter, strength=0.5, strength_mode="kohya")
    with pytest.raises(StateError, match=r"2 strengths were given for 1 adapters.*one for each adapter"):
        oftsurgery.fold(model, adapter, strength=[0.5, 0.2])


def test_each_adapter_has_a_strength_of_its_own(write: Callable[..., Path]) -> None:
    a = oftsurgery.load_adapter(write(TURNED))
    b = oftsurgery.load_adapter(
        write({"lycoris_a.oft_blocks": torch.randn(2, 4, 4), "lycoris_a.alpha": torch.tensor(0.0)})
    )
    model = model_of({"a.weight": torch.randn(8, 4)})
    both = oftsurgery.fold(model, [a, b], strength=[0.5, 0.25])
    after = oftsurgery.fold(oftsurgery.fold(model, a, strength=0.5), b, strength=0.25)
    assert torch.allclose(both.a.weight, after.a.weight, atol=1e-6)  # type: ignore[union-attr, arg-type]
    assert [(info.strength, info.strength_mode) for info in both.oftsurgery.adapters] == [
        (0.5, "angle"),
        (0.25, "angle"),
    ]
    scaled = oftsurgery.fold(model, [a.scaled(0.5), b.scaled(0.25)])
    assert torch.allclose(both.a.weight, scaled.a.weight, atol=1e-6)  # type: ignore[union-attr, arg-type]


def test_no_live_layer_computes_these_maps(write: Callable[..., Path]) -> None:
    adapter = oftsurgery.load_adapter(write(TURNED))
    with pytest.raises(AdapterError, match=r"no live layer for this kind of adapter \(diag-oft\).*fold the adapter"):
        oftsurgery.wrap(model_of({"a.weight": torch.randn(8, 4)}), adapter)


def test_changes_of_normalisation_layers_are_added(write: Callable[..., Path], tmp_path: Path) -> None:
    model = model_of({"a.weight": torch.randn(8, 4)})
    model.add_module("norm", nn.LayerNorm(8))
    added = {"lycoris_norm.w_norm": torch.randn(8), "lycoris_norm.b_norm": torch.randn(8)}
    adapter = oftsurgery.load_adapter(write(TURNED | added))
    assert list(adapter.modules) == ["lycoris_a"]
    folded = oftsurgery.fold(model, adapter, strength=0.5, undo=tmp_path / "fold.undo")
    state = folded.state_dict()
    assert torch.allclose(state["norm.weight"], 1 + 0.5 * added["lycoris_norm.w_norm"])
    assert torch.allclose(state["norm.bias"], 0.5 * added["lycoris_norm.b_norm"])
    assert set(folded.oftsurgery.saved) == {"norm.weight", "norm.bias"}
    for back in (oftsurgery.unfold(folded, base=model), oftsurgery.unfold(folded, undo=tmp_path / "fold.undo")):
        assert all(torch.equal(t, back.state_dict()[name]) for name, t in model.state_dict().items())
    with pytest.warns(oftsurgery.UnfoldWarning):
        turned_back = oftsurgery.unfold(folded, adapter).state_dict()
    assert all(torch.allclose(t, turned_back[name], atol=1e-6) for name, t in model.state_dict().items())
    assert adapter.fingerprint != oftsurgery.load_adapter(write(TURNED)).fingerprint
    with pytest.raises(AdapterError, match="also adds to tensors of normalisation layers"):
        adapter.inverse()
    with pytest.raises(ShapeError, match="what the adapter adds does not fit"):
        oftsurgery.fold(model, oftsurgery.load_adapter(write(TURNED | {"lycoris_norm.w_norm": torch.ones(9)})))
    with pytest.raises(MatchError, match="match nothing in the model"):
        oftsurgery.fold(model, oftsurgery.load_adapter(write(TURNED | {"lycoris_other.w_norm": torch.ones(8)})))


def test_bundled_embeddings_are_left_out_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As A1111's web UI, sd-scripts and OneTrainer bundle them: any dtype and number of tensors for each word."""
    file, base = tmp_path / "style.safetensors", tmp_path / "base.safetensors"
    rotations = {"lora_unet_proj.oft_blocks": torch.randn(2, 4, 4) * 0.1, "lora_unet_proj.alpha": torch.tensor(0.0)}
    bundled = {
        "bundle_emb.my style.string_to_param.*": torch.ones(2, 8),
        "bundle_emb.second.clip_l": torch.ones(2, 8, dtype=torch.int32),
        "bundle_emb.second.clip_g": torch.full((2, 8), torch.nan),
    }
    meta = {"ss_network_module": "lycoris.kohya"}
    save_file(rotations | bundled, file, meta)
    save_file(rotations, tmp_path / "alone.safetensors", meta)
    save_file({"proj.weight": torch.randn(8, 8)}, base)
    with pytest.raises(DialectError, match=r"bundle_emb: my style, second\).*without_embeddings=True"):
        oftsurgery.load_adapter(file)
    adapter, alone = oftsurgery.load_adapter(file, without_embeddings=True), tmp_path / "alone.safetensors"
    assert adapter.left_out == ("my style", "second")
    assert adapter.fingerprint == oftsurgery.load_adapter(alone).fingerprint
    assert oftsurgery.load_adapter(alone, without_embeddings=True).left_out == ()
    words = ["fold", base, file, tmp_path / "out.safetensors", "--trained-on", "plain"]
    assert main(list(map(str, words))) == 2
    assert main([*map(str, words), "--without-embeddings"]) == 0
    record = json.loads((tmp_path / "out.safetensors.oftsurgery.json").read_text())
    assert record["adapters"][0]["left_out"] == ["my style", "second"]
    words = ["verify", tmp_path / "out.safetensors", base, file, "--without-embeddings"]
    assert main(list(map(str, words))) == 0
    capsys.readouterr()
    assert main(["adapter", "show", str(file), "--without-embeddings"]) == 0
    assert "embeddings that were left out: my style, second" in capsys.readouterr().out
    with pytest.raises(AdapterError, match="are for the single files of image tools"):
        oftsurgery.load_adapter(IMAGE / "peft-0.21.2" / "road_1", without_embeddings=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_a.lora_up.weight", "lora_unet_a.lora_down.weight", "lora_unet_a.alpha"], "is a LoRA adapter, not an"),
        (["transformer.a.lora_A.weight", "transformer.a.lora_B.weight"], "is a LoRA adapter, not an OFT adapter"),
        (["lycoris_a.hada_w1_a", "lycoris_a.hada_w1_b"], "is a LoHa adapter"),
        (["lycoris_a.lokr_w1", "lycoris_a.lokr_w2"], "is a LoKr adapter"),
        (["lycoris_a.on_input", "lycoris_a.weight"], r"is a \(IA\)³ adapter"),
        (["down_blocks.0.conv.weight"], "is no adapter: it holds tensors like.*BASE, ADAPTER and OUTPUT in this order"),
    ],
)  # fmt: skip
def test_files_of_other_kinds(names: list[str], message: str, write: Callable[..., Path]) -> None:
    file = write({name: torch.ones(2, 2) for name in names})
    with pytest.raises(DialectError, match=message):
        oftsurgery.load_adapter(file)
    codes = [f.code for f in oftsurgery.doctor(file)]
    assert codes == ([] if "no adapter" in message else ["dialect"])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="the file does not exist"):
        oftsurgery.load_adapter(tmp_path / "style.safetensors")
