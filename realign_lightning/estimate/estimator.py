"""The estimate of a job."""

from __future__ import annotations

import logging

from realign_lightning.estimate.empty import empty_models, tensor_bytes
from realign_lightning.estimate.example import RESPONSE_TOKENS, example_batch
from realign_lightning.estimate.job import Job
from realign_lightning.estimate.result import Estimate, Flops, Memory, Parameters
from realign_lightning.estimate.sharing import communication_bytes
from realign_lightning.estimate.trial import Trial, measure_optimizer, run_trial
from realign_lightning.scoring import make_rows

log = logging.getLogger(__name__)


def estimate(job: Job, length: int | None = None, response_tokens: int = RESPONSE_TOKENS) -> Estimate:
    """Estimate memory and arithmetic of a training run.

    Args:
        job: what is trained, and how.
        length: tokens of a row (prompt, picture and response); None takes the template with a picture of 640 x 480
            pixels, 64 tokens of text and the response.
        response_tokens: tokens of a response.

    Raises:
        ValueError: if the module cannot be trained so, or the tokens do not fit.
        OSError: if configuration or processor of the model cannot be reached.
    """
    log.info("Making the model without its weights")
    models = empty_models(job)
    example = example_batch(job.module.backbone, job.batch_size, length, response_tokens)
    policy = dict(models.policy.named_parameters())
    parameters = Parameters(
        total=sum(models.base.values()),
        trained=models.count_trained(),
        quantised=sum(models.base[name] for name in models.quantised),
    )
    weights, reference = models.stored_bytes(models.policy), models.stored_bytes(models.reference)
    communication = communication_bytes(models)
    # A 4-bit weight is unpacked to multiply with it, one at a time.
    unpacked = max((tensor_bytes(value) for name, value in policy.items() if models.is_quantised(name)), default=0)
    largest = max(policy.values(), key=lambda value: value.numel())
    dtype = job.autocast_dtype or largest.dtype
    views = job.module.loss.views
    rows = make_rows(job.module.backbone, models.policy, example.batch, views, models.module.share_prefix)
    log.info("Running a training step without values; with 13 billion parameters that takes half a minute")
    # The trial takes the models' weights away.
    trial = run_trial(models, example.batch)
    reached = [value for name, value in policy.items() if name in trial.reached]
    states, optimizer_step = measure_optimizer(job, reached)
    return Estimate(
        model=models.name,
        dtype=str(dtype).removeprefix("torch."),
        layout=job.layout,
        devices=job.world_size,
        batch_size=job.batch_size,
        accumulate_grad_batches=job.accumulate_grad_batches,
        views=len(views),
        length=example.length,
        tokens=rows.tokens["input_ids"].numel(),
        response_tokens=example.response_tokens,
        gradient_checkpointing=job.module.gradient_checkpointing,
        parameters=parameters,
        memory=Memory(
            weights=weights,
            reference=reference,
            gradients=sum(tensor_bytes(value, job.shards) for value in reached),
            optimizer=states,
            activations=trial.peak + unpacked,
            saved=trial.saved,
            optimizer_step=optimizer_step,
            communication=communication,
        ),
        flops=_flops_per_step(trial, job),
    )


def _flops_per_step(trial: Trial, job: Job) -> Flops:
    times = job.accumulate_grad_batches * job.world_size
    return Flops(
        images=trial.images * times,
        policy=trial.policy * times,
        reference=trial.reference * times,
        recomputed=trial.recomputed * times,
        backward=trial.backward * times,
    )
