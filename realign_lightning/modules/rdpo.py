"""Preference training of a vision-language model as a LightningModule."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from realign_lightning import scoring
from realign_lightning.backbones.adapters import LoRA
from realign_lightning.backbones.base import PARTS, Backbone, Part, eval_mode
from realign_lightning.backbones.files import FileHasher, hash_code
from realign_lightning.checkpoints import ResumePoint, check_room, make_durable
from realign_lightning.losses import PreferenceLoss, RDPOLoss, reward_metrics
from realign_lightning.modules.base_scorer import BaseScorer, Surroundings
from realign_lightning.modules.cache import (
    FILE_HASHES,
    ReferenceCache,
    describe_changes,
    nearest_fingerprint,
)
from realign_lightning.modules.cache_pass import CachePass
from realign_lightning.modules.card import write_card
from realign_lightning.modules.finite import FiniteGuard, LossMarks, NonFinite, counted, name_some
from realign_lightning.modules.hparams import component_spec
from realign_lightning.modules.reference import AdapterOff, CachedReference, Reference, ReferenceKind, make_reference
from realign_lightning.modules.schedule import WarmupCosine
from realign_lightning.modules.strategy import FSDP2Strategy, check_shapes
from realign_lightning.ranks import gather, rank_and_world_size, sum_over_ranks
from realign_lightning.scoring import (
    Rows,
    SharePrefix,
    encode_batch_images,
    make_rows,
    padding_fraction,
    response_lengths,
    score,
)
from realign_lightning.types import VIEWS, LogProbs, PreferenceBatch, Prompt, ViewName

log = logging.getLogger(__name__)

SchedulerCallable = Callable[[Optimizer, int], LRScheduler]
"""Makes a scheduler from the optimizer and the number of optimizer steps of the whole run."""


_PROGRESS_BAR = ("loss", "rewards/margins", "rewards/visual_margins")


def paper_adamw(parameters: Iterable[Any]) -> Optimizer:
    """AdamW with Re-Align's settings: learning rate 1e-5, no weight decay."""
    return AdamW(parameters, lr=1e-5, weight_decay=0.0)


