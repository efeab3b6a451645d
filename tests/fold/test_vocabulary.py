"""Adapters of models whose embeddings were resized in training: peft saves the embeddings and the head with another number of
rows, and the folded model has that number in its tensors and in its config.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import adapted, bnb_config, differing, load, quiet_fold, tensors, unpacked
from independent import relative
from peft import OFTConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import oftsurgery
from oftsurgery import ShapeError, StateError

WORDS = 64  # tokens of each base
SMALL: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": WORDS, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": WORDS, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "text_config": SMALL | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
        "patch_size": 8,
    },
    "mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62,
}  # fmt: skip
BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}


@dataclass(frozen=True)
class Case:
    """A base, and how an adapter is trained on it.

    Attributes:
        cls: transformers' class, in training.
        config: its config.
        targets: the modules that the adapter rotates.
        rows: the number of tokens in training.
        more: further fields of the adapter's config.
        base: the class of the checkpoint, where it is another class.
        save: arguments of peft's ``save_pretrained``.
    """

    cls: str
    config: dict[str, Any]
    targets: list[str]
    rows: int = WORDS + 3
    more: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    save: dict[str, Any] = field(default_factory=dict)


LLAMA, CLASSIFIER = "LlamaForCausalLM", "LlamaForSequenceClassification"
CASES = {
    "untied": Case(LLAMA, SMALL | UNTIED, ["q_proj"]),
    "tied": Case(LLAMA, SMALL | TIED, ["q_proj"]),
    "untied, both saved": Case(LLAMA, SMALL | UNTIED, ["q_proj"], more=BOTH),
    "tied, both saved": Case(LLAMA, SMALL | TIED, ["q_proj"], more=BOTH),
    "tied, embeddings saved": Case(LLAMA, SMALL | TIED, ["q_proj"], more={"modules_to_save": ["embed_tokens"]}),
    "untied, both rotated": Case(LLAMA, SMALL | UNTIED, ["q_proj", "embed_tokens", "lm_head"]),
    "tied, embeddings rotated": Case(LLAMA, SMALL | TIED, ["q_proj", "embed_tokens"]),
    "fewer rows": Case(LLAMA, SMALL | UNTIED, ["q_proj"], 60),
    "gpt2": Case("GPT2LMHeadModel", {"vocab_size": WORDS, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32}, ["lm_head"]),
    "bert": Case("BertForMaskedLM", SMALL, ["query"]),
    "a bare model": Case("BertModel", SMALL, ["query"]),
    "bart, with a buffer": Case("BartForConditionalGeneration", ENCODER_DECODER, ["q_proj"]),
    "t5": Case("T5ForConditionalGeneration", T5, ["q"]),
    "a config in the config": Case("Gemma3ForConditionalGeneration", GEMMA, ["q_proj"], save={"save_embedding_layers": True}),
    "a classifier": Case("BertForSequenceClassification", SMALL | {"num_labels": 3}, ["query"], more={"task_type": "SEQ_CLS"}),
    "a new head": Case(
        CLASSIFIER, SMALL | UNTIED | {"num_labels": 3, "pad_token_id": 0}, ["q_proj"], more={"task_type": "SEQ_CLS"}, base=LLAMA
    ),
}  # fmt: skip
warnings_of_peft = pytest.mark.filterwarnings(
    "ignore:Setting .save_embedding_layers", "ignore:Model with .tie_word_embeddings", "ignore:Model has .tie_word"
)
pytestmark = [warnings_of_peft, pytest.mark.filterwarnings("ignore::oftsurgery.UntieWarning")]


def tokenizer(words: int) -> Any:
    text = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, words)}}, unk_token="<unk>"))
    text.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=text, unk_token="<unk>", bos_token="<s>")


def trained(place: Path, case: Case) -> Any:
    """``base`` and ``adapter``, as a trainer leaves them; the live model."""
    torch.manual_seed(0)
    base_class = getattr(transformers, case.base or case.cls)
    base_class(base_class.config_class(**case.config)).save_pretrained(place / "base")
    tokenizer(min(WORDS, case.rows)).save_pretrained(place / "base")
    words = AutoTokenizer.from_pretrained(place / "base")
    words.add_tokens([f"<new{i}>" for i in range(case.rows - WORDS)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, case.cls).from_pretrained(place / "base")
        model.resize_token_embeddings(case.rows)
        live = adapted(model, case.targets, oft_block_size=8, **case.more)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in live.named_parameters():
                if parameter.requires_grad and "oft_" not in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) / 5)
        live.save_pretrained(place / "adapter", **case.save)
    words.save_pretrained(place / "adapter")
    return live


def outputs(model: Any, rows: int) -> Any:
    """Logits or hidden states in float64, also of the last tokens."""
    ids = torch.tensor([[1, 5, 9, rows - 1, 7, 3], [4, 4, rows - 2, 1, 6, 6]])
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).double()


def rows_of(model: Any) -> tuple[int, int, int]:
    """The number of tokens in the config, in the embeddings and in the module's own words."""
    embeddings = model.get_input_embeddings()
    return model.config.get_text_config().vocab_size, embeddings.weight.shape[0], embeddings.num_embeddings


