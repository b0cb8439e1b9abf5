"""Text files with rows: JSONL and CSV, and how a bad row is named."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mpp.media.paths import MediaPath, read_all

Record = TypeVar("Record")

_SHOWN = 80
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_text(path: MediaPath) -> str:
    """A text file.

    Raises:
        ValueError: It cannot be read, or is not UTF-8.
    """
    return decode_text(next(read_all([path])), path)


def decode_text(content: bytes, path: MediaPath) -> str:
    """Text from UTF-8, with or without a byte order mark.

    Raises:
        ValueError: It is in another encoding; names the file and the first byte that is not UTF-8.
    """
    looks = _MARKS.get(content[:2])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = f"; it looks like {looks}" if looks else ""
        at = f"{error.reason} at byte {error.start}: {content[error.start]:#04x}"
        raise ValueError(f"{path} is not UTF-8 ({at}{hint}); save it as UTF-8") from error
    if "\0" in text:
        at = content.index(0)
        raise ValueError(f"{path} holds a zero byte (byte {at}), as UTF-16 does; save it as UTF-8")
    return text


def json_rows(path: MediaPath) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a JSONL file with their line numbers; empty lines are skipped.

    Raises:
        ValueError: Names file and line of what is no JSON object, or names a field twice.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):  # a caption may hold other kinds of line breaks
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_no_twins)
            json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            why = "too deeply nested" if isinstance(error, RecursionError) else str(error)
            raise ValueError(f"{path}:{number} is not JSON in UTF-8 ({why[:_SHOWN]})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is {_shown(row)}, not an object like {{...}}")
        yield number, row


def csv_rows(path: MediaPath) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV file (of a `.tsv` file: separated by tabs) by the names in its first line, with line numbers.

    Raises:
        ValueError: Names file and line of what is no CSV, or of a row that has more or fewer cells than the header.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{start} is not CSV ({error})") from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = [name.strip() for name in cells]
            twice = _twice(header)
            if twice is not None:
                raise ValueError(f"{path}:{start} names the column {twice!r} twice")
        elif len(cells) != len(header):
            raise ValueError(
                f"{path}:{start} has {len(cells)} cells, its header {len(header)} ({', '.join(header)[:_SHOWN]}); "
                'put text with commas in "quotes"'
            )
        else:
            yield start, dict(zip(header, cells, strict=True))


def as_record(record: type[Record], values: Mapping[str, Any], where: str, *, below: str = ": ") -> Record:
    """Values from a file as a record whose type hints are the schema.

    Args:
        record: A dataclass with `__pydantic_config__` strict, extra fields forbidden.
        values: What the file says.
        where: File and line, or setting, for messages.
        below: What joins it with a field's name.

    Raises:
        ValueError: Names all fields that are unknown or of the wrong type, and the legal ones.
    """
    try:
        text = json.dumps(values, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} holds what no setting can be ({str(error)[:_SHOWN]})") from error
    try:
        return TypeAdapter(record).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError("\n".join(_problems(error, record, where, below))) from error


def _problems(error: ValidationError, record: type, where: str, below: str) -> Iterable[str]:
    legal = ", ".join(field.name for field in fields(record))
    wrong: dict[tuple[str, str], list[str]] = {}
    for item in error.errors():
        at = f"{where}{below}{'.'.join(map(str, item['loc']))}"
        if item["type"] == "unexpected_keyword_argument":
            hint = f"; there are {legal}" if len(item["loc"]) == 1 else ""
            yield f"{at} is not known{hint}"
        elif item["type"] in ("missing", "missing_argument"):
            yield f"{at} is missing"
        elif item["type"] == "value_error":
            yield f"{where}: {item['ctx']['error']}"
        else:
            wrong.setdefault((at, _shown(item["input"])), []).append(item["msg"].removeprefix("Input "))
    for (at, got), wishes in wrong.items():
        yield f"{at} {' or '.join(dict.fromkeys(wishes))}, got {got}"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = _twice(name for name, _ in pairs)
    if twice is not None:
        raise ValueError(f"it names {twice!r} twice")
    return dict(pairs)


def _twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)
