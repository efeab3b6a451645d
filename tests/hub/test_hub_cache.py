"""Hub ids without a network: from the cache that huggingface_hub keeps, links and all."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from models import live, llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache(home: Path, repo: str, folder: Path) -> None:
    """What `snapshot_download` leaves: blobs by hash, and a snapshot of relative links to them."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "blobs").mkdir()
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        data = path.read_bytes()
        blob = hashlib.sha256(data).hexdigest()
        (root / "blobs" / blob).write_bytes(data)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob))


def run(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "oftsurgery", *words], env=environment, capture_output=True, text=True, check=False
    )


def test_base_and_adapter_come_from_the_cache_when_offline(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    live(llama()).save_pretrained(tmp_path / "adapter")
    cache(tmp_path / "home", "org/base", tmp_path / "base")
    cache(tmp_path / "home", "me/adapter", tmp_path / "adapter")
    done = run(
        tmp_path / "home", "fold", "org/base", "me/adapter", str(tmp_path / "out"), "-q", "--trained-on", "plain"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    local = run(
        tmp_path / "home",
        "fold",
        str(tmp_path / "base"),
        str(tmp_path / "adapter"),
        str(tmp_path / "local"),
        "--trained-on",
        "plain",
    )
    assert local.returncode == 0, local.stderr
    names = {p.name for p in (tmp_path / "local").iterdir()}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    # copies, not links into the cache; the record and the card alone say where it came from
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    for name in names - {"oftsurgery.json", "README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name


def test_what_the_cache_lacks_is_refused_with_the_reason(tmp_path: Path) -> None:
    done = run(tmp_path / "home", "fold", "org/base", "me/adapter", str(tmp_path / "out"), "--trained-on", "plain")
    assert done.returncode == 2
    assert "AdapterError: the name is neither a folder nor a Hub repository that can be read" in done.stderr
    assert "offline use needs a filled cache" in done.stderr
    assert "Traceback" not in done.stderr
