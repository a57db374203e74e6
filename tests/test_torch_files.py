"""Reading and writing PyTorch files: golden files of the real PyTorch, round trips, and files that were damaged."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinymodel_jax.io.torch_files import describe_torch_file, load_torch_file, save_torch_file

DATA = Path(__file__).parent / "data"
DTYPES = [
    *map(np.dtype, ("float64", "float32", "float16", "complex128", "complex64", "bool")),
    *map(np.dtype, ("int64", "int32", "int16", "int8", "uint8")),
    np.dtype(ml_dtypes.bfloat16),
]
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal shape, dtype and bytes: NaNs and signed zeros included."""
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


def load_bytes(content: bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.pt")
        path.write_bytes(content)
        return load_torch_file(path)


def saved_bytes(tensors) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.pt")
        save_torch_file(tensors, path)
        assert os.listdir(folder) == ["file.pt"]
        return path.read_bytes()


@st.composite
def arrays(draw) -> np.ndarray:
    """Arrays of any dtype, shape and bit pattern, contiguous or not."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    array = (raw % 2 if dtype == np.bool_ else raw).view(dtype).reshape(shape)
    if draw(st.booleans()):
        array = array.T
    return array[..., ::-2] if array.ndim and draw(st.booleans()) else array


@pytest.mark.parametrize("name", ["odd_zip.pt", "odd_legacy.pt"])
def test_views_strides_and_every_dtype_come_out_as_pytorch_saved_them(name):
    tensors, expected = load_torch_file(DATA / name), np.load(DATA / "odd_expected.npz")
    for key in expected.files:
        got, want = tensors[key], expected[key]
        assert got.dtype == want.dtype or (key.startswith("bf16") and got.dtype == ml_dtypes.bfloat16), key
        np.testing.assert_array_equal(got.astype(want.dtype), want, err_msg=key)
    assert set(tensors) == {*expected.files, "nested"}


@pytest.mark.parametrize("name", ["odd_zip.pt", "odd_legacy.pt"])
def test_nested_containers_keep_their_structure(name):
    first, *rest = load_torch_file(DATA / name)["nested"]["a"]
    np.testing.assert_array_equal(first, np.ones(2, np.float32))
    assert rest == [3, "s", None, (1.5, True)]


@pytest.mark.parametrize("name", ["odd_zip.pt", "odd_legacy.pt"])
def test_tensors_that_shared_a_storage_share_memory_and_cannot_be_written(name):
    tensors = load_torch_file(DATA / name)
    assert np.shares_memory(tensors["base"], tensors["transposed"])
    assert not any(array.flags.writeable for array in tensors.values() if isinstance(array, np.ndarray))
    with pytest.raises(ValueError, match="read-only"):
        tensors["base"][0] = 1


def test_the_bfloat16_file_is_the_rounded_float32_file():
    exact, rounded = load_torch_file(DATA / "lm_f32_zip.pt"), load_torch_file(DATA / "lm_bf16_zip.pt")
    assert list(exact)[:2] == ["pos_embed", "embed.weight"]
    assert set(exact) == set(rounded)
    for name, array in exact.items():
        assert same_bits(array.astype(ml_dtypes.bfloat16), rounded[name]), name


@given(st.dictionaries(st.text(max_size=8), arrays(), max_size=4))
@settings(max_examples=150, deadline=None)
def test_what_is_saved_is_loaded_bit_for_bit(tensors):
    loaded = load_bytes(saved_bytes(tensors))
    assert list(loaded) == list(tensors)
    for name, array in tensors.items():
        assert same_bits(loaded[name], array)


def test_saved_storages_are_aligned_to_64_bytes_and_the_bytes_depend_on_the_arrays_alone():
    tensors = {
        "odd": np.arange(3, dtype=np.uint8),
        "w": np.ones((3, 5), np.float32),
        "u": np.arange(2, dtype=np.int16),
    }
    content = saved_bytes(tensors)
    assert content == saved_bytes(tensors)
    for array in load_bytes(content).values():
        assert array.ctypes.data % 64 == 0
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_torch_file({"w": np.ones(3, np.float32)}, path)
    old = path.read_bytes()
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_torch_file({"w": np.zeros(3, np.float32)}, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_saving_lists_every_array_that_pytorch_cannot_hold(tmp_path):
    wrong = {"text": np.array(["a"]), "swapped": np.ones(2, ">f4"), "ids": np.ones(2, np.uint16), "good": np.ones(2)}
    with pytest.raises(ValueError, match=r"'text' \(<U1\), 'swapped' \(>f4\), 'ids' \(uint16\); allowed .* bfloat16"):
        save_torch_file(wrong, tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["odd_zip.pt", "odd_legacy.pt"])
def test_describe_tells_names_storages_and_views(name):
    summary = describe_torch_file(DATA / name)
    tensors = {entry.name: entry for entry in summary.tensors}
    assert (summary.form, summary.file_bytes) == (name[4:-3], (DATA / name).stat().st_size)
    assert summary.refused == ()
    assert {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch.BFloat16Storage"} <= set(
        summary.globals
    )
    assert (tensors["nested.a.0"].shape, tensors["bf16"].dtype) == ((2,), "bfloat16")
    views = {entry.name for entry in summary.tensors if entry.is_view}
    assert views == {"view", "transposed", "strided", "overlap", "expanded"}


def test_a_missing_path_and_a_folder_have_errors_of_their_own(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        load_torch_file(tmp_path / "missing.pt")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_torch_file(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(ValueError, match="a pipe"):
        load_torch_file(tmp_path / "pipe.pt")


@pytest.mark.parametrize("name", ["odd_zip.pt", "odd_legacy.pt", "sparse_M2_f32_legacy.pt"])
def test_every_truncation_is_an_error_of_one_line(name):
    content = (DATA / name).read_bytes()
    for length in range(0, len(content), max(1, len(content) // 400)):
        with pytest.raises(ValueError, match="PyTorch file") as caught:
            load_bytes(content[:length])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["odd_zip.pt", "odd_legacy.pt"])
@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_gives_an_error_or_arrays_but_nothing_else(name, data):
    content = bytearray((DATA / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(ValueError):
        for value in load_bytes(bytes(content)).values():
            np.array(value, dtype=object)


@given(index=st.integers(0, 6143), bit=st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_a_bit_flipped_in_a_storage_of_a_zip_file_is_found(index, bit):
    content = bytearray((DATA / "sparse_T1_bf16_zip.pt").read_bytes())
    start = bytes(content).index(load_torch_file(DATA / "sparse_T1_bf16_zip.pt")["encoder.weight"].tobytes())
    content[start + index] ^= 1 << bit
    with pytest.raises(ValueError, match="data/0' does not match its checksum"):
        load_bytes(bytes(content))


@given(
    st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."]),
    st.binary(),
)
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_an_error_of_one_line(start, rest):
    with pytest.raises(ValueError, match="PyTorch file") as caught:
        load_bytes(start + rest)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_a_big_file_costs_no_more_memory_than_its_size(tmp_path):
    path, size = tmp_path / "big.pt", 64 << 20
    save_torch_file({"w": np.zeros(size // 2, ml_dtypes.bfloat16)}, path)
    program = f"""
import re
from tinymodel_jax.io.torch_files import load_torch_file
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
before = peak()
array = load_torch_file({str(path)!r})["w"]
print(peak() - before, array.nbytes)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    grown, nbytes = map(int, output.split())
    assert nbytes == size
    assert grown < 1.25 * size
