"""A device that is not the CPU, for machines that have none: the CPU's arithmetic behind another name.

Tensors there say so, and an operation that mixes them with the CPU's is refused as an accelerator refuses it. Indices
and numbers without a dimension may come from the CPU, as they may there.
"""

from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("xla:0")  # a type that torch knows and does not try to start
MPS = torch.device("mps:0")  # Apple's, which has no float64
place = DEVICE  # the one that is open
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class There(torch.Tensor):
    """A tensor on that device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            requires_grad=here.requires_grad,
        )  # fmt: skip

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here.detach()

    @property
    def device(self):
        return place

    def __repr__(self):
        return f"There({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, There)]
    if there and func not in MOVES:
        first = args[:1] if func in INDEXED else tensors
        wrong = [t for t in first if isinstance(t, torch.Tensor) and not isinstance(t, There) and t.ndim]
        if wrong:
            raise RuntimeError(
                f"{func}: tensors on two devices, one of them the CPU's of shape {tuple(wrong[0].shape)}."
            )
    asked = kwargs.get("device")  # of zeros_like and its kin torch fills in where it thinks the tensor is
    to_there = bool(there) or (asked is not None and torch.device(asked).type == place.type)
    if func is aten._conj.default:  # a view that in here nothing resolves
        func = aten._conj_physical.default
    inner = tree_map(lambda t: t.here if isinstance(t, There) else t, (args, kwargs))
    if asked is not None:
        inner[1]["device"] = torch.device("cpu")
    found = func(*inner[0], **inner[1])
    if (
        to_there
        and place.type == MPS.type
        and any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(found))
    ):
        raise TypeError(f"{func}: MPS has no float64.")
    if func._schema.is_mutable:  # what was changed in place is what is given back
        return args[0] if func._schema.returns else None
    return tree_map(lambda t: There(t) if isinstance(t, torch.Tensor) and to_there else t, found)


TO = torch.Tensor.to


def to(self, *args, **kwargs):
    """`Tensor.to`, which torch itself would take a tensor there for one of the CPU's by."""
    given = (*args, *kwargs.values())
    like = next((a for a in given if isinstance(a, torch.Tensor)), self)
    goal = torch.device(next((a for a in given if isinstance(a, (str, torch.device))), like.device))
    kind = next((a for a in given if isinstance(a, torch.dtype)), like.dtype)
    if place.type not in (goal.type, self.device.type):
        return TO(self, *args, **kwargs)
    if goal.type == self.device.type:
        return TO(self, kind)
    if self.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("a gradient would have to pass from one device to another.")
    if goal.type == MPS.type and kind == torch.float64:
        raise TypeError("MPS has no float64.")
    return There(TO(self, kind)) if goal.type == place.type else TO(self.here, kind)


class Elsewhere(TorchDispatchMode):
    """Within, tensors can be made on the device that is open."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


PAD_SEQUENCE = torch._C._nn.pad_sequence


def pad_sequence(sequences, batch_first=False, padding_value=0.0, padding_side="right"):
    """torch's own begins with a tensor of that value where it thinks that the sequences are."""
    if not isinstance(sequences[0], There):
        return PAD_SEQUENCE(sequences, batch_first, padding_value, padding_side)
    longest = max(map(len, sequences))
    beside = [[0, 0] * (each.ndim - 1) + [0, longest - len(each)] for each in sequences]
    padded = [aten.constant_pad_nd(each, pad, padding_value) for each, pad in zip(sequences, beside, strict=True)]
    return torch.stack(padded, 0 if batch_first else 1)


def open_device(monkeypatch, device=DEVICE):
    """Let tensors and modules be moved to a device until the test ends; to be entered as well."""
    monkeypatch.setitem(globals(), "place", device)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: to(self, "cpu"))
    monkeypatch.setattr(torch._C._nn, "pad_sequence", pad_sequence)
    if not hasattr(torch, device.type):
        monkeypatch.setattr(torch, device.type, SimpleNamespace(), raising=False)  # checkpoints ask for its module
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    return Elsewhere()
