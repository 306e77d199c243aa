"""``visual_words: masked`` against each model's own forward, token by token."""

import dataclasses
import math

import pytest
import torch

from realign_lightning.backbones import AutoBackbone, LoRA, PaliGemmaBackbone
from realign_lightning.losses import RDPOLoss, SFTLoss
from realign_lightning.modules import RDPOModule
from realign_lightning.scoring import make_rows, score
from realign_lightning.types import PreferenceSample
from tests.conftest import picture
from tests.tiny_models import FAMILIES, make_tiny

TEXTS = [
    ("describe the image.", "a red bus stands beside two people.", "a red cat stands beside two people.", ["bus"]),
    ("what is in the picture?", "a cat and a laptop.", "a dog and a bottle.", ["cat", "laptop"]),
    ("is there a dog on the sofa?", "no.", "yes, there is a dog.", ["no."]),
]


def spans_of(text: str, words: list[str]) -> list[dict]:
    places = [(text.index(word), word) for word in words]
    return [{"start": start, "end": start + len(word), "kind": "object"} for start, word in places]


def samples(words: list[list[str]] | None = None, before: str = "") -> list[PreferenceSample]:
    return [
        PreferenceSample(
            f"sample{row}",
            picture(2 * row, (40 + 3 * row, 32)),
            picture(2 * row + 1),
            prompt,
            before + chosen,
            rejected,
            {"spans": spans_of(before + chosen, masked if words is None else words[row])},
        )
        for row, (prompt, chosen, rejected, masked) in enumerate(TEXTS)
    ]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    folder = make_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)
    backbone = (PaliGemmaBackbone if request.param == "paligemma" else AutoBackbone)(str(folder))
    return backbone, backbone.load_model()


def batch_of(backbone, found):
    return backbone.collate([backbone.encode_sample(sample) for sample in found])


@pytest.mark.parametrize("before", ["", "  "], ids=["plain", "spaces in front"])
def test_masked_tokens_are_those_of_the_masked_words(family, before):
    """Every tokenizer, also of bytes: the marked tokens spell the masked words, the others the rest."""
    backbone, _ = family
    for sample in samples(before=before):
        encoded = backbone.encode_sample(sample)
        ids = encoded.chosen.tokens["input_ids"][encoded.chosen.response_mask]
        assert encoded.masked.shape == ids.shape
        words = [sample.chosen[span.start : span.end] for span in sample.masked_spans()]
        marked, others = (backbone.decode(ids[mask].tolist()) for mask in (encoded.masked, ~encoded.masked))
        assert marked.replace(" ", "") == "".join(words).replace(" ", "")
        rest = sample.chosen
        for word in words:
            rest = rest.replace(word, "")
        assert others.replace(" ", "") == rest.replace(" ", "")


@pytest.mark.parametrize("share", ["auto", False])
def test_the_visual_view_reads_masked_words_beside_the_retrieved_image_and_others_beside_the_image(family, share):
    """Against token log-probs of the chosen and the visual view, each scored alone."""
    backbone, model = family
    found = samples()
    with torch.no_grad():
        batch = batch_of(backbone, found)
        rows = make_rows(backbone, model, batch, share_prefix=share, visual_words="masked")
        together = score(backbone, model, batch, rows=rows)
        plain = score(backbone, model, batch)
        torch.testing.assert_close(together.chosen, plain.chosen, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.rejected, plain.rejected, rtol=1e-4, atol=1e-4)
        for row, sample in enumerate(found):
            one = batch_of(backbone, [sample])
            own = make_rows(backbone, model, one, share_prefix=False)
            tokens = {0: [], 2: []}
            for view, number in (("chosen", 0), ("visual", 2)):
                mask = getattr(one, view).response_mask[0]
                for place in range(int(mask.sum())):
                    kept = (own.sums == number).nonzero()[place]
                    single = dataclasses.replace(
                        own, positions=own.positions[kept], labels=own.labels[kept], sums=own.sums[kept]
                    )
                    tokens[number].append(getattr(score(backbone, model, one, rows=single), view).item())
            masked = one.masked[0].tolist()
            expected = sum(
                there if is_masked else here for here, there, is_masked in zip(*tokens.values(), masked, strict=True)
            )
            assert together.visual[row].item() == pytest.approx(expected, abs=2e-3)
            assert together.visual[row].item() != pytest.approx(plain.visual[row].item(), abs=1e-4) or all(masked[:-1])


