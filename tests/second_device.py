"""A second device made of the processor: tensors there cannot be mixed with others, nor read by numpy.

Code that moves its tensors to the device it was given runs here as it runs on a GPU; code that forgets one is refused
with the name of the operation, as a GPU refuses it. Speed and rounding of a GPU are not imitated. Registering a
backend is for the whole process and cannot be undone, so tests import this in a process of its own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("far")

FAR = torch.device("far:0")
done: Counter[str] = Counter()  # operations that ran there
_COPY = torch.ops.aten.copy_.default
# Inside an operation the marks of lazy views are not read, so they are never set.
_AT_ONCE = {
    torch.ops.aten._conj.default: torch.ops.aten.conj_physical.default,
    torch.ops.aten._neg_view.default: torch.ops.aten.neg.default,
}


class MixedDevicesError(RuntimeError):
    """An operation was given tensors of both devices."""


class FarTensor(torch.Tensor):
    """A tensor of the second device; `near` holds its numbers."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> FarTensor:
        """Wrap numbers of the processor; nothing is copied."""
        made: FarTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
        )
        made.near = near
        return made

    def __init__(self, near: torch.Tensor) -> None:
        """All is done in `__new__`."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation that was given at least one of these."""
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given, shape = pytree.tree_flatten((args, kwargs))
    owners = {id(one.near): one for one in given if isinstance(one, FarTensor)}
    plain = [_near(func, one) for one in given]
    plain_args, plain_kwargs = pytree.tree_unflatten(plain, shape)
    result = _AT_ONCE.get(func, func)(*plain_args, **plain_kwargs)
    done[str(func)] += 1
    if any(isinstance(one, torch.device) and one.type == "cpu" for one in given):
        return result
    if func is _COPY and not isinstance(args[0], FarTensor):
        return args[0]

    def far(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        return owners[id(one)] if id(one) in owners else FarTensor(one)

    return pytree.tree_map(far, result)


def _near(func: Any, one: Any) -> Any:
    if isinstance(one, FarTensor):
        return one.near
    if isinstance(one, torch.device) and one.type == FAR.type:
        return torch.device("cpu")
    # Single numbers may come from anywhere, and copies are the way between the two.
    if isinstance(one, torch.Tensor) and one.dim() and func is not _COPY:
        raise MixedDevicesError(f"{func} was given tensors of both devices")
    return one


_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
