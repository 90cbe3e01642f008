# SPDX-License-Identifier: Apache-2.0
"""Turns the benchmarks' JSON into tables in Markdown and pictures.

usage: python benches/report.py FILE.json [--out DIR]    table and pictures of one run
       python benches/report.py                          rewrites the tables that texts of this repository hold

A text holds a table of TABLES between two lines, `<!-- table NAME begin -->` and `<!-- table NAME end -->`.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import atomic
import report_pictures
import report_summary
import report_tables
import report_training

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benches" / "results"

# What writes a table, and from which runs: a machine's name, a file's.
TABLES = {
    "layers": (
        report_tables.layers_by_machine,
        {"Zen 5": "layers-amd-zen-5", "Zen 4": "layers-amd", "Intel": "layers-intel-amx"},
    ),
    "networks": (report_tables.networks_by_machine, {"Zen 4": "mlp-amd", "Intel": "mlp-intel-amx"}),
    "training": (report_training.loops_by_machine, {"Zen 4": "training-amd", "Intel": "training-intel-amx"}),
    "kernelbench": (
        report_summary.kernelbench_by_machine,
        {"Zen 4": "kernelbench-amd", "Intel": "kernelbench-intel-amx"},
    ),
    "means": (
        report_summary.over_eager,
        {
            "layers, Zen 5": "layers-amd-zen-5",
            "layers, Zen 4": "layers-amd",
            "layers, Intel": "layers-intel-amx",
            "networks, Zen 4": "mlp-amd",
            "networks, Intel": "mlp-intel-amx",
        },
    ),
    "others": (
        report_summary.against_others,
        {"training": "training-amd", "layers": "layers-amd", "networks": "mlp-amd"},
    ),
}
HELD = re.compile(r"^(<!-- table (\S+) begin -->\n).*?^(<!-- table \2 end -->\n)", re.MULTILINE | re.DOTALL)


def with_tables(text: str) -> str:
    """The text with every table that it holds as the results are now. Raises KeyError at a name that is none."""

    def written(found: re.Match) -> str:
        make, runs = TABLES[found[2]]
        documents = {name: json.loads((RESULTS / f"{run}.json").read_text()) for name, run in runs.items()}
        return "".join([found[1], *(f"{line}\n" for line in make(documents)), found[3]])

    return HELD.sub(written, text)


def holders() -> Iterator[Path]:
    """The texts of this repository that hold a table."""
    for pattern in ("*.md", "[a-z]*/**/*.md", ".github/**/*.md"):
        yield from (path for path in sorted(ROOT.glob(pattern)) if HELD.search(path.read_text(encoding="utf-8")))


def write(source: Path, out: Path | None = None) -> list[Path]:
    """Writes the table and, where matplotlib is installed, the pictures beside the JSON or into `out`."""
    document = json.loads(source.read_text())
    out = source.parent if out is None else out
    training = document["machine_info"].get("suite") == "training"
    texts, drawings = (report_training, report_training) if training else (report_tables, report_pictures)
    written = [out / f"{source.stem}.md"]
    atomic.write(written[0], texts.markdown(document))
    try:
        images = drawings.pictures(document)
    except ModuleNotFoundError as error:
        print(f"no pictures: {error}", file=sys.stderr)
        images = {}
    for name, image in images.items():
        written.append(out / f"{source.stem}-{name}.png")
        atomic.write(written[-1], image)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="what pytest-benchmark wrote")
    parser.add_argument("--out", type=Path, help="folder of the table and the pictures; default: that of FILE")
    options = parser.parse_args(arguments)
    if options.file is None:
        written = list(holders())
        for path in written:
            atomic.write(path, with_tables(path.read_text(encoding="utf-8")))
    else:
        written = write(options.file, options.out)
        print(written[0].read_text())
    print("written:", *written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
