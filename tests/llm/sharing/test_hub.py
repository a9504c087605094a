"""A model goes to the Hub whole, and alone: no place of this machine, no other file, nothing after a refusal.

A stand-in of the Hub's client keeps what it is sent.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from zotune.errors import RunError, UsageError
from zotune.ledger import read
from zotune.llm.api.load import load
from zotune.llm.checkpoints.companions import NAMES as COMPANIONS
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load as load_by_name
from zotune.llm.sharing.hub import upload, upload_after
from zotune.llm.training.train import train


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in of the Hub: what was made there, and the files that it was sent."""
    kept = SimpleNamespace(made=[], files=tmp_path / "hub", error=None)

    class Api:
        def __init__(self, **about):
            assert about["library_name"] == "zotune"

        def create_repo(self, name, *, private, exist_ok):
            if kept.error is not None:
                raise kept.error
            kept.made.append((name, private, exist_ok))
            full = name if "/" in name else f"me/{name}"
            return type("Url", (str,), {"repo_id": full})(f"https://huggingface.co/{full}")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, kept.files)
            kept.repo_id = repo_id

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return kept


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of this machine with a base model and rows."""
    place = tmp_path_factory.mktemp("this-machine") / "home/me/secret-project"
    place.mkdir(parents=True)
    lm = load_by_name(ModelOptions(model="random:llama-tiny", device="cpu"))
    lm.module.save_pretrained(place / "base")
    lm.tokenizer.save_pretrained(place / "base")
    rows = [{"text": text, "label": "yes" if i % 2 else "no"} for i, text in enumerate(["fine", "dull", "bad", "good"])]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def run(place):
    """A function: options to the folder of a run whose base, rows and output all lie in folders of this machine."""

    def make(**options):
        plain = {"model": str(place / "base"), "train_file": str(place / "rows.jsonl"), "num_dev": 1, "max_steps": 2}
        plain |= {"device": "cpu", "per_device_train_batch_size": 2, "output_dir": str(place / "runs/mine")}
        return train(TrainConfig.model_validate({**plain, **options})).output_dir

    return make


@pytest.fixture(scope="module")
def runs(run, place):
    """The folders of two runs, an adapter and whole weights."""
    return {
        tuning: run(tuning=tuning, learning_rate=0.1, save_steps=1, output_dir=str(place / "runs" / tuning))
        for tuning in ("lora", "full")
    }


@pytest.fixture
def copy(runs, tmp_path, monkeypatch):
    """A function: what was tuned to a copy of its run's folder, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return lambda tuning: shutil.copytree(runs[tuning], Path("runs/mine"))


def everything(folder):
    """The bytes of all files in a folder, and the headers of ledgers, which are compressed."""
    parts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    parts += [json.dumps(read(path).header.about).encode() for path in folder.rglob("*.zol")]
    return b"\n".join([*parts, *(path.name.encode() for path in folder.rglob("*"))])


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_what_is_sent_names_no_place_of_this_machine(hub, copy, tuning, tmp_path):
    folder = copy(tuning)
    for name in (".env", "notes.txt", "rows.jsonl", "weights.bin"):
        (folder / name).write_text("secret")
    assert upload(folder, "me/mine", base="org/base" if tuning == "lora" else None) == "https://huggingface.co/me/mine"
    sent = everything(hub.files)
    for secret in (b"secret", str(tmp_path).encode(), b"home/me", b"runs/", str(Path.home()).encode() + b"/"):
        assert secret not in sent
    assert hub.made == [("me/mine", None, True)]
    weights = "adapter_model.safetensors" if tuning == "lora" else "model.safetensors"
    names = {path.name for path in hub.files.iterdir()}
    assert {weights, "README.md", "config.yaml", "results.json", "ledger.zol", "tokenizer.json"} <= names
    assert not names & {"checkpoint.safetensors", "checkpoint-1", "report.html", "zotune-files.json"}


