"""Names in checkpoints and in models: experts fused in memory, vision-language layouts of both transformers
generations, what cannot be resolved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    adapted,
    bnb_config,
    decoded,
    differing,
    load,
    outputs,
    quiet_fold,
    quiet_transformers,
    rotations_in,
    scaled_up,
    tensors,
)
from independent import relative
from old_names import MODELS, build, hand_made
from safetensors.torch import save_file
from warned import quietly

import oftsurgery
from oftsurgery.files.checkpoint import open_checkpoint
from oftsurgery.stores.naming import architecture_of, locate


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


# --- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
@pytest.mark.parametrize("format_", ["same", "bf16", "nf4"])
def test_attention_of_a_mixture_of_experts(tmp_path: Path, name: str, format_: str) -> None:
    build(name).save_pretrained(tmp_path / "base")
    live = adapted(build(name), ["q_proj", "o_proj"])
    live.save_pretrained(tmp_path / "adapter")
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format=format_)
    found, before = tensors(tmp_path / "out"), tensors(tmp_path / "base")
    experts = [n for n in before if ".experts." in n]
    assert len(experts) == 2 * 4 * 3
    assert all(
        found[n].dtype == (torch.bfloat16 if format_ == "bf16" else torch.float32) for n in experts
    )  # bitsandbytes quantises none of them
    model = load(tmp_path / "out", MODELS[name][0])
    assert relative(outputs(model), outputs(live)) < {"same": 1e-5, "bf16": 4e-2, "nf4": 0.5}[format_]


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_experts_that_the_checkpoint_holds_one_by_one(tmp_path: Path, name: str) -> None:
    """Folded one by one, each by its own rotation; transformers then fuses the folded ones."""
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    before = tensors(tmp_path / "base")
    experts = {n.removesuffix(".weight"): t.shape[1] for n, t in before.items() if ".experts." in n}
    hand_made(tmp_path / "adapter", experts)
    record = quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert record.modules.keys() == experts.keys()
    found, rotations = tensors(tmp_path / "out"), rotations_in(tmp_path / "adapter")
    for path in experts:
        assert relative(decoded(found, f"{path}.weight"), decoded(before, f"{path}.weight") @ rotations[path].T) < 1e-6
    fused = load(tmp_path / "out", MODELS[name][0]).state_dict()["model.layers.1.mlp.experts.down_proj"]
    down = "w2" if name == "mixtral" else "down_proj"
    (one,) = (n for n in found if "layers.1." in n and n.endswith(f".experts.3.{down}.weight"))
    assert torch.equal(fused[3], found[one])


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
@pytest.mark.parametrize(
    "path",
    ["model.layers.0.mlp.experts", "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"],
)
def test_fused_names_on_experts_held_one_by_one_are_refused(tmp_path: Path, name: str, path: str) -> None:
    build(name).save_pretrained(tmp_path / "base")
    hand_made(tmp_path / "adapter", {path: 64, "model.layers.0.self_attn.q_proj": 64})
    with pytest.raises(
        oftsurgery.FormatError,
        match=r"the model merges this weight from \d+ tensors of the checkpoint .*experts\.0\..*one by one",
    ) as caught:
        oftsurgery.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", trained_on="plain")
    assert path in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "adapter", ["model.layers.0.mlp.experts.0.gate_proj", "model.layers.0.mlp.experts.gate_up_proj"]
)
def test_experts_that_the_checkpoint_holds_fused_are_refused(tmp_path: Path, adapter: str) -> None:
    """Saved as they are in memory, as some tools do: neither one expert's part nor the whole is folded."""
    model = build("qwen3 moe")
    model.config.save_pretrained(tmp_path / "base")
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()},
        tmp_path / "base" / "model.safetensors",
        {"format": "pt"},
    )
    hand_made(tmp_path / "adapter", {adapter: 64})
    with pytest.raises((oftsurgery.MatchError, oftsurgery.FormatError), match="experts"):
        oftsurgery.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", trained_on="plain")
    assert not (tmp_path / "out").exists()


