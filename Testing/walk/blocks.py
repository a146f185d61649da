"""The code blocks of the documents, and what must be done with each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "Resources" / "Docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
HOW_TO = [page for page in PAGES if page.parent.name == "extend" and page.name != "index.md"]

_BLOCK = re.compile(
    r'^(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?```(?P<language>\w*)(?: title="(?P<file>[^"]+)")?\n'
    r"(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its page's name, relative to the documents.
        language: "python", "sh", "toml", "diff" ...
        file: the title that the fence carries: the file that the block is, or changes; "" without one.
        text: the code.
        reason: why it is not run, from the comment ``<!-- not run: ... -->`` before it; "" where it is.
    """

    page: str
    language: str
    file: str
    text: str
    reason: str

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.partition(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    name = page.name if page.parent == ROOT else page.relative_to(DOCS).as_posix()
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(name, m["language"], m["file"] or "", m["text"], m["reason"] or "") for m in found]
