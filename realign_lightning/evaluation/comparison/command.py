"""``realign-lightning compare``: is one model better than another, by how much, and where."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from realign_lightning.backbones.files import write_json
from realign_lightning.evaluation.comparison.flips_page import write_flips
from realign_lightning.evaluation.comparison.pairing import Comparison, Resampling, compare_runs
from realign_lightning.evaluation.comparison.picture import draw
from realign_lightning.evaluation.comparison.report import as_json, markdown
from realign_lightning.evaluation.looks import check_matplotlib

_JSON = "comparison.json"
_PICTURE = "comparison.png"


def main(args: Sequence[str]) -> None:
    """Command line of :func:`compare_runs` and :func:`write_comparison`: prints the tables and writes the files.

    Args:
        args: options of this command.

    Raises:
        ValueError: as :func:`compare_runs`.
        FileNotFoundError: as :func:`compare_runs`.
        FileExistsError: as :func:`write_comparison`.
        ImportError: if matplotlib is not there.
    """
    options = _parser().parse_args(args)
    output = options.output or _beside(options.run_a, options.run_b)
    _check(options, output)
    resampling = Resampling(options.resamples, options.seed, options.confidence)
    names = tuple(options.names) if options.names else None
    comparison = compare_runs(options.run_a, options.run_b, names, resampling)
    missing = write_comparison(comparison, output, options.flips, options.images, options.picture)
    sys.stdout.write(markdown(comparison, options.flips))
    sys.stdout.write(f"\nWritten: {output}\n")
    if missing:
        sys.stdout.write(f"{missing:,} images are not in {options.images}, or cannot be read, and not on the page.\n")


def write_comparison(
    comparison: Comparison,
    folder: str | Path,
    flips: int = 20,
    images: str | Path | None = None,
    picture: bool = True,
) -> int:
    """Write ``comparison.md``, ``comparison.json``, ``comparison.png`` and ``flips.html``.

    Args:
        comparison: of two models.
        folder: made if needed; an older comparison in it is replaced.
        flips: most flipped answers of a benchmark in ``comparison.md``; the other files have all.
        images: folder with the images that the questions name, to be shown in ``flips.html``.
        picture: whether to draw ``comparison.png``, which needs matplotlib.

    Returns:
        How many images could not be shown.

    Raises:
        FileExistsError: if the folder holds files, and no comparison.
        ImportError: if matplotlib is needed and not there.
    """
    folder = Path(folder)
    _refuse_foreign(folder)
    if picture:
        check_matplotlib("comparison", "--no-picture")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _JSON, as_json(comparison))
    (folder / "comparison.md").write_text(markdown(comparison, flips), encoding="utf-8")
    (folder / _PICTURE).unlink(missing_ok=True)
    if picture and comparison.intervals:
        draw(comparison, folder / _PICTURE)
    return write_flips(comparison, folder / "flips.html", Path(images) if images else None)


def _check(options: argparse.Namespace, output: Path) -> None:
    """Refuse what would fail only after the work is done."""
    if options.flips < 0:
        raise ValueError(f"--flips must not be negative, got {options.flips}.")
    if options.resamples < 1:
        raise ValueError(f"--resamples must be at least 1, got {options.resamples}.")
    if not 0 < options.confidence < 1:
        raise ValueError(f"--confidence must lie between 0 and 1, such as 0.95, got {options.confidence}.")
    if options.images and not options.images.is_dir():
        raise FileNotFoundError(f"--images {options.images} is no folder.")
    _refuse_foreign(output)
    if options.picture:
        check_matplotlib("comparison", "--no-picture")


def _refuse_foreign(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / _JSON).is_file()):
        raise FileExistsError(f"{folder} is there and holds no comparison: give another folder as --output.")


def _beside(run_a: Path, run_b: Path) -> Path:
    first, second = run_a.resolve(), run_b.resolve()
    return second.parent / f"{second.name}_against_{first.name}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realign-lightning compare",
        description="Is one model better than another, by how much, and where: on the questions that both answered, "
        "scores with paired bootstrap intervals of the difference, McNemar's test, and the answers that flipped.",
    )
    parser.add_argument("run_a", type=Path, metavar="RUN_A", help="folder of evaluations, of this package or lmms-eval")
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="the same of the other model; differences are B - A")
    parser.add_argument("--output", type=Path, help="folder to write; default: RUN_B_against_RUN_A, beside RUN_B")
    parser.add_argument("--names", nargs=2, metavar=("A", "B"), help="of the models; default: where the paths differ")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of intervals (default: %(default)s)")
    parser.add_argument("--flips", type=int, default=20, help="flips printed per benchmark (default: %(default)s)")
    parser.add_argument("--images", type=Path, help="folder of the images, to show them in flips.html")
    parser.add_argument("--no-picture", dest="picture", action="store_false", help="no comparison.png, no matplotlib")
    return parser
