import subprocess
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp

from tests.metrics import test_amber, test_chair, test_hallusionbench, test_mmhal, test_pope
from tests.metrics._ranks import score_on_rank
from tests.metrics._tester import assert_scores, joined


def test_two_processes_give_the_value_of_one(tmp_path: Path) -> None:
    """With a padded sampler. One start of two processes for all metrics, since starting them is what takes time."""
    testers = [
        test_pope.TestPOPE(),
        test_pope.TestLmmsEval(),
        test_pope.TestCategories(),
        test_chair.TestCHAIR(),
        test_amber.TestBoth(),
        test_hallusionbench.TestHallusionBench(),
        test_mmhal.TestMMHal(),
    ]
    cases = [(tester.make_metric(), tester.batches(), tester.takes_ids) for tester in testers]
    mp.spawn(score_on_rank, (cases, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        for tester, scores in zip(testers, torch.load(tmp_path / f"scores{rank}.pt"), strict=True):
            assert_scores(scores, tester.reference(*joined(tester.batches())))


def test_functions_load_neither_torchmetrics_nor_the_heavy_packages() -> None:
    script = (
        "import sys; from realign_lightning.metrics import Lexicon, chair_captions, pope_questions;"
        "chair_captions(['A dog.'], [{'dog'}]);"
        "print(*{'torchmetrics', 'transformers', 'peft', 'faiss', 'webdataset', 'lightning'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)  # noqa: S603
    assert result.stdout.split() == []
