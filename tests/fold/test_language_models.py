"""A language model by itself and inside a multimodal model: an adapter of one fits the other, in memory and on disk."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import GROUPED, SIZES, load, quiet_fold, quiet_transformers, scaled_up
from models import distance, live
from old_names import VISION
from peft import PeftModel

import oftsurgery

IDS = torch.tensor([[3, 5, 9, 2, 7, 11]])
TEXT = SIZES | GROUPED
OPT = {"model_type": "opt", "word_embed_proj_dim": 64, "ffn_dim": 128, "max_position_embeddings": 64}
QFORMER = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "encoder_hidden_size": 32,
}

#: multimodal class → (config, class of the language model alone, path of the language model, heads and all or not)
MODELS: dict[str, tuple[dict[str, Any], str, str]] = {
    "Gemma3ForConditionalGeneration": (
        {
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "text_config": {**TEXT, "head_dim": 16},
            "mm_tokens_per_image": 4,
            "image_token_index": 63,
        },
        "Gemma3ForCausalLM",
        "model.language_model",
    ),
    "LlavaForConditionalGeneration": (
        {
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
            "text_config": {"model_type": "llama", **TEXT},
            "image_token_index": 63,
        },
        "LlamaForCausalLM",
        "model.language_model",
    ),
    "Idefics3ForConditionalGeneration": (
        {
            "vision_config": VISION,
            "text_config": {"model_type": "llama", **TEXT, "pad_token_id": 0},
            "image_token_id": 63,
            "scale_factor": 2,
        },
        "LlamaForCausalLM",
        "model.text_model",
    ),
    # the whole class of its own, with its head
    "Blip2ForConditionalGeneration": (
        {
            "vision_config": VISION,
            "text_config": {**TEXT, **OPT},
            "qformer_config": QFORMER,
            "num_query_tokens": 4,
            "image_token_index": 63,
        },
        "OPTForCausalLM",
        "language_model",
    ),
}


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A multimodal model, and its language model alone with the same weights."""
    config, alone, path = MODELS[request.param]
    cls = getattr(transformers, request.param)
    torch.manual_seed(0)
    whole = scaled_up(cls(cls.config_class(**json.loads(json.dumps(config))))).eval()
    part = whole.get_submodule(path)
    text = getattr(transformers, alone)(part.config).eval()
    (text if type(text) is type(part) else text.model).load_state_dict(part.state_dict())
    if type(text) is not type(part):
        text.lm_head.load_state_dict(whole.lm_head.state_dict())
    return whole, text


def logits(model: Any) -> torch.Tensor:
    model = model.base_model.model if isinstance(model, PeftModel) else model
    if isinstance(model, transformers.Blip2ForConditionalGeneration):  # it takes no text without an image
        model = model.language_model
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.double()


def trained(model: Any, targets: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)
        peft_model = live(model, target_modules=targets)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return peft_model


@pytest.mark.filterwarnings("ignore::oftsurgery.UntieWarning")
@pytest.mark.parametrize("targets", [["q_proj", "fc1", "down_proj"], ["v_proj", "lm_head"]])
def test_an_adapter_of_the_language_model_fits_the_multimodal_one(
    pair: tuple[Any, Any], targets: list[str], tmp_path: Path
) -> None:
    whole, text = pair
    with quiet_transformers():
        whole.save_pretrained(tmp_path / "base")
        expected = logits(trained(text, targets, tmp_path / "adapter"))
        folded = oftsurgery.fold(whole, tmp_path / "adapter")
        assert distance(logits(folded), expected) < 1e-6
        quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        on_disk = load(tmp_path / "out", type(whole).__name__)
        assert distance(logits(on_disk), expected) < 1e-6
        assert oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", tmp_path / "adapter").ok
        wrapped = oftsurgery.wrap(whole, tmp_path / "adapter")
        assert distance(logits(wrapped), expected) < 1e-6
        with pytest.warns(oftsurgery.UnfoldWarning):
            back = oftsurgery.unfold(folded, tmp_path / "adapter")
        assert distance(logits(back), logits(whole)) < 1e-6


@pytest.mark.filterwarnings("ignore::oftsurgery.UntieWarning")
def test_an_adapter_of_the_multimodal_model_fits_its_language_model(pair: tuple[Any, Any], tmp_path: Path) -> None:
    whole, text = pair
    with quiet_transformers():
        text.save_pretrained(tmp_path / "base")
        targets = r".*(language_model|text_model)\..*\.(q_proj|fc1|down_proj)|.*lm_head"
        expected = logits(trained(whole, targets, tmp_path / "adapter"))
        assert distance(logits(oftsurgery.fold(text, tmp_path / "adapter")), expected) < 1e-6
        quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        assert distance(logits(load(tmp_path / "out", type(text).__name__)), expected) < 1e-6
        assert oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", tmp_path / "adapter").ok


def test_what_an_adapter_rotates_beside_the_language_model_is_refused(pair: tuple[Any, Any], tmp_path: Path) -> None:
    whole, text = pair
    with quiet_transformers():
        trained(whole, ["q_proj", "v_proj", "query", "out_proj", "qkv"], tmp_path / "adapter")
        with pytest.raises(oftsurgery.MatchError, match="match nothing in the model"):
            oftsurgery.fold(text, tmp_path / "adapter")
