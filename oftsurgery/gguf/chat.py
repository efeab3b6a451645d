""":func:`modelfile` writes the ``Modelfile`` with which Ollama takes a GGUF file.

Ollama's templates are Go's, and a model's chat template is Jinja. Ollama compares the Jinja text in a GGUF with a list of templates that
it knows, and passes the prompt without any template where no text of the list is near. So the Modelfile has the template in Go wherever
the Jinja template puts fixed texts around each message: probes find these texts, and conversations prove them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oftsurgery.errors import needs, printable

from .reading import value_in

Message = Mapping[str, str]
#: function of (messages, whether the assistant's turn begins) to the prompt; an error says that the template takes no such messages
Render = Callable[[Sequence[Message], bool], str]

_SYSTEM, _FIRST, _ANSWER, _NEXT = "Qsystemq", "Qfirstq", "Qanswerq", "Qnextq"


@dataclass(frozen=True)
class Texts:
    """The fixed texts of a chat template.

    Attributes:
        start: what a prompt without a system message begins with.
        before_system: what a prompt with a system message begins with; None for a template without system messages.
        after_system: the text between the system message and the first turn.
        user: the texts before and after a message of the user.
        assistant: the texts before and after an answer.
        begin: what begins the assistant's turn.
    """

    start: str
    before_system: str | None
    after_system: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    begin: str

    def prompt(self, messages: Sequence[Message]) -> str:
        """The prompt that Ollama makes of the Go template."""
        system = next((m["content"] for m in messages if m["role"] == "system"), None)
        text = self.start if system is None else f"{self.before_system}{system}{self.after_system}"
        for message in messages:
            if message["role"] != "system":
                before, after = self.user if message["role"] == "user" else self.assistant
                text += before + message["content"] + after
        return text + self.begin

    def go(self) -> str:
        """The template in Go."""
        start = self.start
        if self.before_system is not None:
            start = f"{{{{ if .System }}}}{self.before_system}{{{{ .System }}}}{self.after_system}{{{{ else }}}}{self.start}{{{{ end }}}}"
        user, assistant = (f"{before}{{{{ .Content }}}}{after}" for before, after in (self.user, self.assistant))
        return (
            f'{start}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{assistant}'
            f"{{{{ end }}}}{{{{ end }}}}{self.begin}"
        )


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile's text, and why the text has no template (None where the text has one)."""

    text: str
    without_template: str | None


def modelfile(reader: Any, file: str) -> Modelfile:
    """The Modelfile for the GGUF ``file``.

    Args:
        reader: the file's ``gguf.GGUFReader``.
    """
    template, tokens = value_in(reader, "tokenizer.chat_template"), _tokens(reader)
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{file}"]
    reason: str | None = "the model has no chat template"
    if isinstance(template, str):
        try:
            texts = find_texts(renderer(template, tokens))
            begin = tokens.get("bos", "") if _adds_bos(reader) else ""  # the tokenizer adds this token itself
            go = texts.go() if not begin else _without(texts, begin).go()
            if '"""' in go or "{{" in "".join(_all(texts)):
                raise ValueError("the template has signs that a Modelfile cannot hold")
            reason = None
            if "tools" in template:
                lines.append("# the chat template takes tools, and TEMPLATE takes none")
            lines.append(f'TEMPLATE """{go}"""')
            stops = dict.fromkeys(s for s in (texts.assistant[1].strip(), tokens.get("eos", "")) if s)
            lines += [f'PARAMETER stop """{stop}"""' for stop in stops]
        except Exception as error:  # the model's own template raises errors of any kind
            reason = printable(error, 300)
    if reason is not None:
        lines.append(f"# no TEMPLATE: {reason}")
        if isinstance(template, str):
            lines.append(
                "# Ollama looks for a near template in its own list, and otherwise passes the prompt without a template"
            )
    return Modelfile("\n".join(lines) + "\n", reason)


