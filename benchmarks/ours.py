"""Trains with headscope's own trainer: the process that stands beside those of `peers/`; option: default."""

from importlib.metadata import version
from itertools import islice

import torch
from torch import Tensor

from headscope.sae.config import TrainConfig
from headscope.sae.model import SAE, JumpReLU
from headscope.sae.training.trainer import Trainer
from headscope.site import Site
from peers.common import Report, Task

SAMPLE_BATCHES = 8
"""From which the first dictionary is drawn, and on which dead latents are started anew."""


def config_for(task: Task) -> TrainConfig:
    """From given weights at a constant rate and coefficient; else the recipe, penalties steered towards k."""
    matryoshka = task.variant == "matryoshka"
    shared = {
        "variant": "batchtopk" if matryoshka else task.variant,
        "prefixes": task.prefixes if matryoshka else (),
        "d_sae": task.d_sae,
        "target_l0": float(task.k),
        "tokens": task.horizon * task.batch,
        "batch": task.batch,
        "buffer": SAMPLE_BATCHES * task.batch,
        "lr": task.lr,
        "scaling": "none",  # inputs come scaled
    }
    if task.initial:
        coefficient = task.coefficient if task.variant == "relu" else None
        shared |= {"coefficient": coefficient, "warmup_steps": 0, "decay": 0.0, "resample": 0}
    return TrainConfig(**shared)


def trainer_for(task: Task) -> Trainer:
    """The trainer, with the initial weights put in where they are given."""
    trainer = Trainer(_sample(task), config_for(task))
    if task.initial:
        weights = task.weights()
        by_latent = {"encoder": weights["W_enc"].T, "decoder": weights["W_dec"]}
        with torch.no_grad():
            for name in ("encoder", "b_enc", "decoder", "b_dec"):
                trainer.p[name].copy_(by_latent.get(name, weights.get(name)))
    return trainer


def _sample(task: Task) -> Tensor:
    return torch.cat(list(islice(task.batches(), SAMPLE_BATCHES)))


def trained(sae: SAE, variant: str) -> dict[str, Tensor]:
    """Its weights; of batchtopk the selection in training is judged, not the threshold that stands for it later."""
    weights = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if isinstance(sae.activation, JumpReLU) and variant in ("jumprelu", "gated"):
        weights["threshold"] = sae.activation.threshold
    return weights


def main() -> None:
    """Train, with resampling where the recipe has it."""
    task, report = Task.from_command_line(), Report()
    trainer = trainer_for(task)

    def step(_: int, x: Tensor) -> None:
        trainer.step(x)
        if trainer.step_number in trainer.config.resampled_at:
            trainer.resample(_sample(task))

    report.train(task, step)
    report.finish(task, trained(trainer.finish(Site("z", 0), "inputs"), task.variant), version("headscope"))


if __name__ == "__main__":
    main()
