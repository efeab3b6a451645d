"""Bases and adapters from the Hub, through the real huggingface_hub: what is downloaded, and what is said of what is not there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from checkpoints import load
from hub_server import Hub, Repo, serving, talk_to
from models import distance, live, llama, logits
from safetensors.torch import load_file
from warned import noted, quietly

import oftsurgery
from oftsurgery import AdapterError, CheckpointError, SourceWarning, StateError
from oftsurgery.cli import main as cli
from oftsurgery.files.finding import find_checkpoint

TOKEN = "hf_" + "Ab3" * 12
BASE, ADAPTER = "org/base", "me/adapter"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1 and v2 (bases that differ), sharded (v1), adapter (of v1)."""
    folder = tmp_path_factory.mktemp("reading")
    one, two = llama(), llama()
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.mul_(1.5)
    one.save_pretrained(folder / "v1")
    one.save_pretrained(folder / "sharded", max_shard_size="100KB")
    two.save_pretrained(folder / "v2")
    model = live(one)
    model.save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": BASE}))
    torch.save(logits(model), folder / "logits.pt")
    return folder


@pytest.fixture
def server() -> Iterator[Hub]:
    with serving(Hub({TOKEN: "me"})) as running:
        yield running


@pytest.fixture(autouse=True)
def online(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The client in this process talks to the server, in an empty folder."""
    talk_to(server, TOKEN, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    yield
    huggingface_hub.close_session()


def hold(server: Hub, repo_id: str, files: dict[str, bytes], *branches: str) -> str:
    """A commit of a repository, at these branches (else main)."""
    repo = server.repos.setdefault(repo_id, Repo(private=False))
    sha = repo.commit(dict(files), "by hand", "")
    repo.branches |= dict.fromkeys(branches or ("main",), sha)
    return sha


def files_of(folder: Path, below: str = "") -> dict[str, bytes]:
    return {f"{below}{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}


def downloaded(server: Hub) -> set[str]:
    return {re.sub(r"^.*?/resolve/[^/]+/", "", path) for path in server.asked("GET", "/resolve/")}


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()


# --- which files ------------------------------------------------------------------------------------------------------

OTHERS = dict.fromkeys(
    (
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "original/model.safetensors",
        "original/params.json",
        "original/tokenizer.model",
        "model.fp16.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "onnx/model.onnx",
        "onnx/config.json",
        "openvino/openvino_model.bin",
        "model.Q4_K_M.gguf",
        "unet/diffusion_pytorch_model.safetensors",
        "checkpoint-500/model.safetensors",
        "checkpoint-500/optimizer.pt",
    ),
    b"x" * 100,
)


@pytest.mark.parametrize("base", ["v1", "sharded"])
def test_of_several_formats_only_what_transformers_reads_is_downloaded(place: Path, server: Hub, base: str) -> None:
    mine = files_of(place / base)
    hold(server, BASE, mine | OTHERS | {"tokenizer.json": b"{}", "LICENSE": b"free"})
    beside = dict.fromkeys(("checkpoint-500/tokenizer.json", "checkpoint-500/adapter_config.json"), b"{}")
    hold(server, ADAPTER, files_of(place / "adapter") | OTHERS | beside)
    folder = find_checkpoint(BASE)
    assert downloaded(server) == set(mine) | {"tokenizer.json", "LICENSE"}
    server.requests.clear()
    quietly(oftsurgery.fold_checkpoint, BASE, ADAPTER, "out", trained_on="plain")
    # the card may say what the adapter was trained on
    assert downloaded(server) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert distance(logits(load(Path("out"), "LlamaForCausalLM")), torch.load(place / "logits.pt")) < 1e-6
    # and offline from what is there, though the repository has more
    server.requests.clear()
    with pytest.MonkeyPatch.context() as patch:
        offline(patch)
        assert find_checkpoint(BASE) == folder
        quietly(oftsurgery.fold_checkpoint, BASE, ADAPTER, "out-2", trained_on="plain")
    assert server.requests == []


def test_two_checkpoints_are_refused_before_either_is_downloaded(place: Path, server: Hub) -> None:
    hold(server, BASE, files_of(place / "sharded") | files_of(place / "v1"))
    with pytest.raises(
        CheckpointError, match=r"holds two checkpoints.*Remedy: remove the checkpoint .*hf download --exclude"
    ):
        find_checkpoint(BASE)
    assert not any(name.endswith(".safetensors") for name in downloaded(server))


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (
            {"pytorch_model.bin": b"x"},
            r"pytorch_model.bin is a pickle, which could run code .*Remedy: load the model with transformers",
        ),
        (
            {"a.Q4_K_M.gguf": b"x"},
            r"the weights are there only as a.Q4_K_M.gguf.*Remedy: give the model from which",
        ),
        ({"onnx/model.onnx": b"x"}, "the weights are there only as onnx/model.onnx"),
        (
            {"consolidated.safetensors": b"x"},
            "the folder has neither model.safetensors nor model.safetensors.index.json",
        ),
    ],
)
def test_a_repository_without_such_weights(server: Hub, files: dict[str, bytes], text: str) -> None:
    hold(server, BASE, {"config.json": b"{}", **files})
    with pytest.raises(CheckpointError, match=text):
        find_checkpoint(BASE)
    assert downloaded(server) == {"config.json"}


def test_an_adapter_in_the_place_of_a_base(place: Path, server: Hub) -> None:
    hold(server, ADAPTER, files_of(place / "adapter"))
    with pytest.raises(
        CheckpointError,
        match=r"the folder holds an adapter, not a model .*Remedy: give the model's folder in this place",
    ):
        oftsurgery.fold_checkpoint(ADAPTER, ADAPTER, "out", trained_on="plain")
    assert [f.code for f in oftsurgery.doctor(ADAPTER)] == []


# --- revisions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def revisions(place: Path, server: Hub) -> Callable[..., Path]:
    """A base of which main is another one than v1, and a function that gives the adapter with these fields."""
    hold(server, BASE, files_of(place / "v1"), "v1", "release/1")
    hold(server, BASE, files_of(place / "v2"), "main")

    def adapter(**fields: Any) -> Path:
        folder = Path("with-" + "-".join(map(str, fields.values())).replace("/", "-"))
        folder.mkdir(exist_ok=True)
        for name, data in files_of(place / "adapter").items():
            (folder / name).write_bytes(data)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | fields))
        return folder

    return adapter


def right(folder: str, place: Path) -> bool:
    return distance(logits(load(Path(folder), "LlamaForCausalLM")), torch.load(place / "logits.pt")) < 1e-5


def test_the_base_is_read_at_the_revision_that_the_adapter_was_trained_at(
    place: Path, server: Hub, revisions: Callable[..., Path]
) -> None:
    adapter, commit = revisions(revision="v1"), server.repos[BASE].branches["v1"]
    with pytest.warns(
        SourceWarning, match=r"org/base is read at revision v1, which the adapter's config names; revision="
    ):
        record = oftsurgery.fold_checkpoint(BASE, adapter, "out", trained_on="plain")
    assert right("out", place)
    assert (record.base["revision"], record.base["commit"]) == ("v1", commit)
    with noted() as said:
        assert oftsurgery.verify_checkpoint("out", BASE, adapter).ok
        assert [f.code for f in oftsurgery.doctor("out", base=BASE, adapter=adapter)] == ["kept"]
        assert [f.code for f in oftsurgery.doctor(adapter, base=BASE)] == []
        oftsurgery.unfold_checkpoint("out", "back", base=BASE)
    texts = {str(w.message).partition(";")[0] for w in said}
    named = "org/base is read at revision v1, which "
    assert texts == {f"{named}the adapter's config names", f"{named}the fold's record names"}
    one, other = (load_file(Path(folder) / "model.safetensors") for folder in ("back", place / "v1"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    # a model in memory is put back from it too
    folded = quietly(oftsurgery.fold, load(place / "v1", "LlamaForCausalLM"), adapter)
    assert distance(logits(oftsurgery.unfold(folded, base=f"{BASE}@v1")), logits(llama())) == 0


def test_a_revision_that_is_asked_for_comes_first(
    place: Path, server: Hub, revisions: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, pinned = revisions(revision=None), revisions(revision="nowhere")
    record = oftsurgery.fold_checkpoint(BASE, plain, "main", trained_on="plain")
    assert not right("main", place)
    assert record.base["commit"] == server.repos[BASE].branches["main"]
    assert "revision" not in record.base
    for i, (given, asked) in enumerate(((BASE, "v1"), (f"{BASE}@v1", None), (f"{BASE}@v1", "v1"))):
        for adapter in (plain, pinned):
            assert (
                oftsurgery.fold_checkpoint(given, adapter, f"{adapter}-{i}", revision=asked, trained_on="plain").base[
                    "revision"
                ]
                == "v1"
            )
            assert right(f"{adapter}-{i}", place)
    words = ["fold", BASE, str(pinned), "cli", "--base-revision", "release/1", "--trained-on", "plain"]
    assert cli.main(words) == 0
    assert right("cli", place)
    capsys.readouterr()
    assert cli.main(["show", "cli"]) == 0
    assert "revision release/1, commit " in capsys.readouterr().out
    assert cli.main(["verify", "cli", BASE, str(pinned), "--base-revision", "release/1"]) == 0
    assert cli.main(["fold", BASE, str(pinned), "wrong"]) == 2
    assert "the repository has no revision 'nowhere' [at org/base] Remedy: name a branch" in capsys.readouterr().err
    assert cli.main(["fold", str(place / "v1"), str(plain), "wrong", "--base-revision", "v1"]) == 2
    assert "a local folder has no revisions" in capsys.readouterr().err
    assert cli.main(["fold", f"{BASE}@v2", str(plain), "wrong", "--base-revision", "v1"]) == 2
    assert "two revisions of one repository were given" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields", [{"revision": "v1", "base_model_name_or_path": "org/other"}, {"revision": "main"}, {"revision": ""}]
)
def test_a_revision_of_another_base_or_the_main_one_changes_nothing(
    place: Path, server: Hub, revisions: Callable[..., Path], fields: dict[str, Any]
) -> None:
    with noted() as said:
        record = oftsurgery.fold_checkpoint(BASE, revisions(**fields), "out", trained_on="plain")
    assert not said
    assert record.base["commit"] == server.repos[BASE].branches["main"]


def test_a_local_base_has_no_revision(place: Path, revisions: Callable[..., Path]) -> None:
    record = oftsurgery.fold_checkpoint(place / "v1", revisions(revision="v1"), "out", trained_on="plain")
    assert record.base.keys().isdisjoint({"revision", "commit"})


def test_adapters_that_were_trained_at_different_revisions(place: Path, revisions: Callable[..., Path]) -> None:
    one = revisions(revision="v1")
    second = quietly(oftsurgery.load_adapter(revisions(revision="release/1")).scaled, 0.5)
    with pytest.raises(
        StateError, match=r"trained at different revisions of org/base: v1, release/1 .*Remedy: name the revision"
    ):
        oftsurgery.fold_checkpoint(BASE, [one, second], "out", trained_on="plain")


@pytest.mark.parametrize("revision", ["../../../etc/passwd", "v1/../../x", 7])
def test_revisions_that_an_adapters_config_may_not_name(revisions: Callable[..., Path], revision: Any) -> None:
    with (
        noted(),
        pytest.raises(
            (AdapterError, CheckpointError), match=r"no repository has a revision of the name|revision = '7'"
        ),
    ):
        oftsurgery.fold_checkpoint(BASE, revisions(revision=revision), "out", trained_on="plain")


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_in_a_subfolder_and_at_a_revision(
    place: Path, server: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = files_of(place / "adapter", "runs/sft/")
    hold(server, ADAPTER, mine | {"README.md": b"x"})
    hold(server, ADAPTER, files_of(place / "adapter"), "top")
    fingerprint = oftsurgery.load_adapter(place / "adapter").fingerprint
    for given, named in (
        (f"{ADAPTER}/runs/sft", {}),
        (ADAPTER, {"subfolder": "runs/sft"}),
        (f"{ADAPTER}/runs", {"subfolder": "sft"}),
        (f"{ADAPTER}/runs/sft@main", {}),
        (f"{ADAPTER}@top", {}),
        (ADAPTER, {"revision": "top"}),
    ):
        found = oftsurgery.load_adapter(given, **named)
        assert found.fingerprint == fingerprint
        assert oftsurgery.load_adapter(str(found.source)).source == found.source
        top = "top" in (*named.values(), given[-3:])
        assert found.source == (
            f"{ADAPTER}@top" if top else f"hf://{ADAPTER}{'@main' * given.endswith('@main')}/runs/sft"
        )
    with pytest.warns(
        SourceWarning, match=r"me/adapter holds one adapter, in its subfolder runs/sft; this adapter is read"
    ):
        assert oftsurgery.load_adapter(ADAPTER).source == f"hf://{ADAPTER}/runs/sft"
    record = oftsurgery.fold_checkpoint(place / "v1", f"{ADAPTER}/runs/sft", "out", trained_on="plain")
    assert record.adapters[0].source == f"hf://{ADAPTER}/runs/sft"
    assert cli.main(["adapter", "show", ADAPTER, "--adapter-subfolder", "runs/sft", "-q"]) == 0
    assert (
        cli.main(
            ["fold", str(place / "v1"), ADAPTER, "out-2", "--adapter-subfolder", "runs/sft", "--trained-on", "plain"]
        )
        == 0
    )
    assert "SourceWarning" not in capsys.readouterr().err
    assert cli.main(["verify", "out-2", str(place / "v1"), ADAPTER, "--adapter-subfolder", "runs/sft"]) == 0
    assert quietly(oftsurgery.doctor, ADAPTER) == []


@pytest.mark.parametrize("name", ["training_args.yaml", "README.md"])
def test_what_the_adapter_was_trained_on_is_asked_of_the_hub_too(name: str, place: Path, server: Hub) -> None:
    settings = "model_name_or_path: x\nfinetuning_type: oft\nquantization_bit: 8\n"
    card = "The following `bitsandbytes` quantization config was used during training:\n- load_in_8bit: True\n"
    said = settings if name.endswith("yaml") else card
    hold(
        server,
        ADAPTER,
        {n: t for n, t in files_of(place / "adapter").items() if n != "README.md"} | {name: said.encode()},
    )
    with noted() as caught:
        record = oftsurgery.fold_checkpoint(place / "v1", ADAPTER, "out")
    assert (record.base["trained_on"], record.base["trained_on_source"]) == ("int8", name)
    assert any(f"trained on int8, as {name} says" in str(w.message) for w in caught)


def test_several_adapters_are_listed_the_last_checkpoint_last(place: Path, server: Hub) -> None:
    files = {}
    for step in (500, 1000, 1500, 900):
        files |= files_of(place / "adapter", f"checkpoint-{step}/") | {f"checkpoint-{step}/tokenizer.json": b"{}"}
    hold(server, ADAPTER, files)
    text = (
        r"the folder holds 4 adapters, each in a subfolder: checkpoint-500, checkpoint-900, checkpoint-1000, checkpoint-1500 "
        r".*Remedy: name one subfolder: subfolder='checkpoint-1500' \(--adapter-subfolder checkpoint-1500\)"
    )
    with pytest.raises(AdapterError, match=text):
        oftsurgery.load_adapter(ADAPTER)
    assert downloaded(server) == set()
    assert oftsurgery.load_adapter(ADAPTER, subfolder="checkpoint-900").sha256
    with pytest.MonkeyPatch.context() as patch:
        offline(patch)  # what is in the cache is all there is
        with pytest.warns(SourceWarning, match="in its subfolder checkpoint-900"):
            oftsurgery.load_adapter(ADAPTER)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"config.json": b"{}", "model.safetensors": b"x"}, r"neither the folder nor a subfolder has adapter_config.json; .*\(model.safetensors"),
        ({"x.Q8_0.gguf": b"x"}, r"the folder holds a model \(x.Q8_0.gguf"),
        ({"README.md": b"x"}, r"the folder has no adapter_config.json \[at me/adapter\] Remedy: give the folder that peft's"),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, r"adapter_model.bin is a pickle, which could run code .*save_pretrained\(…, safe_ser"),
        ({"adapter_config.json": b"{}"}, r"the folder has no adapter_model.safetensors \[at me/adapter\]"),
        ({"adapter_model.safetensors": b"x"}, r"the folder has no adapter_config.json"),
        ({"sub/adapter_config.json": b"{}", "sub/adapter_model.bin": b"x"}, "adapter_model.bin is a pickle"),
        ({"adapter_model.bin": b"x"}, "adapter_model.bin is a pickle"),
    ],
)  # fmt: skip
def test_a_repository_without_an_adapter(
    server: Hub, files: dict[str, bytes], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(server, ADAPTER, files)
    with noted(), pytest.raises(AdapterError, match=text):
        oftsurgery.load_adapter(ADAPTER)
    assert cli.main(["adapter", "show", ADAPTER]) == 2
    assert not any(
        name.endswith((".bin", ".gguf", "model.safetensors"))
        for name in downloaded(server) - {"adapter_model.safetensors"}
    )


def test_no_such_repository_subfolder_or_network(server: Hub, place: Path) -> None:
    hold(server, ADAPTER, files_of(place / "adapter"))
    with pytest.raises(AdapterError, match=r"neither a folder nor a Hub repository that can be read \(404"):
        oftsurgery.load_adapter("me/nothing")
    with pytest.raises(AdapterError, match=r"the folder is empty \[at hf://me/adapter/nowhere\]"):
        oftsurgery.load_adapter(f"{ADAPTER}/nowhere")
    server.fail("GET", "/api/models/", times=99, status=503)
    with pytest.raises(AdapterError, match="neither a folder nor a Hub repository that can be read"):
        oftsurgery.load_adapter("me/other")


# --- pushing beside an adapter ----------------------------------------------------------------------------------------


def test_a_push_beside_an_adapter_is_refused_with_a_remedy_that_works(place: Path, server: Hub) -> None:
    quietly(oftsurgery.fold_checkpoint, place / "v1", place / "adapter", "out", trained_on="plain")
    hold(server, ADAPTER, files_of(place / "adapter") | {".gitattributes": b""})
    text = (
        r"the repository me/adapter holds an adapter: adapter_config.json, adapter_model.safetensors; transformers would load the adapter "
        r"instead of the pushed model.*Remedy: name another repository or revision, or delete these files in the repository: (.*) \(`hf repos delete-files`\)"
    )
    with pytest.raises(StateError, match=text) as caught:
        oftsurgery.push_to_hub("out", ADAPTER)
    server.put(ADAPTER, dict.fromkeys(re.search(text, str(caught.value))[1].split(", ")))  # type: ignore[index]
    oftsurgery.push_to_hub("out", ADAPTER)
    oftsurgery.push_to_hub("out", "me/another")
    for repo in (ADAPTER, "me/another"):
        assert distance(logits(load(repo, "LlamaForCausalLM")), torch.load(place / "logits.pt")) < 1e-6  # type: ignore[arg-type]
    # the weights alone do not make it loadable
    hold(server, "me/third", {"adapter_config.json": b"{}", ".gitattributes": b""})
    with pytest.raises(StateError, match=r"holds an adapter: adapter_config.json; transformers would load"):
        oftsurgery.push_to_hub("out", "me/third")


def test_the_command_in_a_process_of_its_own(server: Hub, tmp_path: Path) -> None:
    hold(server, ADAPTER, {"config.json": b"{}"})
    done = subprocess.run(
        [sys.executable, "-m", "oftsurgery", "adapter", "show", ADAPTER],
        env={**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "oftsurgery: AdapterError: the folder has no adapter_config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_repository_is_no_base(server: Hub, place: Path) -> None:
    hold(server, BASE, {})
    with pytest.raises(CheckpointError, match=r"the folder has neither model.safetensors nor .* \[at org/base\]"):
        oftsurgery.fold_checkpoint(BASE, place / "adapter", "out", trained_on="plain")


def test_the_client_does_not_note_what_a_repository_lacks(
    server: Hub, place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The folders of sentence-transformers' modules without weights, for example."""
    index = json.dumps([{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]).encode()
    hold(server, BASE, files_of(place / "v1") | {"modules.json": index, "1_Pooling/config.json": b"{}"})
    hold(server, ADAPTER, {f"sub/{name}": data for name, data in files_of(place / "adapter").items()})
    assert cli.main(["fold", BASE, ADAPTER, "out", "-q", "--trained-on", "plain"]) == 0
    assert capsys.readouterr() == ("", "")
    assert "No files matched" not in caplog.text
    assert Path("out/1_Pooling/config.json").is_file()


def test_a_model_in_memory_of_another_commit(server: Hub, place: Path, revisions: Callable[..., Path]) -> None:
    """The cache has one commit, or several that may be meant."""
    extra = {"tokenizer.json": b"{}", "tokenizer_config.json": b'{"a": 1}'}
    server.repos[BASE].commits[server.repos[BASE].branches["v1"]].update(extra)
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, revision="v1")
    adapter = revisions(revision=server.repos[BASE].branches["main"])
    with pytest.warns(SourceWarning, match=r"the model is commit \w+ of org/base, but the adapter was trained at"):
        folded = oftsurgery.fold(model, adapter)
    find_checkpoint(f"{BASE}@v1")  # the tokenizer too
    oftsurgery.export_safetensors(folded, "out")
    assert Path("out/tokenizer_config.json").read_bytes() == extra["tokenizer_config.json"]
    find_checkpoint(BASE)
    if getattr(model.config, "_commit_hash", None) is None:  # earlier releases of transformers wrote the commit
        with pytest.warns(SourceWarning, match=r"several commits of org/base, and transformers does not say which"):
            oftsurgery.export_safetensors(folded, "out-2")
