"""What a step costs: time, memory, floating point operations and where they go."""

from __future__ import annotations

import gc
import resource
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.modes import Step

Part = Literal["vision", "language model", "head"]
"""Tower and projector; the layers of the language model; the vocabulary head with its softmax."""

PARTS: tuple[Part, ...] = get_args(Part)

Kind = Literal["matmul", "attention", "other"]

aten = torch.ops.aten

# What FlopCounterMode leaves out although it multiplies matrices.
_IN_PLACE = {aten.addmm_: flop_registry[aten.addmm], aten.baddbmm_: flop_registry[aten.baddbmm]}
_MATMULS = ("mm", "bmm", "linear", "convolution")
_TRL_TILE = 32768


@dataclass(frozen=True)
class Work:
    """What one step computes.

    Args:
        flops: floating point operations of matrix products, attention and convolutions, by part. The half of causal
            attention that a kernel may skip is counted.
        images: pictures that went through the vision tower.
        positions: positions that went through the language model.
        loss: the step's loss.
        gradient: of the trained parameters, as one vector on the CPU.
    """

    flops: dict[str, float]
    images: int
    positions: int
    loss: float
    gradient: Tensor

    @property
    def total(self) -> float:
        """Operations of all parts."""
        return sum(self.flops.values())


class _Watch:
    """Counts what goes through vision tower and language model, and knows which part of the model an operation is of.

    Args:
        model: a PEFT model around one of transformers' LLaVA or Qwen-VL.
    """

    def __init__(self, model: Any) -> None:
        inner = model.get_base_model()
        self.images = 0
        self.positions = 0
        self._in_vision = 0
        self._tower = getattr(inner.model, "vision_tower", None) or inner.model.visual
        projector = getattr(inner.model, "multi_modal_projector", None)
        self._vision: list[nn.Module] = [self._tower, *([projector] if projector is not None else [])]
        self._decoder = inner.model.language_model
        vocabulary = inner.get_output_embeddings().weight.shape[0]
        # TRL's head works on tiles of the vocabulary.
        self._head_sizes = {vocabulary, _TRL_TILE, vocabulary % _TRL_TILE} if vocabulary > _TRL_TILE else {vocabulary}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch inside the block."""
        hooks = [self._decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True)]
        for module in self._vision:
            hooks.append(module.register_forward_pre_hook(self._enter_vision, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leave_vision))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter_vision(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._in_vision += 1
        if module is self._tower:
            inputs = [*args, *kwargs.values()]
            grids = kwargs.get("grid_thw")
            self.images += len(next(value for value in inputs if isinstance(value, Tensor)) if grids is None else grids)

    def _leave_vision(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._in_vision -= 1

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeddings = kwargs["inputs_embeds"]
        self.positions += embeddings.shape[0] * embeddings.shape[1]

    def part(self, tensors: Sequence[Any]) -> Part:
        """The part that an operation on these tensors is of."""
        if self._in_vision:
            return "vision"
        shapes = {size for tensor in tensors if isinstance(tensor, Tensor) for size in tensor.shape}
        return "head" if shapes & self._head_sizes else "language model"


def count_work(step: Step) -> Work:
    """Run a step once and count what it does."""
    watch = _Watch(step.model)
    flops: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def by_part(formula: Callable[..., int]) -> Callable[..., int]:
        @wraps(formula)
        def count(*args: Any, **kwargs: Any) -> int:
            amount = formula(*args, **kwargs)
            flops[watch.part(args)] += amount
            return amount

        count._get_raw = True  # type: ignore[attr-defined]
        return count

    formulas = {operation: by_part(formula) for operation, formula in {**flop_registry, **_IN_PLACE}.items()}
    step.clear()
    with watch.on(), FlopCounterMode(display=False, custom_mapping=formulas):
        loss = step.run()
    work = Work(flops, watch.images, watch.positions, float(loss), step.gradient().cpu())
    step.clear()
    return work


class _Stopwatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Times every operation by itself, and adds up the times by part and kind."""

    def __init__(self, watch: _Watch, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds: dict[tuple[Part, Kind], float] = defaultdict(float)
        self._watch = watch
        self._device = device
        self._events: list[tuple[tuple[Part, Kind], Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            output = func(*args, **(kwargs or {}))
            end.record()
            self._events.append((self._place(func, args, output), start, end))
            return output
        before = time.perf_counter()
        output = func(*args, **(kwargs or {}))
        self.seconds[self._place(func, args, output)] += time.perf_counter() - before
        return output

    def _place(self, func: Any, args: tuple[Any, ...], output: Any) -> tuple[Part, Kind]:
        name = func._overloadpacket.__name__
        attends = "attention" in name
        kind: Kind = "attention" if attends else "matmul" if any(word in name for word in _MATMULS) else "other"
        # The table of embeddings has a row for every word too.
        tensors = [] if "embedding" in name else [*args, output]
        return self._watch.part(tensors), kind

    def finish(self) -> dict[tuple[Part, Kind], float]:
        """Seconds by part and kind."""
        if self._events:
            torch.cuda.synchronize()
        for place, start, end in self._events:
            self.seconds[place] += start.elapsed_time(end) / 1000
        return dict(self.seconds)


def profile(step: Step) -> dict[tuple[Part, Kind], float]:
    """Seconds that a step's operations take one by one, by part of the model and kind of operation."""
    watch = _Watch(step.model)
    step.clear()
    with watch.on(), _Stopwatch(watch, next(step.model.parameters()).device) as stopwatch:
        step.run()
    step.clear()
    found: dict[tuple[Part, Kind], float] = stopwatch.finish()
    return found


@dataclass(frozen=True)
class Times:
    """What every repeat of a step took.

    Args:
        wall: seconds.
        cpu: seconds of processor time, of all threads together.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """Time one more step."""
        step.clear()
        gc.collect()
        synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        step.run()
        synchronize()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        step.clear()


def time_steps(
    steps: Sequence[Step], repeats: int, matmul: Callable[[], float]
) -> tuple[dict[str, Times], list[float]]:
    """Times of every step and rates of a matrix product, taken in turns.

    Args:
        steps: what to time; run before, so that nothing is first.
        repeats: turns.
        matmul: measures the rate.
    """
    times = {step.name: Times() for step in steps}
    rates = []
    for turn in range(repeats):
        rates.append(matmul())
        # Another one first in every turn.
        first = turn % len(steps)
        for step in (*steps[first:], *steps[:first]):
            times[step.name].add(step)
    return times, rates


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations a second of a large matrix product, the median of some."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        left @ right
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(step: Step) -> int:
    """Bytes that a step takes at its peak above what is held before it.

    On a CPU this is resident memory: run it in a fresh process, after a step on little data.
    """
    step.clear()
    gc.collect()
    if next(step.model.parameters()).device.type == "cuda":
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.run()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with ResidentPeak() as peak:
        step.run()
    return peak.bytes


class ResidentPeak:
    """Highest resident memory inside the block above that at its start, looked at every few milliseconds."""

    def __enter__(self) -> ResidentPeak:
        self._start = self._highest = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self._highest = max(self._highest, _resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        """What the block took."""
        return self._highest - self._start


def _resident() -> int:
    """Resident memory of this process in bytes; Linux only."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()
