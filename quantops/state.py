"""What a state dict says besides numbers: with which settings they have a meaning; compared when it is loaded."""

import json
import operator
import warnings
import zlib
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from quantops.reference.uniform import acc_dtype

VERSION = 1
UNSEALED = 7  # bits of the hash that ``seal`` is without: it has 24, which averages in float32 keep
KEY = "_extra_state"
version = operator.attrgetter("_version")


def versions_of(tensors):
    """The version counters of tensors. RuntimeError where they have none."""
    try:
        return tuple(map(version, tensors))
    except RuntimeError as error:
        raise RuntimeError(
            "a quantizer was made, moved or copied within torch.inference_mode, whose tensors have no version; "
            "expected that before it, or within torch.no_grad"
        ) from error


class Settings:
    """Base of modules, before torch.nn.Module, whose state dict carries ``settings()`` and a version.

    They are kept as JSON in a uint8 tensor, which every format of state dicts takes. A state without them, of an
    earlier version of quantops, loads with a warning. ``counts``: {name of an integer buffer: the integers that a state
    may set it to}. ``constants``: {name of a buffer that is not in the state dict: its value}.

    Averages of models may be taken of buffers too (AveragedModel with use_buffers=True, loops over state dicts), where
    3 becomes 2 and 8 and 2 become 5. ``seal``, of a hash of counts and constants, in a buffer beside them, is then
    another number than theirs, and :meth:`check_written` raises. Copies of buffers copy it too.
    """

    counts: dict[str, Any] = {}  # {name: a container of integers}
    constants: dict[str, torch.Tensor] = {}
    sealed: Any = None
    hashed = 0  # that hash
    noted: Any = None
    # Of torch.nn.Module, and of write().
    register_buffer: Any
    _buffers: Any
    seal: Any
    layer = "a module of quantops"  # or its name, for messages
    is_layer = False  # True where its parameters are the network's own, and not those of a quantizer

    def settings(self) -> dict[str, Any]:
        """{name: value}, fit for JSON, of what the numbers in the state dict mean."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """{name: value}, fit for JSON, that goes into the state dict and is not compared."""
        return {}

    def training_settings(self) -> dict[str, Any]:
        """{name: value}, fit for JSON, of what changes gradients alone: a state of others means the same values, and
        loads with a warning."""
        return {}

    def register_constants(self, device: Any, **constants: Any) -> None:
        """Registers int32 buffers of values that never change; they are made again after every move and every load."""
        self.constants = constants
        for name, value in constants.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.int32, device=device), persistent=False)

    def write(self, **counts: Any) -> None:
        """Sets all of ``counts``, in place: nothing recompiles."""
        for name, value in counts.items():
            self._buffers[name].fill_(value)
        if "seal" not in self._buffers:
            like = next(t for t in self._buffers.values() if t is not None)
            self.register_buffer("seal", torch.zeros((), dtype=torch.int32, device=like.device), persistent=False)
        self.hashed = self._hash([counts[name] for name in self.counts])
        self.seal.fill_(self.hashed >> UNSEALED)
        self._note()

    def _note(self):
        self.sealed, self.noted = self._tensors(), self.versions()  # these tensors, so that a copy has its own

    def _tensors(self):
        return [self._buffers[n] for n in (*self.counts, *self.constants, "seal")]

    def _hash(self, counts):
        return zlib.crc32(json.dumps([[int(v) for v in counts], list(self.constants.values())]).encode()) >> 1

    def versions(self) -> tuple[int, ...]:
        """Those of all buffers that are sealed."""
        return versions_of(self._tensors())

    def check_written(self) -> None:
        """ValueError where others than quantops wrote counts or constants since they were looked at last. Another
        tensor in the place of one was put there on purpose. On other devices than the CPU they are not looked at within
        DDP, which writes them, from one process to all, before every forward."""
        values = self._tensors()
        if values[0].is_meta or values[0].device.type != "cpu" and DistributedDataParallel._get_active_ddp_module():
            return
        if any(a is not b for a, b in zip(values, self.sealed)):
            self.write(**{name: self._buffers[name].item() for name in self.counts})
            return
        *found, seal = [t.tolist() for t in values]
        hashed = self._hash(found[: len(self.counts)])  # itself, where an earlier version has pickled the module
        if seal not in (hashed >> UNSEALED, hashed) or found[len(self.counts) :] != list(self.constants.values()):
            told = ", ".join(f"{n} = {v}" for n, v in zip((*self.counts, *self.constants), found))
            raise ValueError(
                f"{self.layer}: {told}: expected values that quantops has set, got others, as where models "
                "are averaged; take AveragedModel(use_buffers=False), which copies such numbers, and "
                "set_precision or set_bits to change them"
            )
        self.hashed = hashed
        self._note()

    def _restore_constants(self):
        """to_empty() leaves them without their values, and a load to a module on the meta device on that."""
        device = next(
            (
                t.device
                for t in (*self._buffers.values(), *self._parameters.values())
                if t is not None and not t.is_meta
            ),
            None,
        )
        for name, value in self.constants.items():
            t = self._buffers[name]
            if t.is_meta and device is not None:
                setattr(self, name, torch.tensor(value, dtype=torch.int32, device=device))
            elif not t.is_meta:
                t.copy_(torch.tensor(value, dtype=torch.int32, device=t.device))

    def _apply(self, fn, recurse=True):
        own = self.sealed is not None and all(a is b for a, b in zip(self._tensors(), self.sealed))
        super()._apply(lambda t: _in_full(fn, t), recurse)
        self._restore_constants()
        if own:
            self.sealed, self.noted = self._tensors(), None  # they have moved; whether they are good is looked at next
        return self

    def get_extra_state(self) -> torch.Tensor:
        # The hash in as many digits always: some formats load a state into the memory of another.
        about = {**self.about(), "training": self.training_settings(), "seal": f"{self.hashed:08x}"}
        text = json.dumps({"version": VERSION, **self.settings(), **about})
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")  # whatever the default device is

    def set_extra_state(self, state: Any) -> None:
        """Nothing: what it says was compared before any value was loaded."""

    def refusal(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why a state dict cannot be loaded, or None: its settings are others, or its counts out of range."""
        found = state_dict.get(prefix + KEY)
        wrong = self._differs(found) if found is not None else None
        for count, allowed in self.counts.items():
            value = state_dict.get(prefix + count)
            if wrong is None and isinstance(value, torch.Tensor) and not value.is_meta:  # torch refuses the others
                bad = [v for v in value.reshape(-1).tolist() if v not in allowed]
                wrong = f"{count}: expected one of {', '.join(map(str, allowed))}, got {bad[0]}" if bad else None
        return wrong

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        name = prefix.partition("parametrizations.")[0].removesuffix(".") or "model"
        wrong = self.refusal(state_dict, prefix)
        if wrong is not None:
            errors.append(f"{name}: {wrong}")
            return
        if state_dict.get(prefix + KEY) is None:
            if any(key.startswith(prefix) for key in state_dict):
                warnings.warn(
                    "the state dict does not say which settings its numbers were made with (an earlier "
                    "version of quantops); they are taken to be those of the model",
                    stacklevel=1,
                )
            state_dict[prefix + KEY] = self.get_extra_state()
        else:
            self._warn_of_others(name, state_dict, prefix)
        self._warn_of_training(state_dict[prefix + KEY])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self._restore_constants()
        if "seal" in self._buffers and not any(self._buffers[name].is_meta for name in self.counts):
            if self.seal.is_meta:
                del self.seal
            self.write(**{name: self._buffers[name].item() for name in self.counts})

    def _differs(self, state):
        found = settings_in(state)
        if not isinstance(found, dict) or "version" not in found:
            return f"expected the settings of a module of quantops in {KEY}, got {state!r}"
        version = found.pop("version")
        for name in (*self.about(), "training", "seal"):
            found.pop(name, None)
        if version != VERSION:
            return f"expected version {VERSION} of the state of a module of quantops, got {version!r}"
        own = json.loads(json.dumps(self.settings()))
        if own == found:
            return None
        own, found = _others(own, found)
        return f"expected a state of the settings that the model has, {own}, got one of {found}"

    def _warn_of_training(self, state):
        found, own = settings_in(state).get("training"), self.training_settings()
        if isinstance(found, dict) and found != json.loads(json.dumps(own)):
            own, found = _others(own, found)
            warnings.warn(
                f"the state dict was trained with {found}, the model has {own}: its values are the same, and will "
                "train in another way",
                stacklevel=1,
            )

    def _warn_of_others(self, name, state_dict, prefix):
        """Where counts are not those that the settings were written with."""
        told = settings_in(state_dict[prefix + KEY]).get("seal")
        found = [state_dict.get(prefix + n) for n in self.counts]
        if told is None or not all(isinstance(t, torch.Tensor) and t.numel() == 1 and not t.is_meta for t in found):
            return
        found = [t.item() for t in found]
        if told != f"{self._hash(found):08x}":
            numbers = ", ".join(f"{n} = {v}" for n, v in zip(self.counts, found))
            warnings.warn(
                f"{name}: the state dict has {numbers}, and was made with others: it is an average of several, where "
                "such numbers should be those of one, or its model has changed since",
                stacklevel=1,
            )


def _in_full(fn, t):
    """fn(t), but numbers of quantizers stay in the dtype of arithmetic where a model is cast to a narrower one."""
    made = fn(t)
    acc = acc_dtype(made.dtype) if made.is_floating_point() else made.dtype
    return made if made.dtype == acc else t.to(made.device, acc)


def _others(*sides):
    """Each of two dicts as text, where they differ."""
    names = [k for k in {**sides[0], **sides[1]} if sides[0].get(k) != sides[1].get(k)]
    return [", ".join(f"{k}={side.get(k)!r}" for k in names) for side in sides]


def settings_in(state):
    """What get_extra_state put into a tensor; None for another."""
    try:
        return json.loads(bytes(state.cpu().tolist()))
    except (AttributeError, NotImplementedError, TypeError, ValueError):  # on the meta device it has no values
        return None
