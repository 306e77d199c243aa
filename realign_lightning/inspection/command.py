"""``realign-lightning inspect``: look at the pairs of shards in a browser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from realign_lightning.inspection.page import PageReport, write_page


def main(args: Sequence[str]) -> None:
    """Command line of :func:`write_page`: writes the page and says in a line what is on it.

    Args:
        args: options of this command.

    Raises:
        ValueError: as :func:`write_page`.
        FileExistsError: as :func:`write_page`.
        ShardError: as :func:`write_page`.
    """
    options = _parser().parse_args(args)
    report = write_page(options.shards, options.output, options.limit, options.thumbnail)
    sys.stdout.write(_summary(options.output, report))


def _summary(output: str, report: PageReport) -> str:
    readable = report.samples - sum(bool(item.key) for item in report.skipped)
    of = f" of {report.samples:,} samples, spread evenly" if report.pairs < readable else ""
    lines = [f"{output}: {report.pairs:,} pairs{of}, {report.bytes / 1e6:.1f} MB"]
    if report.skipped:
        first = report.skipped[0]
        where = f"{first.shard} {first.key}".strip()
        lines.append(f"{len(report.skipped):,} left out, listed on the page; first: {where}: {first.reason}")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realign-lightning inspect",
        description="Write one HTML page with the pairs of shards: both images, the answers with their differences, "
        "masks, scores and provenance; to filter, sort and page through. Needs no network and no server.",
        allow_abbrev=False,
    )
    parser.add_argument("shards", nargs="+", help="folder of shards, tar file, or a pattern in quotes")
    parser.add_argument("--output", default="inspect.html", help="the page (default: %(default)s)")
    parser.add_argument(
        "--limit", type=int, default=2000, help="most pairs, spread evenly over all (default: %(default)s)"
    )
    parser.add_argument(
        "--thumbnail", type=int, default=384, help="longest side of the images in pixels (default: %(default)s)"
    )
    return parser
