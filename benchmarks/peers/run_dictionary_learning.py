"""Trains with the `update` of dictionary_learning's own trainers; option: fp32."""

import sys
from importlib.metadata import version
from types import SimpleNamespace

import torch
from common import Report, Task
from torch import Tensor

# Its buffer imports nnsight, whose last fitting version does not go with transformers 5; the trainers use neither.
sys.modules.setdefault("nnsight", SimpleNamespace(LanguageModel=None))

from dictionary_learning.trainers import BatchTopKTrainer, StandardTrainer  # noqa: E402


def trainer_for(task: Task) -> StandardTrainer | BatchTopKTrainer:
    """Its trainer with the initial weights put in."""
    shared = {
        "steps": task.horizon,
        "activation_dim": task.d_in,
        "dict_size": task.d_sae,
        "layer": 0,
        "lm_name": "none",
        "lr": task.lr,
        "warmup_steps": 0,
        "device": task.device,
    }
    if task.variant == "relu":
        trainer = StandardTrainer(**shared, l1_penalty=task.coefficient, sparsity_warmup_steps=None)
    else:
        trainer = BatchTopKTrainer(**shared, k=task.k)
    with torch.no_grad():
        for name, value in task.weights().items():
            _parameters(trainer)[name].copy_(value)
    return trainer


def _parameters(trainer: StandardTrainer | BatchTopKTrainer) -> dict[str, Tensor]:
    """Its weights by our names, as views."""
    sae = trainer.ae
    return {
        "W_enc": sae.encoder.weight.T,
        "b_enc": sae.encoder.bias,
        "W_dec": sae.decoder.weight.T,
        "b_dec": sae.bias if hasattr(sae, "bias") else sae.b_dec,
    }


def main() -> None:
    """Train from step 1 on: at step 0 its BatchTopK would put a median in the place of the given b_dec."""
    task, report = Task.from_command_line(), Report()
    trainer = trainer_for(task)
    report.train(task, lambda number, x: trainer.update(number + 1, x))
    report.finish(task, _parameters(trainer), version("dictionary-learning"))


if __name__ == "__main__":
    main()
