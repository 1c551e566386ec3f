"""A GPU pretended on the processor: tensors that were put there must not meet tensors that were not.

Within `pretended()` there is a device `cuda`. Tensors made there, moved there, or computed from any that are there say
so by `.device`; `.cpu()` and `.to("cpu")` bring them back. As with a GPU, what is mixed is refused, but for numbers
without axes and for indices, which may be of the processor, and so is `.numpy()`. It holds for one thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
_MARK = "_pretended"
_INDEXED = ("__getitem__", "__setitem__", "index_put_", "index_put", "__get__", "__set__")
_MOVES = ("to", "cpu", "cuda", "type_as")
_TO_NUMPY = ("numpy", "__array__")
_SAYS_NOTHING = ("__repr__", "__format__", "item", "tolist", "__bool__", "__int__", "__float__", "__index__")


def is_there(value: Any) -> bool:
    return isinstance(value, Tensor) and getattr(value, _MARK, False)


def _marked(value: Any) -> Any:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            setattr(leaf, _MARK, True)
    return value


class _Pretended(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), given: dict | None = None) -> Any:
        kwargs: dict[str, Any] = given or {}
        name = getattr(func, "__name__", "")
        if name in ("_parse_to", "_has_compatible_shallow_copy_type"):  # of `Module.to`
            return func(*args, **kwargs)
        if name == "__deepcopy__":
            found = func(*args, **kwargs)
            setattr(found, _MARK, is_there(args[0]))
            return found
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [is_there(t) for t in tensors]
        if getattr(func, "__self__", None) is Tensor.device and name == "__get__":
            return DEVICE if there[0] else func(*args, **kwargs)
        if getattr(func, "__self__", None) is Tensor.data and name == "__set__":
            func(*args, **kwargs)
            setattr(args[0], _MARK, is_there(args[1]))
            return None
        asked = any(_names_it(leaf) for leaf in tree_leaves((args, kwargs)))
        elsewhere = any(isinstance(leaf, torch.device) for leaf in tree_leaves((args, kwargs))) and not asked
        args, kwargs = tree_map(lambda leaf: "cpu" if _names_it(leaf) else leaf, (args, kwargs))
        if name in _MOVES and tensors:
            return self._moved(func, name, args, kwargs, asked, elsewhere, there)
        if any(there) and name in _TO_NUMPY:
            raise AssertionError(f"{name} of a tensor of the other device")
        self._check(name, tensors, there)
        found = func(*args, **kwargs)
        if name in _SAYS_NOTHING:
            return found
        return _marked(found) if asked or any(there) else found

    @staticmethod
    def _moved(
        func: Any, name: str, args: tuple, kwargs: dict, asked: bool, elsewhere: bool, there: list[bool]
    ) -> Tensor:
        given_name = any(isinstance(leaf, str) for leaf in tree_leaves((args[1:], kwargs))) and not asked
        other = there[1] if len(there) > 1 else None  # `.to(another tensor)`
        goes = asked or (there[0] if other is None else other)
        if name == "cpu" or elsewhere or given_name:
            goes = False
        found = func(*args, **kwargs)
        if goes != is_there(found):
            found = found.detach() if found is args[0] and not found.requires_grad else found.view_as(found)
            setattr(found, _MARK, goes)
        return found

    @staticmethod
    def _check(name: str, tensors: list[Tensor], there: list[bool]) -> None:
        if not any(there) or all(there):
            return
        away = [t for t, t_there in zip(tensors, there, strict=True) if not t_there and t.ndim]
        if away and not (name in _INDEXED and there[0]):
            raise AssertionError(f"{name} of tensors of two devices: {[tuple(t.shape) for t in tensors]}, {there}")


def _names_it(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )


@contextmanager
def pretended() -> Iterator[None]:
    """Within the block there is a device `cuda`."""
    with _Pretended():
        yield
