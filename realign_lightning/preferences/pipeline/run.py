"""One run of a build: its stages in order, each with its memo, its time and its part of the report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from realign_lightning.backbones.files import FileHasher
from realign_lightning.data.sources.base import Source
from realign_lightning.engines.asking import AnswerBook
from realign_lightning.engines.base import Engine
from realign_lightning.engines.local import LocalEngine
from realign_lightning.engines.memo import Memo, content_key
from realign_lightning.engines.policy import Policy
from realign_lightning.preferences.accept import Gate
from realign_lightning.preferences.balance import surplus_answers
from realign_lightning.preferences.completing import Completer
from realign_lightning.preferences.mask import LLMMasker, Masker
from realign_lightning.preferences.pipeline.drafts import OWN, Draft, LeftOut, Try, still_open
from realign_lightning.preferences.pipeline.masks import mask_responses
from realign_lightning.preferences.pipeline.reading import Album, check_images, check_texts, read_drafts, read_pool
from realign_lightning.preferences.pipeline.report import BuildReport
from realign_lightning.preferences.pipeline.responding import write_responses
from realign_lightning.preferences.pipeline.similar import calibrated, embed_album, find_neighbours, prepare_index
from realign_lightning.preferences.retrieve import EmbeddingStore, ImageEncoder, Neighbour, PolicyEncoder, Retriever
from realign_lightning.preferences.trials import Candidate, Outcome, Trial, Trials
from realign_lightning.ranks import gather, rank_and_world_size, share

_SCHEMA = 1
"""Raised whenever this package checks, masks, asks, embeds or searches otherwise, so that old results are not used."""


@dataclass(frozen=True)
class Stages:
    """Who does what in a build; see :class:`~realign_lightning.preferences.PreferenceBuilder`.

    Args:
        masker: chooses what to mask.
        retriever: finds similar images.
        completer: lets an engine complete masked responses.
        gate: decides on completions.
        responder: generates missing chosen responses; None where there is nobody.
        calibrate: whether the end of the band of similarities is found from the images.
        batches: records that are tried at a time, in batches of the engine.
        seed: of what is drawn.
        own_mistakes: whether responses are completed on the image itself before similar ones.
        balance_answers: whether yes turns into no as often as no into yes.
    """

    masker: Masker
    retriever: Retriever
    completer: Completer
    gate: Gate
    responder: Engine | None
    calibrate: bool
    batches: int
    seed: int
    own_mistakes: bool = False
    balance_answers: bool = False

    @property
    def engines(self) -> list[Engine]:
        """All that answer about images."""
        return [self.completer.engine, *([self.responder] if self.responder is not None else [])]


class Run:
    """Runs the stages on this rank's share of the records; all ranks make the same calls in the same order.

    Args:
        stages: who does what.
        work: folder of finished work, which all ranks share.
        policy: whose hallucinations are wanted; None where engines and encoder have models of their own.
        shows: whether there are progress bars.
    """

    def __init__(self, stages: Stages, work: Path, policy: Policy | None, shows: bool = True) -> None:
        self.stages = stages
        self.work = work
        self.policy = policy
        self.report = BuildReport()
        self.drafts: list[Draft] = []
        self.others: list[LeftOut] = []
        self.strays: list[LeftOut] = []
        self.album = Album()
        self.dimension = 0
        self.paid_stages: frozenset[str] = frozenset()
        self._has_retrieved = False
        self._memos: list[Memo] = []
        self.shows = shows and rank_and_world_size()[0] == 0
        self._retriever = stages.retriever
        self._encoder = stages.retriever.encoder
        if policy is not None:
            policy.hash_file = FileHasher(work / "files.json")
            for engine in stages.engines:
                engine.use(policy)
            self._encoder = self._encoder or PolicyEncoder.sharing(policy)

    # ---- stages

    def read(self, source: Source, pool: Source | None) -> None:
        """Read and check records and images.

        Args:
            source: records.
            pool: further images that can be retrieved.

        Raises:
            ValueError: if records lack what nobody of this build can make.
        """
        with self._timed("read"):
            spill = self.work / "images"
            self.drafts, self.others = read_drafts(source, spill, self.shows)
            images, self.strays = ([], []) if pool is None else read_pool(pool, spill)
        self._check_parts()
        policy = self.policy if any(self._needs_completion(self.drafts)) else None
        identity = {"policy": None if policy is None else policy.identity}
        with self._timed("check"):
            self.album = check_images(
                self.drafts, images, self._memo("images", {}), self._memo("hashes", {}), self.shows
            )
            self._name_strays(self.album.problems)
            check_texts(self.drafts, policy, self._memo("texts", identity), self.shows)

    def respond(self) -> None:
        """Generate chosen responses that are missing."""
        responder, seed = self.stages.responder, self.stages.seed
        book = None
        if responder is not None and any(draft.record.chosen is None for draft in still_open(self.drafts)):
            book = AnswerBook(responder, self._memo("responses", {"engine": dict(responder.identity)}))
        with self._timed("answer", book):
            write_responses(self.drafts, self.album, book, self.stages.gate, seed, self.shows)

    def mask(self) -> None:
        """Mask chosen responses."""
        masker, book = self.stages.masker, None
        if any(self._needs_completion(still_open(self.drafts))):
            if isinstance(masker, LLMMasker):
                book = AnswerBook(masker.engine, self._memo("markings", {"engine": dict(masker.engine.identity)}))
                masker.keep(book)
            with self._timed("mask", book):
                mask_responses(self.drafts, masker, self._memo("masks", masker.identity), self.shows)

    def retrieve(self) -> dict[str, list[Neighbour]]:
        """Find similar images for this rank's share of :meth:`unfinished`.

        Returns:
            Neighbours by ``image_id``.
        """
        if all(draft.record.retrieved is not None for draft in self.unfinished()):
            return {}
        encoder = self._given_encoder
        self._has_retrieved = True
        store = EmbeddingStore(self.work / "embeddings", encoder.identity, rank_and_world_size()[0])
        with self._timed("embed"):
            problems = embed_album(self.album, encoder, store)
            self._name_strays(problems)
            self.dimension = store.dimension or 0
            for draft in self.unfinished():
                name = draft.record.image.image_id
                if draft.record.retrieved is None and name in problems:
                    draft.leave_out("image cannot be used", f"{name}: {problems[name]}")
        with self._timed("retrieve"):
            prepare_index(self._retriever, self.album, store)
            if self.stages.calibrate:
                memo = self._memo("bands", self._neighbourhood)
                end = calibrated(self._retriever, self.album, encoder, store, memo)
                self._retriever = self._retriever if end is None else self._retriever.below(end)
            pool = {"images": content_key(self.album.retrievable)}
            memo = self._memo("neighbours", {**self._neighbourhood, **pool})
            mine = [draft for draft in share(self.unfinished()) if draft.record.retrieved is None]
            queries = [draft.record.image.image_id for draft in mine]
            return find_neighbours(queries, self.album, self._retriever, store, memo, self.shows)

    def complete(self, neighbours: Mapping[str, Sequence[Neighbour]]) -> None:
        """Complete masked responses on the image itself, if that is wanted, and on similar ones until one is accepted.

        Args:
            neighbours: of this rank's share, as :meth:`retrieve` returns them.
        """
        top_k = self._retriever.rules.top_k
        unfinished = self.unfinished()
        mine = share(unfinished)
        queries = [draft.record.image.image_id for draft in mine if draft.record.retrieved is None]
        short = sum(len(neighbours[name]) < top_k for name in queries)
        found = {draft.key: _given(self._candidates(draft, neighbours)) for draft in mine if draft.masked is None}
        if any(draft.masked is not None for draft in unfinished):
            found |= self._try(self.trials(neighbours))
        self._finish(found, short)

    def balance(self) -> None:
        """Leave out yes and no that are too many, if that is wanted."""
        if not self.stages.balance_answers:
            return
        drafts = list(still_open(self.drafts))
        pairs = [(draft.record.chosen or "", draft.rejected or "") for draft in drafts]
        for row in surplus_answers(pairs, self.stages.seed):
            drafts[row].leave_out("too many of this answer", drafts[row].record.chosen or "")

    def trials(self, neighbours: Mapping[str, Sequence[Neighbour]]) -> list[Trial]:
        """What is to be tried for this rank's share of :meth:`unfinished`.

        Args:
            neighbours: as :meth:`retrieve` returns them.
        """
        return [
            Trial(
                draft.key, draft.record.prompt, draft.masked, self._candidates(draft, neighbours), draft.record.objects
            )
            for draft in share(self.unfinished())
            if draft.masked is not None
        ]

    def runner(self) -> Trials:
        """What tries them, with the memos of this build."""
        stages = self.stages
        answers = self._memo("answers", stages.completer.identity)
        similarities = self._memo("similarities", stages.gate.similarity.identity)
        return Trials(stages.completer, stages.gate, answers, similarities, stages.seed, stages.batches)

    def _try(self, trials: Sequence[Trial]) -> dict[str, _Found]:
        runner = self.runner()
        with self._timed("complete", runner.book), self._bar(len(trials)) as bar:
            done: Counter[bool] = Counter()

            def show(outcome: Outcome) -> None:
                done[outcome.accepted is not None] += 1
                bar.set_postfix(accepted=f"{done[True] / done.total():.0%}", asked=runner.book.asked, refresh=False)
                bar.update()

            return {outcome.trial.key: _Found.of(outcome) for outcome in runner.run(trials, show)}

    def unfinished(self) -> list[Draft]:
        """Drafts that lack a rejected response or a retrieved image and were not given up, in order."""
        return [draft for draft in still_open(self.drafts) if draft.lacks_pair]

    def close(self) -> None:
        """Bring what was finished to the disk."""
        for memo in self._memos:
            memo.close()

    # ---- parts

    def identities(self) -> dict[str, Any]:
        """What pairs depend on beside the records, in plain JSON values."""
        stages, found = self.stages, dict[str, Any]()
        if any(draft.generated for draft in self.drafts) and stages.responder is not None:
            found["responder"] = dict(stages.responder.identity)
        if any(draft.masked is not None for draft in self.drafts):
            found |= {"masker": dict(stages.masker.identity), "completer": dict(stages.completer.identity)}
            found["gate"] = dict(stages.gate.identity)
            found |= {"own_mistakes": True} if stages.own_mistakes else {}
        if stages.balance_answers:
            found["balance_answers"] = True
        if self._has_retrieved:
            found |= self._neighbourhood
        return {**found, "seed": stages.seed}

    def _check_parts(self) -> None:
        """Refuse before hours of work what would fail after them."""
        if any(self._needs_completion(self.drafts)):
            engine = self.stages.completer.engine
            if isinstance(engine, LocalEngine) and engine.backbone is None and self.policy is None:
                raise ValueError("Rejected responses are to be made, and there is no policy: give `backbone`.")
            self.stages.gate.similarity.compare(["one"], ["another"])
        responder = self.stages.responder
        is_policy = isinstance(responder, LocalEngine) and responder.backbone is None
        if is_policy and self.policy is None and any(draft.record.chosen is None for draft in self.drafts):
            raise ValueError("Chosen responses are to be generated, and there is no policy: give `backbone`.")
        if self._encoder is None and any(draft.record.retrieved is None for draft in self.drafts):
            raise ValueError("Images are to be retrieved, and nobody embeds them: give `backbone` or an encoder.")

    def _name_strays(self, problems: Mapping[str, str]) -> None:
        """Images of the pool that cannot be used and are no record's."""
        own = {draft.record.image.image_id for draft in self.drafts}
        own |= {draft.record.retrieved.image_id for draft in self.drafts if draft.record.retrieved is not None}
        broken = sorted(problems.keys() - own)
        self.strays += [LeftOut(name, "image cannot be used", problems[name]) for name in broken]

    @property
    def _given_encoder(self) -> ImageEncoder:
        assert self._encoder is not None  # noqa: S101 - checked when the records were read
        return self._encoder

    @property
    def _neighbourhood(self) -> dict[str, Any]:
        return {"retriever": dict(self._retriever.identity), "encoder": dict(self._given_encoder.identity)}

    @staticmethod
    def _needs_completion(drafts: Any) -> Iterator[bool]:
        return (draft.record.rejected is None for draft in drafts)

    def _candidates(self, draft: Draft, neighbours: Mapping[str, Sequence[Neighbour]]) -> list[Candidate]:
        """The image that was given, or similar ones; before them the original, where mistakes on it are wanted."""
        album, given = self.album, draft.record.retrieved
        if given is not None:
            found = [Candidate(given, album.contents[given.image_id])]
        else:
            found = [
                Candidate(album.files[other.image_id], album.contents[other.image_id], other.score)
                for other in neighbours[draft.record.image.image_id]
            ]
        if not (self.stages.own_mistakes and found and draft.masked is not None):
            return found
        image = draft.record.image
        return [Candidate(image, album.contents[image.image_id], is_own=True), *found]

    def _finish(self, mine: dict[str, _Found], short: int) -> None:
        """Hand all ranks what each has found."""
        found = {key: one for part in gather(mine) for key, one in part.items()}
        self.report.short = sum(gather(short))
        for draft in self.unfinished():
            one = found[draft.key]
            draft.tries = one.tries
            if one.error is not None:
                draft.leave_out("engine failed", one.error)
            elif not one.tries:
                draft.leave_out("no similar image")
            elif (last := one.tries[-1].attempt) is not None and last.verdict.reason is not None:
                reasons = ", ".join(
                    str(tried.attempt.verdict.reason) for tried in one.tries if tried.attempt is not None
                )
                draft.leave_out("no completion accepted", reasons)

    def _memo(self, stage: str, identity: Mapping[str, Any]) -> Memo:
        memo = Memo(self.work, stage, {"schema": _SCHEMA, **identity}, rank_and_world_size()[0])
        self._memos.append(memo)
        return memo

    def _bar(self, total: int) -> Any:
        return tqdm(total=total, desc="complete", unit="record", disable=not self.shows or not total)

    @contextmanager
    def _timed(self, stage: str, book: AnswerBook | None = None) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.report.seconds[stage] = time.monotonic() - started
        if book is not None:
            self.paid_stages |= {stage} if book.engine.is_remote else set()
            counts = gather((book.asked, book.prompt_tokens, book.new_tokens))
            asked, read, written = (sum(column) for column in zip(*counts, strict=True))
            self.report.calls[stage] = asked
            self.report.tokens[stage] = (read, written)


@dataclass
class _Found:
    """What became of a draft, as ranks tell each other."""

    tries: list[Try]
    error: str | None = None

    @classmethod
    def of(cls, outcome: Outcome) -> _Found:
        candidates, accepted = outcome.trial.candidates, outcome.accepted
        # What was refused is told by its verdict; its text would only have to be carried about.
        attempts = [one if one is accepted else one._replace(text="") for one in outcome.attempts]
        first = OWN if candidates and candidates[0].is_own else 0
        tries = [
            Try(one.image.image_id, one.score, attempt, rank)
            for rank, (one, attempt) in enumerate(zip(candidates, attempts, strict=False), first)
        ]
        if accepted is not None and tries[-1].rank == OWN:
            tries.append(_untried(candidates[1]))
        return cls(tries, outcome.error)


def _given(candidates: Sequence[Candidate]) -> _Found:
    """The best retrieved image for a rejected response that was given."""
    return _Found([_untried(one) for one in candidates[:1]])


def _untried(candidate: Candidate) -> Try:
    """The most similar image, beside which nothing was completed."""
    return Try(candidate.image.image_id, candidate.score, None, 0)
