"""GgufFile: what it reads is what GGUFWriter wrote, and no bytes get more out of it than a ModelError."""

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from yoke.core.errors import ModelError
from yoke.core.tensor import TensorType
from yoke.weights.gguf import ArrayInfo, GgufFile

QUANTISED = [TensorType.F32, TensorType.F16, TensorType.BF16, TensorType.Q8_0, TensorType.Q4_0, TensorType.Q5_1]


def write(path: Path, tensor_type: TensorType = TensorType.Q4_0, name: str = "tiny") -> np.ndarray:
    """A file with every kind of metadata, a matrix, a vector and a stack of two matrices; returns the matrix as stored."""
    values = np.random.default_rng(3).standard_normal((6, 128), dtype=np.float32)
    kind = gguf.GGMLQuantizationType(tensor_type.value)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -3)
    writer.add_uint16("a.u16", 60_000)
    writer.add_int16("a.i16", -300)
    writer.add_int32("a.i32", -70_000)
    writer.add_uint64("a.u64", 1 << 40)
    writer.add_int64("a.i64", -(1 << 40))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.yes", True)
    writer.add_array("a.short", [1, 2, 3])
    writer.add_array("a.words", ["ox", "yoké"])
    writer.add_array("a.long", list(range(2000)))
    writer.add_array("a.tokens", [f"tökén{i}" for i in range(2000)])
    stored = quantize(values, kind)
    writer.add_tensor("matrix", stored, raw_dtype=kind)
    writer.add_tensor("vector", values[0])
    writer.add_tensor("stack", np.stack([stored, stored[::-1]]), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dequantize(stored, kind)


def plain(file: GgufFile, name: str, **ranges: tuple[int, int]) -> np.ndarray:
    part = file.read(name, **ranges)
    data = np.frombuffer(part.data, dtype=np.uint8)
    kind = gguf.GGMLQuantizationType(part.info.type.value)
    return dequantize(data.reshape(-1, part.info.type.row_bytes(part.info.shape[-1])), kind).reshape(part.info.shape)


def test_metadata_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    with GgufFile.open(tmp_path / "m.gguf") as file:
        expected = {
            "general.architecture": "llama", "general.name": "tiny", "a.u8": 200, "a.i8": -3, "a.u16": 60_000, "a.i16": -300, "a.i32": -70_000,
            "a.u64": 1 << 40, "a.i64": -(1 << 40), "a.f32": 0.5, "a.f64": 0.1, "a.yes": True, "a.short": [1, 2, 3], "a.words": ["ox", "yoké"],
        }  # fmt: skip
        assert {key: file.metadata[key] for key in expected} == expected
        assert isinstance(file.metadata["a.long"], ArrayInfo)
        assert len(file.metadata["a.long"]) == 2000
        assert file.array("a.long") == list(range(2000))
        assert file.array("a.tokens") == [f"tökén{i}" for i in range(2000)]
        assert file.raw_strings("a.words") == [b"ox", "yoké".encode()]
        assert file.raw_strings("a.tokens")[1] == "tökén1".encode()
        for key in ("a.u8", "nothing"):
            with pytest.raises(ModelError, match="array"):
                file.array(key)
            with pytest.raises(ModelError, match="array of strings"):
                file.raw_strings(key)


@pytest.mark.parametrize("tensor_type", QUANTISED)
def test_slices_of_any_quantisation_are_the_slices_of_the_matrix(tmp_path: Path, tensor_type: TensorType) -> None:
    whole = write(tmp_path / "m.gguf", tensor_type)
    with GgufFile.open(tmp_path / "m.gguf") as file:
        assert file.tensors["matrix"].shape == (6, 128)
        assert file.tensors["matrix"].type is tensor_type
        np.testing.assert_array_equal(plain(file, "matrix"), whole)
        np.testing.assert_array_equal(plain(file, "matrix", rows=(2, 5)), whole[2:5])
        np.testing.assert_array_equal(plain(file, "matrix", columns=(32, 96)), whole[:, 32:96])
        np.testing.assert_array_equal(plain(file, "matrix", rows=(1, 2), columns=(96, 128)), whole[1:2, 96:])
        np.testing.assert_array_equal(plain(file, "stack", rows=(1, 2)), whole[None, ::-1])
        np.testing.assert_array_equal(plain(file, "stack", columns=(0, 32)), np.stack([whole, whole[::-1]])[..., :32])
        np.testing.assert_array_equal(plain(file, "vector", rows=(7, 9)), plain(file, "vector")[7:9])
        np.testing.assert_array_equal(file.dequantized_rows("matrix", [5, 0, 5]), whole[[5, 0, 5]])
        assert file.dequantized_rows("matrix", []).shape == (0, 128)


def test_rows_are_a_view_and_outlive_the_file(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf", TensorType.F32)
    file = GgufFile.open(tmp_path / "m.gguf")
    view = file.read("matrix", rows=(1, 3)).data
    assert isinstance(view, memoryview)
    assert view.readonly
    file.dequantized_rows("matrix", [0])
    file.release("matrix")
    file.close()
    np.testing.assert_array_equal(np.frombuffer(view, dtype=np.float32).reshape(2, 128), whole[1:3])


@pytest.mark.parametrize(
    ("name", "ranges", "message"),
    [
        ("nothing", {}, "no tensor 'nothing'"),
        ("matrix", {"rows": (0, 7)}, r"rows 0\.\.7"),
        ("matrix", {"rows": (3, 3)}, "not empty"),
        ("matrix", {"rows": (-1, 3)}, r"within 0\.\.6"),
        ("matrix", {"columns": (16, 64)}, "cut a Q4_0 block"),
        ("matrix", {"columns": (0, 160)}, r"within 0\.\.128"),
        ("vector", {"rows": (0, 1), "columns": (0, 1)}, "not both"),
    ],
)
def test_impossible_slices_are_refused(tmp_path: Path, name: str, ranges: dict[str, tuple[int, int]], message: str) -> None:
    write(tmp_path / "m.gguf")
    with GgufFile.open(tmp_path / "m.gguf") as file, pytest.raises(ModelError, match=message):
        file.read(name, **ranges)


def test_impossible_lookups_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    with GgufFile.open(tmp_path / "m.gguf") as file:
        for ids in ([6], [-1], [0, 1 << 70]):
            with pytest.raises(ModelError, match="it has 6"):
                file.dequantized_rows("matrix", ids)
        with pytest.raises(ModelError, match="expected a matrix"):
            file.dequantized_rows("vector", [0])


def test_digest_tells_headers_apart(tmp_path: Path) -> None:
    for name in ("one", "two", "one"):
        write(tmp_path / f"{name}.gguf", name=name)
    write(tmp_path / "again.gguf", name="one")
    digests = {}
    for name in ("one", "two", "again"):
        with GgufFile.open(tmp_path / f"{name}.gguf") as file:
            digests[name] = file.digest
    assert digests["one"] == digests["again"] != digests["two"]
    assert len(digests["one"]) == 64


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def preamble(n_tensors: int = 0, n_metadata: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_metadata)


def tensor(name: str = "w", dims: tuple[int, ...] = (8, 2), number: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)


def number(key: str, value: int) -> bytes:
    return string(key) + struct.pack("<II", 4, value)


BROKEN = {
    "empty": (b"", "has 0 bytes"),
    "foreign magic": (b"PK\x03\x04" + bytes(60), "expected b'GGUF'"),
    "version 1": (preamble(version=1) + bytes(60), "version 1; expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(60), "big-endian GGUF of version 3"),
    "absurd tensor count": (preamble(n_tensors=1 << 60) + bytes(60), "more than"),
    "absurd metadata count": (preamble(n_metadata=1 << 60) + bytes(60), "more than"),
    "absurd string": (preamble(n_metadata=1) + struct.pack("<Q", 1 << 62) + bytes(60), "cut short"),
    "absurd array": (preamble(n_metadata=1) + string("k") + struct.pack("<IIQ", 9, 4, 1 << 61) + bytes(60), "claims"),
    "absurd array of strings": (preamble(n_metadata=1) + string("k") + struct.pack("<IIQ", 9, 8, 5000) + b"\xff" * 50_000, "runs past the end"),
    "array of arrays": (preamble(n_metadata=1) + string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(60), "element type 9"),
    "unknown value type": (preamble(n_metadata=1) + string("k") + struct.pack("<I", 13) + bytes(60), "value type 13"),
    "key twice": (preamble(n_metadata=2) + number("k", 1) + number("k", 2) + bytes(60), "there twice"),
    "alignment 24": (preamble(n_metadata=1) + number("general.alignment", 24) + bytes(60), "power of two"),
    "parts": (preamble(n_metadata=1) + number("split.count", 3) + bytes(60), "one of 3 parts"),
    "cut short": (preamble(1) + tensor() + bytes(80), "cut short"),
    "offset outside": (preamble(1) + tensor(offset=1 << 40) + bytes(200), "cut short"),
    "offset misaligned": (preamble(1) + tensor(offset=4) + bytes(200), "multiple of the alignment"),
    "tensor twice": (preamble(2) + tensor() + tensor() + bytes(400), "listed twice"),
    "unknown type": (preamble(1) + tensor(number=99) + bytes(400), r"type 99.*known are 0 F32, 1 F16"),
    "no dims": (preamble(1) + tensor(dims=()) + bytes(400), "0 dims"),
    "dim of zero": (preamble(1) + tensor(dims=(0, 4)) + bytes(400), "positive"),
    "half a block": (preamble(1) + tensor(dims=(31, 4), number=2) + bytes(400), "whole number of Q4_0 blocks"),
    "long name": (preamble(1) + tensor(name="w" * 64) + bytes(400), "64 bytes"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_with_their_fault(tmp_path: Path, case: str) -> None:
    content, message = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"(?s)broken.gguf.*{message}"):
        GgufFile.open(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(ModelError, match="cannot be opened"):
            GgufFile.open(path)


def trouble(path: Path) -> str:
    """The message of the ModelError that reading everything raises, or the path if there is none."""
    try:
        read_everything(path)
    except ModelError as error:
        return str(error)
    return str(path)


def read_everything(path: Path) -> None:
    with GgufFile.open(path) as file:
        assert len(file.digest) == 64
        for key, value in file.metadata.items():
            if isinstance(value, list | ArrayInfo):
                assert len(file.array(key)) == len(value)
        for name, info in file.tensors.items():
            assert len(file.read(name).data) == info.n_bytes


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_gives_a_file_or_a_model_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m.gguf"
    if not path.exists():
        write(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        # The first 600 bytes hold the counts, keys and lengths; the last 3000 of the header the tensor infos.
        place = data.draw(st.one_of(st.integers(0, 600), st.integers(0, len(content) - 9)))
        value = data.draw(st.one_of(st.integers(0, 40), st.sampled_from([255, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]), st.integers(0, (1 << 64) - 1)))
        width = data.draw(st.sampled_from([1, 4, 8]))
        content[place : place + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    del content[data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content)))) :]
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    assert "damaged.gguf" in trouble(damaged)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=400), n_tensors=st.integers(0, 3), n_metadata=st.integers(0, 3))
def test_any_bytes_after_the_preamble_give_a_file_or_a_model_error(tmp_path: Path, content: bytes, n_tensors: int, n_metadata: int) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(preamble(n_tensors, n_metadata) + content)
    assert "noise.gguf" in trouble(path)


def test_header_with_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    arrays = {"tokenizer.ggml.tokens": 128_256, "tokenizer.ggml.merges": 280_147}
    content = b"".join(
        string(key) + struct.pack("<IIQ", 9, 8, length) + b"".join(struct.pack("<Q", 12) + b"%012d" % i for i in range(length))
        for key, length in arrays.items()
    )
    path.write_bytes(preamble(n_metadata=2) + content)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with GgufFile.open(path) as file:
            assert len(file.metadata["tokenizer.ggml.merges"]) == 280_147
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3
