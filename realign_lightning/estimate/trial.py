"""One training step on tensors that have a shape but no values.

What runs is :class:`~realign_lightning.modules.RDPOModule`'s own ``training_step`` and its backward pass; only weights,
and everything that is computed from them, are PyTorch's fake tensors
(https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html). Tokens, masks and pictures are real. So what is
counted holds for any family, any loss and any adapter.

The step is that of a CPU but for dropout, which keeps a mask of one byte per element as on GPUs. Attention keeps
queries, keys, values and results as GPU kernels do, no matrix of scores, unless the backbone asks for ``eager``. Under
autocast GPUs compute layer norms in float32, CPUs do not; that makes a difference where a vision tower is trained.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from realign_lightning.estimate.empty import EmptyModels, share_of
from realign_lightning.estimate.job import Job
from realign_lightning.scoring import encode_batch_images
from realign_lightning.types import PreferenceBatch


@dataclass(frozen=True)
class Trial:
    """What one forward and backward pass on one device takes.

    Args:
        peak: most bytes held at a time, beside weights, gradients and optimizer states.
        saved: bytes that the forward pass keeps for the backward pass, weights not counted.
        images: FLOPs of vision tower and projector.
        policy: FLOPs of the policy's language model.
        reference: FLOPs of the reference's.
        recomputed: FLOPs that gradient checkpointing computes once more.
        backward: FLOPs of the gradients.
        reached: names of the policy's weights that get a gradient; a vision tower's last blocks may get none.
    """

    peak: int
    saved: int
    images: int
    policy: int
    reference: int
    recomputed: int
    backward: int
    reached: frozenset[str]


def run_trial(models: EmptyModels, batch: PreferenceBatch) -> Trial:
    """Run one training step on shapes.

    Args:
        models: on the meta device; left without weights of any kind, and not to be used again.
        batch: real tokens and pictures.
    """
    module, mode = models.module, _Shapes()
    _give_shapes(module, mode, models.job.gathered_dtype)
    trained = {name: value for name, value in module.policy.named_parameters() if value.requires_grad}
    reached: list[str] = []
    for name, value in trained.items():
        value.register_post_accumulate_grad_hook(partial(_note, reached, name))  # type: ignore[no-untyped-call]
    # Gradients exist before, as in every pass but the first of those that are accumulated.
    held = [*module.parameters(), *module.buffers(), *_give_gradients(trained.values())]
    with _Ledger(held) as ledger, _autocast(models.job), _dropout_as_on_gpus():
        with torch.no_grad():
            encode_batch_images(module.backbone, module.policy, batch, module.loss.views)
        once = sum(ledger.take_flops())
        ledger.peak = ledger.live
        with _Saved(held) as kept:
            loss = module.training_step(batch, 0)
        saved = kept.bytes
        policy, reference = ledger.take_flops()
        torch.autograd.backward(loss)
        recomputed, backward = ledger.take_flops()
    # Encoded once for both models, without gradients, or by each for itself.
    shared = module.image_path_is_frozen
    by_policy, by_reference = (0, once) if shared else (once, once if models.runs_reference else 0)
    return Trial(
        peak=ledger.peak,
        saved=saved,
        images=by_policy + by_reference,
        policy=policy - by_policy,
        reference=reference - by_reference,
        recomputed=recomputed,
        backward=backward,
        reached=frozenset(reached),
    )


def _note(names: list[str], name: str, _: Tensor) -> None:
    names.append(name)


def measure_optimizer(job: Job, parameters: Sequence[Tensor]) -> tuple[int, int]:
    """Bytes on one device of the optimizer's states, and of what its step needs beside them for a moment.

    The optimizer steps on shapes; one that looks at values is measured on a small weight instead, and reckoned by the
    element.

    Args:
        job: makes the optimizer.
        parameters: that get a gradient, whole, on any device.
    """
    with _Shapes():
        shapes = [torch.empty(share_of(value.shape, job.shards), dtype=value.dtype) for value in parameters]
    try:
        return _step(job, shapes)
    except RuntimeError:
        small = torch.zeros(_SMALL, dtype=shapes[0].dtype)
    scale = sum(shape.numel() for shape in shapes) / small.numel()
    states, temporary = (round(size * scale) for size in _step(job, [small]))
    return states, temporary


_SMALL = (256, 256)
"""Large enough for 8-bit optimizers, which keep small weights in 32 bit."""


def _step(job: Job, values: Sequence[Tensor]) -> tuple[int, int]:
    parameters = [nn.Parameter(value) for value in values]
    gradients = _give_gradients(parameters)
    optimizer = job.module.make_optimizer(parameters)
    if job.layout != "fsdp2":
        # PyTorch's own optimizers take all weights at a time on GPUs, unless they are told otherwise or sharded.
        for group in optimizer.param_groups:
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True
    with _Ledger([*parameters, *gradients]) as ledger:
        optimizer.step()
    states = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    }
    return sum(states.values()), max(0, ledger.peak - sum(states.values()))


class _Shapes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Makes fake tensors on the CPU, which real ones may meet."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    # Or it would look for GPUs at every operation, for half of the time.
    avoid_device_init = True


def _give_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    gradients = []
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
        gradients.append(parameter.grad)
    return gradients


def _give_shapes(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> None:
    """Put fake tensors in the place of all weights and buffers, floating weights of another dtype if asked for."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def shape_of(value: Tensor) -> Tensor:
        if id(value) not in made:
            is_weight = isinstance(value, nn.Parameter)
            cast = dtype if is_weight and value.is_floating_point() and dtype is not None else value.dtype
            # As large; with float16 not every operation works under a CPU's autocast.
            cast = torch.bfloat16 if cast == torch.float16 else cast
            with mode:
                empty: Tensor = torch.empty(value.shape, dtype=cast, device="cpu")
            made[id(value)] = (nn.Parameter(empty, value.requires_grad) if is_weight else empty), value
        return made[id(value)][0]

    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, value in store.items():
                if value is not None:
                    store[name] = shape_of(value)  # type: ignore[assignment]


