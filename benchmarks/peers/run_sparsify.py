"""Trains with `sparsify.Trainer.fit`; options: adam, signum (its default optimiser).

Its step has no function of its own: it is what `fit` does around a model's forward pass. So the model here looks its
activations up in the file of inputs, the tokens being row numbers; a step is timed from there to where `fit` asks for
the next batch.
"""

from contextlib import suppress
from types import SimpleNamespace

import torch
from common import Report, Task, now
from sparsify import SparseCoderConfig, TrainConfig, Trainer, __version__
from torch import Tensor, nn

SITE = "site"


class Done(Exception):  # noqa: N818
    """Enough steps."""


class Lookup(nn.Module):
    """A model whose activations are the next inputs."""

    def __init__(self, task: Task) -> None:
        """What `sparsify.Trainer` asks of a model."""
        super().__init__()
        self.site = nn.Identity()
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.device = torch.device(task.device)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self.started = 0.0
        self._task = task
        self._batches = task.batches()

    @property
    def base_model(self) -> nn.Module:
        """Itself."""
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        """The next batch, as one sequence; zeros for the probe of the width."""
        n = input_ids.shape[1]
        x = torch.zeros(1, self._task.d_in, device=self.device) if n == 1 else next(self._batches)
        self.started = now(self._task.device)
        return self.site(x.reshape(1, n, -1))


class Steps:
    """One sequence a step, and the end of the step before."""

    def __init__(self, task: Task, model: Lookup, report: Report) -> None:
        """Ends of steps go to the report."""
        self._task, self._model, self._report = task, model, report

    def __len__(self) -> int:
        """Far more than are taken: its learning rate falls to zero towards the end."""
        return self._task.horizon

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Tokens, of which only the number matters."""
        if number > 0:
            self._report.seconds.append(now(self._task.device) - self._model.started)
        if number == self._task.steps:
            raise Done
        return {"input_ids": torch.arange(self._task.batch)}


def main() -> None:
    """Train until the steps are done."""
    task, report = Task.from_command_line(), Report()
    config = TrainConfig(
        SparseCoderConfig(num_latents=task.d_sae, k=task.k),
        batch_size=1,
        optimizer=task.option,
        lr=task.lr if task.option == "adam" else None,
        lr_warmup_steps=0,
        hookpoints=[SITE],
        finetune="given",  # or it would put the first batch's mean in the place of the given b_dec
        log_to_wandb=False,
        save_every=task.horizon,
    )
    model = Lookup(task)
    trainer = Trainer(config, Steps(task, model, report), model)
    sae = trainer.saes[SITE]
    views = {"W_enc": sae.encoder.weight.T, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    with torch.no_grad():
        for name, value in task.weights().items():
            views[name].copy_(value)
    with suppress(Done):
        trainer.fit()
    if task.option == "signum":
        trainer.optimizers[0].eval()  # schedule-free: the weights to use are averages
    sae.set_decoder_norm_to_unit_norm()  # as its next step would begin
    report.finish(task, views, __version__)


if __name__ == "__main__":
    main()
