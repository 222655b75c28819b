"""A result that grows part by part, and is whole on disk at any moment."""

import json
from pathlib import Path
from typing import Any

from _machine import describe


class Record:
    """A JSON file written anew after each part, so that a run that is cut keeps what it has.

    Args:
        folder: where it goes.
        name: the file is ``<name>-<date>.json``.
        machine: what is known of it; by default it is looked at.
    """

    def __init__(self, folder: Path, name: str, machine: dict[str, Any] | None = None) -> None:
        machine = machine or describe()
        self.path = folder / f"{name}-{machine['date']}.json"
        self._content: dict[str, Any] = {"machine": machine}

    def add(self, **parts: Any) -> None:
        """Add parts and write the file."""
        self._content |= parts
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)
