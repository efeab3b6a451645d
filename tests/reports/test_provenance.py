"""`oftsurgery.json` and the metadata of safetensors files: what they say, that it is so, and that other versions' fields
survive.
"""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import adapted, build, quiet_fold
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import oftsurgery
from oftsurgery import AdapterInfo, CheckpointError, FoldRecord, ModuleRecord
from oftsurgery.cli import main as cli
from oftsurgery.records.record_file import public_record, record_in

RECORD = "oftsurgery.json"
NOT_HASHED = (RECORD, "README.md")  # itself, and the card, which people edit


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BASE, two adapters, and FOLDED, which carries both, one fold after the other, in two shards."""
    folder = tmp_path_factory.mktemp("provenance")
    build("llama").save_pretrained(folder / "BASE")
    for i, name in enumerate(("ADAPTER", "OTHER")):
        adapted(build("llama"), ["q_proj", "down_proj"], seed=i).save_pretrained(folder / name)
    quiet_fold(folder / "BASE", folder / "ADAPTER", folder / "ONCE")
    quiet_fold(folder / "ONCE", folder / "OTHER", folder / "FOLDED", max_shard_size="200KB")
    return folder


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_record_has_the_hash_of_every_other_file(place: Path) -> None:
    for name in ("ONCE", "FOLDED"):
        folder = place / name
        assert stored(folder)["files"] == {p.name: sha256(p) for p in folder.iterdir() if p.name not in NOT_HASHED}


def test_a_second_fold_appends(place: Path) -> None:
    first, second = stored(place / "ONCE"), stored(place / "FOLDED")
    assert first["earlier"] == []
    assert second["earlier"] == [first]
    assert second["adapters"][0]["sha256"] == sha256(place / "OTHER" / "adapter_model.safetensors")
    assert first["adapters"][0]["sha256"] == sha256(place / "ADAPTER" / "adapter_model.safetensors")


def test_every_shard_says_what_was_folded_before_the_first_was_written(place: Path) -> None:
    shards = sorted((place / "FOLDED").glob("*.safetensors"))
    assert len(shards) > 1
    record = stored(place / "FOLDED")
    for path in shards:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        said = json.loads(metadata["oftsurgery"])
        assert said == {
            "adapters": [{k: a[k] for k in ("dialect", "fingerprint", "sha256")} for a in record["adapters"]],
            "earlier": [
                [{k: a[k] for k in ("dialect", "fingerprint", "sha256")} for a in record["earlier"][0]["adapters"]]
            ],
            "format": "same",
            "rounding": "nearest",
            "versions": record["versions"],
        }
        assert set(said["versions"]) >= {"oftsurgery", "torch", "bitsandbytes", "peft", "transformers"}


def test_a_live_model_saved_says_the_same(place: Path, tmp_path: Path) -> None:
    model = build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        folded = oftsurgery.fold(oftsurgery.fold(model, place / "ADAPTER"), place / "OTHER")
    record = oftsurgery.export_safetensors(folded, tmp_path / "out", torch.bfloat16)
    assert record is not None
    assert record.to_dict() == stored(tmp_path / "out")
    assert record.files == {p.name: sha256(p) for p in (tmp_path / "out").iterdir() if p.name not in NOT_HASHED}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        said = json.loads(file.metadata()["oftsurgery"])
    assert said["format"] == "bf16"
    assert [a["sha256"] for a in said["adapters"]] == [sha256(place / "OTHER" / "adapter_model.safetensors")]
    assert [a["sha256"] for a in said["earlier"][0]] == [sha256(place / "ADAPTER" / "adapter_model.safetensors")]
    # neither this fold's record nor the earlier one's tells of this machine
    assert str(place) not in (tmp_path / "out" / RECORD).read_text()
    assert [a["source"] for r in (stored(tmp_path / "out"), record.earlier[0].to_dict()) for a in r["adapters"]] == [
        "OTHER",
        "ADAPTER",
    ]
    # nothing folded, nothing said
    oftsurgery.export_safetensors(model, tmp_path / "plain")
    with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not (tmp_path / "plain" / RECORD).exists()


def test_an_unfolded_checkpoint_does_not_say_that_the_adapter_is_in_it(place: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.UnfoldWarning)
        oftsurgery.unfold_checkpoint(place / "FOLDED", tmp_path / "one", adapter=place / "OTHER")
        oftsurgery.unfold_checkpoint(tmp_path / "one", tmp_path / "none", adapter=place / "ADAPTER")
    left = stored(tmp_path / "one")
    assert left["files"] == {p.name: sha256(p) for p in (tmp_path / "one").iterdir() if p.name not in NOT_HASHED}
    assert left | {"files": None} == stored(place / "ONCE") | {"files": None}
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        said = json.loads(file.metadata()["oftsurgery"])
    assert [a["fingerprint"] for a in said["adapters"]] == [left["adapters"][0]["fingerprint"]]
    assert said["earlier"] == []
    with safe_open(tmp_path / "none" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not (tmp_path / "none" / RECORD).exists()


@pytest.mark.parametrize(
    ("said", "public"),
    [
        ("org/model", "org/model"),
        ("default", "default"),
        ("/home/someone/runs/llama", "llama"),
        ("~/runs/llama", "llama"),
        ("../llama", "llama"),
        ("runs/2026/llama", "llama"),
        ("C:\\runs\\llama", "C:\\runs\\llama"),
        ("/", "/"),
        ("", ""),
        ("x" * 5000, "x" * 5000),
        (None, None),
    ],
)
def test_a_record_that_goes_out_names_no_place_of_this_machine(said: str | None, public: str | None) -> None:
    info = AdapterInfo(said, "peft-0.21", "xxh3:0", None, said, None)
    record = FoldRecord((info,), {}, earlier=(FoldRecord((info,), {}),))
    out = public_record(record)
    assert {a.source for r in (out, *out.earlier) for a in r.adapters} == {public}
    assert {a.base_model for r in (out, *out.earlier) for a in r.adapters} == {public}


# --- other versions' fields -------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
UNKNOWN = st.dictionaries(st.text("xyz", min_size=1, max_size=6), JSON, max_size=3)
MODULE = {
    "format": "nf4",
    "side": "in",
    "block_size": [16, 32],
    "error": 0.09,
    "defect": 0.0,
    "angle": 0.5,
    "before": "xxh3:1",
    "after": "xxh3:2",
}
ADAPTER = {
    "source": "a",
    "dialect": "peft-0.21",
    "fingerprint": "xxh3:3",
    "sha256": None,
    "base_model": "org/base",
    "peft_version": "0.21.2",
}
OLDEST = {"adapters": [ADAPTER], "modules": {"up": MODULE}}


@given(UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
def test_unknown_fields_at_every_level_are_read_and_written_again(
    top: dict[str, Any], adapter: dict[str, Any], module: dict[str, Any], earlier: dict[str, Any]
) -> None:
    whole = FoldRecord.from_dict(OLDEST).to_dict()
    data = whole | top
    data["adapters"] = [whole["adapters"][0] | adapter]
    data["modules"] = {"up": whole["modules"]["up"] | module}
    data["earlier"] = [whole | earlier]
    text = json.dumps(data)
    record = FoldRecord.from_dict(json.loads(text))
    assert record.to_dict() == data
    assert json.loads(record.to_json()) == data
    assert FoldRecord.from_dict(record.to_dict()) == record
    for made in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record)):  # noqa: S301
        assert made == record
        assert made.to_dict() == data
    assert dict(record.extra) == top
    assert dict(record.modules["up"].extra) == module


def test_unknown_fields_survive_a_second_fold_and_its_unfolding_on_disk(place: Path, tmp_path: Path) -> None:
    quiet_fold(place / "BASE", place / "ADAPTER", tmp_path / "newer")
    data = stored(tmp_path / "newer")
    data["calibration"] = {"samples": 128, "of": ["a", None, 1.5]}
    data["adapters"][0]["signature"] = "…"
    for module in data["modules"].values():
        module["kurtosis"] = 3.1
    (tmp_path / "newer" / RECORD).write_text(json.dumps(data))
    quiet_fold(tmp_path / "newer", place / "OTHER", tmp_path / "twice")
    assert stored(tmp_path / "twice")["earlier"] == [data]
    oftsurgery.unfold_checkpoint(tmp_path / "twice", tmp_path / "back", base=tmp_path / "newer")
    assert stored(tmp_path / "back") | {"files": None} == data | {"files": None}


def test_a_record_of_an_older_version_is_read_with_defaults() -> None:
    record = FoldRecord.from_dict(OLDEST)
    assert (record.rounding, record.earlier, dict(record.files), dict(record.saved)) == ("nearest", (), {}, {})
    module = record.modules["up"]
    assert (module.untied, module.backend, module.block_size) == (False, "reference", (16, 32))
    assert isinstance(hash(module), int)
    assert isinstance(hash(record.adapters[0]), int)
    with pytest.raises(TypeError, match="mappingproxy"):
        record.extra["x"] = 1  # type: ignore[index]


WRONG: dict[str, tuple[Any, str]] = {
    "no object": ([], "FoldRecord is a list"),
    "no modules": ({"adapters": []}, "FoldRecord lacks 'modules'"),
    "modules in a list": ({"adapters": [], "modules": []}, r"FoldRecord.modules is '\(\)'"),
    "an adapter of text": ({"adapters": ["a"], "modules": {}}, "AdapterInfo is a str"),
    "adapters of a number": ({"adapters": 3, "modules": {}}, "not iterable"),
    "an adapter without its hash": ({"adapters": [{"source": "a", "dialect": "b"}], "modules": {}}, "'fingerprint'"),
    "a dialect of None": ({"adapters": [ADAPTER | {"dialect": None}], "modules": {}}, "AdapterInfo.dialect is 'None'"),
    "an error in words": (OLDEST | {"modules": {"up": MODULE | {"error": "small"}}}, "ModuleRecord.error is 'small'"),
    "an error beyond floats": (OLDEST | {"modules": {"up": MODULE | {"error": 10**400}}}, "ModuleRecord.error"),
    "a boolean angle": (OLDEST | {"modules": {"up": MODULE | {"angle": True}}}, "ModuleRecord.angle is 'True'"),
    "a fraction of a block": (OLDEST | {"modules": {"up": MODULE | {"block_size": [1.5]}}}, "ModuleRecord.block_size"),
    "versions in a list": (OLDEST | {"versions": ["torch"]}, "FoldRecord.versions"),
    "a hash that is none": (OLDEST | {"files": {"a": 1}}, "FoldRecord.files"),
    "earlier of an object": (OLDEST | {"earlier": {"a": 1}}, "FoldRecord is a str"),
    "a damaged earlier one": (OLDEST | {"earlier": [{"adapters": []}]}, "FoldRecord lacks 'modules'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_record_that_says_nonsense_is_refused_with_the_field(case: str, tmp_path: Path) -> None:
    data, text = WRONG[case]
    if isinstance(data, dict):
        (tmp_path / RECORD).write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=r"record of an earlier fold cannot be read.*" + text):
            record_in(tmp_path)
    with pytest.raises(TypeError, match=text):
        FoldRecord.from_dict(data)


def test_a_field_that_no_check_knows_is_an_error_of_the_class() -> None:
    from oftsurgery.records.record import _Stored

    with pytest.raises(TypeError, match=r"New\.names: there is no check of a value from JSON for set\[str\]"):

        class New(_Stored):
            names: set[str]


def test_a_record_of_records_without_end_is_refused(tmp_path: Path) -> None:
    data = '{"adapters": [], "modules": {}, "earlier": [' * 400 + "]}" * 400
    (tmp_path / RECORD).write_text(data)
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        record_in(tmp_path)


# --- show and verify --------------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(list(words))
    return code, capsys.readouterr().out


def test_show_prints_every_fold_with_what_it_was(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = said(capsys, "show", str(place / "FOLDED"))
    record = stored(place / "FOLDED")
    assert code == 0
    for i, fold in enumerate((record["earlier"][0], record), start=1):
        part = out.split(f"fold {i} of 2\n")[1].split(f"fold {i + 1} of")[0]
        for a in fold["adapters"]:
            for fact in ("source", "fingerprint", "sha256", "peft_version"):
                assert a[fact] in part
        assert f"torch {metadata.version('torch')}" in part
        assert "rounding: nearest" in part
        for path, m in fold["modules"].items():
            (line,) = (row for row in part.splitlines() if row.startswith(path + " "))
            assert f"{m['error']:.3e}" in line
        errors = [float(row.split()[4]) for row in part.splitlines() if row.startswith("model.")]
        assert errors == sorted(errors, reverse=True)
    assert f"files with a recorded hash: {len(record['files'])}" in out
    assert json.loads(said(capsys, "show", str(place / "FOLDED"), "--json")[1]) == record
    assert said(capsys, "show", str(place / "BASE"))[1] == "nothing is folded into this checkpoint\n"


def test_show_of_hostile_values_keeps_the_terminal_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "\x1b[2J"
    data = {
        "adapters": [ADAPTER | dict.fromkeys(ADAPTER, bad)],
        "modules": {bad: MODULE | {"format": bad, "side": bad}},
        "saved": {bad: bad},
        "rounding": bad,
        "base": {bad: bad},
        "versions": {bad: bad},
        bad: bad,
    }
    (tmp_path / RECORD).write_text(json.dumps(data))
    code, out = said(capsys, "show", str(tmp_path))
    assert code == 0
    assert "\x1b" not in out
    assert out.count("\\x1b[2J") >= 12


def test_verify_re_checks_the_hashes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    quiet_fold(place / "BASE", place / "ADAPTER", folder)
    code, out = said(capsys, "verify", str(folder))
    count = len(stored(folder)["files"])
    verdict = f"ok: all {count} files are as recorded; the weights were not compared, which needs BASE and ADAPTER"
    assert (code, out) == (0, f"{count} files are as recorded\n{verdict}\n")
    both = [str(place / "BASE"), str(place / "ADAPTER")]
    assert said(capsys, "verify", str(folder), *both)[0] == 0
    # one byte of a norm, which no rotation touches
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    with safe_open(path, "pt") as file:
        norm = file.get_tensor("model.norm.weight").numpy().tobytes()
    data[data.index(norm)] ^= 1
    path.write_bytes(data)
    (folder / "generation_config.json").unlink()
    for words in ([], both):
        code, out = said(capsys, "verify", str(folder), *words)
        assert code == 1
        assert "model.safetensors: CHANGED since it was recorded" in out
        assert "generation_config.json: MISSING since it was recorded" in out
    code, out = said(capsys, "verify", str(folder), "--json")
    assert code == 1
    assert {n: s for n, s in json.loads(out)["files"].items() if s != "ok"} == {
        "generation_config.json": "missing",
        "model.safetensors": "changed",
    }
    assert not oftsurgery.verify_checkpoint(folder).ok
    # the card is people's to edit
    (folder / "README.md").write_text("# mine")
    assert "README.md" not in oftsurgery.verify_checkpoint(folder).files


def test_verify_without_anything_to_check_by_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, text in ((place / "BASE", "the folder has no oftsurgery.json"), (tmp_path, "no hashes of files")):
        if folder == tmp_path:
            (tmp_path / RECORD).write_text(json.dumps(OLDEST))
        assert cli.main(["verify", str(folder)]) == 2
        err = capsys.readouterr().err
        assert text in err
        assert "give the base and the adapter too" in err
    assert cli.main(["verify", str(place / "FOLDED"), str(place / "BASE")]) == 2
    assert "give base and adapter" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", "link"])
def test_a_record_cannot_make_verify_read_elsewhere(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / RECORD).write_text(json.dumps(OLDEST | {"files": {name: sha256(tmp_path / "secret")}}))
    assert cli.main(["verify", str(folder)]) == 2
    assert "CheckpointError" in capsys.readouterr().err


def test_unfinished_work_of_other_versions_is_not_resumed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shards say which versions wrote them."""
    import oftsurgery.folding.disk_run
    import oftsurgery.records.record

    step = oftsurgery.folding.disk_run.Run.step

    def interrupt(self: Any, name: str, nbytes: int) -> None:
        if self.done > self.total // 2:
            raise KeyboardInterrupt
        step(self, name, nbytes)

    words = (place / "BASE", place / "ADAPTER", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(oftsurgery.folding.disk_run.Run, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quiet_fold(*words, max_shard_size="100KB")
    assert list((tmp_path / ".out.oftsurgery").glob("*.safetensors"))
    with monkeypatch.context() as patched:
        patched.setattr(oftsurgery.folding.disk_run, "versions", lambda: {"torch": "3.0"})
        with pytest.raises(oftsurgery.StateError, match="has other inputs or settings"):
            quiet_fold(*words, max_shard_size="100KB", resume=True)
    quiet_fold(*words, max_shard_size="100KB", resume=True)
    assert oftsurgery.verify_checkpoint(tmp_path / "out", place / "BASE", place / "ADAPTER").ok


def test_module_records_are_small_enough_to_be_one_per_layer() -> None:
    record = FoldRecord.from_dict(OLDEST)
    assert ModuleRecord.from_dict(MODULE) == record.modules["up"]
    assert repr(record.modules["up"]).count("extra") == 0
