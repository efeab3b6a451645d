"""A :class:`VerifyReport` says what :func:`~oftsurgery.verify` measured of two live models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from oftsurgery.errors import printable, share
from oftsurgery.records.record import ENOUGH, plain

#: the outputs that say the most about a model, the first that it has
_MAIN = ("logits", "sentence_embedding", "last_hidden_state")

#: an output this much nearer to the reference than the base's output is good, whatever share of the effect it keeps
_NEAR = 0.5


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference's, over all inputs.

    >>> report = oftsurgery.verify(model, model, inputs)
    >>> report.outputs["logits"].max_abs
    0.0

    Attributes:
        relative: ``‖a - b‖ / ‖b‖`` (Frobenius).
        max_abs: largest absolute difference.
        cosine_distance: mean of ``1 - cos`` over the vectors of the last dimension.
        kept: how much of the adapter's effect on the output is there,
            ``⟨folded(x) - base(x), live(x) - base(x)⟩ / ‖live(x) - base(x)‖²``: 1 all of it, 0 nothing; None where no base
            is known, or where the adapter has no effect.
        kl: mean Kullback–Leibler divergence of the predicted token from the reference's, in nats; None where the output is
            not the scores of tokens.
    """

    relative: float
    max_abs: float
    cosine_distance: float
    kept: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`~oftsurgery.verify` measured.

    >>> report = oftsurgery.verify(oftsurgery.fold(model, "ADAPTER"), live, inputs)
    >>> path, error = report.worst
    >>> error == report.modules[path], list(report.outputs), report.batches
    (True, ['logits'], 1)
    >>> report.kept > 0.9, report.verdict[:3]
    (True, 'ok:')

    Attributes:
        modules: ``{path: OutputError}`` of each compared module, given the very inputs that the module gets in the
            reference model: the error of this module, not of the modules before it.
        outputs: ``{name: OutputError}`` of the models' outputs. Positions that the inputs' ``attention_mask`` marks as padding
            count nowhere.
        batches: how many inputs were run.
        plain: ``{name: OutputError}`` of the outputs of the model ``plain``; empty without one.
        uncalled: folded modules that the reference never called on these inputs: where their owners only read the
            weights, a live adapter does nothing there, and a fold should not either.
        base: ``{name: OutputError}`` of the outputs without the adapter: the distance that the adapter makes. Empty where no
            base is known.
        rounds_inputs: whether the models have int8 layers, which round their inputs too, live and folded. ``kept`` counts this
            rounding as lost, although no weight has lost anything.
    """

    modules: Mapping[str, OutputError]
    outputs: Mapping[str, OutputError]
    batches: int
    plain: Mapping[str, OutputError] = field(default_factory=dict)
    uncalled: tuple[str, ...] = ()
    base: Mapping[str, OutputError] = field(default_factory=dict)
    rounds_inputs: bool = False

    @property
    def worst(self) -> tuple[str, OutputError] | None:
        """The module with the largest relative error, or None without modules."""
        return max(self.modules.items(), key=lambda item: item[1].relative, default=None)

    @property
    def main(self) -> str:
        """The name of the output that the verdict goes by: the logits, else embeddings, else the last hidden states, else the
        first output.
        """
        return next((name for name in _MAIN if name in self.outputs), next(iter(self.outputs), ""))

    @property
    def kept(self) -> float | None:
        """How much of the adapter's effect on the main output is there; None where no base is known."""
        return self.outputs[self.main].kept if self.outputs else None

    @property
    def ok(self) -> bool | None:
        """Whether the main output does what the live adapter does: it is nearer to the reference than the base's output is, and
        it keeps at least 90 % of the adapter's effect, or its distance is at most half of the base's (calibrated weights
        come nearer with a smaller share). None where nothing can be said: no base is known, or int8 layers round the inputs.
        """
        if self.kept is None:
            return None
        ratio = self.outputs[self.main].relative / self.base[self.main].relative
        good = ratio < 1 and (self.kept >= ENOUGH or ratio <= _NEAR)
        return good or (None if self.rounds_inputs else False)

    @property
    def verdict(self) -> str:
        """One line that says whether the folded model does what the live adapter does."""
        if self.kept is None:
            return "no verdict: the reference has no live adapter that can be switched off, so the adapter's effect is not known; give base=…"
        word = {True: "ok", False: "not ok", None: "no verdict"}[self.ok]
        far = f"the distance to the live model is {self._distance(self.outputs)}, and the base's is {self._distance(self.base)}"
        text = f"{word}: {share(self.kept)} of the adapter's effect on {printable(self.main)} is kept; {far}"
        noise = "; int8 layers round their inputs too, live and folded, and the share counts this rounding as lost"
        return text + noise * self.rounds_inputs

    def _distance(self, outputs: Mapping[str, OutputError]) -> str:
        found = outputs[self.main]
        return f"{found.cosine_distance:.2g} (1 - cos)" if found.kl is None else f"{found.kl:.2g} nats (KL)"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, strings and numbers."""
        return {**plain(self), "kept": self.kept, "ok": self.ok, "verdict": self.verdict}

    def __str__(self) -> str:
        rows = [
            *self.outputs.items(),
            *((f"{name}, plain rounding", e) for name, e in self.plain.items()),
            *((f"{name}, base", e) for name, e in self.base.items()),
            *sorted(self.modules.items(), key=lambda item: -item[1].relative),
        ]
        width = max((len(printable(name)) for name, _ in rows), default=0)
        lines = [f"{'':{width}}  relative   max abs    1 - cos    KL         kept"]
        for name, e in rows:
            kl, kept = "-" if e.kl is None else f"{e.kl:.2e}", "-" if e.kept is None else share(e.kept, ".1%")
            figures = f"{e.relative:.2e}   {e.max_abs:.2e}   {e.cosine_distance:.2e}   {kl:8}   {kept}"
            lines.append(f"{printable(name):{width}}  {figures}")
        lines += [
            f"{printable(name)}: the reference never called this module on these inputs" for name in self.uncalled
        ]
        return "\n".join(lines)
