"""The real PyTorch reads what is written here, and what it writes is read here; skipped where it is not installed."""

import warnings
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from tinymodel_jax.io.torch_files import describe_torch_file, load_torch_file, save_torch_file

torch = pytest.importorskip("torch")

DTYPES = [
    *("float64", "float32", "float16", "complex128", "complex64", "bool"),
    *("int64", "int32", "int16", "int8", "uint8"),
    "bfloat16",
]


def random_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    raw = np.random.default_rng(0).integers(0, 2 if name == "bool" else 256, int(np.prod(shape)) * dtype.itemsize)
    return raw.astype(np.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("name", DTYPES)
def test_pytorch_reads_every_dtype_that_is_written(tmp_path, name):
    arrays = {f"w{len(shape)}": random_array(name, shape) for shape in [(), (5,), (3, 4), (2, 0, 3)]}
    save_torch_file(arrays, tmp_path / "model.pt")
    tensors = torch.load(tmp_path / "model.pt", weights_only=True)
    assert type(tensors) is OrderedDict
    assert list(tensors) == list(arrays)
    for key, array in arrays.items():
        assert (tensors[key].dtype, tuple(tensors[key].shape)) == (getattr(torch, name), array.shape)
        assert tensors[key].is_contiguous()
        assert tensors[key].reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_pytorch_maps_a_written_file_and_loads_it_into_a_module(tmp_path):
    weights = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(2, np.float32)}
    save_torch_file(weights, tmp_path / "model.pt")
    module = torch.nn.Linear(3, 2)
    module.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True, mmap=True))
    np.testing.assert_array_equal(module.weight.detach().numpy(), weights["weight"])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_what_pytorch_writes_is_read_whatever_its_pickle_protocol(tmp_path, zipped, protocol):
    base = torch.arange(24, dtype=torch.float32)
    saved = {
        "state": torch.nn.BatchNorm1d(3).state_dict(),
        "views": [base, base.view(4, 6).T[::2], base[3:].expand(2, 21)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "facts": (1, -1, 1 << 70, 1.5, True, None, "é", {"lr": 0.1}),
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
    }
    path = tmp_path / "file.pt"
    torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    loaded = load_torch_file(path)
    assert type(loaded["state"]) is OrderedDict
    for name, tensor in saved["state"].items():
        np.testing.assert_array_equal(loaded["state"][name], tensor.numpy())
    for got, want in zip(loaded["views"], saved["views"], strict=True):
        np.testing.assert_array_equal(got, want.numpy())
        assert np.shares_memory(got, loaded["views"][0])
    np.testing.assert_array_equal(loaded["parameter"], np.ones(2, np.float32))
    assert loaded["facts"] == saved["facts"]
    assert (loaded["shape"], loaded["dtype"]) == ((2, 3), np.dtype(ml_dtypes.bfloat16))
    assert [entry.name for entry in describe_torch_file(path).tensors[-4:]] == [
        "views.0",
        "views.1",
        "views.2",
        "parameter",
    ]


def test_a_file_saved_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(5)}, tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(load_torch_file(tmp_path / "file.pt")["w"], np.arange(5))


def test_a_pickled_module_and_a_torchscript_archive_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        load_torch_file(tmp_path / "module.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer PyTorch deprecates torch.jit
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "script.pt")
    with pytest.raises(ValueError, match="TorchScript archive"):
        load_torch_file(tmp_path / "script.pt")