def module_of(backbone, loss, **options) -> RDPOModule:
    torch.manual_seed(2)
    module = RDPOModule(backbone, loss, LoRA(4, 8, 0.0), **options)
    module.configure_model()
    return module


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return AutoBackbone(str(make_tiny("llava", tmp_path_factory.mktemp("tiny") / "llava")))


def shaken(module: RDPOModule) -> RDPOModule:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return module


def test_without_the_rejected_response_the_visual_view_is_the_same(backbone):
    batch = batch_of(backbone, samples())
    with torch.no_grad():
        whole, _ = shaken(module_of(backbone, RDPOLoss(visual_words="masked"))).score(batch)
        loss = RDPOLoss(visual_words="masked", text_weight=0.0)
        alone, reference = shaken(module_of(backbone, loss)).score(batch, loss.views)
    assert alone.rejected is None
    assert reference is not None
    torch.testing.assert_close(alone.visual, whole.visual, rtol=1e-4, atol=1e-4)
    assert not torch.equal(alone.visual, reference.visual)


def test_at_the_start_the_loss_is_2_ln_2_and_all_words_masked_is_eq_1(backbone):
    batch = batch_of(backbone, samples([[chosen] for _, chosen, *_ in TEXTS]))
    masked = module_of(backbone, RDPOLoss(visual_words="masked"))
    assert masked.training_step(batch, 0).item() == pytest.approx(2 * math.log(2), abs=1e-5)
    moved, plain = shaken(masked), shaken(module_of(backbone, RDPOLoss()))
    # The end token alone is in no span.
    for row in range(len(batch)):
        batch.masked[row][:] = True
    torch.testing.assert_close(moved.training_step(batch, 0), plain.training_step(batch, 0), rtol=1e-5, atol=1e-5)


def test_a_cached_reference_gives_the_same_losses_and_is_not_shared_with_eq_1(backbone, tmp_path):
    encoded = [
        dataclasses.replace(backbone.encode_sample(sample), fingerprint=f"{row}" * 64)
        for row, sample in enumerate(samples())
    ]
    batch = backbone.collate(encoded)
    losses = {}
    for words in ("masked", "all"):
        for reference in ("adapter_off", "cached"):
            options = {"reference": reference, "reference_cache": str(tmp_path)}
            module = module_of(backbone, RDPOLoss(visual_words=words), **options)
            if reference == "cached":
                # Nothing is found that was computed for the other words.
                assert module.cache_reference([batch]) == len(batch)
            losses[words, reference] = shaken(module).training_step(batch, 0).item()
    for words in ("masked", "all"):
        assert losses[words, "cached"] == pytest.approx(losses[words, "adapter_off"], abs=1e-5)
    assert losses["masked", "cached"] != pytest.approx(losses["all", "cached"], abs=1e-4)


def test_pairs_that_do_not_say_what_was_masked_are_refused_by_name(backbone):
    unknown = [dataclasses.replace(sample, provenance={}) for sample in samples()]
    batch = batch_of(backbone, [samples()[0], *unknown[1:]])
    module = module_of(backbone, RDPOLoss(visual_words="masked"))
    with pytest.raises(ValueError, match=r"2 of 3 samples of a batch do not say what that was \(first: 'sample1'\)"):
        module.training_step(batch, 0)
    # Nobody else minds, nor does this one without a visual preference.
    for loss in (RDPOLoss(), SFTLoss(), RDPOLoss(visual_weight=0.0, visual_words="masked")):
        assert math.isfinite(module_of(backbone, loss).training_step(batch, 0).item())


def test_spans_of_another_text_are_bad_samples(backbone):
    wrong = dataclasses.replace(samples()[0], provenance={"spans": [{"start": 5, "end": 500, "kind": "object"}]})
    with pytest.raises(ValueError, match="expected spans to be a list of"):
        backbone.encode_sample(wrong)


def test_a_cut_response_has_a_cut_mask(backbone):
    whole = backbone.encode_sample(samples()[0])
    length = len(whole.chosen.response_mask) - 3
    short = dataclasses.replace(samples()[0])
    cut = type(backbone)(backbone.path, max_length=length).encode_sample(short)
    assert int(cut.chosen.response_mask.sum()) == len(cut.masked) == len(whole.masked) - 3
    assert torch.equal(cut.masked, whole.masked[:-3])


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="visual_words"):
        RDPOLoss(visual_words="claims")
