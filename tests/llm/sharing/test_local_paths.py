"""What goes to other machines names no folder of this one; text that only looks like a path stays."""

import json
from pathlib import Path

import pytest

from zotune.errors import UsageError
from zotune.llm.sharing.local_paths import check_no_path, text_without_paths, without_paths


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with files, which is the current one."""
    (tmp_path / "data set").mkdir()
    (tmp_path / "data set/rows.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_become_their_last_part_at_any_depth(here):
    value = {
        "train_file": [str(here / "data set/rows.jsonl"), "elsewhere/other.csv"],
        "model": str(here / "base"),
        "output_dir": "runs/secret-project",
        "nested": [
            {"anything": str(here / "data set")},
            f"read {here}/data set/rows.jsonl and ~/x",
            "data set/rows.jsonl",
        ],
        str(here / "key"): 1,
    }
    found = without_paths(value)
    assert found["train_file"] == ["rows.jsonl", "other.csv"]
    assert (found["model"], found["output_dir"], found["key"]) == ("base", "secret-project", 1)
    assert found["nested"][0] == {"anything": "data set"}
    assert found["nested"][2] == "rows.jsonl"
    assert str(here) not in json.dumps(found)
    at_home = {"output_dir": str(Path.home()), "note": f"see {Path.home()}, {Path.home()}/a and {here}"}
    assert without_paths(at_home) == {"output_dir": "~", "note": f"see ~, a and {here.name}"}


@pytest.mark.parametrize("place", ["home/me", "me", "a home/me", "."])
def test_the_home_folder_is_never_its_name_wherever_it_lies(here, monkeypatch, place):
    """Below the current folder and that of scratch files, or the current folder itself."""
    home = (here / place).resolve()
    home.mkdir(parents=True, exist_ok=True)
    (here / "link").symlink_to(home)
    for named in (home, here / "link"):
        monkeypatch.setenv("HOME", str(named))
        text = f"{named}, see {named}, '{named}', {home} and {named}."
        assert text_without_paths(text) == "~, see ~, '~', ~ and ~."
        assert text_without_paths(f"at {named}/rows.jsonl, {named}/a/b.csv") == "at rows.jsonl, b.csv"
        assert without_paths({"output_dir": str(named), "x": [str(home)]}) == {"output_dir": "~", "x": ["~"]}


@pytest.mark.parametrize(
    "text",
    [
        "facebook/opt-125m",
        "hub:org/rows:train",
        "smollm2-135m",
        "random:opt-tiny",
        "/no_think {prompt}",
        "{a}/{b}",
        "either/or",
        "https://example.org/usr/share",
        "a <b>x</b>",
        "km/h",
    ],
)
def test_what_is_no_path_stays(here, text):
    assert without_paths({"template": text, "x": [text]}) == {"template": text, "x": [text]}
    assert text_without_paths(text) == text


@pytest.mark.parametrize(
    "value",
    [
        {"template": "Fix the file /etc/hosts:\n{text}", "system_prompt": "/usr/bin/bash"},
        {"verbalizer": {"/usr/lib": "/etc/passwd"}, "id2label": {"0": "/usr"}, "label2id": {"/usr/lib": 0}},
        {"chat_template": "Files are in /mnt/data."},
        {"chat_template": [{"name": "default", "template": "{{ '/usr/bin/bash' }}"}]},
        {"chat_template": {"default": "{{ '/usr/bin/bash' }}"}},
        {"added_tokens_decoder": {"7": {"content": "/tmp/", "special": True}}, "eos_token": {"content": "/tmp/"}},
        {"pad_token": "/usr/lib", "additional_special_tokens": ["/usr/lib"], "stop_strings": ["/usr/bin/env"]},
        {"text_column": "data set/rows.jsonl", "columns": {"data set/rows.jsonl": "text"}},
    ],
)
def test_what_a_model_reads_stays(here, value):
    assert without_paths({"deeper": [value]}) == {"deeper": [value]}


def test_a_chat_template_may_be_the_path_of_a_file(here):
    for path in ("/mnt/mine/chat.jinja", "~/chat.jinja", "../chat.jinja", "data set/chat.jinja"):
        (here / "data set/chat.jinja").write_text("")
        assert without_paths({"chat_template": path}) == {"chat_template": "chat.jinja"}


def test_a_check_finds_what_a_rewriting_would_miss(here):
    check_no_path([("a.json", b"nothing")], here)
    hidden = json.dumps({"a": f"{here}/x"}).replace("/", "\\/").encode()
    for content in (f"see {here}/x".encode(), hidden, f"{Path.home()}/x".encode(), f"at {Path.home()}.".encode()):
        with pytest.raises(UsageError, match=r"README.md names the folder .* of this machine"):
            check_no_path([("a.json", b""), ("README.md", content)])


@pytest.mark.parametrize("name", ["facebook/opt-125m", "smollm2-135m", "random:opt-tiny"])
def test_names_stay_where_paths_may_stand(here, name):
    options = {"model": name, "train_file": "hub:org/rows:train", "data_source": "sample", "name_or_path": name}
    assert without_paths(options) == options
