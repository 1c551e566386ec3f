"""Trains with `sae_lens.training.sae_trainer.SAETrainer.step`.

Options: fp32, bf16 (autocast); for topk also fp32-sparse and bf16-sparse, with its sparse activations. These do without
its weighing by decoder norms, its default: torch has no gradient of a sparse matrix times a vector that is broadcast.
"""

import torch
from common import Report, Task
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
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
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
}
WARM_UP, DECAY = 0.05, 0.3
"""Shares of training over which rates and coefficients rise, and the rate falls, where the trainer starts by itself."""


def trainer_for(task: Task) -> SAETrainer:
    """Its trainer, with the initial weights put in where they are given."""
    made, config = KINDS[task.variant]
    sae = made(config(d_in=task.d_in, d_sae=task.d_sae, device=task.device, **settings(task)))
    schedule = {}
    if task.initial:
        with torch.no_grad():
            for name, value in task.weights().items():
                getattr(sae, name).copy_(value)
    else:
        schedule = {"lr_warm_up_steps": round(WARM_UP * task.steps), "lr_decay_steps": round(DECAY * task.steps)}
    cfg = SAETrainerConfig(
        total_training_samples=task.horizon * task.batch,
        train_batch_size_samples=task.batch,
        lr=task.lr,
        lr_end=task.lr / 10,  # must be set; a constant rate has no use for it
        autocast=task.option.startswith("bf16"),
        device=task.device,
        **schedule,
    )
    return SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))


def settings(task: Task) -> dict[str, object]:
    """Of the variant."""
    warm_up = 0 if task.initial else round(WARM_UP * task.steps)
    if task.variant in ("relu", "gated"):
        return {"l1_coefficient": task.coefficient, "l1_warm_up_steps": warm_up}
    if task.variant == "jumprelu":
        return {"l0_coefficient": task.coefficient, "l0_warm_up_steps": warm_up}
    if task.variant == "matryoshka":
        return {"k": task.k, "matryoshka_widths": [*task.prefixes, task.d_sae]}
    sparse = task.option.endswith("-sparse")
    return {"k": task.k, "use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse}


def trained(trainer: SAETrainer, variant: str) -> dict[str, Tensor]:
    """Its weights.

    topk and its kin choose by activations times the decoder's norms, which is folded in, but for sparse activations.
    Gated: the magnitude's weights, and the magnitude at which the gate opens as the threshold.
    """
    sae = trainer.sae
    weights = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if variant == "gated":
        gain = sae.r_mag.exp()
        return weights | {"W_enc": sae.W_enc * gain, "b_enc": sae.b_mag, "threshold": sae.b_mag - gain * sae.b_gate}
    if variant == "jumprelu":
        return weights | {"b_enc": sae.b_enc, "threshold": sae.threshold}
    weighed = variant != "relu" and sae.cfg.rescale_acts_by_decoder_norm
    norm = sae.W_dec.norm(dim=1) if weighed else torch.ones_like(sae.b_enc)
    return weights | {"W_enc": sae.W_enc * norm, "b_enc": sae.b_enc * norm, "W_dec": sae.W_dec / norm[:, None]}


def main() -> None:
    """Train as `SAETrainer.fit` does, without its logs and checkpoints."""
    task, report = Task.from_command_line(), Report()
    torch.manual_seed(0)
    trainer = trainer_for(task)

    def step(_: int, x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    report.train(task, step)
    report.finish(task, trained(trainer, task.variant), __version__)


if __name__ == "__main__":
    main()
