"""Trains with headscope's own trainer: the process that stands beside those of `peers/`; option: default."""

import math
from importlib.metadata import version

import torch
from peers.common import Report, Task
from torch import Tensor

from headscope.sae.config import TrainConfig
from headscope.sae.train import Trainer


def _constant(_: int) -> float:
    return 1.0


def trainer_for(task: Task, samples: Tensor) -> Trainer:
    """The trainer with the initial weights put in, at a constant learning rate and L1 coefficient."""
    weights = task.weights()
    config = TrainConfig(
        variant=task.variant,
        d_sae=len(weights["b_enc"]),
        target_l0=task.k,
        tokens=task.horizon * task.batch,
        batch=task.batch,
        lr=task.lr,
        resample=0,
        buffer=2 * task.batch,
    )
    trainer = Trainer(samples, config)
    trainer.rate = _constant
    trainer.l1 = task.l1 if task.variant == "relu" else 0.0
    inside = {
        "encoder": weights["W_enc"].T,
        "b_enc": weights["b_enc"] * trainer.scale,
        "decoder": weights["W_dec"],
        "b_dec": weights["b_dec"] * trainer.scale,
    }
    with torch.no_grad():
        for name, value in inside.items():
            getattr(trainer.p, name).copy_(value)
    return trainer


def trained(trainer: Trainer) -> dict[str, Tensor]:
    """Its weights, in the units of the inputs."""
    p = trainer.p
    return {
        "W_enc": p.encoder.T,
        "b_enc": p.b_enc / trainer.scale,
        "W_dec": p.decoder,
        "b_dec": p.b_dec / trainer.scale,
    }


def main() -> None:
    """Train."""
    task, report = Task.from_command_line(), Report()
    trainer = trainer_for(task, next(task.batches()))
    assert math.isclose(trainer.scale, 1.0, rel_tol=0.05), trainer.scale  # inputs come scaled
    report.train(task, trainer.step)
    report.finish(task, trained(trainer), version("headscope"))


if __name__ == "__main__":
    main()
