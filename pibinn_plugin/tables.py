"""Rows of text as one table."""

import io
from collections.abc import Iterable


def text_table(columns: Iterable[str], rows: Iterable[list[str]], left_columns: int = 0) -> str:
    """A table with these column titles, the first ``left_columns`` flush left; every line is ended by a newline.

    Example:
        >>> text_table(["layer", "error"], [["1", "0.5"]]).splitlines()[-1]
        '    1     0.5'
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left_columns else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    buffer = io.StringIO()
    Console(file=buffer, width=1000, no_color=True).print(table)
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines() if line.strip())
