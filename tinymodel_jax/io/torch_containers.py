"""The two outer forms of a PyTorch file, zip archive and older stream of pickles: one pickle plus its storages.

Storages are slices of the mapped file: nothing is copied. Zip members must be stored, lie inside the file and match
their CRC-32; the older form has no checksums, so there only sizes can be checked. It deliberately refuses
what `torch.save` does not write (TorchScript, tar, compressed or encrypted members) and big-endian files.
"""

import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import IO

from tinymodel_jax.io.pickle_instructions import instructions
from tinymodel_jax.io.torch_pickle import survey
from tinymodel_jax.io.torch_records import StorageRecord

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Start of a zip member: signature, and the lengths of the name and the extra field that come before its bytes."""
_ZIP_START, _ZIP_EMPTY = b"PK\x03\x04", b"PK\x05\x06"


@dataclass(frozen=True)
class ZipContainer:
    """A zip archive of `torch.save`, every member checked."""

    pickle: bytes
    """The pickle of the object that was saved."""
    members: dict[str, memoryview]
    """Storage key -> its bytes."""
    form: str = "zip"

    def storages(self, declared: Mapping[str, StorageRecord]) -> dict[str, memoryview]:
        """Key -> bytes of the storages that the pickle declares; ValueError if one is missing or has another size."""
        for key, record in declared.items():
            if key not in self.members:
                raise ValueError(f"storage {key!a:.40} is not in the archive; fetch the file again")
            if len(self.members[key]) != record.nbytes:
                raise ValueError(
                    f"storage {key!a:.40} has {len(self.members[key])} bytes, but the pickle says {record.nbytes}"
                )
        return {key: self.members[key] for key in declared}


@dataclass(frozen=True)
class LegacyContainer:
    """A stream of `torch.save` before PyTorch 1.6: a header, the object's pickle, a list of keys, the storages."""

    pickle: bytes
    """The pickle of the object that was saved."""
    mapped: mmap
    after_pickle: int
    """Position of the list of storage keys that follows the pickle."""
    form: str = "legacy"

    def storages(self, declared: Mapping[str, StorageRecord]) -> dict[str, memoryview]:
        """Key -> bytes of the storages that the pickle declares; ValueError if the rest of the file disagrees."""
        listed = survey(self.mapped, self.after_pickle)
        keys, at = listed.require().tree, listed.end
        strings = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not strings or sorted(keys) != sorted(declared):
            raise ValueError("its list of storages is not the one that its pickle uses; fetch the file again")
        whole, found = memoryview(self.mapped), {}
        for key in keys:
            record, start = declared[key], at + 8
            at = start + record.nbytes
            if whole[start - 8 : start] != record.numel.to_bytes(8, "little") or at > len(whole):
                raise ValueError(f"storage {key!a:.40} is cut short or damaged; fetch the file again")
            found[key] = whole[start:at]
        if at != len(whole):
            raise ValueError(f"{len(whole) - at} bytes follow its last storage; fetch the file again")
        return found


Container = ZipContainer | LegacyContainer


def open_container(file: IO[bytes], mapped: mmap) -> Container:
    """Recognise the form of a file by its first bytes. `mapped` is the whole of `file`.

    Raises:
        ValueError: the file is damaged, or is none that `torch.save` writes; the message says what it seems to be.
    """
    if mapped[:4] in (_ZIP_START, _ZIP_EMPTY):
        return _open_zip(file, mapped)
    if mapped[257:262] == b"ustar":
        raise ValueError("it is a tar archive, as the first PyTorch releases wrote; save it again with a newer PyTorch")
    return _open_legacy(mapped)


def _open_zip(file: IO[bytes], mapped: mmap) -> ZipContainer:
    try:
        infos = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, OverflowError, struct.error) as error:
        raise ValueError(f"it is a zip archive cut short or damaged ({error}); fetch the file again") from None
    root = _archive_root([info.filename for info in infos])
    members = _stored_members(infos, mapped)
    if bytes(members.get(f"{root}/byteorder", b"little")) != b"little":
        raise ValueError("it was saved on a big-endian machine; load and save it again on a little-endian one")
    storages = {
        name.removeprefix(f"{root}/data/"): view for name, view in members.items() if name.startswith(f"{root}/data/")
    }
    return ZipContainer(bytes(members[f"{root}/data.pkl"]), storages)


def _archive_root(names: list[str]) -> str:
    """The folder that `torch.save` puts around everything in its archive."""
    roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1 or len(set(names)) != len(names):
        raise ValueError(
            f"it is a zip archive, but not of torch.save: it has {len(roots)} data.pkl, {len(names)} members"
        )
    if any(name == f"{roots[0]}/constants.pkl" or name.startswith(f"{roots[0]}/code/") for name in names):
        raise ValueError("it is a TorchScript archive (torch.jit.save), which holds code; save its state_dict()")
    return roots[0]


def _stored_members(infos: list[zipfile.ZipInfo], mapped: mmap) -> dict[str, memoryview]:
    whole = memoryview(mapped)
    packed = [member for member in infos if member.compress_type or member.compress_size != member.file_size]
    packed += [member for member in infos if member.flag_bits & 1]
    if packed:
        name = ascii(packed[0].filename)[:60]
        raise ValueError(f"its zip member {name} is compressed or encrypted, which torch.save never does")
    if sum(info.file_size for info in infos) > len(whole):
        raise ValueError("its zip members claim more bytes than the file has; it is damaged or made to deceive")
    # torch.serialization.set_crc32_options(False) leaves every checksum zero.
    unchecked = all(info.CRC == 0 for info in infos)
    members = {}
    for info in infos:
        shown = ascii(info.filename)[:60]
        header = whole[info.header_offset : info.header_offset + LOCAL_HEADER.size]
        if len(header) < LOCAL_HEADER.size or header[:4] != _ZIP_START:
            raise ValueError(f"its zip member {shown} is not where the directory says; fetch the file again")
        _, name_length, extra_length = LOCAL_HEADER.unpack(header)
        start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        view = whole[start : start + info.file_size]
        if len(view) != info.file_size or not (unchecked or zlib.crc32(view) == info.CRC):
            raise ValueError(f"its zip member {shown} does not match its checksum or size; fetch the file again")
        members[info.filename] = view
    return members


def _open_legacy(mapped: mmap) -> LegacyContainer:
    first = survey(mapped)
    if first.tree != _LEGACY_MAGIC:
        if mapped[0] == 0x80 or not first.problem:
            first.require()
            raise ValueError("it is a plain pickle, not a file of torch.save")
        raise ValueError(f"torch.save did not write it; it begins with {mapped[:16]!r}")
    protocol = survey(mapped, first.end)
    system = survey(mapped, protocol.end)
    if protocol.require().tree != _LEGACY_PROTOCOL:
        raise ValueError(f"its protocol is not {_LEGACY_PROTOCOL}, the only one of torch.save's older form")
    facts = system.require().tree
    if not isinstance(facts, dict) or facts.get("little_endian") is not True:
        raise ValueError("it was saved on a big-endian machine; load and save it again on a little-endian one")
    end = max(after for _, _, after in instructions(mapped, system.end))
    return LegacyContainer(mapped[system.end : end], mapped, end)
