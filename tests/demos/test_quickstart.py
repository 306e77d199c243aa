import pytest
from torch import nn

from realign_lightning.backbones import AutoBackbone
from realign_lightning.data import DualPreferenceDataModule, ShardWriter
from realign_lightning.demos import DigitBackbone, DigitPairs
from realign_lightning.demos.quickstart import _policy_facts
from tests.conftest import preference_samples


class NoModel(DigitBackbone):
    """Fails the test if a build begins."""

    def load_model(self) -> nn.Module:
        raise AssertionError("no model may be loaded here")


def write(folder, built_with) -> dict[str, bytes]:
    with ShardWriter(folder, built_with=built_with) as writer:
        for sample in preference_samples(2):
            writer.write(sample)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("finished", [True, False])
def test_shards_of_others_are_left_alone(tmp_path, finished):
    """`--data.train my/pairs` with the recipe's builder still in place must not cost the user's pairs."""
    before = write(tmp_path / "mine", {"source": "our annotators"})
    if not finished:
        (tmp_path / "mine" / "index.json").unlink()
        del before["index.json"]
    with pytest.raises(FileExistsError, match=r"--data\.builder null"):
        DigitPairs(scenes=4).build(NoModel(), str(tmp_path / "mine"), None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


@pytest.mark.parametrize("source", ["mine/*.tar", "mine/a.tar"])
def test_a_builder_beside_named_shards_is_refused(source):
    with pytest.raises(ValueError, match=r"--data\.builder null"):
        DualPreferenceDataModule(NoModel(), train=source, builder=DigitPairs(scenes=4))


def test_pairs_of_the_same_policy_and_settings_are_used_again(tmp_path):
    pairs = DigitPairs(scenes=4)
    write(tmp_path / "train", pairs._facts(DigitBackbone(), "train", 4))
    pairs.build(NoModel(), str(tmp_path / "train"), None)
    for other in (DigitPairs(scenes=5), DigitPairs(scenes=4, tau=0.5)):
        with pytest.raises(AssertionError, match="no model"):
            other.build(NoModel(), str(tmp_path / "train"), None)


def test_policies_are_told_apart():
    small, large, pinned = (
        AutoBackbone("llava-hf/llava-1.5-7b-hf"),
        AutoBackbone("llava-hf/llava-1.5-13b-hf"),
        AutoBackbone("llava-hf/llava-1.5-7b-hf", revision="main"),
    )
    facts = [_policy_facts(backbone) for backbone in (small, large, pinned, DigitBackbone())]
    assert all(one != other for position, one in enumerate(facts) for other in facts[:position])
