"""Tables: csv with Python's parser in its strict mode, and parquet in batches of rows."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastgpt.data.document import Document
from fastgpt.data.read.defects import need
from fastgpt.data.read.fields import Fields
from fastgpt.data.read.lines import line_blocks
from fastgpt.data.read.reading import Reading
from fastgpt.data.read.streams import compression_of

ROWS = 256


class _Endless(Exception):
    """A row above max_bytes: most likely a quote that is never closed."""


class _Lines:
    """The lines of a csv file as text, with the offset of the row in progress and whether it is clean."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.row = self.next = 0  # offsets of the row in progress and of the next line
        self.clean = self.some = True
        self.started = False

    def __iter__(self) -> Iterator[str]:
        for at, lines in line_blocks(self.reading):
            for raw in lines:
                if not self.started:
                    self.row, self.started = at, True
                self.next = at + len(raw) + 1
                if self.next - self.row > self.reading.format.max_bytes:
                    raise _Endless
                line = self.reading.decode(raw, at, "row")
                if line is None:
                    self.clean = False
                    line = raw.decode("utf-8", "replace").replace("\0", "\ufffd")
                yield line + "\n"
                at = self.next

    def begin(self) -> None:
        """Begin the next row."""
        self.row, self.clean = self.next, True


def _rows(reading: Reading) -> Iterator[tuple[int, list[str]]]:
    """Yield (offset, cells) of each clean row; report the others."""
    csv.field_size_limit(max(csv.field_size_limit(), reading.format.max_bytes))
    lines = _Lines(reading)
    parser = csv.reader(lines, delimiter=reading.format.delimiter, strict=True)
    while True:
        try:
            cells = next(parser, None)
        except csv.Error as e:
            if reading.damaged:
                return
            reading.report("broken CSV", f"the row is broken: {e}", "repair its quotes", lines.row)
            cells = []
        except _Endless:
            remedy = "close its quote, or raise max_bytes; the rest of the file is not read"
            reading.giant(lines.row, "row", remedy)
            return
        if cells is None:
            return
        if cells and lines.clean and cells != [""]:
            yield lines.row, cells
        lines.begin()


def read_csv(reading: Reading) -> Iterator[Document]:
    """Yield the documents of a csv file, whose first line names the columns unless the format does.

    Cells are text, always. Ids count rows from 0.
    """
    fields = Fields(reading)
    format = reading.format
    for number, at, record in csv_records(reading, format.text_fields + ((format.id,) if format.id else ())):
        document = fields.document(record, number, at)
        if document is not None:
            yield document


def csv_records(reading: Reading, needed: tuple[str, ...] = ()) -> Iterator[tuple[int, int, dict[str, str]]]:
    """Yield (number, offset, cells by column) of each clean row; report the others, and a header without `needed`."""
    columns = list(reading.format.columns)
    number = 0
    for at, cells in _rows(reading):
        if not columns:
            columns = cells
            if not _has_columns(reading, columns, at, needed):
                return
            continue
        if len(cells) != len(columns):
            problem = f"the row has {len(cells)} cells, expected {len(columns)}"
            reading.report("broken CSV", problem, "repair its delimiters and quotes, or set delimiter", at)
        else:
            yield number, at, dict(zip(columns, cells))
        number += 1


def _has_columns(reading: Reading, columns: list[str], at: int, names: tuple[str, ...]) -> bool:
    """Return whether a header is usable; report it if it is not."""
    if len(set(columns)) < len(columns):
        first, second = next((columns.index(c), i) for i, c in enumerate(columns) if columns.index(c) < i)
        problem = f"columns {first + 1} and {second + 1} have the same name"
        reading.report("key twice", problem, "rename one, or set columns if the file has no header", at)
        return False
    missing = next((n for n in names if n not in columns), None)
    if missing is not None:
        remedy = "name the column that holds it, or set columns if the file has no header"
        reading.report("missing field", f"the header has no column {missing!r}", remedy, at)
    return missing is None


def read_parquet(reading: Reading) -> Iterator[Document]:
    """Yield the documents of a parquet file. Only the declared columns are read; ids count rows from 0.

    Text is checked byte by byte: Arrow trusts the writer to have written UTF-8. Other columns become text in Arrow's
    own spelling, so integers keep all digits and dates stay dates. A compressed file is unpacked to a temporary one.
    """
    fields = Fields(reading)

    def records(file: Any) -> Iterator[dict[str, Any] | None]:
        table = _Table(reading, file)
        batches = file.iter_batches(ROWS, columns=table.columns) if table.usable else ()
        return (record for batch in batches for record in table.records(batch))

    for number, record in _parquet(reading, records):
        document = fields.document(record, number, 0)
        if document is not None:
            yield document


