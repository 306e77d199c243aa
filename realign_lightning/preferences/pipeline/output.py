"""The last stage: pairs are written as shards, which appear when they are complete."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from realign_lightning.backbones.files import hash_bytes, write_json
from realign_lightning.data.card import PICTURES, write_card
from realign_lightning.data.convert import Pair, sample_of
from realign_lightning.data.manifest import INDEX_NAME
from realign_lightning.data.publish import (
    check_target,
    publish_folder,
    publish_problems,
    restore_folder,
    staging_folder,
)
from realign_lightning.data.shards import ShardWriter
from realign_lightning.data.sources.images import read_unchanged
from realign_lightning.preferences.accept import Scope
from realign_lightning.preferences.pipeline.drafts import OWN, Draft, Try, still_open
from realign_lightning.preferences.pipeline.reading import Album
from realign_lightning.preferences.pipeline.report import rounded
from realign_lightning.preferences.pipeline.run import Run
from realign_lightning.types import SampleError

_OURS = re.compile(rf"index\.json|shard-\d{{6}}\.tar|README(\.new)?\.md|{PICTURES}")
_WRITTEN = "written.json"
_LONGEST_SHOWN = 200
"""Characters of a setting on the card."""


def check_output(target: Path, work: Path, overwrite: bool) -> None:
    """Refuse an output that would be replaced and is not of this very build.

    Args:
        target: folder of the shards.
        work: folder of the build's finished work, which knows what it has written.
        overwrite: whether anything that looks like shards may be replaced.

    Raises:
        FileExistsError: if so.
    """
    restore_folder(target)
    check_target(target, overwrite or _is_own(target, work), _OURS)


def _is_own(target: Path, work: Path) -> bool:
    index = target / INDEX_NAME
    return index.is_file() and hash_bytes(index.read_bytes()) in _written(work).get(str(target), [])


def _written(work: Path) -> dict[str, list[str]]:
    """SHA-256 of the indices that each output had, or was about to get, from this work folder."""
    path = work / _WRITTEN
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


class Output:
    """Writes the pairs of drafts.

    Args:
        target: folder of the shards.
        work: folder of finished work.
        mask_token: what stands for a mask where a masked response is shown.
        scope: what similarities compare.
        samples_per_shard: pairs in every shard but the last.
        max_side: most pixels of an image's longer side, see :class:`~realign_lightning.data.ShardWriter`.
        overwrite: whether shards of whatever origin may be replaced.
    """

    def __init__(
        self,
        target: Path,
        work: Path,
        mask_token: str,
        scope: Scope,
        samples_per_shard: int,
        max_side: int | None,
        overwrite: bool,
    ) -> None:
        self.target = target
        self.work = work
        self.overwrite = overwrite
        self.mask_token = mask_token
        self.scope = scope
        self.samples_per_shard = samples_per_shard
        self.max_side = max_side

    def write(self, run: Run, settings: Mapping[str, Any], title: str) -> None:
        """Write shards, card and the list of what was left out; count all of it in the run's report.

        Without a single pair the shards that are there are left as they are.

        Args:
            run: that has come to its end.
            settings: of the build, plain values; they are stored in the index and shown on the card.
            title: the card's heading.

        Raises:
            OSError: if the disk is full, or the folder cannot be written.
        """
        staging = staging_folder(self.target)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            self._write_shards(staging, run, settings)
            if run.report.pairs:
                self._keep_card(staging)
                write_card(staging, run.report.facts(_shortened(settings)), title)
            run.report.problems = self._write_problems(run)
            if run.report.pairs:
                self._publish(staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _publish(self, staging: Path) -> None:
        """Put the shards in their place, if nothing of anybody else's has come to lie there in the meantime."""
        check_output(self.target, self.work, self.overwrite)
        name, digest = str(self.target), hash_bytes((staging / INDEX_NAME).read_bytes())
        known = _written(self.work)
        # Noted before: whenever this is killed, what lies there is known to be its own.
        write_json(self.work / _WRITTEN, {**known, name: [*known.get(name, [])[-1:], digest]})
        publish_folder(staging, self.target)

    def _write_shards(self, staging: Path, run: Run, settings: Mapping[str, Any]) -> None:
        writer = ShardWriter(staging, self.samples_per_shard, max_side=self.max_side)
        try:
            for draft in tqdm(list(still_open(run.drafts)), desc="write", unit="pair", delay=1, disable=not run.shows):
                try:
                    self._write_pair(writer, draft, run.album)
                except SampleError as error:
                    draft.leave_out("pair cannot be stored", str(error))
            run.report.count(run.drafts, run.others, run.strays)
            writer.built_with = {"command": "build", **settings, "counts": run.report.counts()}
            if run.report.pairs:
                writer.close()
        finally:
            writer.abandon()

    def _write_pair(self, writer: ShardWriter, draft: Draft, album: Album) -> None:
        record = draft.record
        retrieved = record.retrieved or album.files[draft.tries[-1].image_id]
        facts = {**record.facts, **self._provenance(draft, retrieved.image_id)}
        image, other = (read_unchanged(file, album.contents[file.image_id]) for file in (record.image, retrieved))
        pair = Pair(record.key, record.prompt, record.chosen or "", draft.rejected or "", image, other, facts)
        writer.write(sample_of(pair), pair.image, pair.retrieved)

    def _provenance(self, draft: Draft, retrieved_id: str) -> dict[str, Any]:
        """Where a pair comes from; what the source had is named under ``given``."""
        record = draft.record
        given = {"chosen": not draft.generated, "rejected": record.rejected, "retrieved": record.retrieved}
        found: dict[str, Any] = {
            "image_id": record.image.image_id,
            "retrieved_id": retrieved_id,
            "given": [name for name, value in given.items() if value],
        }
        last = draft.tries[-1] if draft.tries else None
        if last is not None and last.score is not None:
            found |= {"retrieval_rank": last.rank, "retrieval_score": rounded(last.score)}
        if draft.completed is not None and draft.completed.verdict.similarity is not None:
            found |= {"response_similarity": rounded(draft.completed.verdict.similarity), "compared": self.scope}
        if draft.masked is not None:
            spans = [{"start": span.start, "end": span.end, "kind": span.kind} for span in draft.masked.spans]
            found |= {"masked": draft.masked.render(self.mask_token), "spans": spans}
            tried = [one for one in draft.tries if one.attempt is not None]
            found["tried"] = [_told(one) for one in tried]
            found |= {"completed_on": "image"} if tried and tried[-1].rank == OWN else {}
        return found

    def _keep_card(self, staging: Path) -> None:
        """A card that its owner has filled in must not be lost; whether it was, :func:`write_card` finds out."""
        card = self.target / "README.md"
        if card.is_file():
            shutil.copyfile(card, staging / card.name)

    def _write_problems(self, run: Run) -> str | None:
        partial = self.target.parent / f".{self.target.name}.problems.partial"
        left_out = (draft.left_out for draft in run.drafts if draft.left_out is not None)
        with partial.open("w", encoding="utf-8") as file:
            for one in (*run.others, *left_out, *run.strays):
                file.write(json.dumps({"where": one.where, "reason": one.reason, "detail": one.detail}) + "\n")
        return publish_problems(self.target, partial)


def _shortened(value: Any) -> Any:
    """Settings as a card shows them: without whole chat templates."""
    if isinstance(value, Mapping):
        return {name: _shortened(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shortened(inner) for inner in value]
    is_long = isinstance(value, str) and len(value) > _LONGEST_SHOWN
    return f"{value[:_LONGEST_SHOWN]}... ({len(value)} characters, in index.json)" if is_long else value


def _told(one: Try) -> dict[str, Any]:
    """A try as samples tell it."""
    told: dict[str, Any] = {"rank": one.rank, "retrieved_id": one.image_id}
    if one.score is not None:
        told["retrieval_score"] = rounded(one.score)
    if one.attempt is not None:
        verdict = one.attempt.verdict
        told["verdict"] = verdict.reason or "accepted"
        if verdict.similarity is not None:
            told["similarity"] = rounded(verdict.similarity)
    return told
