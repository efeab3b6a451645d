"""The Modelfile's template: fixed texts around messages become Go; another chat template is left out, with the reason."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import gguf
import pytest

from oftsurgery.gguf.chat import find_texts, modelfile, renderer
from oftsurgery.gguf.reading import read_gguf

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe nice<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
    "{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
THINKS = CHATML.replace("message['content']", "(message['content'] if loop.last else message['content'][:4])")
TOKENS = ["<|end|>", "<|begin|>"]
CONVERSATIONS = [
    [("user", "Hello")],
    [("system", "Short."), ("user", "Hello")],
    [("user", "One"), ("assistant", "Two {"), ("user", "Three\n\nfour")],
    [("system", "S"), ("user", "One"), ("assistant", "Two"), ("user", "Three"), ("assistant", "4"), ("user", "5")],
]


def make_gguf(file: Path, template: str | None, *, add_bos: bool | None = True) -> Path:
    writer = gguf.GGUFWriter(file, "llama")
    if template is not None:
        writer.add_chat_template(template)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def go(template: str, messages: list[tuple[str, str]]) -> str:
    """What Go's text/template makes of the few forms that a Modelfile of ours holds, with the values that Ollama gives."""
    system = "\n\n".join(text for role, text in messages if role == "system")
    start = re.match(
        r"\{\{ if \.System \}\}(.*?)\{\{ \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}", template, re.DOTALL
    )
    out = template[: template.index("{{ range")]
    if start:
        out = (start[1] + system + start[2] if system else start[3]) + template[
            start.end() : template.index("{{ range")
        ]
    loop = re.search(
        r'\{\{ range \.Messages \}\}\{\{ if eq \.Role "user" \}\}(.*?)\{\{ \.Content \}\}(.*?)\{\{ else if eq \.Role "assistant" \}\}'
        r"(.*?)\{\{ \.Content \}\}(.*?)\{\{ end \}\}\{\{ end \}\}(.*)$",
        template,
        re.DOTALL,
    )
    assert loop
    around = {"user": (loop[1], loop[2]), "assistant": (loop[3], loop[4])}
    for role, text in messages:
        if role != "system":
            out += around[role][0] + text + around[role][1]
    return out + loop[5]


@pytest.mark.parametrize(
    ("template", "with_system"), [(CHATML, True), (LLAMA3, True), (GEMMA, False), (MISTRAL, False)]
)
def test_the_template_in_go_gives_the_prompts_of_the_chat_template(
    template: str, with_system: bool, tmp_path: Path
) -> None:
    made = modelfile(read_gguf(make_gguf(tmp_path / "m.gguf", template)), "m.gguf")
    assert made.without_template is None
    text = re.search(r'TEMPLATE """(.*?)"""', made.text, re.DOTALL)
    assert text
    render = renderer(template, {"bos": "<|begin|>", "eos": "<|end|>"})
    for messages in CONVERSATIONS:
        if with_system or messages[0][0] != "system":
            expected = render([{"role": r, "content": c} for r, c in messages], True)
            assert go(text[1], messages) == expected.removeprefix("<|begin|>")  # the tokenizer adds this token
    assert made.text.startswith("# ollama create NAME -f Modelfile\nFROM ./m.gguf\n")
    assert 'PARAMETER stop """<|end|>"""' in made.text


def test_tools_are_left_out_and_the_modelfile_says_so(tmp_path: Path) -> None:
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    made = modelfile(read_gguf(make_gguf(tmp_path / "m.gguf", template)), "m.gguf")
    assert made.without_template is None
    assert "# the chat template takes tools, and TEMPLATE takes none\n" in made.text


def test_a_first_token_that_the_tokenizer_does_not_add_stays(tmp_path: Path) -> None:
    made = modelfile(read_gguf(make_gguf(tmp_path / "m.gguf", LLAMA3, add_bos=False)), "m.gguf")
    assert '"""{{ if .System }}<|begin|><|start|>system' in made.text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "the model has no chat template"),
        (THINKS, "in some conversations|once and in order"),
        ("{{ messages | length }}", "does not give each message once and in order"),
        ("{% for m in messages %}{{ 'x{{' + m['content'] }}{% endfor %}", "signs that a Modelfile cannot hold"),
        ("{% for m in messages %}", "Unexpected end of template|unexpected end"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe|does not give"),
    ],
)
def test_another_template_is_left_out_with_the_reason(template: str | None, reason: str, tmp_path: Path) -> None:
    made = modelfile(read_gguf(make_gguf(tmp_path / "m.gguf", template)), "m.gguf")
    assert made.without_template is not None
    assert re.search(reason, made.without_template, re.IGNORECASE)
    assert "TEMPLATE " not in made.text.replace("no TEMPLATE", "")
    assert f"# no TEMPLATE: {made.without_template}" in made.text
    assert len(made.text.splitlines()) <= 4  # a reason of many lines would be read as commands


def test_transformers_renders_the_same(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, TOKENS[0]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=TOKENS[1], eos_token=TOKENS[0])
    for template, messages in itertools.product((CHATML, LLAMA3, MISTRAL), CONVERSATIONS):
        chat = [{"role": role, "content": content} for role, content in messages]
        expected = fast.apply_chat_template(chat, chat_template=template, add_generation_prompt=True, tokenize=False)
        assert renderer(template, {"bos": TOKENS[1], "eos": TOKENS[0]})(chat, True) == expected
    assert find_texts(renderer(CHATML, {})).begin == "<|im_start|>assistant\n"
