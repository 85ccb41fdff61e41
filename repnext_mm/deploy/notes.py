"""What an export says while it runs, and what of it stays in the report."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console

from .report import Record


@dataclass
class Notes:
    """Lines on the screen; warnings and skipped formats are kept for the report.

    Args:
        console: Where the lines go.
    """

    console: Console
    warnings: list[str] = field(default_factory=list)
    skipped: list[Record] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.say(f'warning: {text}')

    def skip(self, name: str, error: Exception) -> None:
        """Leave a format out, for a reason whose fix comes after a semicolon."""
        reason, _, fix = str(error).partition('; ')
        self.skipped.append({'format': name, 'reason': reason, 'fix': fix})
        self.say(f'skipped {name}: {error}')