def find_texts(render: Render) -> Texts:
    """The fixed texts of a chat template.

    Raises:
        ValueError: the template is not made of fixed texts around each message.
    """
    user, answer = {"role": "user", "content": _FIRST}, {"role": "assistant", "content": _ANSWER}
    more = {"role": "user", "content": _NEXT}
    start, closed = _around(render([user], False), _FIRST)
    begin = _cut(_around(render([user], True), _FIRST)[1], before=closed)
    _, between, rest = _split(render([user, answer, more], False), _FIRST, _ANSWER, _NEXT)[:3]
    before_answer = _cut(between, before=closed)
    _, _, after_answer = _split(render([user, answer], False), _FIRST, _ANSWER)
    before_user = _cut(rest, before=after_answer)
    texts = Texts(_cut(start, after=before_user), None, "", (before_user, closed), (before_answer, after_answer), begin)
    try:
        before, between, _ = _split(render([{"role": "system", "content": _SYSTEM}, user], True), _SYSTEM, _FIRST)
    except Exception:  # noqa: S110 - a template may refuse system messages with an error of any kind
        pass
    else:
        texts = Texts(texts.start, before, _cut(between, after=before_user), texts.user, texts.assistant, begin)
    _prove(texts, render)
    return texts


def _prove(texts: Texts, render: Render) -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two words?\nOr three"}
    answer = {"role": "assistant", "content": "Here: {x} they are."}
    turns: list[Message] = [user, answer, {"role": "user", "content": "And now"}, {**answer, "content": "No."}, user]
    conversations: list[list[Message]] = [turns[:1], turns[:3], turns]
    if texts.before_system is not None:
        conversations += [[system, *c] for c in conversations]
    if any(render(c, True) != texts.prompt(c) for c in conversations):
        raise ValueError("the chat template puts other texts around a message in some conversations")


def renderer(template: str, tokens: Mapping[str, str]) -> Render:
    """A function that renders a chat template in jinja's sandbox, with the settings of transformers.

    Args:
        tokens: ``{kind: text}`` of the special tokens, with the kinds ``"bos"`` and ``"eos"``.
    """
    with needs("jinja2", "pip install jinja2"):
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)
    named = {f"{kind}_token": text for kind, text in tokens.items()}
    return lambda messages, begins: compiled.render(messages=messages, add_generation_prompt=begins, **named)


def _around(text: str, inner: str) -> tuple[str, str]:
    before, after = _split(text, inner)
    return before, after


def _split(text: str, *inner: str) -> list[str]:
    """The texts around the ``inner`` texts, which must each stand once and in this order."""
    parts = []
    for part in inner:
        before, found, text = text.partition(part)
        if not found or part in text:
            raise ValueError("the chat template does not give each message once and in order")
        parts.append(before)
    return [*parts, text]


def _cut(text: str, *, before: str = "", after: str = "") -> str:
    if not text.startswith(before) or not text.endswith(after) or len(text) < len(before) + len(after):
        raise ValueError("the chat template puts other texts around a message in some conversations")
    return text[len(before) : len(text) - len(after)]


def _all(texts: Texts) -> tuple[str, ...]:
    return (texts.start, texts.before_system or "", texts.after_system, *texts.user, *texts.assistant, texts.begin)


def _without(texts: Texts, begin: str) -> Texts:
    """The texts of a prompt that does not begin with ``begin``."""
    before = texts.before_system
    return Texts(
        texts.start.removeprefix(begin),
        None if before is None else before.removeprefix(begin),
        texts.after_system,
        texts.user,
        texts.assistant,
        texts.begin,
    )


def _tokens(reader: Any) -> dict[str, str]:
    entry = reader.get_field("tokenizer.ggml.tokens")
    ids = {kind: value_in(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    count = 0 if entry is None else len(entry.data)
    return {kind: str(entry.contents(int(i))) for kind, i in ids.items() if i is not None and 0 <= int(i) < count}


def _adds_bos(reader: Any) -> bool:
    """Whether llama.cpp puts the first token before each prompt."""
    told = value_in(reader, "tokenizer.ggml.add_bos_token")
    # without the setting, llama.cpp goes by the kind of the vocabulary
    return bool(told) if told is not None else value_in(reader, "tokenizer.ggml.model") in ("llama", "bert")
