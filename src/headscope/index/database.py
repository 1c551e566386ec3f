"""SQL over the tables of an index: one SELECT at a time, restricted to the index's own files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from threading import Event, RLock, Timer
from typing import Any
from uuid import uuid4

import duckdb
import pyarrow as pa

from headscope.errors import IndexFormatError

_ALONE: dict[str, Any] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,  # local variables are not tables
}


class Database:
    """DuckDB with a view of each table; thread-safe."""

    def __init__(self, tables: Mapping[str, list[Path] | pa.Table], derived: Mapping[str, str | None]) -> None:
        """Open a database that can access these files only, and no network.

        Args:
            tables: the Parquet files of each table, or the table itself.
            derived: for a table whose files lack a column, the expression `... AS name` that gives it; else None.
        """
        self._connection, self._lock = duckdb.connect(config=_ALONE), RLock()
        run = self._connection.execute
        run("SET enable_progress_bar = false")  # it would be drawn on stdout
        run(f"SET temp_directory = {_quoted(f'{gettempdir()}/headscope-{uuid4().hex}')}")
        paths: list[str] = []
        for name, own in tables.items():
            if isinstance(own, pa.Table):
                self._connection.register(name, own)
                continue
            files = [_quoted(str(path.absolute())) for path in own]
            paths += files
            columns = ", ".join(filter(None, ["*", derived.get(name)]))
            run(f"CREATE VIEW {name} AS SELECT {columns} FROM read_parquet([{', '.join(files)}])")
        run(f"SET allowed_paths = [{', '.join(paths)}]")
        run("SET enable_external_access = false")
        run("SET lock_configuration = true")

    def select(
        self, query: str, parameters: list[Any] | None, more: Mapping[str, pa.Table], seconds: float | None
    ) -> pa.Table:
        """Run one query over the views, and over `more` tables by name, with a time limit in seconds.

        Raises:
            IndexFormatError: it is not one SELECT, takes longer, or DuckDB cannot run it.
            KeyboardInterrupt: Ctrl-C, which DuckDB reports as its own error.
        """
        with self._lock, self._limit(seconds) as out_of_time:
            try:
                for name, own in more.items():
                    self._connection.register(name, own)
                kinds = [statement.type for statement in self._connection.extract_statements(query)]
                if kinds == [duckdb.StatementType.SELECT]:
                    return self._connection.sql(query, params=parameters).to_arrow_table()
                found = f"{len(kinds)} statements" if len(kinds) != 1 else f"a statement of type {kinds[0].name}"
            except (duckdb.Error, RuntimeError) as error:
                if out_of_time.is_set():
                    raise _no_query(query, f"not finished after {seconds:g} seconds") from error
                if isinstance(error, duckdb.Error):
                    raise _no_query(query, str(error)) from error
                if str(error) == "Query interrupted":
                    raise KeyboardInterrupt from error
                raise
        raise _no_query(query, found)

    @contextmanager
    def _limit(self, seconds: float | None) -> Iterator[Event]:
        """Interrupt the running query after some seconds, and set the event."""
        out_of_time = Event()

        def interrupt() -> None:
            out_of_time.set()
            self._connection.interrupt()

        if seconds is None:
            yield out_of_time
            return
        timer = Timer(seconds, interrupt)
        timer.daemon = True
        timer.start()
        try:
            yield out_of_time
        finally:
            timer.cancel()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _no_query(query: str, why: str) -> IndexFormatError:
    return IndexFormatError(
        f"{query.strip()[:200]}: {why}",
        expected="one SELECT over the views that docs/index-format.md names",
        do="correct the query",
    )
