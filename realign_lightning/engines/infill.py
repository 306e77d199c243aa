"""Decoding in which the unmasked words of an answer are fixed and only its blanks are the model's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

Tokenizer = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Token ids of responses as they follow their prompt, without the end-of-turn token."""


class Choice(NamedTuple):
    """Which tokens may come next.

    Args:
        tokens: these only, or all but these.
        is_open: False for these only, True for all but these.
    """

    tokens: frozenset[int]
    is_open: bool = False


class InfillRow(ABC):
    """What one row of a batch may go on with."""

    @abstractmethod
    def next(self, generated: Sequence[int]) -> Choice | None:
        """What may follow the tokens so far; None when the answer is complete.

        Args:
            generated: the tokens so far, which must have grown by allowed ones since the last call.
        """


class _Path(NamedTuple):
    """One way to go on: the text chosen so far, its token ids, white space not yet written, blanks filled."""

    text: str
    ids: tuple[int, ...]
    pending: str
    filled: int


class ListedInfill(InfillRow):
    """Each blank takes one of some fillers.

    Texts are tokenised as a whole, blank by blank, so that it works with any tokenizer: the tokens of a filler are
    those that it has between its neighbours.

    Args:
        segments: unmasked text before, between and behind the blanks.
        fillers: what a blank may become.
        tokenize: token ids of responses.
        end_token_id: closes the response.
    """

    def __init__(self, segments: Sequence[str], fillers: Sequence[str], tokenize: Tokenizer, end_token_id: int) -> None:
        self._segments = list(segments)
        self._fillers = list(fillers)
        self._tokenize = tokenize
        self._end = end_token_id
        first = self._segments[0].rstrip()
        ids = tuple(tokenize([first])[0]) if first else ()
        self._paths = [_Path(first, ids, self._segments[0][len(first) :], 0)]

    def next(self, generated: Sequence[int]) -> Choice | None:
        """Tokens of the fixed words, or the first tokens of fillers."""
        written = tuple(generated)
        if self._end in written:
            return None
        paths = [path for path in self._paths if path.ids[: len(written)] == written]
        open_paths: list[_Path] = []
        while paths:
            path = paths.pop()
            if len(path.ids) > len(written):
                open_paths.append(path)
            else:
                paths.extend(self._extend(path))
        self._paths = open_paths
        return Choice(frozenset(path.ids[len(written)] for path in open_paths))

    def _extend(self, path: _Path) -> Iterator[_Path]:
        last = path.filled == len(self._segments) - 1
        if last:
            yield _Path(path.text, (*path.ids, self._end), "", path.filled)
            return
        segment = self._segments[path.filled + 1]
        # White space before the next filler belongs to the filler's token in most vocabularies: written with it.
        kept = segment.rstrip()
        pieces = [path.pending + filler + kept for filler in self._fillers]
        for piece, row in zip(pieces, self._tokenize([path.text + piece for piece in pieces]), strict=True):
            ids = tuple(row)
            if ids[: len(path.ids)] != path.ids:
                ids = (*path.ids, *self._tokenize([piece])[0])
            yield _Path(path.text + piece, ids, segment[len(kept) :], path.filled + 1)


class FreeInfill(InfillRow):
    """Each blank takes what the model writes, until it goes on with the fixed words or the blank is full.

    Args:
        segments: unmasked text before, between and behind the blanks; those between hold more than white space.
        longest: most tokens of each blank.
        tokenize: token ids of responses.
        end_token_id: closes the response.
        special_ids: tokens that no text holds.

    Raises:
        ValueError: for blanks without a word between them: they are one blank.
    """

    def __init__(
        self,
        segments: Sequence[str],
        longest: Sequence[int],
        tokenize: Tokenizer,
        end_token_id: int,
        special_ids: Sequence[int],
    ) -> None:
        # White space before a blank belongs to the blank's first token in most vocabularies.
        texts = [segment.rstrip() for segment in segments]
        if not all(texts[1:-1]):
            raise ValueError(f"Expected words between all blanks, got {list(segments)}: join blanks that touch.")
        self._fixed = [list(tokenize([text])[0]) if text else [] for text in texts]
        self._fixed[-1].append(end_token_id)
        self._longest = list(longest)
        self._end = end_token_id
        self._special = frozenset(special_ids)
        self._forced = list(self._fixed[0])
        self._seen = 0
        self.blanks: list[list[int]] = []
        """Tokens of the blanks so far."""

    def next(self, generated: Sequence[int]) -> Choice | None:
        """Tokens of the fixed words; in a blank anything but special tokens, and the first of the words behind it."""
        for token in generated[self._seen :]:
            self._advance(token)
        self._seen = len(generated)
        if self._end in generated:
            return None
        if self._forced:
            return Choice(frozenset(self._forced[:1]))
        if not self.blanks:
            self.blanks.append([])
        blank, stop = self.blanks[-1], self._fixed[len(self.blanks)][0]
        if len(blank) == self._longest[len(self.blanks) - 1]:
            return Choice(frozenset([stop]))
        return Choice(self._special - {stop} if blank else self._special | {stop}, is_open=True)

    def _advance(self, token: int) -> None:
        if self._forced:
            self._forced.pop(0)
            if not self._forced and len(self.blanks) < len(self._longest):
                self.blanks.append([])
        elif self.blanks[-1] and token == self._fixed[len(self.blanks)][0]:
            self._forced = self._fixed[len(self.blanks)][1:]
            if not self._forced and len(self.blanks) < len(self._longest):
                self.blanks.append([])
        else:
            self.blanks[-1].append(token)


class ForcedInfill(LogitsProcessor):
    """Lets each row of a batch go on only as its :class:`InfillRow` allows.

    Args:
        rows: one per row; None leaves a row free.
        prompt_length: tokens before the answer, padding included.
        pad_token_id: what rows that are complete are filled with.
    """

    def __init__(self, rows: Sequence[InfillRow | None], prompt_length: int, pad_token_id: int) -> None:
        self._rows = rows
        self._prompt_length = prompt_length
        self._pad = pad_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with minus infinity wherever a row may not go."""
        forced = scores.clone()
        for row, infill in enumerate(self._rows):
            if infill is None:
                continue
            choice = infill.next(input_ids[row, self._prompt_length :].tolist()) or Choice(frozenset([self._pad]))
            tokens = sorted(choice.tokens)
            if choice.is_open:
                forced[row, tokens] = float("-inf")
                continue
            forced[row] = float("-inf")
            forced[row, tokens] = torch.nan_to_num(scores[row, tokens], neginf=torch.finfo(scores.dtype).min)
        return forced


class SeededDraw(LogitsProcessor):
    """Turns greedy decoding into drawing from the model's distribution, with a seed for every row.

    The largest of log-probs plus Gumbel noise is a draw from the distribution (Maddison et al., arXiv 1411.0030), so
    that what is drawn for a row does not depend on the other rows of its batch.

    Args:
        seeds: one per row.
        temperature: that logits are divided by.
        device: of the logits.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V), scaled, with noise of their own in every row."""
        rows = [
            torch.rand(scores.shape[1], generator=generator, device=scores.device, dtype=torch.float64)
            for generator in self._generators
        ]
        noise = -torch.log(-torch.log(torch.stack(rows).clamp(min=torch.finfo(torch.float64).tiny)))
        return (scores.double() / self._temperature + noise).float()