def config_in(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def quietly(function: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        warnings.simplefilter("ignore", oftsurgery.LeftOutWarning)
        return function(*args, **options)


@pytest.mark.parametrize("name", CASES)
def test_the_folded_model_has_the_tokens_of_the_training(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    live = trained(tmp_path, case)
    want, rows = outputs(live, case.rows), (case.rows,) * 3
    plan = {"trained_on": "plain"}
    record = quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", **plan)
    assert dict(record.vocabulary) == {"before": WORDS, "after": case.rows}
    disk = load(tmp_path / "disk", case.cls)
    assert rows_of(disk) == rows
    assert relative(outputs(disk, case.rows), want) < 1e-6
    assert len(AutoTokenizer.from_pretrained(tmp_path / "disk")) == case.rows
    # the live model has been resized already
    assert relative(outputs(quietly(oftsurgery.fold, live), case.rows), want) < 1e-6
    report = oftsurgery.verify_checkpoint(tmp_path / "disk", tmp_path / "base", tmp_path / "adapter")
    assert report.ok, report.wrong
    found = oftsurgery.doctor(tmp_path / "disk", base=tmp_path / "base", adapter=tmp_path / "adapter")
    assert [f for f in found if f.severity == "error"] == []
    restored = quietly(oftsurgery.unfold_checkpoint, tmp_path / "disk", tmp_path / "restored", base=tmp_path / "base")
    assert restored is None
    assert differing(tensors(tmp_path / "restored"), tensors(tmp_path / "base")) == []
    assert rows_of(load(tmp_path / "restored", case.base or case.cls)) == (WORDS,) * 3
    assert len(AutoTokenizer.from_pretrained(tmp_path / "restored")) == len(
        AutoTokenizer.from_pretrained(tmp_path / "base")
    )
    if case.base:
        return  # a model in memory has its head already
    base = getattr(transformers, case.cls).from_pretrained(tmp_path / "base")
    before = {n: t.clone() for n, t in base.state_dict().items()}
    memory = quietly(oftsurgery.fold, base, tmp_path / "adapter")
    assert rows_of(memory) == rows
    assert rows_of(base) == (WORDS,) * 3
    assert relative(outputs(memory.eval(), case.rows), want) < 1e-6
    assert memory.oftsurgery.saved == record.saved
    assert memory.oftsurgery.vocabulary == record.vocabulary
    oftsurgery.export_safetensors(memory, tmp_path / "memory")
    assert differing(tensors(tmp_path / "memory"), tensors(tmp_path / "disk")) == []
    assert rows_of(load(tmp_path / "memory", case.cls)) == rows
    back = oftsurgery.unfold(memory, base=tmp_path / "base")
    assert rows_of(back) == (WORDS,) * 3
    assert differing(back.state_dict(), before) == []
    again = quietly(oftsurgery.fold, base, tmp_path / "adapter", inplace=True)
    assert again is base
    assert rows_of(base) == rows


UNDONE = ["untied", "tied", "tied, both saved", "fewer rows", "bert", "bart, with a buffer", "a config in the config"]


@pytest.mark.parametrize("name", UNDONE)
def test_an_undo_record_restores_the_rows(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    trained(tmp_path, case)
    quiet_fold(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", undo=tmp_path / "disk.undo", trained_on="plain"
    )
    quietly(oftsurgery.unfold_checkpoint, tmp_path / "disk", tmp_path / "restored", undo=tmp_path / "disk.undo")
    assert differing(tensors(tmp_path / "restored"), tensors(tmp_path / "base")) == []
    assert config_in(tmp_path / "restored") == config_in(tmp_path / "base")
    base = getattr(transformers, case.cls).from_pretrained(tmp_path / "base")
    memory = quietly(oftsurgery.fold, base, tmp_path / "adapter", undo=tmp_path / "memory.undo")
    back = oftsurgery.unfold(memory, undo=tmp_path / "memory.undo")
    assert rows_of(back) == (WORDS,) * 3
    assert differing(back.state_dict(), base.state_dict()) == []
    assert back.config.to_dict() == base.config.to_dict()


@pytest.mark.parametrize("name", ["untied, both rotated", "gpt2"])
def test_an_undo_record_of_rows_that_are_rotated_is_refused(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    trained(tmp_path, case)
    model = getattr(transformers, case.cls).from_pretrained(tmp_path / "base")
    for fold in (
        lambda: quiet_fold(
            tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", undo=tmp_path / "undo", trained_on="plain"
        ),
        lambda: oftsurgery.fold(model, tmp_path / "adapter", undo=tmp_path / "undo"),
    ):
        with pytest.raises(StateError, match=r"another number of rows for a weight and rotates.*keep the base"):
            fold()
    assert not (tmp_path / "undo").exists()


@pytest.mark.parametrize("codec", ["nf4", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_base_takes_new_tokens(tmp_path: Path, codec: Any, tied: bool) -> None:
    case = CASES["tied" if tied else "untied"]
    live = trained(tmp_path, case)
    del live
    model = load(tmp_path / "base", case.cls, quantization_config=bnb_config(codec))
    oftsurgery.export_safetensors(model, tmp_path / "quantised")
    tokenizer(WORDS).save_pretrained(tmp_path / "quantised")
    resized = load(tmp_path / "base", case.cls, quantization_config=bnb_config(codec))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resized.resize_token_embeddings(case.rows)
        live = PeftModel.from_pretrained(resized, tmp_path / "adapter").eval()
    want = outputs(unpacked(live), case.rows)
    record = quiet_fold(tmp_path / "quantised", tmp_path / "adapter", tmp_path / "disk")
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "plain", format=codec, trained_on=codec)
    memory = quietly(oftsurgery.fold, model, tmp_path / "adapter", rounding="nearest")
    assert memory.oftsurgery.saved == record.saved
    oftsurgery.export_safetensors(memory, tmp_path / "memory")
    assert differing(tensors(tmp_path / "disk"), tensors(tmp_path / "memory")) == []
    assert differing(tensors(tmp_path / "disk"), tensors(tmp_path / "plain")) == []
    for folded in (memory, load(tmp_path / "disk", case.cls)):
        assert rows_of(folded) == (case.rows,) * 3
        assert relative(outputs(unpacked(folded), case.rows), want) < 0.3
    report = oftsurgery.verify_checkpoint(tmp_path / "disk", tmp_path / "quantised", tmp_path / "adapter")
    assert report.ok, report.wrong
    oftsurgery.unfold_checkpoint(tmp_path / "disk", tmp_path / "restored", base=tmp_path / "quantised")
    assert differing(tensors(tmp_path / "restored"), tensors(tmp_path / "quantised")) == []
    assert config_in(tmp_path / "restored")["vocab_size"] == WORDS


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_a_head_that_is_quantised_becomes_plain_with_its_new_rows(tmp_path: Path, codec: Any) -> None:
    case = CASES["untied, both saved"]
    trained(tmp_path, case)
    model = load(tmp_path / "base", case.cls, quantization_config=bnb_config(codec, llm_int8_skip_modules=["nothing"]))
    assert type(model.lm_head) is not nn.Linear
    oftsurgery.export_safetensors(model, tmp_path / "quantised")
    tokenizer(WORDS).save_pretrained(tmp_path / "quantised")
    quiet_fold(tmp_path / "quantised", tmp_path / "adapter", tmp_path / "disk")
    memory = quietly(oftsurgery.fold, model, tmp_path / "adapter", rounding="nearest")
    for folded in (memory, load(tmp_path / "disk", case.cls)):
        assert rows_of(folded) == (case.rows,) * 3
        assert (type(folded.lm_head), folded.lm_head.out_features) == (nn.Linear, case.rows)
    assert torch.equal(*(outputs(unpacked(m), case.rows) for m in (memory, load(tmp_path / "disk", case.cls))))
    back = oftsurgery.unfold(memory, base=model)
    assert rows_of(back) == (WORDS,) * 3
    assert back.lm_head.weight.shape == model.lm_head.weight.shape
    oftsurgery.unfold_checkpoint(tmp_path / "disk", tmp_path / "restored", base=tmp_path / "quantised")
    assert differing(tensors(tmp_path / "restored"), tensors(tmp_path / "quantised")) == []


def test_a_wrapped_model_has_the_new_tokens(tmp_path: Path) -> None:
    case = CASES["tied"]
    want = outputs(trained(tmp_path, case), case.rows)
    base = load(tmp_path / "base", case.cls)
    wrapped = oftsurgery.wrap(base, tmp_path / "adapter")
    assert rows_of(wrapped) == (case.rows,) * 3
    assert rows_of(base) == (WORDS,) * 3
    assert relative(outputs(wrapped.eval(), case.rows), want) < 1e-6


def test_the_new_token_is_generated(tmp_path: Path) -> None:
    case = CASES["untied"]
    live = trained(tmp_path, case)
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", trained_on="plain")
    words, folded = AutoTokenizer.from_pretrained(tmp_path / "disk"), load(tmp_path / "disk", case.cls)
    ids = words("w3 <new2> w5", return_tensors="pt").input_ids
    assert case.rows - 1 in ids
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert folded.generate(ids, **options).tolist() == live.generate(input_ids=ids, **options).tolist()


def test_a_buffer_that_the_checkpoint_lacks_stays_away(tmp_path: Path) -> None:
    """transformers makes BART's bias of the logits up, as zeros, where a checkpoint lacks it."""
    from safetensors.torch import load_file, save_file

    case = CASES["bart, with a buffer"]
    want = outputs(trained(tmp_path, case), case.rows)
    path = tmp_path / "base" / "model.safetensors"
    held = load_file(path)
    del held["final_logits_bias"]
    save_file(held, path, {"format": "pt"})
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", trained_on="plain")
    assert "final_logits_bias" not in tensors(tmp_path / "disk")
    assert relative(outputs(load(tmp_path / "disk", case.cls), case.rows), want) < 1e-6


def test_two_folds_and_a_chain_of_adapters(tmp_path: Path) -> None:
    """One of two adapters brings the tokens: one fold of both, and a fold over the other."""
    case = CASES["untied"]
    trained(tmp_path, case)
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "first", trained_on="plain")
    second = adapted(load(tmp_path / "first", case.cls), ["v_proj"], oft_block_size=8, seed=5)
    second.save_pretrained(tmp_path / "second")
    want = outputs(second, case.rows)
    record = quiet_fold(tmp_path / "first", tmp_path / "second", tmp_path / "twice", trained_on="plain")
    assert (dict(record.vocabulary), dict(record.earlier[0].vocabulary)) == ({}, {"before": WORDS, "after": case.rows})
    quiet_fold(tmp_path / "base", [tmp_path / "second", tmp_path / "adapter"], tmp_path / "once", trained_on="plain")
    for name in ("twice", "once"):
        assert relative(outputs(load(tmp_path / name, case.cls), case.rows), want) < 1e-6


# --- trained rows of single tokens ------------------------------------------------------------------------------------


def with_rows(place: Path, tokens: Any, *, tied: bool) -> Any:
    """A live model with trained rows: OFT's config has no such field in peft 0.21, and peft obeys the attribute."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL | (TIED if tied else UNTIED))
    transformers.LlamaForCausalLM(config).save_pretrained(place / "base")
    settings = OFTConfig(oft_block_size=8, target_modules=["q_proj"])
    settings.trainable_token_indices = tokens
    live = get_peft_model(load(place / "base", LLAMA), settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 20)
    return live


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "tokens",
    [
        [3, 7],
        {"embed_tokens": [3, 7]},
        {"lm_head": [2]},
        {"embed_tokens": [3, 7], "lm_head": [2]},
        {"embed_tokens": [3], "lm_head": [3]},
    ],
    ids=str,
)
def test_trained_rows_of_a_live_model_are_folded(tmp_path: Path, tokens: Any, tied: bool) -> None:
    live = with_rows(tmp_path, tokens, tied=tied)
    want = outputs(live, WORDS)
    folded = oftsurgery.fold(live)
    assert relative(outputs(folded, WORDS), want) < 1e-6
    assert type(folded.get_input_embeddings()) is nn.Embedding
    oftsurgery.export_safetensors(folded, tmp_path / "out")
    assert relative(outputs(load(tmp_path / "out", LLAMA), WORDS), want) < 1e-6
    assert torch.equal(outputs(live, WORDS), want)


def test_an_adapter_without_trained_rows_beside_one_with_rows(tmp_path: Path) -> None:
    live = with_rows(tmp_path, [3, 7], tied=True)
    live.add_adapter("other", OFTConfig(oft_block_size=8, target_modules=["v_proj"], init_weights=False))
    for name in ("default", "other"):
        live.set_adapter(name)
        assert relative(outputs(oftsurgery.fold(live), WORDS), outputs(live, WORDS)) < 1e-6, name
    assert oftsurgery.doctor(live) == []


def test_trained_rows_in_a_file_are_refused(tmp_path: Path) -> None:
    """The file does not say which tokens have the rows; peft itself leaves the rows out."""
    with_rows(tmp_path, [3, 7], tied=False).save_pretrained(tmp_path / "adapter")
    assert "trainable_token_indices" not in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    with pytest.raises(oftsurgery.DialectError, match=r"which tokens have these rows.*oftsurgery.fold\(peft_model\)"):
        oftsurgery.load_adapter(tmp_path / "adapter")


def test_rows_of_a_head_with_a_bias_are_refused(tmp_path: Path) -> None:
    """peft's live layer forgets the bias."""
    settings = OFTConfig(oft_block_size=8, target_modules=["q_proj"])
    settings.trainable_token_indices = {"lm_head": [2]}
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL))
    with pytest.raises(StateError, match=r"without the head's bias.*modules_to_save"):
        oftsurgery.fold(get_peft_model(model, settings))


# --- refusals ---------------------------------------------------------------------------------------------------------


def without(adapter: Path, *ends: str) -> None:
    """Take the tensors with these ends of their names out of the adapter's file."""
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if not n.endswith(ends)}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "lost", "left"),
    [
        ("untied", "lm_head.weight", "lm_head.weight"),
        ("untied", "embed_tokens.weight", "embed_tokens.weight"),
        ("tied, embeddings saved", "lm_head.weight", "lm_head.weight"),
        ("bert", "decoder.bias", "cls.predictions"),
    ],
)
def test_a_part_of_the_resized_tensors_is_refused(tmp_path: Path, name: str, lost: str, left: str) -> None:
    case = CASES[name]
    trained(tmp_path, case)
    without(tmp_path / "adapter", lost)
    model = load(tmp_path / "base", case.cls)
    for fold in (
        lambda: quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", trained_on="plain"),
        lambda: oftsurgery.fold(model, tmp_path / "adapter"),
        lambda: oftsurgery.wrap(model, tmp_path / "adapter"),
    ):
        with pytest.raises(
            ShapeError, match=rf"for 67 tokens, and no values for another.*{left}.*save_embedding_layers=True"
        ):
            fold()
    assert not (tmp_path / "disk").exists()
    found = oftsurgery.doctor(tmp_path / "adapter", base=tmp_path / "base")
    assert any(f.severity == "error" and "no values for another" in f.message for f in found)


