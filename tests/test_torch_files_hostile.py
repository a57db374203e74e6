"""Malicious files: pickles that ask for code, wrong sizes, bombs. Nothing may run, hang, crash or use much memory."""

import copy
import io
import pickle
import struct
import sys
import tracemalloc
import types
import zipfile
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import pytest

from tinymodel_jax.io import torch_files, torch_pickle
from tinymodel_jax.io.torch_files import describe_torch_file, load_torch_file

ORDERED_DICT = b"ccollections\nOrderedDict\n"
FLOAT_STORAGE = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
LEGACY_HEADER = b"".join(
    pickle.dumps(value, protocol=2)
    for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
)


def push(value) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def tensor(
    shape=(2,), strides=(1,), offset=0, numel=2, storage=b"ctorch\nFloatStorage\n", key="0", tail=b"\x89)"
) -> bytes:
    """Instructions of a tensor on a storage of `numel` elements."""
    reference = b"(" + push("storage") + storage + push(key) + push("cpu") + push(numel) + b"tQ"
    return REBUILD + b"(" + reference + push(offset) + push(shape) + push(strides) + tail + b"tR"


def mapping(value: bytes) -> bytes:
    """A whole pickle of {"w": value}."""
    return b"\x80\x02}" + push("w") + value + b"s."