def test_the_parts_of_fused_experts_are_known() -> None:
    config = MODELS["mixtral"][1] | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    names = [f"model.layers.0.block_sparse_moe.experts.{i}.{w}.weight" for i in range(4) for w in ("w1", "w2", "w3")]
    architecture = architecture_of(config, dict.fromkeys(names, (128, 64)))
    assert set(architecture.units) == set(names)
    assert set(architecture.renamed.values()) == {
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    assert not architecture.linears & architecture.made.keys()


# --- vision-language layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["same", "bf16", "nf4"])
@pytest.mark.parametrize(("name", "targets"), [("llava", ["q_proj", "linear_1"]), ("qwen2 vl", ["q_proj", "qkv"])])
def test_a_vision_language_model(tmp_path: Path, name: str, targets: list[str], format_: str) -> None:
    """Its checkpoint has other names than its modules; text and vision targets alike are found."""
    build(name).save_pretrained(tmp_path / "base")
    live = adapted(build(name), targets)
    live.save_pretrained(tmp_path / "adapter")
    record = quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format=format_)
    assert {("vision" in p or "visual" in p) for p in record.modules} == {True, False}
    assert not {f"{p}.weight" for p in record.modules} <= tensors(tmp_path / "base").keys()
    assert tensors(tmp_path / "base").keys() <= tensors(tmp_path / "out").keys()
    model = load(tmp_path / "out", MODELS[name][0])
    assert relative(outputs(model), outputs(live)) < {"same": 1e-5, "bf16": 4e-2, "nf4": 0.5}[format_]
    merged = live.merge_and_unload().state_dict()
    if format_ == "same":
        assert (
            max(relative(t, merged[n]) for n, t in model.state_dict().items() if t.is_floating_point() and t.norm())
            < 1e-5
        )


#: names that adapters of transformers 4 and 5, and of the text model alone, give one module
ALIASES = {
    "llava": [
        "language_model.model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.q_proj",
        "language_model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.q_proj",
    ],
    "qwen2 vl": [
        "model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.q_proj",
        "language_model.layers.0.self_attn.q_proj",
    ],
}


@pytest.mark.parametrize("name", ALIASES)
def test_names_of_every_generation_find_the_same_tensor(tmp_path: Path, name: str) -> None:
    build(name).save_pretrained(tmp_path / "base")
    outcomes = []
    for i, path in enumerate(ALIASES[name]):
        torch.manual_seed(0)
        hand_made(tmp_path / f"adapter {i}", {path: 64})
        quiet_fold(tmp_path / "base", tmp_path / f"adapter {i}", tmp_path / f"out {i}")
        outcomes.append(tensors(tmp_path / f"out {i}"))
    assert len(differing(outcomes[0], tensors(tmp_path / "base"))) == 1
    assert not any(differing(outcomes[0], other) for other in outcomes[1:])
    in_memory = [oftsurgery.fold(build(name), tmp_path / f"adapter {i}").state_dict() for i in range(len(outcomes))]
    assert not any(differing(in_memory[0], other) for other in in_memory[1:])


# --- what cannot be resolved ------------------------------------------------------------------------------------------

