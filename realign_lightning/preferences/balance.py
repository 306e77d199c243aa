"""As many answers that turn from yes to no as from no to yes."""

from __future__ import annotations

import random
from collections.abc import Sequence


def surplus_answers(pairs: Sequence[tuple[str, str]], seed: int) -> list[int]:
    """The pairs to leave out so that chosen yes stands against rejected no as often as the other way round.

    A policy that says yes too readily gives more rejected yes than rejected no. Trained on all of them it learns to say
    no, whatever is asked: accuracy on questions about what is there falls as that on the others rises.

    Args:
        pairs: chosen and rejected response of each.
        seed: of which ones are drawn.

    Returns:
        Rows, in order. Pairs that turn neither way, longer answers among them, are never left out.

    >>> surplus_answers([("Yes, a dog.", "No."), ("no", "yes"), ("A dog.", "A cat."), ("No.", "Yes.")], seed=0)
    [3]
    """
    turns = [(_verdict(chosen), _verdict(rejected)) for chosen, rejected in pairs]
    to_no, to_yes = ([row for row, turn in enumerate(turns) if turn == way] for way in (("no", "yes"), ("yes", "no")))
    more, fewer = (to_no, to_yes) if len(to_no) > len(to_yes) else (to_yes, to_no)
    return sorted(random.Random(seed).sample(more, len(more) - len(fewer)))


def _verdict(text: str) -> str:
    """The first word, in lower case."""
    return next(iter(text.split()), "").strip(".,;:!").lower()
