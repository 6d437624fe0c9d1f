"""Writes the file list of docs/architecture.md: every Python file with the first paragraph of its docstring.

.venv/bin/python scripts/architecture_doc.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "architecture.md"
START, END = "<!-- files: written by scripts/architecture_doc.py -->", "<!-- end of files -->"


def main() -> None:
    """Write the list between the two marks."""
    text = with_file_list(TARGET.read_text(encoding="utf-8"))
    TARGET.write_text(text, encoding="utf-8", newline="\n")
    print(f"wrote {TARGET}")


def with_file_list(text: str) -> str:
    """The document with its list made anew."""
    before, after = text.split(START)[0], text.split(END)[1]
    return f"{before}{START}\n{file_list()}\n{END}{after}"


def file_list() -> str:
    """One table per folder."""
    tables = []
    folders = [
        ROOT / "mapo_core",
        *sorted(p.parent for p in (ROOT / "mapo_core").glob("*/__init__.py")),
        ROOT / "web" / "gradio_app",
        ROOT / "nodes",
        ROOT / "scripts",
    ]
    for folder in folders:
        rows = [
            f"| `{p.relative_to(ROOT).as_posix()}` | {what} |"
            for p in sorted(folder.glob("*.py"))
            if (what := purpose(p))
        ]
        tables.append("\n".join(["| file | what it is |", "|---|---|", *rows]))
    return "\n\n".join(tables)


def purpose(path: Path) -> str:
    """The first paragraph of a file's docstring, on one line; empty for a file without one."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
