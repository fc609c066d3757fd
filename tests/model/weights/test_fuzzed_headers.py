"""Files of strangers: whatever a header says, it is loaded or refused in our own words, at once, in bounded memory."""

from __future__ import annotations

import copy
import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from tests.model.families.networks import TINY
from tests.model.weights.gguf_writer import gguf_tensors, write_metadata
from tests.model.weights.mutations import changed, damaged
from tests.model.weights.networks import tiny_llama
from tests.model.weights.retold import retold_table, write_retold_header
from tokenrelay.model.chat_template import ChatTemplateError
from tokenrelay.model.config import UnsupportedModelError
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.model.transformer.loading import load_transformer
from tokenrelay.model.transformer.placing import WeightsError
from tokenrelay.model.weights import describe, read_model_config
from tokenrelay.model.weights.checkpoint import open_checkpoint
from tokenrelay.model.weights.errors import CheckpointError
from tokenrelay.model.weights.gguf.metadata import read_gguf_metadata
from tokenrelay.model.weights.sources import ModelSource

REFUSALS = (CheckpointError, UnsupportedModelError, WeightsError, ChatTemplateError)
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:80], "ab", "abc", "<s>", "</s>"]
TOKENS += [f"<{i}>" for i in range(96 - len(TOKENS))]
Mutation = Callable[[random.Random], ModelSource]


def load(source: ModelSource) -> None:
    checkpoint = open_checkpoint(source)
    config, cpu = checkpoint.config(), torch.device("cpu")
    describe(source, config)
    load_transformer(config, checkpoint.stored(), checkpoint.rules, max_model_len=64, dtype=torch.float32, device=cpu)


def tokenize(source: ModelSource) -> None:
    tokenizer = Tokenizer.from_source(source)
    tokenizer.decode(tokenizer.encode("abc <s>", add_special_tokens=True))
    tokenizer.encode_chat([{"role": "user", "content": "abc</s>"}])


@pytest.fixture(params=["gguf", "sentencepiece gguf", "safetensors", "json"])
def mutation(request: pytest.FixtureRequest, tmp_path: Path) -> Mutation:
    """Puts a file, or a folder, there whose header is a damaged one's."""
    match request.param:
        case "gguf" | "sentencepiece gguf" as kind:
            return gguf(tmp_path / "x.gguf", sentencepiece=kind != "gguf")
        case "safetensors":
            return safetensors(tmp_path)
    return json_files(tmp_path)


def gguf(path: Path, *, sentencepiece: bool) -> Mutation:
    writer, model = GGUFWriter(path, "llama"), tiny_llama()
    write_metadata(writer, model.config)
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 82 + [3] * 14)
    if sentencepiece:
        writer.add_token_scores([-float(i) for i in range(96)])
        writer.add_unk_token_id(84)
    else:
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(82)
    writer.add_chat_template(TEMPLATE)
    for name, values in gguf_tensors(model):
        writer.add_tensor(name, values.numpy())
    written = copy.deepcopy(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    good, header = path.read_bytes(), read_gguf_metadata(path).tensors["token_embd.weight"].offset

    def mutate(chance: random.Random) -> ModelSource:
        if chance.random() < 0.5:
            path.write_bytes(damaged(good[:header], chance) + good[header:])
        else:
            write_retold_header(written, path, chance)
            path.write_bytes(path.read_bytes() + good[header:])
        return ModelSource("x", path, "gguf")

    return mutate


def folder(path: Path, *, shards: int = 2) -> dict[str, bytes]:
    """The files of a folder with one or two shards and a tokenizer."""
    tiny_llama().save_pretrained(path, max_shard_size="150KB" if shards == 2 else "1GB")
    backend = Backend(BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[("a", "b"), ("ab", "c")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(TOKENS[82:])
    backend.save(str(path / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return {file.name: file.read_bytes() for file in path.iterdir()}


def safetensors(path: Path) -> Mutation:
    """One of two shards is damaged, or a file that is alone: no index contradicts what it says of itself."""
    good = {shards: folder(path / str(shards), shards=shards) for shards in (1, 2)}

    def mutate(chance: random.Random) -> ModelSource:
        shards = chance.choice((1, 2))
        chosen, names = path / str(shards), sorted(name for name in good[shards] if name.endswith(".safetensors"))
        for name in names:
            (chosen / name).write_bytes(good[shards][name])
        name = chance.choice(names)
        content = good[shards][name]
        end = 8 + int.from_bytes(content[:8], "little")
        (chosen / name).write_bytes(_header(content[:end], chance) + content[end:])
        return ModelSource("x", chosen, "folder")

    return mutate


def _header(good: bytes, chance: random.Random) -> bytes:
    change = chance.choice((damaged, changed, retold_table, retold_table))
    if change is damaged:
        return damaged(good, chance)
    text = json.dumps(change(json.loads(good[8:]), chance)).encode()
    return len(text).to_bytes(8, "little") + text


def json_files(path: Path) -> Mutation:
    good = folder(path)
    names = sorted(name for name in good if name.endswith(".json"))

    def mutate(chance: random.Random) -> ModelSource:
        for name, content in good.items():
            (path / name).write_bytes(content)
        name = chance.choice(names)
        if chance.random() < 0.2:
            (path / name).write_bytes(damaged(good[name], chance))
        else:
            (path / name).write_text(json.dumps(changed(json.loads(good[name]), chance)))
        return ModelSource("x", path, "folder")

    return mutate


@pytest.mark.parametrize("count", [100, pytest.param(20_000, marks=pytest.mark.long)])
def test_damaged_headers_are_refused_or_harmless(mutation: Mutation, count: int) -> None:
    """Processor time counts, not the clock; of memory, by how much the most that the process ever had grew."""
    refused = 0
    for seed in range(count):
        source = mutation(random.Random(seed))
        for read in (load, tokenize):
            refused += not read_in_bounds(read, source, seed)
    assert count / 4 < refused < 2 * count


@pytest.mark.parametrize("count", [10, pytest.param(20_000 // len(TINY), marks=pytest.mark.long)])
@pytest.mark.parametrize("name", TINY)
def test_damaged_configs_of_every_family_are_refused_or_harmless(name: str, count: int, tmp_path: Path) -> None:
    good = TINY[name]().config.to_dict()
    for seed in range(count):
        (tmp_path / "config.json").write_text(json.dumps(changed(good, random.Random(seed))))
        read_in_bounds(
            lambda source: describe(source, read_model_config(source)), ModelSource("x", tmp_path, "folder"), seed
        )


def read_in_bounds(read: Callable[[ModelSource], object], source: ModelSource, seed: int) -> bool:
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read(source)
        return True
    except REFUSALS:
        return False
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise
    finally:
        assert time.process_time() - start < 1, f"seed {seed}"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, f"seed {seed}"  # KiB
