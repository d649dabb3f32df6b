"""MSQ in the Trainer of transformers: penalty, controller, logging and checkpoints."""

import torch
from transformers.trainer_callback import DefaultFlowCallback, ExportableState, TrainerCallback

from quantops.integrations.figures import figures
from quantops.methods.msq import add_penalty_grad_
from quantops.methods.msq_controller import MSQController


class MSQCallback(TrainerCallback, ExportableState):
    """Trains a model quantized with MSQConfig (arXiv 2507.22349) in a ``transformers.Trainer``.

        quantize_(model, MSQConfig(penalty="decoupled"))
        controller = MSQController(model, target=10.7, interval=100, threshold=0.3, strength=5e-5)
        trainer = Trainer(model, ...)
        MSQCallback(controller).add_to(trainer)
        trainer.train()

    Before each optimizer step it adds the gradient of strength * penalty, after gradient clipping and gradient
    accumulation (:func:`quantops.add_penalty_grad_`); after it, the controller counts the step and decides.
    Compression, average bits, and bits and beta of each layer go into the Trainer's logs and to whatever it reports to.
    Checkpoints hold the state of the controller, in ``trainer_state.json``, and ``train(resume_from_checkpoint=...)``
    goes on bit for bit.

    Args:
        controller: an :class:`quantops.MSQController` of the Trainer's model.
        loss_fn: (model, args, kwargs) -> scalar, for Hessian traces, of the model's last training inputs. Default: the
            ``loss`` that the model returns for them. The model is evaluated then: no dropout, no statistics.
        layers: whether bits and beta of each layer are logged.

    Raises TypeError for what is not a controller; ValueError at the start of training for fp16 without gradient
    clipping, where gradients are still multiplied by the loss scale, and for a Trainer of another model.
    """

    def __init__(self, controller=None, loss_fn=None, *, layers=True):
        if controller is not None and not isinstance(controller, MSQController):
            raise TypeError(f"controller: expected an MSQController, got {type(controller).__name__}")
        self.controller, self.loss_fn, self.layers = controller, loss_fn, layers
        self.inputs = self.hook = None
        self.saved = {}  # of a checkpoint, where the Trainer restores callbacks

    def add_to(self, trainer):
        """Adds itself to a Trainer, before the callbacks that report its logs, and returns the Trainer. (What is given
        as ``callbacks`` comes after them: the Trainer's own history has the numbers then, and others have not.)"""
        found = trainer.callback_handler.callbacks
        found.insert(sum(isinstance(c, DefaultFlowCallback) for c in found[:1]), self)
        return trainer

    def on_train_begin(self, args, state, control, model=None, **_):
        """Checks the settings, takes up a checkpoint and begins to note inputs."""
        if self.controller is None:
            raise ValueError(
                "controller: expected an MSQController, got None; leave restore_callback_states_from_checkpoint False, "
                "the callback restores its controller itself"
            )
        if args.fp16 and not args.max_grad_norm:
            raise ValueError("fp16: expected max_grad_norm > 0 with it, or bf16, since gradients are still scaled")
        if not self.controller.belongs_to(model):
            raise ValueError("controller: expected one of the model that is trained")
        name = type(self).__name__
        if state.global_step and name in state.stateful_callbacks:
            saved = state.stateful_callbacks[name]
            saved = saved[-1] if isinstance(saved, list) else saved
            self.controller.load_state_dict(saved["attributes"]["saved"])
        state.stateful_callbacks.setdefault(name, {})
        if self.controller.hessian and not self.controller.done:
            self.hook = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model, args, kwargs):
        if model.training:
            self.inputs = args, kwargs

    def on_train_end(self, args, state, control, **_):
        """Forgets the inputs."""
        if self.hook is not None:
            self.hook.remove()
        self.inputs = self.hook = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        """Adds the gradient of the penalty."""
        if self.controller.strength:
            add_penalty_grad_(model, self.controller.strength)

    def on_step_end(self, args, state, control, model=None, **_):
        """Counts the step; the controller decides at every interval."""
        self.controller.step(lambda: self._loss(model))

    def _loss(self, model):
        args, kwargs = self.inputs
        training = model.training
        model.eval()
        try:
            if self.loss_fn is not None:
                return self.loss_fn(model, args, kwargs)
            out = model(*args, **kwargs)
            loss = out.get("loss") if isinstance(out, dict) else getattr(out, "loss", None)
        finally:
            model.train(training)
        if not isinstance(loss, torch.Tensor):
            raise TypeError(
                f"loss_fn: expected one, since {type(model).__name__} returns no loss for the inputs that it is "
                "trained on; or MSQController(hessian=False)"
            )
        return loss

    def on_log(self, args, state, control, logs=None, **_):
        """Adds the controller's numbers to those of the training."""
        if logs is not None and "loss" in logs:
            added = figures(self.controller, self.layers)
            logs.update(added)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(added)

    def state(self):
        """What checkpoints hold."""
        return {"args": {}, "attributes": {"saved": self.controller.state_dict()}}
