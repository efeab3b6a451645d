"""Check everything that oftsurgery does on a GPU, and time it, with one command that takes less than 8 minutes.

    python tools/gpu_check.py [--out FILE] [--wheels FOLDER]     on a machine with a CUDA GPU
    python tools/gpu_check.py --device cpu                       the rehearsal: every step on small sizes, without a GPU
    python tools/gpu_check.py --pack FOLDER                      wheels for a machine that reaches no package index
    python tools/gpu_check.py --only codes times                 some steps; --list names all

The tool needs this tree and the packages that ``pyproject.toml`` names (its dependencies, the extra ``peft``, pytest and
Triton). A package that Python does not import in a fitting version comes from the wheels in ``--wheels`` (``wheels/`` in the
tree, by default), and else from pip's index; the packages go to a temporary folder, never into the environment. ``--pack``
writes wheels of the packages of this environment that hold no code for one release of Python, bitsandbytes with the libraries
of one release of CUDA alone (``--cuda``), so that its wheel has some megabytes.

Each step runs in a process of its own with a time limit: after a crash, a fault on the GPU or a hang the next step runs. The
JSON file (``gpu_check.json``, by default) is written anew after each step::

    {"schema": 1, "device": "cuda", "small": false, "seconds": 311.5, "ok": true,
     "packages": {"from_wheels": […], "from_index": […], "missing": […]},
     "steps": {"environment": {"state": "passed", "seconds": 8.1, "found": {…}},
               "codes": {"state": "failed", "seconds": 20.3, "found": {…}, "error": "the end of what the step said"}}}

``state`` is passed, failed, timed out or skipped. ``found`` holds the step's figures, also those from before a failure;
:mod:`gpu_steps` says which. The exit code is 0 if no step failed, and 1 otherwise.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parent.parent
STEPS = TREE / "tools" / "gpu_steps.py"
#: seconds for everything, and the seconds that each step may take, in the order in which the steps run
BUDGET = 465
LIMITS = {
    "environment": 120,
    "codes": 90,
    "reference": 90,
    "images": 60,
    "layers": 70,
    "training": 60,
    "undo": 60,
    "model": 90,
    "calibration": 90,
    "kernels": 80,
    "times": 90,
    "checkpoint": 60,
    "tests": 170,
}
#: packages besides the dependencies: `pip` must not take torch, which fits the machine's driver
OF_STEPS = ("triton>=3.2", "pytest>=8.3", "hypothesis>=6.100")
NEVER_FETCHED = ("torch", "triton")


# --- packages ---------------------------------------------------------------------------------------------------------


def requirements() -> list[Any]:
    """What the package and the steps need, as pyproject.toml says it."""
    from packaging.requirements import Requirement

    text = (TREE / "pyproject.toml").read_text()
    names = []
    for block in (r"^dependencies = \[\n(.*?)^\]", r"^peft = \[(.*?)\]"):
        found = re.search(block, text, re.MULTILINE | re.DOTALL)
        names += re.findall(r"\"((?:[^\"])+)\"", re.sub(r"#.*", "", found[1]) if found else "")
    wanted = [Requirement(name) for name in (*names, *OF_STEPS)]
    return [r for r in wanted if r.marker is None or r.marker.evaluate()]


def unmet(path: list[str] | None = None) -> list[Any]:
    """The requirements that the packages on ``path`` (Python's own, by default) do not meet."""

    def version(name: str) -> str | None:
        found = importlib.metadata.distributions(name=name, **({} if path is None else {"path": path}))
        return next((d.version for d in found), None)

    versions = {r.name: version(r.name) for r in requirements()}
    return [
        r
        for r in requirements()
        if versions[r.name] is None or not r.specifier.contains(versions[r.name], prereleases=True)
    ]


def fetch(wheels: Path, site: Path, seconds: float) -> dict[str, list[str]]:
    """Put what is missing into ``site``: from wheels, then from the index."""
    from packaging.utils import canonicalize_name

    told: dict[str, list[str]] = {"from_wheels": [], "from_index": [], "missing": []}
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(site)]
    # a package that fits stays as it is: a newer release may need packages that the machine lacks
    wanted = {canonicalize_name(r.name) for r in unmet()}
    given = [w for w in sorted(wheels.glob("*.whl")) if canonicalize_name(w.name.partition("-")[0]) in wanted]
    if given:
        subprocess.run([*install, "--no-index", *map(str, given)], timeout=seconds, check=False)
        told["from_wheels"] = [w.name for w in given]
    missing = [r for r in unmet([str(site), *sys.path]) if r.name not in NEVER_FETCHED]
    if missing:
        # a machine without an index answers at once, or never
        from_index = [*install, "--retries", "0", "--timeout", "5", *(f"{r.name}{r.specifier}" for r in missing)]
        try:
            done = subprocess.run(from_index, timeout=seconds, capture_output=True, check=False)
            told["from_index"] = [str(r) for r in missing] if done.returncode == 0 else []
        except subprocess.TimeoutExpired:
            pass
    told["missing"] = [str(r) for r in unmet([str(site), *sys.path])]
    return told