def test_two_numbers_of_rows_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    case = CASES["untied"]
    trained(tmp_path, case)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    found = load_file(path)
    found["base_model.model.lm_head.weight"] = torch.randn(66, 64)
    save_file(found, path, {"format": "pt"})
    with pytest.raises(ShapeError, match=r"do not fit.*expected 6[67]×64"):
        quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", trained_on="plain")


def test_another_width_is_refused_as_before(tmp_path: Path) -> None:
    case = CASES["untied"]
    trained(tmp_path, case)
    narrow = transformers.LlamaConfig(**case.config | {"hidden_size": 32})
    transformers.LlamaForCausalLM(narrow).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ShapeError):
        quiet_fold(tmp_path / "narrow", tmp_path / "adapter", tmp_path / "disk", trained_on="plain")


def test_a_tokenizer_without_rows_is_refused(tmp_path: Path) -> None:
    """The trainer cut the embeddings to fewer rows than the tokenizer has words."""
    case = Case(LLAMA, SMALL | UNTIED, ["q_proj"], 60)
    trained(tmp_path, case)
    for where in ("base", "adapter"):
        tokenizer(WORDS).save_pretrained(tmp_path / where)
    with pytest.raises(
        StateError, match=r"a token with the number 63, and the model's embedding has 60 rows.*--tokenizer FOLDER"
    ):
        quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", trained_on="plain")
    tokenizer(60).save_pretrained(tmp_path / "words")
    quiet_fold(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", trained_on="plain", tokenizer=tmp_path / "words"
    )
    assert len(AutoTokenizer.from_pretrained(tmp_path / "disk")) == 60


