# SPDX-License-Identifier: Apache-2.0
"""Make the report of a folder of results, and the README's tables.

    python -m benchmarks.report [--results FOLDER] [--readme] [--check]

Writes `report.md`, `report.html` and the pictures into FOLDER (default: that of this machine).
`--readme` fills in the README's blocks. `--check` writes nothing: it fails when a block of the
README, or a `report.md` under `benchmarks/results`, is not what the results say.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.provenance import ROOT, machine_name
from benchmarks.report.document import markdown, pictures, read_results, title
from benchmarks.report.page import to_html
from benchmarks.report.readme import fill

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MOST_LINES = 12
"""Of a difference, that are printed."""


def stale() -> Iterator[tuple[Path, str, str]]:
    """Files that are not what the results say: file, what it holds, what it should."""
    pages = [(page, markdown(read_results(page.parent))) for page in RESULTS.glob("*/report.md")]
    text = README.read_text(encoding="utf-8")
    for path, wanted in [(README, fill(text, ROOT)), *pages]:
        if (found := path.read_text(encoding="utf-8")) != wanted:
            yield path, found, wanted


def check() -> int:
    """Print what is stale; 1 if anything is."""
    status = 0
    for path, found, wanted in stale():
        status = 1
        print(f"{path.relative_to(ROOT)} is not what the results say; `make report` writes it anew")
        lines = list(
            difflib.unified_diff(found.splitlines(), wanted.splitlines(), "it", "results", n=0)
        )
        print("\n".join(f"  {line[:160]}" for line in lines[:MOST_LINES]))
    return status


def write(folder: Path) -> None:
    """Write report and pictures of a folder of results.

    Raises:
        ValueError: there are no results in it.
    """
    results = read_results(folder)
    if not results:
        raise ValueError(f"{folder} holds no results; `make bench` writes them")
    pictures(results, folder)
    text = markdown(results)
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(to_html(text, folder, title(results)), encoding="utf-8")
    print(f"written: report.md, report.html and pictures in {folder.name}")


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description="The report of a folder of results.")
    parser.add_argument("--results", type=Path, help="folder (default: this machine's)")
    parser.add_argument("--readme", action="store_true", help="fill in the README's blocks too")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if stale")
    options = parser.parse_args()
    if options.check:
        sys.exit(check())
    try:
        write(options.results or RESULTS / machine_name())
        if options.readme:
            text = README.read_text(encoding="utf-8")
            README.write_text(fill(text, ROOT), encoding="utf-8")
            print("README.md: blocks filled in")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
