"""The stage in which chosen responses are masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from realign_lightning.engines.memo import Memo, content_key
from realign_lightning.preferences.mask import MaskedResponse, Masker, MaskError, Span
from realign_lightning.preferences.pipeline.drafts import Draft, still_open
from realign_lightning.ranks import merge, share

_GROUP = 256
"""Responses that are masked before it is noted what came of them."""


def mask_responses(drafts: Sequence[Draft], masker: Masker, memo: Memo, shows: bool = True) -> None:
    """Mask the chosen responses of drafts that need a rejected one; each rank those of its share.

    Args:
        drafts: all of them.
        masker: chooses what to mask.
        memo: keeps masks; its identity is the masker's. Failures are not kept.
        shows: whether there is a progress bar.
    """
    wanted = [draft for draft in still_open(drafts) if draft.record.rejected is None]
    mine = share(wanted)
    keys = {draft.key: content_key(draft.key, draft.record.chosen) for draft in mine}
    todo = [draft for draft in mine if keys[draft.key] not in memo]
    failures: dict[str, str] = {}
    with tqdm(total=len(todo), desc="mask", unit="record", delay=1, disable=not shows) as bar:
        for start in range(0, len(todo), _GROUP):
            group = todo[start : start + _GROUP]
            found = masker.mask_many([draft.key for draft in group], [draft.record.chosen or "" for draft in group])
            made: dict[str, Any] = {}
            for draft, masked in zip(group, found, strict=True):
                if isinstance(masked, MaskError):
                    failures[draft.key] = str(masked)
                else:
                    made[keys[draft.key]] = None if masked is None else _spans(masked)
            memo.add(made)
            bar.update(len(group))
    spans = merge({draft.key: memo[keys[draft.key]] for draft in mine if keys[draft.key] in memo})
    failures = merge(failures)
    for draft in wanted:
        if draft.key in failures:
            draft.leave_out("masking failed", failures[draft.key])
        elif spans[draft.key] is None:
            draft.leave_out("nothing to mask")
        else:
            draft.masked = _masked(draft.record.chosen or "", spans[draft.key])


def _spans(masked: MaskedResponse) -> list[list[Any]]:
    return [[span.start, span.end, span.kind] for span in masked.spans]


def _masked(response: str, spans: Sequence[Sequence[Any]]) -> MaskedResponse:
    return MaskedResponse(response, tuple(Span(start, end, response[start:end], kind) for start, end, kind in spans))
