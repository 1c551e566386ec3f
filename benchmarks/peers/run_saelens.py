"""Trains with `sae_lens.training.sae_trainer.SAETrainer.step`; options: fp32, bf16 (autocast), sparse (topk only)."""

import torch
from common import Report, Task
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    __version__,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

KINDS = {
    "relu": (StandardTrainingSAE, StandardTrainingSAEConfig),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
}


def trainer_for(task: Task) -> SAETrainer:
    """Its trainer with the initial weights put in."""
    weights = task.weights()
    d_in, d_sae = weights["W_enc"].shape
    made, config = KINDS[task.variant]
    extra = {"l1_coefficient": task.l1} if task.variant == "relu" else {"k": task.k}
    if task.variant == "topk":
        extra["use_sparse_activations"] = task.option == "sparse"
    sae = made(config(d_in=d_in, d_sae=d_sae, **extra))
    with torch.no_grad():
        for name, value in weights.items():
            getattr(sae, name).copy_(value)
    settings = SAETrainerConfig(
        total_training_samples=task.horizon * task.batch,
        train_batch_size_samples=task.batch,
        lr=task.lr,
        lr_end=task.lr / 10,  # must be set; a constant rate has no use for it
        autocast=task.option == "bf16",
    )
    return SAETrainer(cfg=settings, sae=sae, data_provider=iter(()))


def trained(trainer: SAETrainer) -> dict[str, Tensor]:
    """Its weights; topk and batchtopk choose by activations times the decoder's norms, which is folded in."""
    sae = trainer.sae
    norm = sae.W_dec.norm(dim=1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else torch.ones(())
    return {
        "W_enc": sae.W_enc * norm,
        "b_enc": sae.b_enc * norm,
        "W_dec": sae.W_dec / norm.reshape(-1, 1),
        "b_dec": sae.b_dec,
    }


def main() -> None:
    """Train as `SAETrainer.fit` does, without its logs and checkpoints."""
    task, report = Task.from_command_line(), Report()
    trainer = trainer_for(task)

    def step(_: int, x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    report.train(task, step)
    report.finish(task, trained(trainer), __version__)


if __name__ == "__main__":
    main()