def pack(folder: Path, cuda: str) -> list[Path]:
    """Wheels of this environment's packages that any Python 3 can use."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for requirement in requirements():
        found = importlib.metadata.distribution(requirement.name)
        tags = re.findall(r"^Tag: (py\S+-none-\S+)", found.read_text("WHEEL") or "", re.MULTILINE)
        if tags and requirement.name not in NEVER_FETCHED:
            made.append(_repacked(found, tags[0], folder, cuda))
    return made


def _repacked(found: importlib.metadata.Distribution, tag: str, folder: Path, cuda: str) -> Path:
    name = re.sub(r"[-_.]+", "_", found.metadata["Name"])
    target = folder / f"{name}-{found.version}-{tag}.whl"
    other_library = re.compile(rf"lib{name}_(?!cpu|cuda{cuda}).*\.so$")
    record = []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in found.files or ():
            path = str(file)
            if ".." in file.parts or file.suffix == ".pyc" or path.endswith("RECORD") or other_library.match(file.name):
                continue
            data = file.read_binary()
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{path},sha256={digest},{len(data)}\n")
            wheel.writestr(path, data)
        place = next(str(f) for f in found.files or () if str(f).endswith("RECORD"))
        wheel.writestr(place, "".join(record) + f"{place},,\n")
    return target


# --- steps ------------------------------------------------------------------------------------------------------------


def run_step(name: str, args: argparse.Namespace, site: Path, seconds: float) -> dict[str, Any]:
    """One step in a process of its own; the figures that it wrote, and what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, str(STEPS), name, args.device, str(found), str(seconds)]
        paths = [str(site), str(TREE), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TMPDIR": folder}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        if args.device == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        start = time.monotonic()
        process = subprocess.Popen(
            command, env=environment, cwd=TREE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=seconds)
            state = "passed" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the step's own children too
            said, state = process.communicate()[0], "timed out"
        result = {"state": state, "seconds": round(time.monotonic() - start, 1)}
        if found.exists():
            result["found"] = json.loads(found.read_text())
        if state != "passed":
            result["error"] = f"exit code {process.returncode}: {said.strip()[-3000:]}"
        return result


def run_steps(args: argparse.Namespace) -> dict[str, Any]:
    """All steps, each within its limit and the time that is left."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as site:
        packages = fetch(args.wheels, Path(site), 90) if unmet() else {"missing": []}
        told: dict[str, Any] = {
            "schema": 1,
            "device": args.device,
            "small": args.device == "cpu",
            "packages": packages,
            "steps": {},
        }
        for name in args.only or LIMITS:
            left = args.budget - (time.monotonic() - start)
            if left < 5:
                told["steps"][name] = {"state": "skipped", "error": f"{left:.0f} s of {args.budget} s are left"}
            else:
                told["steps"][name] = run_step(name, args, Path(site), min(LIMITS[name], left))
            step = told["steps"][name]
            told["seconds"] = round(time.monotonic() - start, 1)
            told["ok"] = all(s["state"] == "passed" for s in told["steps"].values())
            written = args.out.with_suffix(".part")
            written.write_text(json.dumps(told, indent=1) + "\n")
            written.replace(args.out)
            print(
                f"{name:12} {step['state']:9} {step.get('seconds', 0):6.1f} s  {step.get('error', '')[-200:]}".rstrip(),
                flush=True,
            )
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for the rehearsal")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--wheels", type=Path, default=TREE / "wheels")
    parser.add_argument("--only", nargs="+", choices=LIMITS, help="run these steps alone")
    parser.add_argument("--budget", type=int, default=BUDGET, help="seconds for everything")
    parser.add_argument("--list", action="store_true", help="name the steps and what is missing here")
    parser.add_argument(
        "--pack", type=Path, metavar="FOLDER", help="write wheels of this environment's packages, and stop"
    )
    parser.add_argument("--cuda", default="13", help="the release of CUDA whose libraries --pack takes")
    args = parser.parse_args()
    if args.list:
        print("steps:", *LIMITS, "\nmissing:", *(map(str, unmet()) if unmet() else ["nothing"]))
        return 0
    if args.pack:
        for wheel in pack(args.pack, args.cuda):
            print(f"{wheel} {wheel.stat().st_size / 2**20:.1f} MiB")
        return 0
    told = run_steps(args)
    print(f"{told['seconds']:.0f} s; {'all passed' if told['ok'] else 'NOT all passed'}: {args.out}")
    return 0 if told["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
