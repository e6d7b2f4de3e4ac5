"""Files of training data: what is read, what its hash means, and that a part is written back byte for byte."""

import random
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import finfluence as fi
from finfluence.errors import InputError
from finfluence.runs._content import with_content
from finfluence.runs.sources import Source, dataset_hashes, item_hash, read_source, row_hash

# name, bytes, rows; the rows are what a part is made of, so together with the head they are the file
TEXTS = {
    "plain.jsonl": (b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n', 3),
    "open-ended.jsonl": (b'{"text": "a"}\n{"text":  "b" }', 2),
    "windows.jsonl": (b'{"text": "a"}\r\n{"text": "b"}\r\n', 2),
    "mark.jsonl": (b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n', 2),
    "unicode.jsonl": ('{"text": "größer\u2028als"}\n{"text": "\\u00e9\\n"}\n'.encode(), 2),
    "plain.csv": (b"text,label\na,1\nb,2\n", 2),
    "windows.csv": (b"text,label\r\na,1\r\nb,2\r\n", 2),
    "quotes.csv": (b'text,label\n"say ""hi"", twice",1\n"b",2\n', 2),
    "newlines.csv": (b'text,label\n"one\ntwo\r\nthree",1\n"four\n\nfive",2\nsix,3\n', 3),
    "open-ended.csv": ("text;label\nä;1\nb;2".encode(), 2),
    "mark.csv": (b"\xef\xbb\xbftext,label\na,1\n", 1),
    "tabs.tsv": (b"text\tlabel\na, b\t1\n", 1),
}


@pytest.mark.parametrize("name", TEXTS)
def test_all_rows_are_the_file_and_each_row_is_its_own_bytes(tmp_path: Path, name: str) -> None:
    content, count = TEXTS[name]
    path = tmp_path / name
    path.write_bytes(content)
    rows = read_source(path)
    assert len(rows) == count
    assert rows.columns[0] == "text"
    assert rows.part(range(count)) == content
    for i in range(count):
        part = rows.part([i])
        again = tmp_path / f"part-{name}"
        again.write_bytes(part)
        assert read_source(again).rows == [rows.rows[i]]
        # the file's own bytes of that row, whatever the quoting
        assert rows.raw[i].rstrip(b"\r\n") in part
        assert part.endswith(b"\n") == content.endswith(b"\n")


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "gaps.jsonl"
    path.write_bytes(b'\n{"a": 1}\n\n{"a": 2}\n\n')
    assert read_source(path).ids(None) == [0, 1]
    assert read_source(path).part([1]) == b'{"a": 2}\n'


def test_a_row_of_100_kilobytes_is_read(tmp_path: Path) -> None:
    # the csv module refuses fields above 131,072 characters unless told otherwise
    path = tmp_path / "long.csv"
    path.write_text(f"text,label\n{'x' * 200_000},1\n", encoding="utf-8")
    assert len(read_source(path).rows[0]["text"]) == 200_000


def test_parquet_keeps_its_schema(tmp_path: Path) -> None:
    schema = pa.schema(
        [pa.field("id", pa.int16()), pa.field("text", pa.large_string()), pa.field("tags", pa.list_(pa.string()))],
        metadata={b"owner": b"me"},
    )
    table = pa.table({"id": [3, 1, 2], "text": ["a", None, "c"], "tags": [["x"], [], None]}, schema=schema)
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    rows = read_source(path)
    again = tmp_path / "part.parquet"
    again.write_bytes(rows.part([0, 2]))
    kept = pq.read_table(again)
    assert kept.schema.equals(pq.read_table(path).schema, check_metadata=True)
    assert kept.schema.metadata == schema.metadata
    assert kept.to_pylist() == [table.to_pylist()[0], table.to_pylist()[2]]


BAD = {
    "broken.jsonl": (b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
    "list.jsonl": (b"[1]\n", "JSON list"),
    "empty.jsonl": (b"\n", "holds no rows"),
    "latin.csv": (b"a\n\xe9\n", "not UTF-8 at byte 2"),
    "ragged.csv": (b"a,b\n1,2\n1\n", "line 3 has 1 values"),
    "twice.csv": (b"a,a\n1,2\n", "a column twice"),
    "unclosed.csv": (b'a,b\n"1,2\n', "not CSV"),
    "header-only.csv": (b"a,b\n", "holds no rows"),
    "foreign.parquet": (b"not parquet", "cannot read"),
    "rows.xlsx": (b"", "ends in .xlsx"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_source(path)


def test_a_missing_file_and_an_unknown_column(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_source(tmp_path / "nowhere.jsonl")
    path = tmp_path / "plain.csv"
    path.write_bytes(TEXTS["plain.csv"][0])
    with pytest.raises(InputError, match="no column 'id'"):
        read_source(path).ids("id")
    with pytest.raises(InputError, match="format"):
        Source("a.xml", "xml")  # pyright: ignore[reportArgumentType]


values = st.one_of(
    st.none(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False, allow_infinity=False, width=64),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8),
)


@given(st.lists(st.tuples(values, st.text("abé, 'x", min_size=1, max_size=6)), min_size=1, max_size=5))
def test_one_table_has_one_hash_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[object, str]]
) -> None:
    kind = next((type(v) for v, _ in cells if v is not None), str)
    column = [v if type(v) is kind else None for v, _ in cells]
    frame = pl.DataFrame({"value": pl.Series(column, strict=False), "text": [t for _, t in cells]})
    folder = tmp_path_factory.mktemp("formats")
    frame.write_ndjson(folder / "t.jsonl")
    frame.write_csv(folder / "t.csv")
    frame.write_parquet(folder / "t.parquet")
    found = [read_source(folder / f"t.{suffix}").hashes() for suffix in ("jsonl", "csv", "parquet")]
    assert found[0] == found[1] == found[2]


def test_a_hash_sees_every_change_and_no_order() -> None:
    row = {"text": "a", "n": 1, "tags": ["x", {"deep": 2.5}]}
    assert row_hash(row) == row_hash({"tags": ["x", {"deep": "2.5"}], "n": 1.0, "text": "a", "gone": None})
    assert len(row_hash(row)) == 16
    changed = [
        {**row, "text": "b"},
        {**row, "n": 2},
        {**row, "tags": [{"deep": 2.5}, "x"]},
        {**row, "tags": ["x", {"deep": 2.6}]},
        {**row, "more": 0},
        {"text": "a", "n": 1},
    ]
    assert len({row_hash(r) for r in [row, *changed]}) == len(changed) + 1


def test_items_of_tensors_arrays_and_images_have_hashes() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert item_hash((x, 1)) == item_hash((x.numpy(), torch.tensor(1)))
    assert item_hash((x, 1)) != item_hash((x.reshape(3, 2), 1))
    assert item_hash((x, 1)) != item_hash((x + 1, 1))
    assert item_hash(x.bfloat16()) == item_hash(x)
    assert item_hash(b"a") != item_hash("a")
    assert item_hash(object()) is None


class Augmented(Dataset):
    """Items that differ at every reading, drawn from all three global generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = float(torch.rand(())) + random.random() + float(np.random.rand())  # noqa: NPY002
        return torch.full((3,), noise), index % 2


def train(dataset: Dataset, directory: Path, **options: object) -> fi.Run:
    return fi.train(
        fi.ClassificationTask(),
        nn.Linear(3, 2),
        dataset,
        queries={"q": (torch.ones(2, 3), torch.tensor([0, 1]))},
        optimizer=fi.SGD(lr=0.1),
        epochs=1,
        batch_size=4,
        directory=directory,
        panel=fi.NoisePanel(0),
        show_progress="never",
        **options,  # pyright: ignore[reportArgumentType]
    )


def test_training_records_a_hash_an_item_and_draws_no_random_number(tmp_path: Path) -> None:
    data = TensorDataset(torch.arange(36.0).reshape(12, 3) / 36, torch.arange(12) % 2)
    run = train(data, tmp_path / "plain")
    assert run.samples()["content_hash"].to_list() == dataset_hashes(data)
    assert run.manifest["content"] == "items"
    run = train(Augmented(), tmp_path / "augmented")
    assert run.samples()["content_hash"].null_count() == 12
    assert run.manifest["content"] is None
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    with_content(pl.DataFrame({"sample": np.arange(12)}), Augmented(), source=None)
    assert torch.equal(before[0], torch.get_rng_state())
    assert random.getstate() == before[1]
    assert repr(np.random.get_state()) == before[2]  # noqa: NPY002


def test_training_on_a_file_records_its_rows(tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(12, 3), torch.arange(12) % 2)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"id": "r{i}", "text": "t{i}"}}\n' for i in reversed(range(12))), encoding="utf-8")
    source = Source.of(path, id_column="id").as_dict()
    run = train(data, tmp_path / "run", source=source, ids=[f"r{i}" for i in range(12)])
    assert run.manifest["source"] == source
    assert run.samples()["content_hash"].to_list()[3] == row_hash({"id": "r3", "text": "t3"})
    with pytest.raises(InputError, match="no row for 12 of the 12 samples"):
        train(data, tmp_path / "other", source=Source.of(path).as_dict(), ids=[f"r{i}" for i in range(12)])
    with pytest.raises(InputError, match="no 'path'"):
        train(data, tmp_path / "third", source={"format": "csv"})
    given = pl.DataFrame({"sample": np.arange(12), "content_hash": ["h"] * 12})
    assert train(data, tmp_path / "given", samples=given).manifest["content"] == "given"
