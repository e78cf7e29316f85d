"""A GGUF file is converted once, exactly, and again when it changes."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_optim.finetune import gguf as ours
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.models import find_model, load_tokenizer

WIDTH, INNER, WORDS = 32, 64, ("<unk>", "<s>", "</s>", "a", "b", "ab", "Ġ", "Ġa")
SHAPES = {
    "token_embd": (len(WORDS), WIDTH),
    "output_norm": (WIDTH,),
    "blk.0.attn_norm": (WIDTH,),
    "blk.0.ffn_norm": (WIDTH,),
    **{f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
    **{f"blk.0.ffn_{part}": (INNER, WIDTH) for part in ("gate", "up")},
    "blk.0.ffn_down": (WIDTH, INNER),
}


def write_llama(path, seed):
    """A Llama of one layer with 4-bit weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    numbers = np.random.default_rng(seed)
    for name, shape in SHAPES.items():
        values = numbers.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A GGUF file and an empty cache."""
    cached = ours.cached_assets_path
    cache = tmp_path / "cache"
    monkeypatch.setattr(
        ours, "cached_assets_path", lambda *names, **more: cached(*names, **more, assets_dir=cache)
    )
    path = tmp_path / "tiny.gguf"
    write_llama(path, seed=0)
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_folder_has_the_weights_of_the_file_and_is_made_once(file, monkeypatch):
    location = find_model(str(file)).location
    tensors = AutoModelForCausalLM.from_pretrained(location).state_dict()
    for name, tensor in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.norm.weight": "output_norm.weight",
    }.items():
        (found,) = (each for each in gguf.GGUFReader(file).tensors if each.name == tensor)
        wanted = torch.from_numpy(gguf.dequantize(found.data, found.tensor_type).copy())
        assert torch.equal(tensors[name], wanted), name
    assert load_tokenizer(find_model(str(file)))("ab a")["input_ids"] == [5, 7]

    def again(*_):
        raise AssertionError("converted again")

    def locked(path):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(ours, "convert", again)
        assert find_model(str(file)).location == location
        patch.setattr(ours, "FileLock", locked)  # a cache that was filled, and is read-only now
        assert find_model(str(file)).location == location

    write_llama(file, seed=1)
    os.utime(file, ns=(1, 1))
    changed = find_model(str(file)).location
    assert changed != location
    assert not Path(location).exists()  # gigabytes that nobody would read
    other = AutoModelForCausalLM.from_pretrained(changed).state_dict()
    assert not torch.equal(other["model.norm.weight"], tensors["model.norm.weight"])
    shutil.rmtree(changed)  # someone frees space
    assert find_model(str(file)).location == changed
    assert os.listdir(changed)


def test_what_a_killed_process_left_is_not_used(file, monkeypatch):
    def killed(folder, name, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    def convert(folder, name, target):
        target.mkdir()
        (target / "whole").touch()

    monkeypatch.setattr(ours, "convert", killed)
    with pytest.raises(KeyboardInterrupt):
        find_model(str(file))
    (kept,) = (file.parent / "cache" / "sparse_optim" / "gguf").iterdir()
    assert "unfinished" not in os.listdir(kept)  # an interrupted one leaves no gigabytes
    (kept / "unfinished").mkdir()  # a killed one does
    (kept / "unfinished" / "config.json").write_text("{}")
    monkeypatch.setattr(ours, "convert", convert)
    location = find_model(str(file)).location
    assert os.listdir(location) == ["whole"]


def test_a_cache_that_cannot_be_written_is_done_without(file, monkeypatch, caplog):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(ours, "cached_assets_path", read_only)
    monkeypatch.setattr(ours, "convert", lambda folder, name, target: (target / "whole").touch())
    location = find_model(str(file)).location
    assert os.listdir(location) == ["whole"]
    assert "for this process alone" in caplog.text
    assert find_model(str(file)).location == location  # not converted again


def test_a_cut_file_is_named(file):
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(FinetuneError, match=r"cannot load model .*tiny\.gguf"):
        find_model(str(file))
