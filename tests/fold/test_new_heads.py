"""Adapters that bring the head of another class than the base's: peft saves a classifier's head by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import TOKENS, adapted, bnb_config, differing, load, quiet_fold, quiet_transformers, scaled_up, tensors
from independent import relative

import oftsurgery
from oftsurgery import MatchError, StateError

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
PADDED = SMALL | {"pad_token_id": 0}

#: (class of the base, class of the adapter, config, target, labels, more modules to save)
CASES: dict[str, tuple[str, str, dict[str, Any], str, int | None, list[str] | None]] = {
    "a bare model": ("BertModel", "BertForSequenceClassification", SMALL, "query", 3, None),
    "another head": ("BertForPreTraining", "BertForSequenceClassification", SMALL, "query", 4, None),
    "tokens": ("BertForMaskedLM", "BertForTokenClassification", SMALL, "query", 5, None),
    "spans": ("BertForMaskedLM", "BertForQuestionAnswering", SMALL, "query", None, None),
    "two layers": (
        "RobertaForMaskedLM",
        "RobertaForSequenceClassification",
        SMALL | {"pad_token_id": 1},
        "query",
        3,
        None,
    ),
    "a part is the base's": (
        "ModernBertForMaskedLM",
        "ModernBertForSequenceClassification",
        PADDED | {"global_attn_every_n_layers": 1},
        "Wqkv",
        3,
        None,
    ),
    "with a pooler": (
        "DebertaV2ForMaskedLM",
        "DebertaV2ForSequenceClassification",
        PADDED,
        "query_proj",
        3,
        ["pooler"],
    ),
    "a decoder": ("LlamaForCausalLM", "LlamaForSequenceClassification", PADDED, "q_proj", 3, None),
    "other labels": ("BertForSequenceClassification", "BertForSequenceClassification", SMALL, "query", 5, None),
}
TASKS = {"Sequence": "SEQ_CLS", "Token": "TOKEN_CLS", "Question": "QUESTION_ANS"}


def answers(model: Any) -> Any:
    with torch.no_grad():
        found = model.eval()(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS))
    return (found.logits if hasattr(found, "logits") else torch.cat([found.start_logits, found.end_logits])).double()


def made(place: Path, case: str) -> tuple[str, Any]:
    """``base`` and ``adapter``; the adapter's class and what the live model answers."""
    base, cls, config, target, labels, more = CASES[case]
    base_class, model_class = getattr(transformers, base), getattr(transformers, cls)
    torch.manual_seed(0)
    scaled_up(base_class(base_class.config_class(**config))).save_pretrained(place / "base")
    with quiet_transformers():
        settings = {} if labels is None else {"num_labels": labels}
        model = model_class.from_pretrained(place / "base", ignore_mismatched_sizes=True, **settings)
    task = next(task for name, task in TASKS.items() if f"For{name}" in cls)
    live = adapted(model, [target], task_type=task, modules_to_save=more)
    live.save_pretrained(place / "adapter")
    return cls, answers(live)


@pytest.mark.parametrize("format_", ["same", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_the_output_is_of_the_class_with_the_head(tmp_path: Path, case: str, format_: Any) -> None:
    cls, want = made(tmp_path, case)
    record = quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format=format_)
    folded = load(tmp_path / "out", cls)
    assert relative(answers(folded), want) < (1e-5 if format_ == "same" else 0.1)
    assert record.added
    assert set(record.added) <= set(folded.state_dict())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [cls]
    report = oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    assert report.ok, report.wrong
    oftsurgery.unfold_checkpoint(tmp_path / "out", tmp_path / "restored", base=tmp_path / "base")
    if format_ == "same":
        assert differing(tensors(tmp_path / "restored"), tensors(tmp_path / "base")) == []
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("base", "restored"))
    assert {n: after.get(n) for n in ("architectures", "id2label")} == {
        n: before.get(n) for n in ("architectures", "id2label")
    }


def test_a_quantised_base_takes_a_head(tmp_path: Path) -> None:
    cls, want = made(tmp_path, "a bare model")
    quantised = load(tmp_path / "base", "BertModel", quantization_config=bnb_config("int8"))
    oftsurgery.export_safetensors(quantised, tmp_path / "quantised")
    quiet_fold(tmp_path / "quantised", tmp_path / "adapter", tmp_path / "out")
    assert relative(answers(load(tmp_path / "out", cls)), want) < 0.1
    report = oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "quantised", tmp_path / "adapter")
    assert report.ok, report.wrong


def test_a_head_that_is_not_the_adapters_is_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made(tmp_path, "a bare model")
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    for change, why in ((lambda t: t.update({"classifier.bias": t["classifier.bias"] + 1}), "own values"), (
        lambda t: t.pop("classifier.bias"), "lacks it",
    )):  # fmt: skip
        found = load_file(path)
        change(found)
        save_file(found, path, {"format": "pt"})
        report = oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
        assert why in report.wrong["classifier.bias"]


def test_a_head_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    """transformers would make the pooler up, anew each time that it loads the model."""
    CASES["no pooler"] = ("BertForMaskedLM", "BertForSequenceClassification", SMALL, "query", 3, None)
    try:
        made(tmp_path, "no pooler")
    finally:
        del CASES["no pooler"]
    with pytest.raises(
        MatchError, match=r"neither in the checkpoint nor in the adapter.*'bert.pooler.dense' in modules_to_save"
    ):
        quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_undo_record_of_a_new_head_is_refused(tmp_path: Path) -> None:
    made(tmp_path, "a bare model")
    with pytest.raises(StateError, match=r"no form for tensors that come or go.*keep the base"):
        quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", undo=tmp_path / "undo")


def test_an_adapter_of_no_known_task_is_refused_as_before(tmp_path: Path) -> None:
    made(tmp_path, "a bare model")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": None}))
    with pytest.raises(MatchError, match="the adapter brings a tensor that the model does not have"):
        quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    # peft notes the class where it knows no task
    mapping = {"base_model_class": "BertForSequenceClassification", "parent_library": "os"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": mapping}))
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