#: (model, module of the adapter, what the message must name)
UNKNOWN = {
    "another text layout": (
        "llava",
        "text.layers.0.self_attn.q_proj",
        r"model\.language_model\.layers\.0\.self_attn\.q_proj",
    ),
    "a layer too many": ("llama", "model.layers.2.self_attn.q_proj", r"model\.layers\.[01]\.self_attn\.q_proj"),
    "a spelling": ("llama", "model.layers.0.self_attn.query_proj", r"model\.layers\.0\.self_attn\.\w_proj"),
    "another family": ("bert", "model.layers.0.self_attn.q_proj", r"bert\."),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_matches_nothing_is_refused_with_the_nearest_names(tmp_path: Path, case: str) -> None:
    name, path, nearest = UNKNOWN[case]
    build(name).save_pretrained(tmp_path / "base")
    hand_made(tmp_path / "adapter", {path: 64})
    with pytest.raises(oftsurgery.MatchError, match=rf"match nothing in the model; nearest in the model: .*{nearest}"):
        oftsurgery.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", trained_on="plain")
    assert not (tmp_path / "out").exists()


def test_one_name_for_two_tensors_is_refused() -> None:
    """A checkpoint with both generations' names of one module."""
    shape = (64, 64)
    names = [
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
    ]
    config = MODELS["llava"][1] | {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    architecture = architecture_of(config, dict.fromkeys(names, shape))
    assert len(set(architecture.renamed.values())) == 1
    with pytest.raises(oftsurgery.MatchError, match="the checkpoint has 2 tensors of this name"):
        locate([names[1]], architecture)


def test_a_config_that_its_class_cannot_take_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))
    hand_made(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": 64})
    with pytest.raises(
        oftsurgery.CheckpointError,
        match=r"knows the model type llama, but cannot build it from this config.*restore the config\.json",
    ):
        oftsurgery.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", trained_on="plain")


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "of_nobody"}, {"model_type": "of_nobody", "auto_map": {"AutoModel": "code.Model"}}]
)
def test_names_are_taken_as_they_are_where_the_class_is_not_known(tmp_path: Path, config: dict[str, Any]) -> None:
    """No code of the checkpoint's runs; quantising, which needs the class, is refused."""
    base = tmp_path / "base"
    base.mkdir()
    save_file(
        {"body.layers.0.q_proj.weight": torch.randn(64, 64), "norm.weight": torch.ones(64)},
        base / "model.safetensors",
        {"format": "pt"},
    )
    (base / "config.json").write_text(json.dumps(config))
    (base / "code.py").write_text("raise SystemExit('run')")
    hand_made(tmp_path / "adapter", {"body.layers.0.q_proj": 64})
    quiet_fold(base, tmp_path / "adapter", tmp_path / "out", format="bf16")
    found = tensors(tmp_path / "out")
    exact = (
        decoded(tensors(base), "body.layers.0.q_proj.weight")
        @ rotations_in(tmp_path / "adapter")["body.layers.0.q_proj"].T
    )
    assert torch.equal(found["body.layers.0.q_proj.weight"], exact.float().bfloat16())
    assert found["norm.weight"].dtype == torch.bfloat16
    assert (tmp_path / "out" / "code.py").exists() == ("auto_map" in config)  # as data
    with pytest.raises(oftsurgery.StateError, match="the model's class decides which modules"):
        oftsurgery.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "other", format="nf4")


@pytest.mark.parametrize("format_", ["same", "nf4"])
def test_a_part_whose_config_class_has_no_auto_mapping(tmp_path: Path, format_: str) -> None:
    """Bark's parts; its heads stand in a list, tied to embeddings in another."""
    config = {
        "block_size": 64,
        "input_vocab_size": 40,
        "output_vocab_size": 40,
        "num_layers": 1,
        "num_heads": 4,
        "hidden_size": 64,
        "n_codes_total": 3,
        "n_codes_given": 1,
    }
    torch.manual_seed(0)
    scaled_up(transformers.BarkFineModel(transformers.BarkFineConfig(**config))).save_pretrained(tmp_path / "base")
    settings = {} if format_ == "same" else {"quantization_config": bnb_config("nf4")}
    live = adapted(load(tmp_path / "base", "BarkFineModel", **settings), ["att_proj", "lm_heads.0"])
    live.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    base = load(tmp_path / "base", "BarkFineModel", **settings)
    folded = quietly(oftsurgery.fold, base, tmp_path / "adapter", rounding="nearest")
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format=format_)
    on_disk = load(tmp_path / "out", "BarkFineModel")
    assert differing(dict(on_disk.state_dict()), dict(folded.state_dict())) == []
    codes = torch.randint(40, (1, 6, 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, wanted = (model(codebook_idx=1, input_ids=codes).logits for model in (on_disk, live))
    assert relative(got, wanted) < (1e-5 if format_ == "same" else 0.2)


def test_linears_are_those_that_bitsandbytes_loading_replaces(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    source = open_checkpoint(tmp_path)
    shapes = {n: e.shape for n, e in source.entries.items()}
    linears = architecture_of(source.config, shapes).linears
    assert linears == {n for n in shapes if "_proj." in n}
    assert architecture_of(source.config, shapes, skip=["mlp"]).linears == {
        n for n in shapes if "_proj." in n or n == "lm_head.weight"
    }
    assert architecture_of(source.config, shapes, skip=["down_proj"]).linears == (linears | {"lm_head.weight"}) - {
        n for n in shapes if "down" in n
    }
