"""The file of a checkpoint: what lies in it and how large, looked at before anything is read.

``torch.save`` writes a zip archive: the pickle, and the bytes of each storage as they are in
memory. Before torch 1.6 it wrote pickles one after the other, then the storages. A file with
anything else in it, such as the program of a TorchScript archive, is refused by its contents,
whatever it is called.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import zipfile
import zlib
from typing import Any, BinaryIO, NamedTuple

import torch

from .unpickling import ForeignContentsError, Unpickler, text_of

# Bytes of the list of members; a large model has some thousand members of about 100 bytes.
_LARGEST_LIST = 2**26
_MEMBERS = re.compile(
    r'data\.pkl|data/\w+|version|byteorder|\.format_version|\.storage_alignment'
    r'|\.data/serialization_id'
)
_PROGRAM = re.compile(r'constants\.pkl|code/.*|bytecode\.pkl')


def budget_of(size: int) -> int:
    """Bytes that the objects of a file may have; those that share some count as often as named."""
    return 8 * size + 2**26


class Archive(NamedTuple):
    """The parts of a file that ``torch.save`` wrote.

    Attributes:
        file: The file, open.
        size: Its bytes.
        pickle: The pickle of the checkpoint.
        storages: Where the bytes of each storage begin, and how many there are.
    """

    file: BinaryIO
    size: int
    pickle: bytes
    storages: dict[str, tuple[int, int]]

    def storage(self, key: str, whole: torch.UntypedStorage | None) -> torch.UntypedStorage:
        """The bytes of a storage, by its name; taken from ``whole`` where the file is mapped."""
        begin, size = self.storages[key]
        # Numbers must lie at multiples of their size; torch.save sees to that.
        if whole is not None and begin % 16 == 0:
            return whole[begin : begin + size]
        data = torch.UntypedStorage(size)
        self.file.seek(begin)
        target = torch.empty(0, dtype=torch.uint8).set_(data).numpy()
        if self.file.readinto(memoryview(target)) != size:  # type: ignore[attr-defined]
            raise EOFError('the file ends within a tensor')
        return data


def open_archive(file: BinaryIO, verify: bool = False) -> Archive:
    """Find the parts of a checkpoint in its file; of a damaged one, whatever reading it raises.

    Args:
        file: The file, open.
        verify: Whether to hold its bytes against their checksums, which reads all of it.

    Raises:
        ForeignContentsError: It is an archive that ``torch.save`` did not write.
    """
    size = file.seek(0, io.SEEK_END)
    mark = _bytes(file, 0, 4)
    file.seek(0)
    return _of_zip(file, size, verify) if mark == b'PK\x03\x04' else _of_pickles(file, size)


def _of_zip(file: BinaryIO, size: int, verify: bool) -> Archive:
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if not end or end[zipfile._ECD_SIZE] > _LARGEST_LIST:  # type: ignore[attr-defined]
        raise zipfile.BadZipFile('the list of its members is missing or too large')
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    begins = [_begin(file, member) for member in members]
    for member, begin in zip(members, begins, strict=True) if verify else ():
        _verify(file, member, begin)
    folder = members[0].filename.partition('/')[0]
    places: dict[str, tuple[int, int]] = {}
    for member, begin in zip(members, begins, strict=True):
        name, shown = member.filename.removeprefix(f'{folder}/'), f'{member.filename[:99]!r}'
        if _PROGRAM.fullmatch(name):
            raise ForeignContentsError(f'a program, {shown}, as TorchScript archives do')
        if not _MEMBERS.fullmatch(name) or name in places:
            raise ForeignContentsError(f'{shown}, which torch.save does not write')
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ForeignContentsError(f'{shown} compressed, which torch.save does not write')
        places[name] = begin, member.file_size
    if sum(there for _, there in places.values()) > size:
        raise ForeignContentsError('members that overlap')
    if any(begin + there > size for begin, there in places.values()):
        raise EOFError('the file ends within a member')
    if 'byteorder' in places and _bytes(file, *places['byteorder']) != sys.byteorder.encode():
        raise ForeignContentsError('numbers in the byte order of another machine')
    storages = {name.removeprefix('data/'): place for name, place in places.items()}
    return Archive(file, size, _bytes(file, *places['data.pkl']), storages)


def _begin(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: after a header of 30 bytes, its name and padding."""
    mark, name, padding = struct.unpack('<4s22x2H', _bytes(file, member.header_offset, 30))
    if mark != b'PK\x03\x04':
        raise zipfile.BadZipFile('a member is not where it should be')
    return member.header_offset + 30 + name + padding


def _verify(file: BinaryIO, member: zipfile.ZipInfo, begin: int) -> None:
    """Compare a member with its header and checksum; torch can be told to write none."""
    name = member.orig_filename.encode('utf-8' if member.flag_bits & 0x800 else 'cp437')
    if _bytes(file, member.header_offset + 30, len(name)) != name:
        raise zipfile.BadZipFile('the list of its members differs from them')
    found, left = 0, member.compress_size
    file.seek(begin)
    while left and (part := file.read(min(left, 2**24))):
        found, left = zlib.crc32(part, found), left - len(part)
    is_plain = member.compress_type == zipfile.ZIP_STORED
    if left or (is_plain and member.CRC and found != member.CRC):
        raise zipfile.BadZipFile(f'{member.filename[:99]!r} differs from its checksum')


def _bytes(file: BinaryIO, begin: int, size: int) -> bytes:
    file.seek(begin)
    return file.read(size)


def _of_pickles(file: BinaryIO, size: int) -> Archive:
    sizes: dict[str, int] = {}

    def note(key: str, _: str, size: int) -> None:
        sizes[key] = size

    def one() -> Any:
        return Unpickler(file, note, budget_of(size)).load()

    if one() != torch.serialization.MAGIC_NUMBER or one() != torch.serialization.PROTOCOL_VERSION:
        raise ValueError('torch.save did not write it')
    if one().get('little_endian') is not (sys.byteorder == 'little'):
        raise ForeignContentsError('numbers in the byte order of another machine')
    begin = file.tell()
    one()
    pickled = _bytes(file, begin, file.tell() - begin)
    storages = {}
    for key in map(text_of, one()):
        # A number of elements, which the pickle has too, then the elements.
        storages[key] = file.seek(8, io.SEEK_CUR), sizes[key]
        if file.seek(sizes[key], io.SEEK_CUR) > size:
            raise EOFError('the file ends within a tensor')
    return Archive(file, size, pickled, storages)
