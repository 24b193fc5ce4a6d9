"""Conversion: the target appears complete or not at all, and a wrong source is named with its fault."""

import errno
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yoke.core.errors import ModelError
from yoke.core.tensor import TensorType
from yoke.weights import convert as convert_module
from yoke.weights.convert import convert, interleave
from yoke.weights.gguf import GgufFile


def ignore(_what: str, _share: float) -> None:
    pass


def pop(*keys: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: [values.pop(key) for key in keys] and None


def put(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update(entries)


def part(name: str, **entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values[name].update(entries)


WRONG = {
    "architecture": ({"change_config": put(architectures=["OxForCausalLM"])}, "'OxForCausalLM'; known are LlamaForCausalLM, MistralForCausalLM"),
    "no architecture": ({"change_config": pop("architectures")}, "architecture is None"),
    "no width": ({"change_config": pop("hidden_size")}, "hidden_size is None"),
    "absurd size": ({"change_config": put(num_hidden_layers=1 << 60)}, "num_hidden_layers is"),
    "text for a number": ({"change_config": put(rms_norm_eps="small")}, "rms_norm_eps is 'small'"),
    "activation": ({"change_config": put(hidden_act="gelu")}, "hidden_act is 'gelu'"),
    "biases": ({"change_config": put(attention_bias=True)}, "attention_bias is True"),
    "quantised": ({"change_config": put(quantization_config={"bits": 4})}, "quantised already"),
    "yarn": ({"change_config": put(rope_scaling={"type": "yarn", "factor": 4.0})}, "scaling is 'yarn'"),
    "llama3 without factor": ({"change_config": put(rope_scaling={"rope_type": "llama3"})}, "factor is None"),
    "vocabulary too small": ({"change_config": put(vocab_size=299)}, "vocab_size is 299; the tokenizer is of another model"),
    "missing tensor": ({"change_tensors": pop("model.layers.1.mlp.up_proj.weight")}, "missing: model.layers.1.mlp.up_proj.weight"),
    "foreign tensor": ({"change_tensors": lambda t: t.update({"model.extra": np.zeros(3, np.float32)})}, "do not have: model.extra"),
    "wrong shape": ({"change_tensors": lambda t: t.update({"model.norm.weight": np.zeros(33, np.float32)})}, r"model.norm.weight has shape \(33,\)"),
    "foreign dtype": ({"change_tensors": lambda t: t.update({"model.norm.weight": np.zeros(32, np.int64)})}, "type I64; expected one of F32, F16, BF16"),
    "unigram": ({"change_tokenizer": part("model", type="Unigram")}, "type 'Unigram'; expected BPE"),
    "dropout": ({"change_tokenizer": part("model", dropout=0.1)}, "dropout 0.1"),
    "no merges": ({"change_tokenizer": part("model", merges=[])}, "no merges"),
    "malformed merge": ({"change_tokenizer": part("model", merges=["abc"])}, "merge 'abc'"),
    "prefix space": ({"change_tokenizer": part("pre_tokenizer", add_prefix_space=True)}, "add_prefix_space"),
    "normalizer": ({"change_tokenizer": put(normalizer={"type": "Lowercase"})}, "normalizer is 'Lowercase'"),
    "same id": ({"change_tokenizer": lambda t: t["model"]["vocab"].update(ox=5)}, "the same id 5"),
    "no end": ({"change_config": pop("eos_token_id")}, "no token ends a text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_source_is_named_and_leaves_nothing(write_directory: Callable[..., Path], tmp_path: Path, case: str) -> None:
    changes, message = WRONG[case]
    source = write_directory(**changes)
    with pytest.raises(ModelError, match=message):
        convert(source, tmp_path / "model.gguf", "F16", ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff" * 40])
def test_a_damaged_file_is_named(write_directory: Callable[..., Path], tmp_path: Path, name: str, content: bytes | None) -> None:
    source = write_directory()
    (source / name).unlink() if content is None else (source / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        convert(source, tmp_path / "model.gguf", "F16", ignore)


@pytest.mark.parametrize(
    "header",
    [
        {"w": 3}, {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
    ],
)  # fmt: skip
def test_a_damaged_safetensors_header_is_named(write_directory: Callable[..., Path], tmp_path: Path, header: dict[str, Any]) -> None:
    source = write_directory()
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ModelError, match="tensor 'w'"):
        convert(source, tmp_path / "model.gguf", "F16", ignore)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "weights.bin", 7])
def test_an_index_cannot_name_files_elsewhere(write_directory: Callable[..., Path], tmp_path: Path, shard: object) -> None:
    source = write_directory()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(ModelError, match=r"index\.json"):
        convert(source, tmp_path / "model.gguf", "F16", ignore)


def test_unknown_type_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'Q3_X' is unknown; known are F32, F16"):
        convert(tmp_path, tmp_path / "model.gguf", "Q3_X", ignore)


@pytest.mark.parametrize(("raised", "expected"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left on device"), ModelError)])
def test_an_interrupted_conversion_keeps_the_old_target(
    write_directory: Callable[..., Path], tmp_path: Path, raised: BaseException, expected: type[BaseException]
) -> None:
    source, target = write_directory(), tmp_path / "model.gguf"
    target.write_bytes(b"old")

    def interrupt(_what: str, share: float) -> None:
        if share > 0.5:
            raise raised

    with pytest.raises(expected, match="No space left" if expected is ModelError else None):
        convert(source, target, "F16", interrupt)
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "source"]


def test_numbers_beyond_f16_are_refused(write_directory: Callable[..., Path], tmp_path: Path) -> None:
    source = write_directory(change_tensors=lambda t: t["lm_head.weight"].__setitem__((3, 3), 70_000.0))
    with pytest.raises(ModelError, match=r"lm_head\.weight holds numbers beyond 65504"):
        convert(source, tmp_path / "model.gguf", "F16", ignore)
    convert(source, tmp_path / "model.gguf", "BF16", ignore)


def test_progress_goes_from_zero_to_one(write_directory: Callable[..., Path], tmp_path: Path) -> None:
    calls: list[tuple[str, float]] = []
    convert(write_directory(), tmp_path / "model.gguf", "Q4_0", lambda what, share: calls.append((what, share)))
    writing = [share for what, share in calls if what == "writing"]
    assert writing == sorted(writing)
    assert writing[-1] == 1.0
    assert calls[-2:] == [("quantising", 0.0), ("quantising", 1.0)]


def test_matrices_that_fit_no_block_are_f16_and_vectors_f32(write_directory: Callable[..., Path], tmp_path: Path) -> None:
    def narrow(weights: dict[str, np.ndarray]) -> None:
        for i in range(2):
            for name, shape in {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}.items():
                weights[f"model.layers.{i}.mlp.{name}_proj.weight"] = np.ones(shape, np.float32)

    source = write_directory(change_config=put(intermediate_size=48), change_tensors=narrow)
    convert(source, tmp_path / "model.gguf", "Q8_0", ignore)
    with GgufFile.open(tmp_path / "model.gguf") as file:
        types = {name: info.type for name, info in file.tensors.items()}
    assert types["blk.0.ffn_down.weight"] is TensorType.F16
    assert types["blk.0.ffn_up.weight"] is TensorType.Q8_0
    assert types["blk.0.ffn_norm.weight"] is TensorType.F32


def test_small_chunks_give_the_same_file(write_directory: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_directory()
    convert(source, tmp_path / "whole.gguf", "Q8_0", ignore)
    monkeypatch.setattr(convert_module, "_CHUNK_BYTES", 700)
    convert(source, tmp_path / "pieces.gguf", "Q8_0", ignore)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


def test_interleaving_brings_halves_together() -> None:
    rows = np.arange(12, dtype=np.float32)[:, None]
    assert interleave(rows, 6)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_templates_and_special_tokens_come_from_the_settings(write_directory: Callable[..., Path], tmp_path: Path) -> None:
    settings = {
        "bos_token": "<|begin|>", "eos_token": {"content": "<|endoftext|>"}, "pad_token": "a", "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}],
    }  # fmt: skip
    source = write_directory(settings=settings, change_config=put(eos_token_id=[1, 7]))
    convert(source, tmp_path / "model.gguf", "F16", ignore)
    with GgufFile.open(tmp_path / "model.gguf") as file:
        found = {key.removeprefix("tokenizer."): value for key, value in file.metadata.items()}
    assert (found["chat_template"], found["chat_template.tool_use"], found["chat_templates"]) == ("plain", "tools", ["tool_use"])
    assert (found["ggml.bos_token_id"], found["ggml.eos_token_id"], found["ggml.eot_token_id"]) == (0, 1, 7)
    assert found["ggml.add_bos_token"] is True
    (source / "chat_template.jinja").write_text("newer")
    convert(source, tmp_path / "model.gguf", "F16", ignore)
    with GgufFile.open(tmp_path / "model.gguf") as file:
        assert file.metadata["tokenizer.chat_template"] == "newer"