def archive(content: bytes, storages=None, compression=zipfile.ZIP_STORED, extra=()) -> bytes:
    """A zip file like PyTorch's around a pickle; storage 0 has eight bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", content)
        for key, raw in (storages or {"0": bytes(8)}).items():
            file.writestr(f"archive/data/{key}", raw, compress_type=compression)
        for name in extra:
            file.writestr(name, b"x")
    return buffer.getvalue()


def legacy(content: bytes, keys=b"\x80\x02]X\x01\x00\x00\x000a.", storages=b"\x02" + bytes(15)) -> bytes:
    return LEGACY_HEADER + content + keys + storages


@pytest.fixture
def refusal(tmp_path):
    """A function: the message with which a file of the given bytes is refused, having checked that it is one line."""

    def message(content: bytes) -> str:
        path = tmp_path / "file.pt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"file\.pt cannot be read as a PyTorch file: ") as caught:
            load_torch_file(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message


@pytest.mark.parametrize("wrap", [archive, legacy])
def test_the_hand_made_pieces_are_a_good_file(tmp_path, wrap):
    """So that the refusals below are about what each test changes."""
    (tmp_path / "file.pt").write_bytes(wrap(mapping(tensor())))
    np.testing.assert_array_equal(load_torch_file(tmp_path / "file.pt")["w"], np.zeros(2, np.float32))


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path, monkeypatch, protocol):
    """With stand-ins for PyTorch's own classes, pickled as `torch.save` does."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for module, name in [(torch, "FloatStorage"), (utils, "_rebuild_tensor_v2")]:
        monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(module, name, type(name, (), {"__module__": module.__name__}))

    class Tensor:
        def __reduce__(self):
            return utils._rebuild_tensor_v2, (torch.FloatStorage(), 0, (2,), (1,), False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            named = ("storage", torch.FloatStorage, "0", "cpu", 2)
            return named if isinstance(obj, torch.FloatStorage) else None

    facts = (1, -1, 300, 1 << 40, 1 << 70, 1.5, True, None, "é", "x" * 300, {"lr": [0.1] * 3})
    state = OrderedDict(weight=Tensor(), facts=facts, again=facts)
    vars(state)["_metadata"] = OrderedDict(version=1)
    Pickler(buffer := io.BytesIO(), protocol).dump(state)
    for form in (archive, legacy):
        (tmp_path / "file.pt").write_bytes(form(buffer.getvalue()))
        loaded = load_torch_file(tmp_path / "file.pt")
        np.testing.assert_array_equal(loaded.pop("weight"), np.zeros(2, np.float32))
        assert (type(loaded), vars(loaded), dict(loaded)) == (OrderedDict, {}, {"facts": facts, "again": facts})


CODE = {
    "os.system": b"cos\nsystem\n(S'true'\ntR",
    "posix.system": b"(S'true'\niposix\nsystem\n",
    "builtins.exec": b"(cbuiltins\nexec\n" + push("1") + b"o",
    "torch.storage._load_from_bytes": b"ctorch.storage\n_load_from_bytes\n" + push("x") + b"\x85R",
    # The module and the name come from the memo, in disguise and out of order.
    "subprocess.Popen": push("Popen") + b"q\x07" + push("subprocess") + b"q\x080" + b"0h\x08h\x07\x93)\x81",
    # The name is never called, and what holds it is thrown away.
    "builtins.getattr": b"(cbuiltins\ngetattr\n1N",
    "collections.OrderedDict.__init__": b"ccollections\nOrderedDict.__init__\n)R",
    "torch._utils._rebuild_tensor_v3": tensor().replace(b"tensor_v2", b"tensor_v3"),
    # An instruction that is refused itself comes first.
    "os.popen": b"\x82\x01cos\npopen\n",
}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("wrap", [archive, legacy, lambda content: content])
def test_a_pickle_that_asks_for_code_is_refused_by_the_name_it_asks_for(refusal, name, wrap):
    assert f"asks for {name}" in refusal(wrap(mapping(CODE[name])))


def test_nothing_of_a_refused_file_runs_and_describe_names_what_it_wanted(tmp_path):
    target = tmp_path / "owned"
    command = f"cos\nsystem\n(S'touch {target}'\ntR".encode()
    path = tmp_path / "file.pt"
    path.write_bytes(archive(mapping(tensor() + b"0" + command)))
    with pytest.raises(ValueError, match=r"asks for os\.system, and nothing was run"):
        load_torch_file(path)
    summary = describe_torch_file(path)
    assert (summary.refused, summary.tensors) == (("os.system",), ())
    assert summary.globals == ("torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "os.system")
    assert not target.exists()


def test_all_refused_globals_are_listed_at_once_without_control_characters(refusal):
    names = b"".join(b"cevil%d\nx\x1b[2J\r\n0" % number for number in range(10))
    assert "evil0.x\\x1b[2J\\r, evil1" in (message := refusal(archive(mapping(names + b"N"))))
    assert "and 2 more" in message


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_describe_lists_every_refused_global_of_every_protocol(tmp_path, protocol):
    path = tmp_path / "file.pt"
    wanted = {"a": zipfile.ZipInfo, "b": OrderedDict(), "c": [zipfile.ZipFile, zipfile.ZipInfo, Fraction]}
    path.write_bytes(archive(pickle.dumps(wanted, protocol=protocol)))
    summary = describe_torch_file(path)
    assert summary.refused == ("zipfile.ZipInfo", "zipfile.ZipFile", "fractions.Fraction")
    assert set(summary.globals) == {*summary.refused, "collections.OrderedDict"}
    with pytest.raises(ValueError, match=f"asks for {', '.join(summary.refused)}, and nothing was run"):
        load_torch_file(path)


MALFORMED = {
    "keys of a class": (ORDERED_DICT + push("a") + b"Ns", AttributeError),
    "items of a tuple": (b")Na", AttributeError),
    "a storage class called": (b"ctorch\nFloatStorage\n)R", TypeError),
    "a string called": (push("os.system") + b")R", TypeError),
    "a string made an object": (push("os.system") + b")\x81", TypeError),
    "too few arguments": (REBUILD + push((1, 2, 3)) + b"R", TypeError),
    "arguments for an OrderedDict": (ORDERED_DICT + push([["a", 1]]) + b"\x85R", TypeError),
    "a global named by a number": (b"K\x01" + push("x") + b"\x93", pickle.UnpicklingError),
    "no value": (b"000000R", IndexError),
    "no mark": (b"tttt", IndexError),
    "no memo": (b"h\x09", pickle.UnpicklingError),
    "a registered extension": (b"\x82\x01", KeyError),
    "a dict of tuples at once": (b"()Nd", KeyError),
    "a set": (b"\x8f", KeyError),
    "a frozenset": (b"(\x91", KeyError),
    "a buffer from elsewhere": (b"\x97", pickle.UnpicklingError),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_pickle_is_refused_in_one_plain_sentence_and_the_cause_is_kept(tmp_path, fault):
    content, cause = MALFORMED[fault]
    (tmp_path / "file.pt").write_bytes(archive(mapping(content)))
    with pytest.raises(ValueError, match=r": its pickle is damaged, or does not hold .* tensors holds$") as caught:
        load_torch_file(tmp_path / "file.pt")
    refused = caught.value.__cause__
    assert isinstance(refused, ValueError)
    assert isinstance(refused.__cause__, cause)


MISUSES = {
    "attributes of a function": (REBUILD + b"}" + push("__code__") + b"Nsb", "sets attributes"),
    "attributes from None": (ORDERED_DICT + b")RNb", "sets attributes"),
    "a global with a long name": (push("x" * 1000) + push("y") + b"\x93", "asks for xxx"),
    "a function for a storage": (
        tensor(storage=b"ctorch\nfloat32\n").replace(b"float32", b"Size"),
        "storage is malformed",
    ),
    "a tensor on a storage class": (
        REBUILD + b"(" + FLOAT_STORAGE + push(0) + push((0,)) + push((1,)) + b"\x89)tR",
        "not described by a storage",
    ),
    "a bare function": (ORDERED_DICT, "holds a function"),
    "a lazy conjugate": (tensor(tail=b"\x89)}" + push("conj") + b"\x88s"), "lazy conjugate"),
    "a tuple as a key": (b"})Ns", "a key of its pickle"),
    "a long number as a key": (b"}" + push(1 << 70) + b"Ns", "a key of its pickle"),
    "a long number": (b"\x8a\xc8" + bytes(200), "a number in 202 bytes"),
    "a number of many digits": (b"L" + b"7" * 100 + b"L\n", "a number in 103 bytes"),
    "a text with escapes": (b"S'\\q'\n", "not plain ASCII"),
    "two storages of one key": (tensor() + b"0" + tensor(numel=3), "declared twice"),
    "a size of 65 axes": (b"ctorch\nSize\n" + push((1,) * 65) + b"\x85R", "not a tuple of at most 64 numbers"),
    "a size that is a list": (b"ctorch\nSize\n" + push([1]) + b"\x85R", "not a tuple of at most 64 numbers"),
    "a size below 0": (b"ctorch\nSize\n" + push((2, -1)) + b"\x85R", "something other than whole numbers from 0 on"),
    "a size of text": (b"ctorch\nSize\n" + push(("2",)) + b"\x85R", "something other than whole numbers from 0 on"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_allowed_names_cannot_be_misused(refusal, misuse):
    content, fault = MISUSES[misuse]
    assert fault in refusal(archive(mapping(content)))


def test_setting_the_state_of_a_state_dict_changes_nothing(tmp_path):
    """A module's state dict carries `_metadata`; other names in its place must not become attributes either."""
    state = b"}(" + push("_metadata") + b"}" + push("move_to_end") + push("x") + push("__class__") + b"Nub"
    (tmp_path / "file.pt").write_bytes(archive(b"\x80\x02" + ORDERED_DICT + b")R" + state + b"."))
    loaded = load_torch_file(tmp_path / "file.pt")
    assert (type(loaded), vars(loaded)) == (OrderedDict, {})


LIES = {
    "needs 3 elements": tensor(shape=(3,)),
    "needs 4 elements": tensor(offset=2),
    "needs 1152921504606846977": tensor(shape=(2,), strides=((1 << 60) - 1,), offset=1),
    "expands a storage of 8 bytes to 4000000000": tensor(shape=(10**9,), strides=(0,)),
    "not whole numbers": tensor(shape=(-1,)),
    "2 axes and 1 strides": tensor(shape=(1, 1)),
    "array is too big": tensor(shape=(0, 1 << 40, 1 << 40), strides=(1, 1, 1)),
    "65 axes": tensor(shape=(1,) * 65, strides=(1,) * 65),
    "'0' is not in the archive with the 4611686018427387900 bytes": tensor(numel=(1 << 60) - 1),
    "'../0' is not in the archive": tensor(key="../0"),
}


@pytest.mark.parametrize("fault", LIES)
def test_sizes_that_lie_are_refused(refusal, fault):
    assert fault in refusal(archive(mapping(LIES[fault])))


def test_axes_of_length_one_may_have_any_stride_and_small_expansions_stay(tmp_path):
    content = mapping(
        b"(" + tensor(shape=(1, 2), strides=(1 << 59, 1)) + tensor(shape=(1000, 1), strides=(0, 0)) + b"t"
    )
    (tmp_path / "file.pt").write_bytes(archive(content))
    first, second = load_torch_file(tmp_path / "file.pt")["w"]
    assert (first.shape, second.shape, second.strides[0]) == ((1, 2), (1000, 1), 0)


@pytest.mark.parametrize(
    ("storages", "fault"),
    [
        (struct.pack("<q8x", 3), "storage '0' is cut short or damaged"),
        (struct.pack("<q8x", 1 << 62), "storage '0' is cut short or damaged"),
        (struct.pack("<q4x", 2), "storage '0' is cut short or damaged"),
        (struct.pack("<q9x", 2), "1 bytes follow its last storage"),
    ],
)
def test_the_older_form_with_other_storages_than_its_pickle_says_is_refused(refusal, storages, fault):
    assert fault in refusal(legacy(mapping(tensor()), storages=storages))


@pytest.mark.parametrize("keys", [b"\x80\x02].", b"\x80\x02]K\x00a.", b"\x80\x02N.", b"\x80\x02]]a."])
def test_the_older_form_with_another_list_of_storages_is_refused(refusal, keys):
    assert "list of storages" in refusal(legacy(mapping(tensor()), keys=keys))


@pytest.mark.parametrize(
    ("facts", "fault"),
    [((1002, {"little_endian": True}), "protocol"), ((1001, {"little_endian": False}), "big-endian")],
)
def test_the_older_form_with_another_header_is_refused(refusal, facts, fault):
    content = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, *facts))
    assert fault in refusal(content + mapping(tensor()))


def test_a_big_endian_zip_file_is_refused(refusal):
    content = archive(mapping(tensor()), extra=["archive/byteorder"])
    assert "big-endian" in refusal(content)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (archive(mapping(tensor()), extra=["archive/constants.pkl"]), "TorchScript"),
        (archive(mapping(tensor()), extra=["archive/code/__torch__.py"]), "TorchScript"),
        (archive(mapping(tensor()), extra=["other/data.pkl"]), "not of torch.save: it has 2 data.pkl"),
        (archive(b"").replace(b"data.pkl", b"data.txt"), "not of torch.save: it has 0 data.pkl"),
        (bytes(257) + b"ustar" + bytes(250), "tar archive"),
        (pickle.dumps({"w": [1.0]}), "a plain pickle"),
        (b"\x93NUMPY\x01\x00", "torch.save did not write it; it begins with b'\\x93NUMPY"),
        (b"<!DOCTYPE html>", "it begins with b'<!DOCTYPE html>'"),
        (archive(b"\x80\x02]."), "holds a list, not a mapping"),
        (archive(b"\x80\x02" + tensor() + b"."), "holds a tensor, not a mapping"),
    ],
)
def test_files_of_other_kinds_are_told_apart(refusal, content, fault):
    assert fault in refusal(content)


def test_compressed_members_and_zip_bombs_are_refused(refusal):
    assert "is compressed or encrypted" in refusal(archive(mapping(tensor()), compression=zipfile.ZIP_DEFLATED))
    bomb = archive(mapping(tensor(numel=1 << 22)), {"0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED)
    assert "claim more bytes" in refusal(bomb)


def test_overlapping_members_cost_no_more_than_the_file(refusal):
    buffer = io.BytesIO(archive(mapping(tensor()), {"0": bytes(1 << 20)}))
    with zipfile.ZipFile(buffer, "a") as file:
        for index in range(50):
            entry = copy.copy(file.getinfo("archive/data/0"))
            entry.filename = f"archive/data/{index + 1}"
            file.filelist.append(entry)
        file.writestr("archive/version", b"3")
    assert "claim more bytes" in refusal(buffer.getvalue())


def test_zip_members_that_claim_more_than_the_file_are_refused(refusal):
    content = archive(mapping(tensor(numel=1 << 28)))
    real, claimed = struct.pack("<II", 8, 8), struct.pack("<II", 1 << 30, 1 << 30)
    directory = content.rindex(real, 0, content.rindex(b"archive/data/0"))
    assert "claim more bytes" in refusal(content[:directory] + claimed + content[directory + 8 :])


BOMBS = {
    "bytes": b"\x80\x04B\xff\xff\xff\xff.",
    "string of eight-byte length": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
    "long integer": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "negative string length": b"\x80\x02T\xff\xff\xff\xff.",
    "memo index": mapping(b"Nr\xff\xff\xff\xff" + ORDERED_DICT),
    "deep lists": mapping(b"]" * 5000 + b"a" * 4999),
    "deep tuples as a key": mapping(b"})" + b"\x85" * 10_000 + b"Ns"),
    "deep marks": mapping(b"(" * 10_000),
    "a key that doubles": mapping(b"})q\x00" + b"0h\x00h\x00\x86q\x00" * 100 + b"Ns"),
    "names put together from the memo": mapping(push("x" * 99_999) + b"q\x010" + b"h\x01h\x01\x930" * 1000 + b"N"),
    "a frame longer than the file": b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
    "a list in itself": mapping(b"]q\x00h\x00a"),
    "booleans that are none": mapping(tensor(storage=b"ctorch\nBoolStorage\n", numel=8)),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("wrap", [lambda content: archive(content, {"0": b"\x02" * 8}), legacy])
def test_bombs_are_refused_and_cost_little_memory(refusal, bomb, wrap):
    content = wrap(BOMBS[bomb])
    tracemalloc.start()
    refusal(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(content) + (8 << 20)


def test_an_endless_pickle_is_given_up(refusal, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_INSTRUCTIONS", 1000)
    assert "more than 1,000 instructions" in refusal(archive(mapping(b"N0" * 600)))


def test_a_huge_string_is_given_up(refusal, monkeypatch):
    monkeypatch.setattr(torch_files, "MAX_PICKLE_BYTES", 1 << 20)
    assert "larger than 1 MiB" in refusal(archive(mapping(push("x" * (1 << 20)))))


def test_shared_containers_are_neither_copied_nor_walked_again(tmp_path):
    """Twenty lists, each holding the one before ten times: 10^20 leaves if they were unfolded."""
    layers = b"".join(b"0](" + bytes([104, index]) * 10 + b"e" + bytes([113, index + 1]) for index in range(20))
    path = tmp_path / "file.pt"
    path.write_bytes(archive(mapping(b"](" + tensor() + b"eq\x00" + layers)))
    inner = load_torch_file(path)["w"]
    assert len(inner) == 10
    assert all(item is inner[0] for item in inner)
    assert len(describe_torch_file(path).tensors) == 1


def test_described_names_stay_short(tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(archive(mapping(b"}" + push("x" * 10_000) + tensor() + b"s")))
    assert describe_torch_file(path).tensors[0].name == "w." + "x" * 198
