"""Files of a model that cannot be written, by whichever library, are an error in words; nothing half-written stays."""

import pytest
from safetensors import SafetensorError


def no_space(*_, **__):
    raise Exception("No space left on device (os error 28)")  # as tokenizers raises it


def no_file(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)")


WRITERS = {
    "tokenizer": ("transformers.PreTrainedTokenizerFast.save_pretrained", no_space, "No space left"),
    "weights": ("transformers.modeling_utils.safe_save_file", no_file, "quota exceeded"),
    "shards": ("zotune.llm.checkpoints.safetensors_shards._write", no_file, "quota exceeded"),
    "adapter": ("peft.peft_model.safe_save_file", no_file, "quota exceeded"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("verb", ["train", "export"])
def test_a_full_disk_is_told_by_whichever_library_meets_it(zotune, short, tmp_path, monkeypatch, tiny, writer, verb):
    base = tiny("llama")
    for save in (base.module.save_pretrained, base.tokenizer.save_pretrained):
        save(tmp_path / "base")
    train = short("--tuning", "lora" if writer == "adapter" else "full", model=tmp_path / "base")
    if verb == "export":
        assert zotune(*train).code == 0
    elif writer == "shards":
        pytest.skip("training writes no shards of its own")
    target, fails, says = WRITERS[writer]
    monkeypatch.setattr(target, fails)
    said = (
        zotune(*train)
        if verb == "train"
        else zotune("ledger", "export", tmp_path / "out", "--output-dir", tmp_path / "e")
    )
    if (verb, writer) == ("export", "weights"):
        assert said.code == 0, said.err  # it streams, without that function
        return
    assert said.code == 1, said
    assert says in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "e").exists() or not list((tmp_path / "e").iterdir())