def test_a_config_of_another_number_of_tokens_is_found(tmp_path: Path) -> None:
    case = CASES["untied"]
    trained(tmp_path, case)
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", trained_on="plain")
    path = tmp_path / "disk" / "config.json"
    path.write_text(json.dumps(config_in(tmp_path / "disk") | {"vocab_size": WORDS}))
    report = oftsurgery.verify_checkpoint(tmp_path / "disk", tmp_path / "base", tmp_path / "adapter")
    assert "by config.json" in report.wrong["lm_head.weight"]
    found = [f for f in oftsurgery.doctor(tmp_path / "disk") if f.severity == "error"]
    assert [f.code for f in found] == ["other-shape"]
    assert "vocab_size" in (found[0].remedy or "")


def test_an_error_leaves_the_model_as_it_was(tmp_path: Path, snapshot: Any) -> None:
    case = CASES["tied, both saved"]
    trained(tmp_path, case)
    model = load(tmp_path / "base", case.cls)
    before, config = snapshot(model), model.config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error", oftsurgery.UntieWarning)
        with pytest.raises(oftsurgery.UntieWarning):
            oftsurgery.fold(model, tmp_path / "adapter", inplace=True)
    assert snapshot(model) == before
    assert model.config.to_dict() == config
    assert rows_of(model) == (WORDS,) * 3
    assert model.lm_head.out_features == WORDS


def test_the_plan_says_the_number_of_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from oftsurgery.cli.main import main

    trained(tmp_path, CASES["untied"])
    where = [str(tmp_path / name) for name in ("base", "adapter")]
    assert main(["plan", *where, "--trained-on", "plain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocabulary"] == {"before": 64, "after": 67}
    assert main(["plan", *where, "--trained-on", "plain"]) == 0
    assert "tokens: 67, and 64 in the base" in capsys.readouterr().out
    assert main(["fold", *where, str(tmp_path / "out"), "--trained-on", "plain", "-q"]) == 0
    assert main(["show", str(tmp_path / "out")]) == 0
    assert "tokens: 67, and 64 in the base" in capsys.readouterr().out
