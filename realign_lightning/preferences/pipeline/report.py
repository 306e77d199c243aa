"""What became of the records of a build."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from realign_lightning.data.card import BuildFacts
from realign_lightning.preferences.pipeline.drafts import Draft, LeftOut, Try


@dataclass
class BuildReport:
    """What became of the records of a build, and what it took.

    Args:
        records: rows of the source, those that cannot be used among them.
        pairs: pairs that were written.
        generated: pairs whose chosen response was generated.
        left_out: records without a pair, by reason.
        faults: records among them with which something was wrong, and images of the pool that cannot be used.
        refused: completions that were tried and refused, by reason.
        tried_by_rank: completions tried by rank of the retrieved image, from 0; -1 is the original image itself.
        accepted_by_rank: completions accepted by rank.
        kinds: masked spans of pairs by kind.
        short: records with fewer similar images than were to be retrieved.
        similarities: similarity of chosen and rejected response of every pair whose rejected response was made.
        retrieval_scores: similarity of image and retrieved image of every pair whose image was retrieved.
        calls: questions that were asked in this run, by stage; what was known from earlier runs is not asked again.
        tokens: tokens read and written in answering them, as far as engines say, by stage.
        seconds: time of this run by stage.
        problems: file that names every record that was left out; None where there are none.
    """

    records: int = 0
    pairs: int = 0
    generated: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    faults: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    tried_by_rank: dict[int, int] = field(default_factory=dict)
    accepted_by_rank: dict[int, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    short: int = 0
    similarities: list[float] = field(default_factory=list)
    retrieval_scores: list[float] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    problems: str | None = None

    @property
    def acceptance(self) -> float:
        """Share of the completions tried that were accepted; 0 where none was."""
        tried = sum(self.tried_by_rank.values())
        return sum(self.accepted_by_rank.values()) / tried if tried else 0.0

    def count(self, drafts: Iterable[Draft], others: Sequence[LeftOut], strays: Sequence[LeftOut] = ()) -> None:
        """Count what became of drafts whose pairs are written.

        Args:
            drafts: all of them.
            others: rows that never became a draft.
            strays: what is wrong with the pool.
        """
        refused, tried, accepted, kinds = Counter[str](), Counter[int](), Counter[int](), Counter[str]()
        left_out = Counter[str](one.reason for one in others)
        self.records = len(others)
        self.faults = sum(one.is_fault for one in (*others, *strays))
        for draft in drafts:
            self.records += 1
            for one in draft.tries:
                if one.attempt is not None:
                    tried[one.rank] += 1
                    reason = one.attempt.verdict.reason
                    if reason is not None:
                        refused[reason] += 1
                    elif draft.left_out is None:
                        accepted[one.rank] += 1
                    else:
                        refused[draft.left_out.reason] += 1
            if draft.left_out is not None:
                left_out[draft.left_out.reason] += 1
                self.faults += draft.left_out.is_fault
            else:
                self._count_pair(draft, kinds)
        self.left_out, self.refused, self.kinds = dict(left_out), dict(refused), dict(kinds)
        self.tried_by_rank, self.accepted_by_rank = dict(sorted(tried.items())), dict(sorted(accepted.items()))

    def _count_pair(self, draft: Draft, kinds: Counter[str]) -> None:
        self.pairs += 1
        self.generated += draft.generated
        kinds.update(span.kind for span in (draft.masked.spans if draft.masked else ()))
        last: Try | None = draft.tries[-1] if draft.tries else None
        if last is not None and last.score is not None:
            self.retrieval_scores.append(rounded(last.score))
        if draft.completed is not None and draft.completed.verdict.similarity is not None:
            self.similarities.append(rounded(draft.completed.verdict.similarity))

    def facts(self, settings: Mapping[str, Any]) -> BuildFacts:
        """What the card of the shards tells.

        Args:
            settings: of the build, plain values.
        """
        limits = ["Chosen answers of some pairs were generated by a model."] if self.generated else []
        return BuildFacts(
            left_out=self.left_out,
            refused=self.refused,
            accepted_by_rank=self.accepted_by_rank,
            tried_by_rank=self.tried_by_rank,
            similarities=self.similarities,
            retrieval_scores=self.retrieval_scores,
            kinds=self.kinds,
            settings=settings,
            limits=limits,
        )

    def counts(self) -> dict[str, Any]:
        """What the index of the shards tells: the same however often the build was stopped and taken up again."""
        return {
            "records": self.records,
            "pairs": self.pairs,
            "generated": self.generated,
            "left_out": self.left_out,
            "refused": self.refused,
            "tried_by_rank": {str(rank): count for rank, count in self.tried_by_rank.items()},
            "accepted_by_rank": {str(rank): count for rank, count in self.accepted_by_rank.items()},
        }

    def as_text(self) -> str:
        """The report as a table."""
        rows: list[tuple[str, str]] = [("records", f"{self.records:,}"), ("pairs", f"{self.pairs:,}")]
        rows += [(f"  {reason}", f"{count:,}") for reason, count in _by_count(self.left_out)]
        if self.tried_by_rank:
            rows.append(("completions tried", f"{sum(self.tried_by_rank.values()):,}"))
            rows.append(("  accepted", f"{sum(self.accepted_by_rank.values()):,} ({self.acceptance:.0%})"))
            rows += [(f"  {reason}", f"{count:,}") for reason, count in _by_count(self.refused)]
        if self.short:
            rows.append(("records with fewer similar images than top_k", f"{self.short:,}"))
        rows += [(f"asked in this run, {stage}", f"{count:,}") for stage, count in self.calls.items()]
        rows += [(f"seconds, {stage}", f"{seconds:,.1f}") for stage, seconds in self.seconds.items()]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value:>12}" for name, value in rows]
        return "\n".join([*lines, *([f"named in {self.problems}"] if self.problems else [])]) + "\n"


def rounded(value: float) -> float:
    """A similarity as far as anybody reads it.

    Args:
        value: of a cosine.
    """
    return round(float(value), 6)


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
