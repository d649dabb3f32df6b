"""MSQ in the Trainer of Lightning: penalty, controller, logging and checkpoints."""

import inspect

import torch

try:
    import lightning.pytorch as pl
except ImportError:  # the older name of the same library
    import pytorch_lightning as pl  # type: ignore[no-redef]

from quantops.integrations.figures import figures
from quantops.methods.msq import add_penalty_grad_
from quantops.methods.msq_controller import MSQController


class MSQCallback(pl.Callback):
    """Trains a LightningModule quantized with MSQConfig (arXiv 2507.22349) in a ``lightning.Trainer``.

        quantize_(module, MSQConfig(penalty="decoupled"))
        controller = MSQController(module, target=10.7, interval=100, threshold=0.3, strength=5e-5)
        Trainer(callbacks=[MSQCallback(controller)]).fit(module, loader)

    Before each optimizer step it adds the gradient of strength * penalty (:func:`quantops.add_penalty_grad_`), before
    gradient clipping and after gradient accumulation; after it, the controller counts the step and decides.
    Compression, average bits, and bits and beta of each layer go to the Trainer's logger. Checkpoints hold the state of
    the controller; ``fit(ckpt_path=...)`` goes on bit for bit.

    Args:
        controller: an :class:`quantops.MSQController` of the module, or of a part of it.
        loss_fn: (module, batch) -> scalar, for Hessian traces. Default: what ``training_step`` gives for the batch
            (called once more at decisions, with ``self.log`` silenced and the module evaluated: no dropout).
        layers: whether bits and beta of each layer are logged.

    Raises TypeError for what is not a controller; ValueError at the start of training for manual optimization without
    a loss_fn, where training_step does not give the loss alone.
    """

    def __init__(self, controller, loss_fn=None, *, layers=True):
        if not isinstance(controller, MSQController):
            raise TypeError(f"controller: expected an MSQController, got {type(controller).__name__}")
        self.controller, self.loss_fn, self.layers = controller, loss_fn, layers
        self._step = 0

    def on_fit_start(self, trainer, pl_module):
        """Checks the settings."""
        if not pl_module.automatic_optimization and self.loss_fn is None and self.controller.hessian:
            raise ValueError(
                "loss_fn: expected one with manual optimization, whose training_step takes the optimizer's step; or "
                "MSQController(hessian=False)"
            )
        if not self.controller.belongs_to(pl_module):
            raise ValueError("controller: expected one of the module that is trained")

    def on_train_start(self, trainer, pl_module):
        """Counts optimizer steps from here."""
        self._step = trainer.global_step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        """Adds the gradient of the penalty."""
        if self.controller.strength:
            add_penalty_grad_(pl_module, self.controller.strength)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Counts the step; the controller decides at every interval."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self.controller.step(lambda: self._loss(pl_module, batch, batch_idx))
        pl_module.log_dict(figures(self.controller, self.layers), on_step=True, on_epoch=False)

    def _loss(self, pl_module, batch, batch_idx):
        if self.loss_fn is not None:
            return self.loss_fn(pl_module, batch)
        training = {m: m.training for m in pl_module.modules()}
        pl_module.eval()
        pl_module.log = pl_module.log_dict = lambda *args, **options: None
        try:
            count = len(inspect.signature(pl_module.training_step).parameters)  # batch_idx may be left out
            out = pl_module.training_step(*(batch, batch_idx)[:count])
        finally:
            del pl_module.log, pl_module.log_dict
            for m, mode in training.items():
                m.training = mode
        loss = out["loss"] if isinstance(out, dict) else out
        if not isinstance(loss, torch.Tensor):
            raise TypeError(f"loss_fn: expected one, since training_step gives {type(loss).__name__} and no loss")
        return loss

    def state_dict(self):
        """What checkpoints hold."""
        return {"controller": self.controller.state_dict()}

    def load_state_dict(self, state_dict):
        """Takes up :meth:`state_dict`."""
        self.controller.load_state_dict(state_dict["controller"])
