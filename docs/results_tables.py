"""Tables from every ``results.yaml``: in each paper's README and on the site's page of results.

``--check`` writes nothing and fails where a table and its data differ; ``--ids PAPER`` prints the
identifiers of one paper's records.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: begin (nox -s results) -->", "<!-- results: end -->"
COLUMNS = ("id", "metric", "split", "paper", "ours", "status", "configuration")
OVERVIEW = """# Results

Every record of every `results.yaml`, made by `nox -s results`. A number stands here only when a run
directory's `scores.json` is behind it; `not run` means exactly that.
"""


def records(package: Path) -> list[dict[str, Any]]:
    """The records of a package, in the order of its file."""
    file = package / "results.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) or [] if file.exists() else []


def row(record: dict[str, Any]) -> tuple[str, ...]:
    """One record as the cells of its line."""
    paper, ours = record["paper"], record["ours"]
    return (
        f"`{record['id']}`",
        record["metric"]["name"],
        record["split"],
        f"{paper['value']} ({paper['table']})" if paper else "",
        measured(ours) if ours else "",
        record["status"],
        f"`{record['config']}`",
    )


def measured(ours: dict[str, Any]) -> str:
    """Mean, spread and number of seeds."""
    seeds = ours["seeds"]
    if len(seeds) == 1:
        return f"{ours['mean']} (1 seed)"
    return f"{ours['mean']} ± {ours['std']} ({len(seeds)} seeds)"


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, followed by the notes of its records."""
    if not rows:
        return "No results yet.\n"
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *(row(record) for record in rows)]
    text = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    signatures = dict.fromkeys(
        f"- {record['metric']['name']}: `{record['metric']['signature']}`\n"
        for record in rows
        if record["metric"].get("signature")
    )
    said: dict[str, list[str]] = {}
    for record in rows:
        if record.get("note"):
            said.setdefault(record["note"], []).append(f"`{record['id']}`")
    notes = [f"- {', '.join(ids)}: {note}\n" for note, ids in said.items()]
    for title, items in (("Signatures", signatures), ("Notes", notes)):
        if items:
            text += f"\n{title}:\n\n" + "".join(items)
    return text


def with_table(readme: str, rows: list[dict[str, Any]]) -> str:
    """The README's text with the part between the two markers made anew."""
    before, _, rest = readme.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table(rows)}\n{END}{after}"


def pages() -> dict[Path, str]:
    """Every file that holds a table, with the text it should have."""
    texts = {}
    overview = OVERVIEW
    for package in sorted(file.parent for file in ROOT.glob("packages/*/pyproject.toml")):
        readme = package / "README.md"
        rows = records(package)
        try:
            texts[readme] = with_table(readme.read_text(encoding="utf-8"), rows)
        except ValueError as error:
            raise ValueError(f"{readme.relative_to(ROOT)}: {error}") from None
        overview += f"\n## {package.name}\n\n{table(rows)}"
    texts[ROOT / "docs" / "results.md"] = overview
    return texts


def main() -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a table is out of date")
    parser.add_argument("--ids", metavar="PAPER", help="print the identifiers of a paper's records")
    arguments = parser.parse_args()
    if arguments.ids:
        for record in records(ROOT / "packages" / arguments.ids):
            print(f"result     {record['id']}  ({record['status']})")
        return 0
    stale = {
        path: text
        for path, text in pages().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in stale.items():
        if arguments.check:
            print(f"{path.relative_to(ROOT)}: differs from results.yaml; run nox -s results")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: written")
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
