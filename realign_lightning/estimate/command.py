"""``realign-lightning estimate``: memory, arithmetic and hours of a recipe, on any machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from realign_lightning.estimate.estimator import estimate
from realign_lightning.estimate.example import PICTURE, PROMPT_TOKENS, RESPONSE_TOKENS
from realign_lightning.estimate.job import Job
from realign_lightning.estimate.result import PAPER_SAMPLES, UTILISATION, check_assumptions


def main(args: Sequence[str], read_recipe: Callable[[Sequence[str]], Job]) -> None:
    """Command line of :func:`estimate`: writes a table, or JSON, to standard output.

    Args:
        args: options of this command, and a recipe with overrides as ``fit`` takes them.
        read_recipe: makes a job of the latter.

    Raises:
        ValueError: for options out of range, and as :func:`estimate`.
    """
    parser = _parser()
    options, recipe = parser.parse_known_args(args)
    if not recipe:
        parser.error("expected a recipe, for example --config recipes/llava7b_lora.yaml")
    check_assumptions(options.samples, options.utilisation)
    result = estimate(read_recipe(recipe), options.length, options.response_tokens)
    if options.json:
        text = json.dumps(result.as_dict(options.samples, options.utilisation), indent=2) + "\n"
    else:
        text = result.as_text(options.samples, options.utilisation)
    sys.stdout.write(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realign-lightning estimate",
        usage="%(prog)s --config RECIPE [overrides as for fit] [options]",
        description="Estimate memory, arithmetic and hours of a recipe. Reads the model's configuration and processor, "
        "no weights and no data; needs no accelerator.",
        epilog="Overrides: realign-lightning fit --help.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--samples", type=int, default=PAPER_SAMPLES, help="trained on, all epochs together (default: %(default)s)"
    )
    parser.add_argument(
        "--length",
        type=int,
        help=f"tokens of a row, picture and response included (default: a picture of {PICTURE[0]} x {PICTURE[1]} in "
        f"the chat template, {PROMPT_TOKENS} tokens of text, and the response)",
    )
    parser.add_argument(
        "--response-tokens", type=int, default=RESPONSE_TOKENS, help="tokens of a response (default: %(default)s)"
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=UTILISATION,
        help="share of a card's 16-bit peak that training reaches (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="write JSON, in bytes, FLOPs and hours")
    return parser