def _autocast(job: Job) -> AbstractContextManager[Any]:
    return nullcontext() if job.autocast_dtype is None else torch.autocast("cpu", torch.bfloat16)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps account of the bytes of living tensors and of FLOPs.

    Args:
        held: tensors that are not counted.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._flops = {True: 0, False: 0}
        self._known: dict[int, Any] = {value.untyped_storage()._cdata: value for value in held}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _as_numbers(args[1]))
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self._flops[torch.is_grad_enabled()] += count(*args, **kwargs, out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._watch(value.untyped_storage())
        return result

    def take_flops(self) -> tuple[int, int]:
        """FLOPs since the last call: those with gradient recording and those without."""
        taken = self._flops[True], self._flops[False]
        self._flops = {True: 0, False: 0}
        return taken

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _as_numbers(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Boolean indices as integers: how many elements a mask selects is known from its values, not from its shape."""
    numbers: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        numbers += index.nonzero(as_tuple=True) if is_mask else [index]  # type: ignore[union-attr]
    return numbers


class _Saved(ExitStack):
    """Counts the bytes that the forward pass keeps for the backward pass.

    Args:
        held: tensors that are not counted.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self._held = {value.untyped_storage()._cdata for value in held}
        self._kept: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda value: value))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors that are still kept, and were not held before."""
        storages = (reference() for reference in self._kept.values())
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def _pack(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in self._held:
            self._kept[storage._cdata] = weakref.ref(storage)
        return value


@contextmanager
def _dropout_as_on_gpus() -> Iterator[None]:
    """Dropout that keeps a mask of one byte per element; on CPUs it keeps a factor in the input's dtype."""
    original = F.dropout
    F.dropout = _dropout  # type: ignore[assignment]
    try:
        yield
    finally:
        F.dropout = original


def _dropout(value: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: ARG001
    return torch.native_dropout(value, p, True)[0] if training and p > 0 else value