def test_what_is_sent_is_the_model_and_replays(hub, copy, place, zotune, tmp_path):
    folder, base = copy("lora"), place / "base"
    upload(folder, "me/mine", base="org/base")
    card = huggingface_hub.ModelCard((hub.files / "README.md").read_text())
    assert (card.data.base_model, card.data.library_name) == ("org/base", "peft")
    assert card.data.pipeline_tag == "text-generation"
    assert "zotune" in card.data.tags
    assert json.loads((hub.files / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    # On a machine where the Hub has that model, a folder of its name in the test.
    shutil.copytree(base, "org/base")
    ids = torch.tensor([[0, 70, 80]])
    with torch.no_grad():
        ours, theirs = (load(path, device="cpu")[0](input_ids=ids).logits for path in (folder, hub.files))
    assert torch.equal(ours, theirs)
    again = zotune("ledger", "replay", hub.files / "ledger.zol", "--base", base, "--output-dir", tmp_path / "again")
    assert again.code == 0, again.err
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (folder / weights).read_bytes()


def test_a_run_uploads_its_model_when_it_has_ended(hub, run, place, capsys):
    names = {"hub_model_id": "org/name", "hub_private_repo": True}
    folder = run(tuning="full", push_to_hub=True, output_dir=str(place / "runs/pushed"), **names)
    assert (hub.made, hub.repo_id) == ([("org/name", True, True)], "org/name")
    assert (hub.files / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert "uploaded to https://huggingface.co/org/name" in capsys.readouterr().err


def test_a_folder_without_another_name_is_uploaded_under_its_own(hub, copy):
    upload(copy("full"), None)
    assert (hub.made, hub.repo_id) == ([("mine", None, True)], "me/mine")


def test_nothing_begins_without_a_token_a_network_or_a_base_that_others_have(hub, run, place, monkeypatch):
    with pytest.raises(UsageError, match=r"push_to_hub: what --tuning lora tunes needs its base model .* --base-model"):
        run(tuning="lora", push_to_hub=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"HF_HUB_OFFLINE=1 switches the Hub off"):
        run(tuning="full", push_to_hub=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match=r"no token .* `hf auth login`"):
        run(tuning="full", push_to_hub=True)
    assert not (place / "runs/mine").exists()
    assert hub.made == []


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (403, UsageError, r"does not let this token write to me/mine \(HTTP 403\)"),
        (500, RunError, r"did not take the upload to me/mine"),
        (ConnectionError("no route"), RunError, r"could not be reached: no route"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(hub, copy, error, kind, message):
    hub.error = refusal(error) if isinstance(error, int) else error
    with pytest.raises(kind, match=message):
        upload(copy("full"), "me/mine")


def refusal(status):
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    error.response, error.args = SimpleNamespace(status_code=status, headers={}, request=None), ("the Hub said no",)
    return error


def test_a_hub_that_does_not_answer_is_said_in_words(copy, monkeypatch):
    """The client itself, and nothing that listens at the Hub's address."""
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9"))
    config = TrainConfig.model_validate({"task": "sst2", "push_to_hub": True, "hub_model_id": "me/mine"})
    again = (
        r"model is saved in .*the Hub could not be reached: .*\nTry again: zotune push runs/mine --hub-model-id me/mine"
    )
    with pytest.raises(RunError, match=again):
        upload_after(config, copy("full"))


def test_a_run_that_cannot_be_uploaded_is_saved_and_says_how_to_try_again(hub, run, place):
    hub.error = refusal(403)
    folder = place / "runs/refused"
    with pytest.raises(RunError, match=r"the model is saved in .*not uploaded.*\nTry again: zotune push .*refused$"):
        run(tuning="full", push_to_hub=True, output_dir=str(folder))
    assert (folder / "model.safetensors").is_file()


def test_what_nobody_could_load_is_refused(hub, runs, tmp_path):
    folder = runs["lora"]
    with pytest.raises(UsageError, match=r"which nobody else can load. Give the name .* --base-model .*zotune merge"):
        upload(folder, "me/mine")
    (tmp_path / "none").mkdir()
    for place, message in ((tmp_path / "none", "holds no weights"), (tmp_path / "no", "there is no folder")):
        with pytest.raises(UsageError, match=message):
            upload(place, "me/mine")
    with pytest.raises(UsageError, match=r"--base-model has no effect"):
        upload(runs["full"], "me/mine", base="org/base")


def test_a_card_that_the_user_wrote_is_sent_without_its_paths(hub, copy):
    whole = copy("full")
    (whole / "README.md").write_text(f"---\nbase_model: x\n---\n\nSee {Path.home()}\n")
    upload(whole, "me/mine")
    assert (hub.files / "README.md").read_text().endswith("\nSee ~\n")


def test_what_a_model_reads_is_sent_as_it_is(hub, copy):
    whole = copy("full")
    tokens = {"/usr/lib": 258}
    (whole / "added_tokens.json").write_text(json.dumps(tokens))
    for name in (*COMPANIONS, "tokenizer_config.json"):
        (whole / name).write_text(json.dumps({"chat_template": "Files are in /mnt/data.", "size": {"height": 2}}))
    upload(whole, "me/mine")
    assert json.loads((hub.files / "added_tokens.json").read_text()) == tokens
    for name in (*COMPANIONS, "tokenizer_config.json"):
        assert json.loads((hub.files / name).read_text()) == json.loads((whole / name).read_text())


@pytest.mark.parametrize("name", ["README.md", "config.yaml", "model-2.safetensors", "vocab.txt", "results.json"])
def test_a_link_takes_no_other_file_along(hub, copy, tmp_path, name):
    """A folder that somebody else made could hold a link to a file of this machine under a name that is sent."""
    folder = copy("full")
    (tmp_path / "id_rsa").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UsageError, match=r"is a link to .*id_rsa, and only files of the folder itself are uploaded"):
        upload(folder, "me/mine")
    assert hub.made == []


@pytest.mark.parametrize("name", ["a/b/c", "a b", "-a", "a--b", "a..b", "me/", "/me", "x" * 97, "", "~/x", "é"])
def test_a_name_that_the_hub_has_not_is_refused_with_the_options(name):
    with pytest.raises(ValueError, match="a repository is ORG/NAME or NAME"):
        TrainConfig.model_validate({"task": "sst2", "push_to_hub": True, "hub_model_id": name})
    with pytest.raises(ValueError, match="hub_model_id has no effect without an upload"):
        TrainConfig.model_validate({"task": "sst2", "hub_model_id": "me/mine"})
