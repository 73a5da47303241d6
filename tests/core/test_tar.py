"""Tar shards: what goes in comes out, bytes depend on content alone, and strange archives are refused."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourmill.core.names import SampleKey, sample_key
from fourmill.core.tar import TarError, TarWriter, read_tar

MEMBERS = st.dictionaries(st.integers(0, 10**9 - 1), st.binary(max_size=2000), max_size=8)


def pack(members: dict[int, bytes]) -> bytes:
    stream = io.BytesIO()
    writer = TarWriter(stream)
    for row, data in sorted(members.items()):
        writer.add(sample_key(row), "npy", data)
    writer.close()
    return stream.getvalue()


@given(MEMBERS)
def test_members_come_back_in_order(members: dict[int, bytes]) -> None:
    back = list(read_tar(io.BytesIO(pack(members))))
    assert back == [(sample_key(row), "npy", data) for row, data in sorted(members.items())]


@given(MEMBERS)
def test_equal_members_give_equal_bytes_that_tarfile_reads(members: dict[int, bytes]) -> None:
    data = pack(members)
    assert data == pack(members)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        infos = archive.getmembers()
    assert [info.name for info in infos] == [f"{sample_key(row)}.npy" for row in sorted(members)]
    assert {(info.mtime, info.uid, info.gid, info.uname) for info in infos} <= {(0, 0, 0, "")}


@pytest.mark.parametrize("name", ["../evil.npy", "/abs.npy", "000000001.npy.exe/", "1.npy", "000000001"])
def test_names_that_no_shard_has_are_refused(name: str) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(TarError, match="is not a sample"):
        list(read_tar(io.BytesIO(stream.getvalue())))


def test_links_are_refused() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        link = tarfile.TarInfo("000000001.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(TarError, match="is not a sample"):
        list(read_tar(io.BytesIO(stream.getvalue())))


def test_a_cut_archive_is_refused_by_name() -> None:
    data = pack({1: b"x" * 3000})
    with pytest.raises(TarError, match=r"shard-00001\.tar"):
        list(read_tar(io.BytesIO(data[:1500]), "shard-00001.tar"))


def test_a_writer_refuses_keys_that_are_not_keys() -> None:
    with pytest.raises(TarError, match="nine-digit"):
        TarWriter(io.BytesIO()).add(SampleKey("12.5"), "npy", b"")
