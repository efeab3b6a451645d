"""onnxruntime runs a graph in its own process, as users run the graph: from a path, without torch.

So the runtime's memory is not added to the model's memory, and a crash of the runtime becomes an error. The process is
``python -m oftsurgery.onnx.run GRAPH``. This process reads pickled feeds from its standard input and writes pickled outputs;
only the parent process holds these pipes.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from oftsurgery.errors import ExportError, printable

if TYPE_CHECKING:
    import numpy as np


# onnxruntime's names of dtypes where numpy's names differ
_DTYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class Value:
    """An input or output of a graph.

    Attributes:
        name: the value's name.
        dtype: numpy's name of the dtype.
        shape: the axes' sizes, or the names of dynamic axes.
    """

    name: str
    dtype: str
    shape: tuple[str | int, ...]


class Process:
    """A process in which onnxruntime runs a graph on the CPU, until the end of the context.

    Args:
        path: the graph's path.
        lean: whether to leave large weights in their file, where the system can drop them from memory: constant folding
            and prepacking, which copy weights, are switched off.

    Raises:
        ExportError: onnxruntime cannot load or run the graph.
    """

    def __init__(self, path: Path, *, lean: bool = False) -> None:
        # the child finds modules in the same places as this process, and nowhere else
        places = os.pathsep.join(p or str(Path.cwd()) for p in sys.path)
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter
            [sys.executable, "-m", __name__, str(path), "lean" if lean else "usual"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": places, "PYTHONSAFEPATH": "1"},
        )
        try:
            self.inputs, self.outputs = (tuple(Value(*facts) for facts in part) for part in self._answer("load"))
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Run the graph on ``feeds``; the outputs are in the graph's order."""
        try:
            pickle.dump(dict(feeds), self._process.stdin)  # type: ignore[arg-type]
            self._process.stdin.flush()  # type: ignore[union-attr]
        except OSError as error:
            raise self._ended("run") from error
        return self._answer("run")  # type: ignore[no-any-return]

    def _answer(self, what: str) -> Any:
        """The next answer of the process, which had to ``what`` ("load" or "run") the graph."""
        try:
            answer, failed = pickle.load(self._process.stdout)  # type: ignore[arg-type]  # noqa: S301 - our own child
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._ended(what) from error
        if failed:
            message = f"onnxruntime cannot {what} the graph: {printable(answer, 400)}"
            remedy = "report this error together with the model's config.json; verify=False (--no-verify) writes the graph all the same"
            raise ExportError(message, remedy=remedy)
        return answer

    def _end(self) -> bytes:
        """End the process if it still runs; return its error output."""
        if self._process.returncode is not None:
            return b""
        self._process.kill()
        return self._process.communicate()[1]

    def _ended(self, what: str) -> ExportError:
        """The error for a process that ended without an answer."""
        said = self._end().decode(errors="replace").strip().splitlines() or ["the process printed nothing"]
        message = f"onnxruntime ended with code {self._process.returncode} when it had to {what} the graph: {printable(said[-1], 400)}"
        remedy = "check that there is enough memory; verify=False (--no-verify) writes the graph without running it"
        return ExportError(message, remedy=remedy)


def _serve(path: str, mode: str, reader: BinaryIO, writer: BinaryIO) -> None:
    """Run a graph on each of the feeds that the parent process writes; the main function of the child process."""

    def say(answer: Any, *, failed: bool = False) -> None:
        pickle.dump((answer, failed), writer)
        writer.flush()

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    more: dict[str, Any] = {}
    if mode == "lean":
        options.add_session_config_entry("session.disable_prepacking", "1")
        more["disabled_optimizers"] = ["ConstantFolding"]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"], **more)
    except Exception as error:  # onnxruntime's errors share no class; the parent raises an ExportError
        say(str(error), failed=True)
        return
    say((tuple(map(_facts, session.get_inputs())), tuple(map(_facts, session.get_outputs()))))
    names = [o.name for o in session.get_outputs()]
    while True:
        try:
            feeds = pickle.load(reader)  # noqa: S301 - our own parent
        except EOFError:
            return
        try:
            say(session.run(names, feeds))
        except Exception as error:  # onnxruntime's errors share no class here either
            say(str(error), failed=True)


def _facts(found: Any) -> tuple[str, str, tuple[str | int, ...]]:
    """The facts of a :class:`Value`."""
    kind = found.type.removeprefix("tensor(").removesuffix(")")
    return found.name, _DTYPES.get(kind, kind), tuple(found.shape)


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints go to the standard error, so that the pipe holds only answers
    _serve(sys.argv[1], sys.argv[2], sys.stdin.buffer, out)
