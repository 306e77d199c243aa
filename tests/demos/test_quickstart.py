import pytest
from torch import nn

from realign_lightning.data import DualPreferenceDataModule, ShardWriter
from realign_lightning.demos import DigitBackbone, DigitPairs
from tests.conftest import preference_samples


def without_model() -> DigitBackbone:
    """A backbone that fails the test if a build begins."""

    def fail() -> nn.Module:
        raise AssertionError("no model may be loaded here")

    backbone = DigitBackbone()
    backbone.load_model = fail
    return backbone


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
        DigitPairs(scenes=4).build(without_model(), str(tmp_path / "mine"), None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


@pytest.mark.parametrize("source", ["mine/*.tar", "mine/a.tar"])
def test_a_builder_beside_named_shards_is_refused(source):
    with pytest.raises(ValueError, match=r"--data\.builder null"):
        DualPreferenceDataModule(without_model(), train=source, builder=DigitPairs(scenes=4))


def test_pairs_of_the_same_policy_and_settings_are_used_again(tmp_path):
    pairs = DigitPairs(scenes=4)
    write(tmp_path / "train", pairs._facts(DigitBackbone(), "train", 4))
    pairs.build(without_model(), str(tmp_path / "train"), None)
    for other in (DigitPairs(scenes=5), DigitPairs(scenes=4, tau=0.5)):
        with pytest.raises(AssertionError, match="no model"):
            other.build(without_model(), str(tmp_path / "train"), None)
