"""Rows of text as one table."""

import io
from collections.abc import Iterable


def text_table(columns: Iterable[str], rows: Iterable[list[str]]) -> str:
    """A table with these column titles, every line of it ended by a newline.

    Example:
        >>> text_table(["layer", "error"], [["1", "0.5"]]).splitlines()[-1]
        '    1     0.5'
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    buffer = io.StringIO()
    Console(file=buffer, width=1000, no_color=True).print(table)
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines() if line.strip())
