"""Two ranks, then four, then two again, each going on in the middle of an epoch. Run by test_resume.py."""

import sys
from pathlib import Path

from tests.data.test_datamodule import module, trainer
from tests.data.test_resume import Asking, Stop


class Steps(Asking):
    """Writes each batch on a line of its own."""

    def __init__(self, folder: Path, part: str):
        super().__init__(folder)
        self.part = part

    def on_fit_end(self) -> None:
        lines = [f"{key} {weight}" for _, _, key, weight in self.seen]
        (self.folder / f"{self.part}-{self.global_rank}.txt").write_text("\n".join(lines))


def main(shards: str, output: Path) -> None:
    for part, ranks, after in (("a", 2, 2), ("b", 4, 5), ("c", 2, 99)):
        data = module(shards, batch_size=12 // ranks, num_workers=1, seed=5)
        fit = trainer(
            output,
            devices=ranks,
            strategy="ddp_fork",
            max_epochs=2,
            callbacks=[Stop(output / f"{part}.ckpt", after)],
            num_sanity_val_steps=0,
        )
        resume = {"a": None, "b": output / "a.ckpt", "c": output / "b.ckpt"}[part]
        fit.fit(Steps(output, part), datamodule=data, ckpt_path=resume)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
