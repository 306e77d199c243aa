from realign_lightning.evaluation import Benchmark, Question
from tests.conftest import picture


class Lengths(Benchmark):
    """Counts characters; remembers what it was given."""

    max_new_tokens = 6

    def __init__(self, count: int = 5) -> None:
        self.count = count
        self.seen: list[list[str]] = []

    def questions(self):
        return [Question("a" * (index + 1), picture(index)) for index in range(self.count)]

    def score(self, answers):
        self.seen.append(list(answers))
        return {"characters": float(sum(map(len, answers)))}
