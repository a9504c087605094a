"""The commands for a model that is there: answers on stdout alone, exit code 2 for what is wrong, and why."""

import io
import json
import re
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from zotune.llm.training.train import train

TURNS = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }};{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture
def chat_model(tiny, tmp_path):
    """The folder of a tiny model with a chat template."""
    lm = tiny("llama")
    lm.tokenizer.chat_template = TURNS
    lm.module.save_pretrained(tmp_path / "chat")
    lm.tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


@pytest.fixture
def typed(monkeypatch):
    """A function: text to what is on standard input."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def generate(zotune, model, *more):
    return zotune("generate", "--model", model, "--device", "cpu", "--max-new-tokens", 6, *more)


# zotune generate ---------------------------------------------------------------------------------------------


def test_an_answer_alone_is_on_stdout(zotune, chat_model, typed):
    one = generate(zotune, chat_model, "--prompt", "Hi")
    assert (one.code, one.err) == (0, "")
    typed("Hi\n")
    assert generate(zotune, chat_model).out == one.out
    drawn = [generate(zotune, chat_model, "--prompt", "Hi", "--temperature", 2, "--seed", s).out for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_answers_to_several_prompts_are_in_json_and_in_a_file(zotune, chat_model, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi", "id": 7}\n{"prompt": "Ho there, you"}\n')
    several = ("--prompt-file", tmp_path / "p.jsonl", "--per-device-eval-batch-size", 1)
    said = generate(zotune, chat_model, *several, "--json", "--output-file", tmp_path / "a.jsonl")
    assert said.code == 0, said.err
    assert "1 of 2 answers" in said.err
    found = json.loads(said.out)
    assert [record["rendered_prompt"] for record in found["answers"]] == ["[u]Hi;[a]", "[u]Ho there, you;[a]"]
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found["answers"]
    for record, prompt in zip(found["answers"], ("Hi", "Ho there, you"), strict=True):
        alone = json.loads(generate(zotune, chat_model, "--prompt", prompt, "--json").out)
        assert alone["answers"][0]["answer"] == record["answer"]
    plain = generate(zotune, chat_model, *several).out
    assert re.findall(r"^── .*line \d: (.*)$", plain, re.MULTILINE) == ["Hi", "Ho there, you"]
    again = generate(zotune, chat_model, *several, "--output-file", tmp_path / "a.jsonl")
    assert (again.code, "exists; remove it" in again.err) == (2, True)


def test_what_a_model_says_moves_no_terminal(zotune, chat_model, monkeypatch):
    monkeypatch.setattr("zotune.llm.inference.answers.generate", lambda *a, **k: ["\x1b[2Jgone\r"])
    assert generate(zotune, chat_model, "--prompt", "Hi").out == "\\x1b[2Jgone\\r\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "there is no prompt: give --prompt TEXT or --prompt-file FILE, or pipe"),
        (("--prompt", " "), r"prompt 1 is empty"),
        (("--prompt", "Hi", "--prompt-file", "x.txt"), "prompt and prompt_file both name prompts"),
        (("--prompt-file", "no.txt"), "'no.txt' cannot be read"),
        (("--prompt-file", "no.jsonl"), "there is no file 'no.jsonl'"),
        (("--prompt", "Hi", "--max-new-tokens", "0"), "max_new_tokens"),
        (("--prompt", "Hi", "--temperature", "-1"), "temperature"),
        (("--prompt", "Hi", "--top-p", "2"), "top_p"),
        (("--prompt", "Hi", "--top-p", "0.5", "--temperature", "0"), "top_p has no effect here, for temperature: 0"),
        (("--prompt", "Hi", "--generation", "greedy", "--temperature", "1"), "generation: greedy draws nothing"),
        (("--prompt", "Hi", "--template", "{x}"), "template has no effect here"),
        (("--prompt-file", "x.jsonl", "--template", "x"), "template names no column"),
        (("--prompt", "Hi", "--system-prompt", "S", "--prompt-format", "plain"), "system_prompt has no effect"),
        (("--prompt", "Hi", "--output-file", "no/a.jsonl"), "there is no folder 'no'"),
        (("--prompt", "Hi", "--task", "sst2"), "--task"),
        (("--prompt", "Hi", "--max-length", "7"), "max_length"),
        (("--prompt", "x" * 5000), "tokens, but the model reads at most"),
    ],
)
def test_what_generate_cannot_do_is_said_with_exit_2(zotune, chat_model, args, message, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed("")
    said = generate(zotune, chat_model, *args)
    assert (said.code, said.out) == (2, "")
    assert message in re.sub(r"[\s│]+", " ", said.err)
    assert "Traceback" not in said.err


def test_a_model_that_fills_in_masks_generates_nothing(zotune):
    said = generate(zotune, "random:roberta-tiny", "--prompt", "Hi")
    assert (said.code, said.out) == (2, "")


def test_names_of_other_tools_are_taken_or_answered(zotune, chat_model):
    asked = ("--prompt", "Hi", "--model-name-or-path", chat_model, "--device", "cpu", "--max-new-tokens", 3)
    assert zotune("generate", *asked, "--do-sample").code == 0
    assert zotune("generate", *asked, "--no-apply-chat-template").code == 0
    said = zotune("generate", *asked, "--top-k", "5")
    assert (said.code, "temperature and top_p" in said.err) == (2, True)


# zotune chat -------------------------------------------------------------------------------------------------


def chat(zotune, model, *more):
    return zotune("chat", "--model", model, "--device", "cpu", "--max-new-tokens", 6, *more)


def test_each_line_that_is_piped_in_is_answered_with_those_before(zotune, chat_model, typed):
    typed("Hi\n\nHo\n")
    said = chat(zotune, chat_model, "--json")
    assert (said.code, said.err) == (0, "")
    messages = json.loads(said.out)["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    typed("Hi\nHo\n")
    shown = chat(zotune, chat_model)
    assert shown.out.count("\n") == 2
    asked = f"[u]Hi;[a]{messages[1]['content']};[u]Ho;[a]"
    plain = generate(zotune, chat_model, "--prompt", asked, "--prompt-format", "plain").out
    assert shown.out.splitlines()[1].strip() == plain.strip()


def test_commands_of_a_chat(zotune, chat_model, typed):
    typed("/system S\nHi\n/reset\n/rest\n/help\nHo\n /exit\n/exit\nnever\n")
    said = chat(zotune, chat_model, "--json")
    found = json.loads(said.out)
    assert found["system"] == "S"
    # A message that begins with a slash has a space before it.
    assert [m["content"] for m in found["messages"] if m["role"] == "user"] == ["Ho", "/exit"]
    assert "there is no command '/rest' in a chat. Did you mean '/reset'?" in said.err
    assert "a new chat, with the system text" in said.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_answer_of_a_chat(zotune, chat_model, typed, monkeypatch, number, code):
    import zotune.cli.after_training.chat as module

    def interrupted(text):
        shown.append(text)
        if len(shown) == 1:
            signal.raise_signal(number)

    shown = []
    monkeypatch.setattr(module, "print_piece", interrupted)
    typed("Hi\nHo\n")
    said = zotune("chat", "--model", chat_model, "--device", "cpu", "--max-new-tokens", 200)
    assert said.code == code
    assert len("".join(shown)) < 100
    assert "the answer was stopped" in said.err


def test_a_second_signal_leaves_at_once(zotune, chat_model, typed, monkeypatch):
    import zotune.cli.after_training.chat as module

    def twice(text):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "print_piece", twice)
    typed("Hi\n")
    said = chat(zotune, chat_model)
    assert (said.code, said.err) == (130, "zotune: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_chat_escapes_what_a_terminal_would_obey(zotune, chat_model, typed, monkeypatch):
    def answers(lm, prompts, config, seed, stream):
        for piece in ("\x1b", "[2J", "gone"):
            stream.write(piece)
        return ["gone"]

    monkeypatch.setattr("zotune.llm.inference.conversation.answers", answers)
    typed("Hi\n")
    assert chat(zotune, chat_model).out == "\\x1b[2Jgone\n"


def test_a_model_without_a_template_cannot_chat(zotune, typed):
    typed("Hi\n")
    said = chat(zotune, "random:llama-tiny")
    assert (said.code, said.out) == (2, "")
    assert "no chat template" in said.err and "zotune generate --model random:llama-tiny" in said.err


# zotune merge, export and push ---------------------------------------------------------------------------------


def test_merge_writes_beside_the_run_and_replaces_nothing(zotune, config, tmp_path):
    result = train(config(model="random:llama-tiny", tuning="lora", learning_rate=0.1))
    said = zotune("merge", result.output_dir, "--device", "cpu", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["output_dir"] == f"{result.output_dir}-merged"
    ids = torch.tensor([[0, 70, 80]])
    with torch.no_grad():
        found, expected = (
            m.eval()(input_ids=ids).logits
            for m in (AutoModelForCausalLM.from_pretrained(tmp_path / "out-merged"), result.model)
        )
    assert torch.allclose(found, expected, atol=1e-4)
    again = zotune("merge", result.output_dir, "--device", "cpu")
    assert (again.code, "is not empty" in again.err) == (2, True)
    asked = ("--prompt", "dull", "--device", "cpu", "--max-new-tokens", 4)
    assert zotune("generate", "--model", tmp_path / "out-merged", *asked).out == (
        zotune("generate", "--model", result.output_dir, *asked).out
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("merge",), "the folder of a run is missing: zotune merge runs/latest"),
        (("merge", "a", "b"), "takes one folder, got a, b. To combine several runs: zotune ledger merge."),
        (("merge", "a", "--model", "b"), "takes one folder"),
        (("merge", "random:llama-tiny", "--max-shard-size", "x"), "max"),
        (("merge", "random:llama-tiny", "--output-dir", "out"), "nothing to merge"),
        (("export", "a"), "say what to write: zotune export a --gguf"),
        (("export", "a", "--gguf", "--outtype", "q4"), "q4"),
        (("push",), "the folder of a run is missing: zotune push runs/latest"),
        (("push", "nowhere"), "there is no folder 'nowhere'"),
        (("push", "a", "--hub-model-id", "a/b/c"), "a repository is ORG/NAME or NAME"),
        (("push", "a", "--base-model", "/x"), "a repository is ORG/NAME or NAME"),
        (("push", "a", "--hub-token", "hf_x"), "set it in the environment of the command: HF_HOME for the cache,"),
        (("train", "--task", "sst2", "--hub-model-id", "a/b"), "has no effect without an upload: give --push-to-hub"),
    ],
)
def test_what_these_commands_cannot_do_is_said_with_exit_code_2(zotune, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = zotune(*args)
    assert (said.code, said.out) == (2, "")
    assert message in re.sub(r"[\s│]+", " ", said.err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["generate", "chat", "merge", "export", "push"])
def test_these_commands_have_help(zotune, verb):
    said = zotune(verb, "--help")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"usage: zotune {verb} ")