def parquet_records(reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, values by column) of each row of a parquet file, with the types of the file."""

    def records(file: Any) -> Iterator[dict[str, Any]]:
        for batch in file.iter_batches(ROWS):
            yield from batch.to_pylist()

    yield from _parquet(reading, records)


def _parquet(
    reading: Reading, records: Callable[[Any], Iterator[dict[str, Any] | None]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, record) of what `records` returns for an open parquet file, with `reading.row` at each."""
    parquet = need("pyarrow.parquet", f"reading {reading.file}", "pyarrow")
    if compression_of(reading.path) is None:
        yield from _numbered(reading, reading.path, parquet, records)
        return
    with tempfile.NamedTemporaryFile(suffix=".parquet") as copy:
        for chunk in reading.chunks():
            copy.write(chunk)
        copy.flush()
        if not reading.damaged:
            yield from _numbered(reading, Path(copy.name), parquet, records)


def _numbered(
    reading: Reading, path: Path, parquet: Any, records: Callable[[Any], Iterator[dict[str, Any] | None]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.stat().st_size:
        reading.report("empty file", "the file is empty", "remove it, or fetch it again", None)
        return
    try:
        with parquet.ParquetFile(path, memory_map=False, buffer_size=1 << 20, pre_buffer=False) as file:
            rows = records(file)
            reading.row = 0
            for number, record in enumerate(rows):
                if record is not None:
                    yield number, record
                reading.row = number + 1
        if compression_of(reading.path) is None:
            reading.advance(path.stat().st_size)
    except (ValueError, OSError, NotImplementedError, ArithmeticError, MemoryError) as e:
        if isinstance(e, PermissionError):
            raise
        reading.row = None
        problem = f"the parquet data is cut or damaged ({type(e).__name__})"
        reading.report("damaged", problem, "fetch or write it again; the rows before can be read", None)


class _Table:
    """The declared columns of a parquet file."""

    def __init__(self, reading: Reading, file: Any) -> None:
        self.reading = reading
        self.fields = Fields(reading)
        format = reading.format
        schema = file.schema_arrow
        self.names = [*format.text_fields, *([format.id] if format.id else []), *format.meta]
        self.usable = True
        self.columns: list[str] = []
        for name in dict.fromkeys(self.names):
            if _has(schema, name):
                self.columns.append(name)
            elif name not in format.meta:
                self.usable = False
                remedy = "name the column that holds it"
                reading.report("missing field", f"there is no column {name!r}", remedy, None)

    def records(self, batch: Any) -> Iterator[dict[str, Any] | None]:
        """Yield the rows of a batch as records of text; None for one that is not clean."""
        values = {name: self._values(batch, name) for name in self.columns}
        for i in range(batch.num_rows):
            record: dict[str, Any] | None = {}
            for name, column in values.items():
                value = column[i]
                if isinstance(value, bytes):
                    value = self.reading.decode(value, 0, "row")
                    record = None if value is None else record
                if record is not None:
                    record[name] = value
            yield record

    def _values(self, batch: Any, name: str) -> list[Any]:
        """Return a column as bytes of UTF-8, None for null, or the objects themselves if it holds lists or structs."""
        pa = need("pyarrow", "reading parquet")
        column = _column(batch, name)
        kind = column.type
        if pa.types.is_dictionary(kind):
            column = column.dictionary_decode()
            kind = column.type
        if pa.types.is_nested(kind):
            return list(column.to_pylist())
        if name in self.reading.format.text_fields and not _is_text(pa, kind):
            return [None if value is None else 0 for value in column.is_valid().to_pylist()]
        if not _is_text(pa, kind):
            column = column.cast(pa.string())
        return list(column.cast(pa.large_binary()).to_pylist())


def _is_text(pa: Any, kind: Any) -> bool:
    t = pa.types
    return bool(
        t.is_string(kind) or t.is_large_string(kind) or t.is_binary(kind) or t.is_large_binary(kind)
        or t.is_string_view(kind) or t.is_binary_view(kind)
    )  # fmt: skip


def _has(schema: Any, name: str) -> bool:
    """Return whether a schema has a column, or a member of a struct that a dotted name reaches."""
    if name in schema.names:
        return True
    fields = schema
    for key in name.split("."):
        names = [field.name for field in fields]
        if key not in names:
            return False
        kind = fields.field(key).type
        fields = kind if kind.num_fields and hasattr(kind, "get_field_index") else []
    return True


def _column(batch: Any, name: str) -> Any:
    """Return a column, or the member of a struct that a dotted name reaches."""
    if name in batch.schema.names:
        return batch.column(name)
    first, *rest = name.split(".")
    column = batch.column(first)
    for key in rest:
        column = need("pyarrow.compute", "reading parquet", "pyarrow").struct_field(column, key)
    return column
