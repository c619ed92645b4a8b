from pathlib import Path

import numpy as np
import pytest

from fastgpt.core.errors import UserError
from fastgpt.data import ShardWriter, Tokens, open_split, open_tokens
from fastgpt.data.shards import atomic_file


def llmc(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1, n: int | None = None) -> Path:
    """Write a shard as llm.c's scripts do, independently of fastgpt's writer."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids) if n is None else n
    path.write_bytes(header.tobytes() + ids.tobytes())
    return path


IDS = np.random.default_rng(0).integers(0, 50257, 3000)


@pytest.mark.parametrize(("dtype", "magic", "version"), [("uint16", 20240520, 1), ("uint32", 20240801, 7)])
def test_llmc_shard_is_read_in_place(tmp_path: Path, dtype: str, magic: int, version: int):
    tokens = open_tokens(llmc(tmp_path / "a.bin", IDS.astype(dtype), magic, version))
    assert len(tokens) == 3000 and np.array_equal(tokens.read(0, 3000), IDS)
    assert isinstance(tokens.parts[0], np.memmap) and np.shares_memory(tokens.read(7, 9), tokens.parts[0])


def test_nanogpt_raw_files(tmp_path: Path):
    IDS.astype("<u2").tofile(tmp_path / "train.bin")
    IDS.astype("<u4").tofile(tmp_path / "train_u32.bin")
    IDS.astype("<u4").tofile(tmp_path / "wide.bin")
    for path, dtype in (("train.bin", None), ("train_u32.bin", None), ("wide.bin", "uint32")):
        assert np.array_equal(open_tokens(tmp_path / path, dtype).read(0, 3000), IDS)
    assert isinstance(open_tokens(tmp_path / "train.bin").parts[0], np.memmap)
    with pytest.raises(UserError, match=r"wide.bin looks like uint32 ids .*: pass --data-dtype uint32"):
        open_tokens(tmp_path / "wide.bin")
    with pytest.raises(UserError, match="token dtype is 'int8', expected uint16 or uint32"):
        open_tokens(tmp_path / "wide.bin", "int8")


@pytest.mark.parametrize(("n_vocab", "dtype"), [(50257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_writer_writes_what_llmc_reads(tmp_path: Path, n_vocab: int, dtype: str):
    with ShardWriter(tmp_path / "a.bin", n_vocab) as out:
        for part in np.array_split(IDS, 7):
            out.write(part)
        out.write(np.array([n_vocab - 1]))
        assert not (tmp_path / "a.bin").exists()
    expected = np.append(IDS, n_vocab - 1).astype(dtype)
    magic, version = (20240520, 1) if dtype == "uint16" else (20240801, 7)
    assert (tmp_path / "a.bin").read_bytes() == llmc(tmp_path / "b.bin", expected, magic, version).read_bytes()
    assert [p.name for p in tmp_path.glob("*a.bin*")] == ["a.bin"]


def test_writer_left_by_an_exception_leaves_nothing(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(b"before")
    for bad in ([500], [-1]):
        with pytest.raises(ValueError, match=r"\[0, 500\), got"), ShardWriter(tmp_path / "a.bin", 500) as out:
            out.write(np.array(bad))
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "b.bin", 500):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"before"
    with (
        pytest.raises(UserError, match="cannot write .*no/a.bin: No such file"),
        atomic_file(tmp_path / "no" / "a.bin"),
    ):
        pass


def test_shards_in_natural_order_are_one_stream(tmp_path: Path):
    parts = np.split(IDS.astype("<u2"), [100, 1000, 1001, 2500])
    for i, part in zip((1, 2, 9, 10, 11), parts, strict=True):
        llmc(tmp_path / f"shards_{i}.bin", part)
    tokens = open_tokens(tmp_path / "shards_*.bin")
    assert len(tokens) == 3000 and [Path(n).stem[7:] for n in tokens.names] == ["1", "2", "9", "10", "11"]
    for start, n in ((0, 3000), (99, 2), (990, 1600), (2999, 1), (1000, 1), (50, 0), (3000, 0)):
        assert np.array_equal(tokens.read(start, n), IDS[start : start + n]), (start, n)
    assert np.array_equal(tokens.slice(90, 1100).read(5, 950), IDS[95:1045])
    for start, n in ((-1, 3), (2999, 2), (0, -1)):
        with pytest.raises(IndexError):
            tokens.read(start, n)
    other = Tokens([np.where(IDS == IDS[0], 1, IDS)])
    assert tokens.fingerprint() == Tokens([IDS]).fingerprint() != other.fingerprint()


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    "truncated header": (lambda p: cut(p, 700), "truncated header: 700 bytes, expected 1024"),
    "magic alone": (lambda p: cut(p, 4), "truncated header: 4 bytes, expected 1024"),
    "truncated body": (lambda p: cut(p, 2000), r"2000 bytes, but its header says 3000 tokens, that is 7024 bytes"),
    "too long": (lambda p: p.write_bytes(p.read_bytes() + b"ab"), "7026 bytes, but its header says 3000 tokens"),
    "version": (lambda p: llmc(p, IDS.astype("<u2"), version=3), "version 3, expected 1 for magic 20240520"),
    "magic": (
        lambda p: llmc(p, IDS.astype("<u2"), magic=77),
        "damaged header: magic 77, expected 20240520 or 20240801",
    ),
    "no tokens": (lambda p: llmc(p, IDS[:0].astype("<u2")), "holds no tokens"),
    "negative count": (lambda p: llmc(p, IDS.astype("<u2"), n=-1), "header says 4294967295 tokens"),
    "empty": (lambda p: cut(p, 0), "is empty"),
    "odd raw": (lambda p: p.write_bytes(b"abc"), "has 3 bytes, raw uint16 ids need a multiple of 2"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_shard_is_named_with_numbers(tmp_path: Path, name: str):
    path = llmc(tmp_path / "good_1.bin", IDS.astype("<u2"))
    path = llmc(tmp_path / "shard_2.bin", IDS.astype("<u2"))
    hurt, said = DAMAGE[name]
    hurt(path)
    with pytest.raises(UserError, match=said) as e:
        open_tokens(tmp_path / "*.bin")
    assert str(path) in str(e.value)


def test_no_match_and_folders_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no token file matches .*shards_\*.bin"):
        open_tokens(tmp_path / "shards_*.bin")
    with pytest.raises(UserError, match="is not a file"):
        open_tokens(tmp_path)
    llmc(tmp_path / "odd[1].bin", IDS.astype("<u2"))
    assert len(open_tokens(tmp_path / "odd[1].bin")) == 3000


def test_ids_are_checked_against_the_vocabulary(tmp_path: Path):
    ids = np.zeros(400_000, "<u2")
    ids[399_990] = 600
    path = llmc(tmp_path / "a.bin", ids)
    tokens = open_tokens(path)
    tokens.check_ids(601)
    said = f"{path} has token id 600 at position 399990; the vocabulary has 600 ids"
    with pytest.raises(UserError) as e:
        tokens.check_ids(600)
    assert str(e.value) == said
    ids[:] = 700
    with pytest.raises(UserError, match="token id 700 at position 0"):
        Tokens([ids]).check_ids(600, limit=100_000)


def test_sampled_check_reads_no_more_than_about_its_limit(monkeypatch: pytest.MonkeyPatch):
    looked = 0

    class Counting(np.ndarray):
        def max(self, *args, **kwargs):
            nonlocal looked
            looked += len(self)
            return super().max(*args, **kwargs)

    Tokens([np.zeros(3_000_000, "<u2").view(Counting)]).check_ids(5, limit=300_000)
    assert 100_000 < looked <= 400_000


def test_validation_comes_from_where_it_says(tmp_path: Path):
    for name, size in (("a_train_1", 30), ("a_train_2", 40), ("a_val_0", 50), ("interval", 2000)):
        llmc(tmp_path / f"{name}.bin", IDS[:size].astype("<u2"))

    llmc(tmp_path / "a_interval.bin", IDS[:7].astype("<u2"))

    def sizes(*args, **kwargs) -> tuple[int, int]:
        train, val = open_split(*args, **kwargs)
        return len(train), len(val)

    assert sizes(tmp_path / "a_*.bin") == (77, 50)
    assert sizes(tmp_path / "a_train_*.bin") == (70, 50)
    assert sizes(tmp_path / "a_train_*.bin", val=tmp_path / "interval.bin") == (70, 2000)
    assert sizes(tmp_path / "interval.bin") == (1900, 100)
    assert sizes(tmp_path / "interval.bin", val_fraction=0.5) == (1000, 1000)
    train, val = open_split(tmp_path / "interval.bin")
    assert np.array_equal(np.append(train.read(0, 1900), val.read(0, 100)), IDS[:2000])
