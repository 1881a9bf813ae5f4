"""The table of a tour: what was tried, survived and lost."""

import dataclasses


@dataclasses.dataclass
class Row:
    """A line of the table."""

    fault: str
    tried: int = 0
    survived: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def count(self, survived: bool, note: str = "") -> None:
        """Counts a try; keeps the note of a lost one."""
        self.tried += 1
        self.survived += survived
        if not survived:
            self.notes.append(note)


def table(rows: list[Row]) -> str:
    """Formats the rows as text."""
    lines = [f"{'fault':40s} {'tried':>6s} {'survived':>9s} {'lost':>5s}"]
    for row in rows:
        lost = row.tried - row.survived
        lines.append(f"{row.fault:40s} {row.tried:6d} {row.survived:9d} {lost:5d}")
        lines += [f"    {note}" for note in row.notes]
    return "\n".join(lines)