class RDPOModule(pl.LightningModule):
    """rDPO (Re-Align, arXiv 2502.13146) on any backbone, with LoRA or in full.

    Per training step the three views of every sample are scored under the policy and under its frozen reference, each
    distinct image encoded once; when the image path is frozen, policy and reference share the features. The model is
    loaded in :meth:`configure_model`, not in the constructor.

    Logged under ``train/`` and ``val/``: ``loss``, ``rewards/{chosen,rejected,margins,accuracies}``,
    ``rewards/{visual,visual_margins,visual_accuracies}`` and ``logps/{chosen,rejected,visual}``, the names of TRL, and
    ``padding_fraction``, the share of the language model's tokens that are padding (0 where prefixes are shared).
    Training values are means over an optimizer step, over accumulated batches and ranks.
    Validation scores all three views also when ``visual_weight`` is 0, so that DPO and rDPO can be compared.

    Checkpoints hold what was trained (the adapter, or every trainable weight) and plain hyperparameters that describe
    backbone, loss and adapter; :meth:`load_from_checkpoint` rebuilds the module from them. Optimizer and scheduler
    made in Python are not described: pass them again to train on.

    Under :class:`~realign_lightning.modules.FSDP2Strategy` policy and reference are loaded and kept sharded.

    Args:
        backbone: model family and checkpoint.
        loss: preference loss; None is :class:`~realign_lightning.losses.RDPOLoss` with Eq. 1's defaults.
        adapter: LoRA settings; None is full fine-tuning.
        trained_parts: parts of the model whose own weights are trained. Beside an adapter this can be the projector,
            and None trains nothing else (the loose ``image_newline`` of LLaVA-NeXT and -OneVision, which is no module,
            stays frozen); without one None trains all parts.
        part_learning_rates: learning rates of single parts in place of the optimizer's, for example
            ``{"projector": 2e-5}``. An adapter's weights count to the part that they adapt.
        reference: what the policy is compared with, see :data:`~realign_lightning.modules.reference.ReferenceKind`.
        optimizer: makes the optimizer from the trainable parameters.
        lr_scheduler: makes the scheduler from the optimizer and the number of steps; None keeps the rate constant.
        gradient_checkpointing: recompute activations in the backward pass; less memory, about a third more time.
        share_prefix: whether chosen and rejected share one [image + prompt] prefix, see
            :data:`~realign_lightning.scoring.SharePrefix`. True fails at the first batch where the model cannot.
        compile_backend: compile the language model's blocks with this backend of ``torch.compile``, for example
            ``inductor``. The first steps take minutes; sequences of other lengths are not compiled anew.
        reference_cache: folder of the log-probs that ``reference='cached'`` computes; runs may share it. None is
            ``reference_cache`` in the Trainer's ``default_root_dir``.
        non_finite: what to do when a loss or a gradient is NaN or infinite, found by all ranks together before the
            optimizer moves. ``stop`` raises :class:`~realign_lightning.modules.NonFiniteError`. ``skip`` leaves the
            whole optimizer step out, on all ranks, counts it in ``train/skipped_steps`` and stops after ten in a row.

    Raises:
        ValueError: for gradient checkpointing together with compilation, ``reference='adapter_off'`` without an
            adapter, parts that cannot be trained beside one, learning rates of unknown parts, and an unknown
            ``non_finite``.
        TypeError: for a component that cannot be described by plain values.
    """

    def __init__(
        self,
        backbone: Backbone,
        loss: PreferenceLoss | None = None,
        adapter: LoRA | None = None,
        trained_parts: list[Part] | None = None,
        part_learning_rates: dict[str, float] | None = None,
        reference: ReferenceKind = "auto",
        optimizer: OptimizerCallable = paper_adamw,
        lr_scheduler: SchedulerCallable | None = WarmupCosine,
        gradient_checkpointing: bool = False,
        share_prefix: SharePrefix = "auto",
        compile_backend: str | None = None,
        reference_cache: str | None = None,
        non_finite: NonFinite = "stop",
    ) -> None:
        super().__init__()
        # Checkpoints hold no paths but as texts.
        reference_cache = None if reference_cache is None else str(reference_cache)
        if compile_backend is not None and gradient_checkpointing:
            raise ValueError(
                "`compile_backend` and `gradient_checkpointing` do not go together: torch.compile leaves alone what is "
                "recomputed. Set `gradient_checkpointing: false`, or `compile_backend: null`."
            )
        if reference == "adapter_off" and adapter is None:
            raise ValueError("reference='adapter_off' needs an adapter to switch off: set `adapter`.")
        self.backbone = backbone
        self.loss: PreferenceLoss = RDPOLoss() if loss is None else loss
        self.adapter = adapter
        self.trained_parts = trained_parts
        self.part_learning_rates = dict(part_learning_rates or {})
        self._check_parts()
        self.reference_kind = reference
        self.make_optimizer = optimizer
        self.make_scheduler = lr_scheduler
        self.gradient_checkpointing = gradient_checkpointing
        self.share_prefix: SharePrefix = share_prefix
        self.compile_backend = compile_backend
        self.reference_cache = reference_cache
        self.non_finite: NonFinite = non_finite
        self._finite = FiniteGuard(non_finite)
        self._val_losses = LossMarks()
        self._resume = ResumePoint()
        self._policy: nn.Module | None = None
        self._image_path_was_trained = False
        self._trained_at_first: set[str] = set()
        self._reference: Reference | None = None
        self._window = _Window()
        self._val_window = _Window()
        self._describe()

    def _check_parts(self) -> None:
        for name in ("trained_parts", "part_learning_rates"):
            unknown = sorted(set(getattr(self, name) or ()) - set(PARTS))
            if unknown:
                raise ValueError(f"Expected `{name}` to name parts of {list(PARTS)}, got {unknown}.")
        negative = {part: rate for part, rate in self.part_learning_rates.items() if not rate >= 0}
        if negative:
            raise ValueError(f"Expected rates of at least 0 in `part_learning_rates`, got {negative}.")
        if self.trained_parts is not None and not self.trained_parts and self.adapter is None:
            raise ValueError("Nothing to train: `trained_parts` is empty and there is no `adapter`.")
        beside = set(self.trained_parts or ()) - {"projector"}
        if self.adapter is not None and beside:
            raise ValueError(
                f"Expected `trained_parts` beside an adapter to be ['projector'], got {sorted(beside)} too. To train "
                "other parts, adapt them (adapter.parts), or leave the adapter out."
            )

    def _describe(self) -> None:
        """Keep plain hyperparameters: the command line's own, or the same form for a module made in Python."""
        self.save_hyperparameters(ignore=["backbone", "loss", "adapter", "optimizer", "lr_scheduler"])
        if "_instantiator" in self.hparams:
            self.save_hyperparameters()
            return
        described = {
            "backbone": component_spec(self.backbone, "backbone"),
            "loss": component_spec(self.loss, "loss"),
            "adapter": component_spec(self.adapter, "adapter"),
        }
        self.save_hyperparameters({**described, "_instantiator": "lightning.pytorch.cli.instantiate_module"})

    # ---- models

    @property
    def policy(self) -> nn.Module:
        """The model that is trained; loaded when first asked for."""
        self.configure_model()
        assert self._policy is not None  # noqa: S101
        return self._policy

    @property
    def reference(self) -> Reference:
        """The frozen reference."""
        self.configure_model()
        assert self._reference is not None  # noqa: S101
        return self._reference

    def configure_model(self) -> None:
        """Load policy and reference, sharded if the strategy has a device mesh. Lightning may call it several times.

        Raises:
            ValueError: if nothing would be trained, or the strategy cannot hold this model.
        """
        if self._policy is not None:
            return
        self._check_strategy()
        mesh = self._mesh()
        policy = self._load() if mesh is None else self._load_sharded(mesh)
        if self.gradient_checkpointing:
            inner: Any = policy.get_base_model() if self.adapter is not None else policy  # type: ignore[operator]
            inner.activation_checkpointing_enable({"use_reentrant": False})
        if not any(parameter.requires_grad for parameter in policy.parameters()):
            raise ValueError("Nothing to train: every weight is frozen. Set `adapter` (a 4-bit model needs one).")
        self._compile(policy)
        # Models come from disk in eval mode, and the Trainer leaves them in the mode that they are in.
        self._policy = policy.train(self.training)
        # Seen now, before anybody freezes what was trained.
        self._image_path_was_trained = self._trains_images()
        self._trained_at_first = self._trained_names()

    def _compile(self, policy: nn.Module) -> None:
        """Compile block by block: they are alike, so that one is compiled and all run it."""
        if self.compile_backend is not None:
            copies = self._reference.children() if self._reference is not None else ()
            for model in (policy, *copies):
                for block in self.backbone.blocks(model):
                    block.compile(backend=self.compile_backend, dynamic=True)

    def _load(self) -> nn.Module:
        model = self.backbone.load_model()
        self._reference = make_reference(self.reference_kind, self.adapter is not None, lambda: copy.deepcopy(model))
        if self.adapter is not None:
            return self.adapter.apply(self.backbone, model, self._trained_modules(model))
        return self._freeze(model)

    def _load_sharded(self, mesh: DeviceMesh) -> nn.Module:
        precision = self.trainer.precision
        if precision not in ("32-true", "bf16-mixed", "bf16-true"):
            raise ValueError(
                f"Expected precision 32-true, bf16-mixed or bf16-true with FSDP2Strategy, got {precision!r}."
            )
        compute_dtype = self._gathered_dtype
        self._reference = make_reference(
            self.reference_kind,
            self.adapter is not None,
            lambda: self.backbone.load_sharded(mesh, compute_dtype=compute_dtype),
        )
        trained = self._trained_modules(self.backbone.empty_model())
        return self._freeze(self.backbone.load_sharded(mesh, self.adapter, trained, compute_dtype))

    @property
    def _gathered_dtype(self) -> torch.dtype | None:
        """What FSDP2 casts weights to while a block uses them; None leaves them."""
        return torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None

    def _trained_modules(self, model: nn.Module) -> list[str]:
        """Modules trained in full beside an adapter."""
        if self.adapter is None or "projector" not in (self.trained_parts or ()):
            return []
        modules = self.backbone.projector_modules(model)
        if not modules:
            raise ValueError(f"Found no projector in {type(model).__name__}: leave it out of `trained_parts`.")
        return modules

    def _freeze(self, model: nn.Module) -> nn.Module:
        """Freeze what full fine-tuning leaves alone; with an adapter PEFT has done so."""
        if self.adapter is None:
            wanted = PARTS if self.trained_parts is None else self.trained_parts
            parts = self.backbone.parts(model)
            if not all(parameter.is_floating_point() for parameter in model.parameters()):
                raise ValueError("A 4-bit model cannot be trained in full: set `adapter`, or `quantization: null`.")
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parts[name] in wanted)
        return model

    def _check_strategy(self) -> None:
        """Refuse strategies that shard in ways of their own: export, checkpoints and answers would go wrong."""
        if self._trainer is None:
            return
        strategy = self.trainer.strategy
        if isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FSDP2Strategy)):
            return
        raise ValueError(
            "Expected a single device, ddp, or realign_lightning.modules.FSDP2Strategy as trainer.strategy, got "
            f"{type(strategy).__name__}. To shard a model, take configs/strategies/fsdp2.yaml."
        )

    def _mesh(self) -> DeviceMesh | None:
        """The mesh to shard over, if the strategy has one."""
        return None if self.device_mesh is None else self.device_mesh["data_parallel"]

    @property
    def image_path_is_frozen(self) -> bool:
        """Whether vision tower and projector are as the reference has them: nothing in them is, or ever was, trained.

        What was once found trainable counts as trained. Freezing it later, as ``LightningModule.freeze`` does, does not
        bring the reference's weights back.
        """
        self._image_path_was_trained = self._image_path_was_trained or self._trains_images()
        return not self._image_path_was_trained

    def _trains_images(self) -> bool:
        return any(parameter.requires_grad for parameter in self.backbone.image_parameters(self.policy))

    # ---- the cache of the reference's log-probs

    def on_fit_start(self) -> None:
        """Check that checkpoints can be written; with ``reference='cached'``, compute what log-probs are missing.

        Raises:
            CheckpointError: if a folder cannot be written, or its disk is too full.
        """
        check_room(self.trainer, self)
        self._cache_splits(["train", "val"] if self.trainer.limit_val_batches else ["train"])

    def on_validation_start(self) -> None:
        """The same before a validation that is no part of training."""
        if self.trainer.state.fn == "validate":
            self._cache_splits(["val"])

    def cache_reference(self, batches: Iterable[PreferenceBatch]) -> int:
        """Compute the reference log-probs that are not there yet, outside of a Trainer.

        Only for ``reference='cached'``. Call it with the module on its device, and inside ``torch.autocast`` if
        :meth:`score` will be called so; several ranks call it with equally many batches each.

        Args:
            batches: on any device; their samples have fingerprints.

        Returns:
            How many samples were scored, on all ranks together.

        Raises:
            ValueError: for another kind of reference, samples without a fingerprint, or log-probs that are not finite.
        """
        if not isinstance(self.reference, CachedReference):
            raise ValueError(
                f"There is nothing to cache with reference={self.reference_kind!r}: set reference='cached'."
            )
        around = Surroundings.of_caller(self.device, self._base_dtype)
        cache = self._open_cache(around)
        with self._base_scorer(around).open() as score_base:
            work = CachePass(cache, score_base, around.device)
            work.run_batches(batches)
        return work.computed

    def _cache_splits(self, splits: Sequence[str]) -> None:
        if not isinstance(self.reference, CachedReference) or not self.loss.needs_reference:
            return
        around = Surroundings.of_trainer(self.trainer)
        cache = self._open_cache(around)
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(datamodule, "sample_readers"):
            if not cache.entries:
                raise ValueError(
                    "reference='cached' computes the log-probs of all samples before training. Expected a datamodule "
                    f"with `sample_readers`, such as DualPreferenceDataModule, got {type(datamodule).__name__}, and "
                    f"nothing in {cache.folder}. Call RDPOModule.cache_reference(batches) before, in the same "
                    "precision, or set another `reference`."
                )
            return
        sources = {split: reader for split, reader in datamodule.sample_readers().items() if split in splits}
        with self._base_scorer(around).open() as score_base:
            shows = self.trainer.progress_bar_callback is not None
            CachePass(cache, score_base, around.device, shows).run(sources)

    def _open_cache(self, around: Surroundings) -> ReferenceCache:
        """The cache of this module's reference in these surroundings; from here on it is looked up there."""
        folder = Path("." if self._trainer is None else self.trainer.default_root_dir, "reference_cache")
        root = folder if self.reference_cache is None else Path(self.reference_cache)
        is_first = rank_and_world_size()[0] == 0
        fingerprint = gather(self._fingerprint(around, root) if is_first else {})[0]
        if is_first:
            other = nearest_fingerprint(root, fingerprint)
            if other is not None:
                log.warning("A reference cache in %s is not used: %s.", root, describe_changes(other, fingerprint))
            cache = ReferenceCache(root, fingerprint)
        # The others read later, so that they know all that rank 0 knows.
        gather(None)
        if not is_first:
            cache = ReferenceCache(root, fingerprint)
        reference = self.reference
        assert isinstance(reference, CachedReference)  # noqa: S101
        reference.entries = cache.entries
        return cache

    def _fingerprint(self, around: Surroundings, root: Path) -> dict[str, str]:
        """What reference log-probs depend on, beside the sample."""
        own = {"scoring": hash_code(scoring), "precision": around.describe(self._base_dtype)}
        if self.loss.visual_words != "all":
            own["visual_words"] = self.loss.visual_words
        return {**own, **self.backbone.fingerprint(FileHasher(root / FILE_HASHES))}

    @property
    def _base_dtype(self) -> torch.dtype:
        """Dtype of the largest weight that is no adapter's."""
        weights = (value for value in self.policy.parameters() if self.adapter is None or not value.requires_grad)
        return max((value for value in weights if value.is_floating_point()), key=lambda value: value.numel()).dtype

    def _base_scorer(self, around: Surroundings) -> BaseScorer:
        def make() -> AbstractContextManager[nn.Module]:
            return nullcontext(self._load_base(around)) if self.adapter is None else AdapterOff().use(self.policy)

        return BaseScorer(self.backbone, around, self.share_prefix, self.loss.visual_words, make)

    def _load_base(self, around: Surroundings) -> nn.Module:
        """The model that training starts from, a second time."""
        log.info("Loading the model once more, for its log-probs before training")
        mesh = self._mesh()
        # Loading must not move the random state, with which training goes on.
        with torch.random.fork_rng(devices=[around.device] if around.device.type == "cuda" else []):
            if mesh is None:
                model = self.backbone.load_model()
            else:
                model = self.backbone.load_sharded(mesh, compute_dtype=self._gathered_dtype)
        return around.convert(model).to(around.device).requires_grad_(False).eval()

    # ---- training

    def configure_callbacks(self) -> list[pl.Callback]:
        """No callbacks; but Lightning's own way of writing checkpoints is replaced before anything is read or written.

        See :class:`~realign_lightning.checkpoints.DurableCheckpointIO`.
        """
        make_durable(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        """Forget where an earlier run stood."""
        self._resume.forget()

    def score(
        self,
        batch: PreferenceBatch,
        views: Sequence[ViewName] = VIEWS,
        with_reference: bool = True,
        rows: Rows | None = None,
    ) -> tuple[LogProbs, LogProbs | None]:
        """Log-probs of the views under the policy (with gradient) and under the reference (without).

        Args:
            batch: B samples.
            views: which views to score.
            with_reference: False leaves the reference out.
            rows: from :meth:`make_rows` for the same views; laid out here when None.
        """
        share = self.image_path_is_frozen
        with ExitStack() as stack:
            if share:
                # As the reference sees images: without dropout, where a tower has some.
                stack.enter_context(eval_mode(self.policy))
                stack.enter_context(torch.no_grad())
            images = encode_batch_images(self.backbone, self.policy, batch, views)
        rows = self.make_rows(batch, views) if rows is None else rows
        reference = None
        if with_reference and isinstance(self.reference, CachedReference):
            reference = self.reference.log_probs(batch, views)
        elif with_reference:
            with torch.no_grad(), self.reference.use(self.policy) as model:
                reference = score(self.backbone, model, batch, views, images if share else None, rows)
        return score(self.backbone, self.policy, batch, views, images, rows), reference

    def make_rows(self, batch: PreferenceBatch, views: Sequence[ViewName] = VIEWS) -> Rows:
        """What the language model runs on for a batch, with prefixes shared as ``share_prefix`` says.

        Args:
            batch: B samples.
            views: the views that will be scored.

        Raises:
            ValueError: for ``share_prefix=True`` where the model cannot.
        """
        return make_rows(self.backbone, self.policy, batch, views, self.share_prefix, self.loss.visual_words)

    def on_train_start(self) -> None:
        """Forget what an interrupted run left unlogged, and see that a resumed one is told the truth."""
        if self._trainer is not None:
            self._resume.on_train_start(self.trainer)
        self._window = _Window()
        self._finite.losses = LossMarks()

    def on_train_epoch_start(self) -> None:
        """Refuse weights that were thawed on the way where the reference is made of them.

        Raises:
            ValueError: if base weights are trained now and the reference is the policy with its adapter off.
        """
        if not isinstance(self.reference, AdapterOff):
            return
        thawed = sorted(self._trained_names() - self._trained_at_first)
        if thawed:
            raise ValueError(
                f"{len(thawed)} weights are trained that were frozen at first ({thawed[0]}, ...), and the reference is "
                "the policy with its adapter off: it would change with them. Set `reference` to 'frozen_copy' or "
                "'cached'."
            )

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Go on with the random numbers of an interrupted run, before the first batch of a resumed one."""
        self._resume.on_train_batch_start(self.trainer)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Mean loss of the batch's samples, so scaled that gradients averaged over ranks are those of all samples.

        Under a Trainer that optimizes automatically it is the sum of the losses over the rows of the optimizer step's
        first batch, which is the mean where no row is a stand-in. :meth:`on_before_optimizer_step` makes of the
        gradients what the mean over all samples that count gives, in all accumulated batches of all ranks.
        """
        values = self._score_losses(batch, self.loss.views)
        self._window.add({name: value.detach() for name, value in values.items()}, batch.weights)
        self._finite.losses.add(batch.keys, values["loss"].detach(), batch.weights)
        if self._trainer is None or not self.automatic_optimization:
            return _mean(values["loss"], batch.weights) * _share_of_rank(batch.weights)
        return (counted(values["loss"], batch.weights) * batch.weights).sum() / self._window.rows(batch.weights)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the means over every sample of this optimizer step: all accumulated batches of all ranks.

        Gradients become those of the mean loss over these samples, too. What Lightning gives is the mean over batches,
        and over ``accumulate_grad_batches`` of them also in an epoch's last step, which may have fewer.

        Raises:
            NonFiniteError: on all ranks, if a loss or a gradient is not finite and ``non_finite`` does not skip it.
        """
        scales = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        means, found = self._window.flush(self._finite.look(optimizer, gradients_too=not scales))
        if self._finite.allows(found, optimizer, self.global_step):
            _scale_gradients(optimizer, self._window.scale(self.trainer.accumulate_grad_batches))
        else:
            means = {}
        if self.non_finite == "skip":
            means["skipped_steps"] = torch.tensor(float(self._finite.skipped))
        for name, value in means.items():
            self.log(f"train/{name}", value, on_step=True, on_epoch=False, prog_bar=name in _PROGRESS_BAR)

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self._val_window = _Window()
        self._val_losses = LossMarks()

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """The same on held-out samples, all three views."""
        values = self._score_losses(batch, VIEWS if self.loss.needs_reference else self.loss.views)
        self._val_window.add(values, batch.weights)
        self._val_losses.add(batch.keys, values["loss"], batch.weights)
        return _mean(values["loss"], batch.weights)

    def on_validation_epoch_end(self) -> None:
        """Log the means over every validation sample of all ranks.

        Lightning's own means round the mean batch size down where ranks hold unequal numbers of samples, so they get
        what is equal on all ranks.
        """
        means, found = self._val_window.flush(self._val_losses.count()[None])
        if found.item():
            keys = name_some(self._val_losses.keys())
            rank_zero_warn(f"The validation loss is not finite in {int(found)} sample(s): {keys}.")
        for name, value in means.items():
            self.log(f"val/{name}", value, prog_bar=name in _PROGRESS_BAR, batch_size=1, sync_dist=True)

    def _score_losses(self, batch: PreferenceBatch, views: Sequence[ViewName]) -> dict[str, Tensor]:
        """Loss and what is logged beside it, (B,) each."""
        rows = self.make_rows(batch, views)
        policy, reference = self.score(batch, views, self.loss.needs_reference, rows)
        policy = LogProbs(**{view: counted(value, batch.weights) for view, value in policy.items()})
        output = self.loss(policy, reference, response_lengths(batch))
        log_probs = {f"logps/{view}": value for view, value in policy.items()}
        padding = padding_fraction(batch, views, packed=rows.packing is not None).expand_as(output.losses)
        return {"loss": output.losses, **reward_metrics(output), **log_probs, "padding_fraction": padding}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer over what is trainable, and the schedule over the run's estimated steps."""
        optimizer = self.make_optimizer(self._parameter_groups())
        if self.make_scheduler is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError(
                "lr_scheduler spans the whole run, but the Trainer has no limit of steps: set max_steps or max_epochs, "
                "or lr_scheduler=None."
            )
        scheduler = self.make_scheduler(optimizer, max(1, int(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _parameter_groups(self) -> list[Any]:
        """The trained parameters, those with a learning rate of their own in groups."""
        parts = self.backbone.parts(self.policy)
        trained = {name: value for name, value in self.policy.named_parameters() if value.requires_grad}
        rates = self.part_learning_rates
        unused = sorted(set(rates) - {parts[name] for name in trained})
        if unused:
            raise ValueError(f"`part_learning_rates` names parts of which nothing is trained: {unused}.")
        half = sum(value.numel() for value in trained.values() if value.dtype in (torch.bfloat16, torch.float16))
        if half:
            rank_zero_warn(
                f"{half} trained weights are kept in 16 bit, where steps of small learning rates are rounded away. "
                "precision=bf16-mixed keeps adapters in float32; for full fine-tuning set the backbone's dtype to "
                "float32 too."
            )
        if not rates:
            return list(trained.values())
        rest = [value for name, value in trained.items() if parts[name] not in rates]
        groups = [
            {"params": [value for name, value in trained.items() if parts[name] == part], "lr": rate}
            for part, rate in rates.items()
        ]
        return [*groups, *([{"params": rest}] if rest else [])]

    # ---- use

    @property
    def can_ask_reference(self) -> bool:
        """Whether the reference is a model in memory, which can answer: not after ``cached`` without an adapter."""
        return self.reference_kind != "cached" or self.adapter is not None

    def generate(
        self, prompts: Sequence[Prompt], images: Sequence[Image.Image], reference: bool = False, **kwargs: Any
    ) -> list[str]:
        """The answers to one prompt per image, greedy unless told otherwise.

        Args:
            prompts: texts or chat messages.
            images: one image per prompt.
            reference: ask the frozen reference instead of the policy.
            **kwargs: go to the model's ``generate``, for example ``max_new_tokens``.

        Raises:
            ValueError: if the reference is asked and none is in memory, see :attr:`can_ask_reference`.
        """
        inputs = self.backbone.encode_prompts(prompts, images)
        with self.reference.use(self.policy) if reference else nullcontext(self.policy) as model:
            return self.backbone.generate(model, inputs, **kwargs)

    def export(self, folder: str | Path, steps: int | None = None) -> None:
        """Write the PEFT adapter, or the whole model after full fine-tuning, for plain transformers and peft.

        Beside it lie the processor's files and a model card. Where weights are sharded all ranks have to call this;
        rank 0 gathers what is written, and writes.

        Args:
            folder: made if needed; files of an earlier export are replaced.
            steps: optimizer steps that the card names; None asks the trainer.
        """
        policy: Any = self.policy
        gathered = {}
        if self.device_mesh is not None:
            gathered["state_dict"] = _gather(policy, trained_only=self.adapter is not None)
        if self.global_rank == 0:
            with _plain_class(policy):
                policy.save_pretrained(str(folder), **gathered)
            self.backbone.save_processor(folder)
            settings = {**self.hparams, "loss": self.hparams["loss"] or component_spec(self.loss, "loss")}
            base = getattr(policy, "name_or_path", "unknown")
            write_card(folder, base, settings, self.adapter is not None, self.global_step if steps is None else steps)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Rebuild the module from a checkpoint, as Lightning does; nothing in it is run, wherever it comes from.

        Its hyperparameters name classes: what may be imported for them, :mod:`realign_lightning.safe_config` says.

        Args:
            checkpoint_path: a file, or a URL.
            *args: as for :class:`~lightning.pytorch.LightningModule`.
            **kwargs: likewise; ``weights_only`` is always true.
        """
        from realign_lightning.safe_config import import_policy

        with import_policy():
            return super().load_from_checkpoint(checkpoint_path, *args, **{**kwargs, "weights_only": True})

    def clone(self, **changes: Any) -> RDPOModule:
        """A fresh, untrained module with the same settings.

        Args:
            **changes: constructor arguments to replace, for example ``loss``.
        """
        arguments = {
            "backbone": self.backbone,
            "loss": self.loss,
            "adapter": self.adapter,
            "trained_parts": self.trained_parts,
            "part_learning_rates": self.part_learning_rates,
            "reference": self.reference_kind,
            "optimizer": self.make_optimizer,
            "lr_scheduler": self.make_scheduler,
            "gradient_checkpointing": self.gradient_checkpointing,
            "share_prefix": self.share_prefix,
            "compile_backend": self.compile_backend,
            "reference_cache": self.reference_cache,
            "non_finite": self.non_finite,
        }
        return type(self)(**{**arguments, **changes})

    # ---- checkpoints

    @property
    def strict_loading(self) -> bool:
        """False: checkpoints hold trained weights only; :meth:`on_load_checkpoint` checks that they fit exactly."""
        return False

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        if value:
            raise ValueError("Checkpoints of RDPOModule hold trained weights only: strict_loading=True cannot work.")

    def _trained_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trained weights only, the name of the architecture that they belong to, and all ranks' random states."""
        self._resume.on_save_checkpoint(self.trainer, checkpoint)
        checkpoint["architecture"] = self._architecture()
        checkpoint["non_finite_steps"] = self._finite.state_dict()
        trained = self._trained_names()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}

    def _architecture(self) -> str:
        """Type of the policy in transformers' words, for example ``llava``."""
        return str(getattr(getattr(self.policy, "config", None), "model_type", type(self.policy).__name__))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = False, assign: bool = False) -> Any:
        """Load trained weights; the frozen rest, which no checkpoint holds, is not reported as missing."""
        # Launchers that fork hand the weights back to a process that has loaded no model.
        self.configure_model()
        keys = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = sorted(self._trained_names() & set(keys.missing_keys))
        if missing or keys.unexpected_keys:
            raise ValueError(
                f"Expected every trained weight and nothing else, got {missing=}, {keys.unexpected_keys=}."
            )
        keys.missing_keys.clear()
        return keys

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another backbone or adapter.

        Raises:
            ValueError: if names or shapes of the weights differ from what this module trains.
        """
        self.configure_model()
        made_with = checkpoint.get("architecture", self._architecture())
        if made_with != self._architecture():
            raise ValueError(
                f"The checkpoint does not fit this module: it was made with another backbone, a {made_with}, and this "
                f"is a {self._architecture()}. Use the recipe that made it."
            )
        self._finite.load_state_dict(checkpoint.get("non_finite_steps", {}))
        if self._trainer is not None:
            self._resume.on_load_checkpoint(self.trainer, checkpoint)
        if "state_dict" not in checkpoint:
            # A sharded checkpoint: the strategy has loaded, and compared, its weights.
            return
        trained = self._trained_names()
        check_shapes(
            {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()},
            {name: tuple(value.shape) for name, value in self.named_parameters() if name in trained},
        )


def _gather(model: nn.Module, trained_only: bool) -> dict[str, Any]:
    """Weights of a sharded model, whole, on rank 0's CPU; shared ones under their first name only."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    weights = get_model_state_dict(model, options=options)
    first_names = {name for name, _ in model.named_parameters()}
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first_names
    return {name: value for name, value in weights.items() if name not in aliases}


@contextmanager
def _plain_class(model: nn.Module) -> Iterator[None]:
    """Undo what FSDP2 makes of a transformers model's class, whose name is written into files."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    sharded = type(inner)
    inner.__class__ = next(cls for cls in sharded.__mro__ if not issubclass(cls, FSDPModule))
    try:
        yield
    finally:
        inner.__class__ = sharded


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (counted(values, weights) * weights).sum() / weights.sum().clamp(min=1)


class _Window:
    """Weighted means over the batches of one optimizer step, on all ranks."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._rows: Tensor | None = None
        self._flushed: tuple[Tensor, Tensor] | None = None

    def rows(self, weights: Tensor) -> Tensor:
        """Rows of the first batch on the mean rank: one number for all batches and ranks of the step."""
        if self._rows is None:
            self._rows = sum_over_ranks(torch.full_like(weights.sum(), len(weights))) / rank_and_world_size()[1]
        return self._rows

    def add(self, values: Mapping[str, Tensor], weights: Tensor) -> None:
        self._names = list(values)
        sums = torch.stack([weights.sum(), *((counted(value, weights) * weights).sum() for value in values.values())])
        self._sums = sums if self._sums is None else self._sums + sums

    def scale(self, batches: int) -> float:
        """What turns the mean over so many batches, of sums over ``rows``, into the mean over the samples flushed."""
        if self._flushed is None:
            return 1.0
        rows, weight = (float(value) for value in self._flushed)
        return rows * batches / max(weight, 1.0)

    def flush(self, counts: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The means, and the sum of ``counts`` over the ranks, in one message."""
        if self._sums is None:
            return {}, counts
        totals = sum_over_ranks(torch.cat([self._sums, counts]))
        weight, *sums = totals[: len(self._sums)]
        found = totals[len(self._sums) :]
        self._flushed = None if self._rows is None else (self._rows * rank_and_world_size()[1], weight)
        self._sums = self._rows = None
        return {name: value / weight.clamp(min=1) for name, value in zip(self._names, sums, strict=True)}, found


def _scale_gradients(optimizer: Optimizer, scale: float) -> None:
    # 1 wherever nothing was filled up: nothing is rounded, and nothing is read and written.
    for group in optimizer.param_groups if scale != 1.0 else ():
        for weight in group["params"]:
            if weight.grad is not None:
                weight.grad.mul_(scale)


def _share_of_rank(weights: Tensor) -> Tensor:
    """Weight of this rank's samples over that of a mean rank; below 1 where the last batches were filled up."""
    total = weights.sum()
    return total * rank_and_world_size()[1] / sum_over_ranks(total).clamp(min=1)
