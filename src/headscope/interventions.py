"""Functions for `Model.edit`: replacements of activations, and where they apply.

    with model.edit({Site("z", 1): at(constant(mean), heads=[3], positions=[-1])}):
        losses = model.losses(tokens)

An edit is a function of the whole value at a site; `at` restricts it to some places. All of them work on a whole batch
at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.errors import HeadscopeError, ModelError
from headscope.models.hf import Edit, ModelSpec, SiteEdit
from headscope.models.hooks import check_like
from headscope.sae.model import SAE
from headscope.site import Site

FeatureEdit = Callable[[Float[Tensor, "batch position d_sae"]], Float[Tensor, "batch position d_sae"]]
"""A function of feature activations."""

Choice = int | Sequence[int] | Int[Tensor, " batch"] | Bool[Tensor, "batch _"]
"""Selection of n positions or heads: some (an int, or several in a sequence), the same in every row; one per row (a
tensor of ints); or any per row (a mask). Negative numbers count from the end."""


# ------------------------------------------------------------------------------------------------------------- values
def constant(vector: Float[Tensor, " d"]) -> Edit:
    """Set the same vector everywhere: zero, a mean, the constant part of z."""
    return lambda value: vector.to(value).expand_as(value)


def replace(values: Float[Tensor, "..."]) -> Edit:
    """Set these values, shaped as the site's: for example those of another run.

    Raises:
        ModelError: in a run, they have another shape.
    """
    return lambda _value: values


def add(values: Float[Tensor, "..."]) -> Edit:
    """Add a vector, or values of any shape that broadcasts to the site's."""
    return lambda value: value + values.to(value)


def reconstruction(sae: SAE, change: FeatureEdit | None = None, *, with_error: bool = False) -> Edit:
    """Replace the SAE's input by its reconstruction, with or without the error.

    Args:
        sae: an SAE of the edited site.
        change: function of the feature activations f before decoding, e.g. `pin(j)`.
        with_error: keep `x - x_hat`, so that only the change has an effect: `x + (change(f) - f) @ W_dec`; exactly x
            without a change. Otherwise the error is dropped: `change(f) @ W_dec + b_dec`.

    The SAE computes in its own precision, for example float32 with a model in half precision.

    Raises:
        SAEError: it reads activations of processed weights.
    """
    sae.check_raw()

    def edit(value: Tensor) -> Tensor:
        f = sae.encode(value.to(sae.W_enc.dtype))
        changed = f if change is None else change(f)
        return (
            value + ((changed - f) @ sae.W_dec).to(value.dtype) if with_error else sae.decode(changed).to(value.dtype)
        )

    return edit


def pin(latents: Choice, activation: float | Float[Tensor, "batch *position"] = 0.0) -> FeatureEdit:
    """Fix some features at an activation; at 0, the default, they are ablated.

    With the error kept, ablating one is `x - f_j W_dec[j]`.

    Args:
        latents: the features: for every row, or one for each row.
        activation: one number, one for each row, or one for each position of each row.
    """

    def edit(f: Tensor) -> Tensor:
        held = activation.to(f).reshape(len(f), -1, 1) if isinstance(activation, Tensor) else activation
        return torch.where(_chosen(latents, f.shape[0], f.shape[2], "latents", f.device)[:, None], held, f)

    return edit


# -------------------------------------------------------------------------------------------------------------- where
def at(
    edit: Edit | SiteEdit,
    *,
    rows: int | Sequence[int] | Bool[Tensor, " batch"] | None = None,
    positions: Choice | None = None,
    heads: Choice | None = None,
) -> SiteEdit:
    """Restrict an edit to some rows of the batch, some positions and some heads; None is no restriction.

    For scores and pattern a position is a query; for k and v it is a source, and a head is a head of theirs (`kv_head`
    of `Site`). For z a head is its block of components.

    Args:
        edit: any edit, including a restricted one.
        rows: row numbers, or a mask.
        positions: the same in every row, one for each row (`Int[Tensor, "batch"]`), or a mask `[batch, position]`.
        heads: likewise.

    Raises:
        ModelError: on entering `Model.edit`: heads at a site that has none.
        HeadscopeError: in a run: no such row, position or head, or a tensor that does not fit the batch.
    """
    return _At(edit, rows, positions, heads)


@dataclass(frozen=True)
class _At:
    edit: Edit | SiteEdit
    rows: int | Sequence[int] | Tensor | None
    positions: Choice | None
    heads: Choice | None

    def bind(self, site: Site, spec: ModelSpec) -> Edit:
        """Return the edit for one site."""
        edit = self.edit.bind(site, spec) if isinstance(self.edit, SiteEdit) else self.edit
        head_axis, position_axis = _axes(site)
        if self.heads is not None and head_axis is None:
            raise ModelError(
                f"heads {self.heads} at {site.kind} of layer {site.layer}, which is a sum over heads or before them",
                expected="a site with heads: z, q, k, v, scores or pattern",
                do="leave heads out, or edit z",
            )

        def restricted(value: Tensor) -> Tensor:
            by_head = value.unflatten(-1, (spec.n_heads, spec.d_head)) if site.kind == "z" else value
            chosen = torch.ones((), dtype=torch.bool, device=value.device)
            if self.rows is not None:
                chosen = chosen & _placed(_rows(self.rows, value), by_head.ndim)
            for name, choice, axis in (("positions", self.positions, position_axis), ("heads", self.heads, head_axis)):
                if choice is not None and axis is not None:
                    mask = _chosen(choice, value.shape[0], by_head.shape[axis], name, value.device)
                    chosen = chosen & _placed(mask, by_head.ndim, axis)
            edited = edit(value)
            check_like(edited, value, site)
            return torch.where(chosen, edited.reshape(by_head.shape), by_head).view_as(value)

        return restricted


def _axes(site: Site) -> tuple[int | None, int]:
    """Return the axes of heads and positions; z with its heads separated."""
    match site.kind:
        case "scores" | "pattern":
            return 1, 2
        case "z" | "q" | "k" | "v":
            return 2, 1
        case _:
            return None, 1


def _placed(mask: Tensor, ndim: int, axis: int | None = None) -> Tensor:
    """Reshape a mask `[batch]` or, with an axis, `[batch or 1, n]`, to broadcast along the axes of a value."""
    shape = [1] * ndim
    shape[0] = mask.shape[0]
    if axis is not None:
        shape[axis] = mask.shape[1]
    return mask.view(shape)


def _rows(rows: int | Sequence[int] | Tensor, value: Tensor) -> Bool[Tensor, " batch"]:
    if isinstance(rows, Tensor):
        if rows.dtype != torch.bool or rows.shape != value.shape[:1]:
            raise _misfit("rows", rows, f"a mask of shape ({value.shape[0]},), or a sequence of row numbers")
        return rows.to(value.device)
    return _chosen(rows, value.shape[0], value.shape[0], "rows", value.device)[0]


def _chosen(choice: Choice, batch: int, n: int, name: str, device: torch.device) -> Bool[Tensor, "rows n"]:
    """Return a mask of the chosen ones of n, with one row per batch row, or one for all.

    Raises:
        HeadscopeError: a number that is not below n, or a tensor that does not fit the batch.
    """
    if isinstance(choice, Tensor) and choice.dtype == torch.bool:
        if choice.shape != (batch, n):
            raise _misfit(name, choice, f"a mask of shape {(batch, n)}")
        return choice.to(device)
    if isinstance(choice, Tensor) and choice.shape != (batch,):
        raise _misfit(name, choice, f"one for each row, shape ({batch},), or a list of those of every row")
    if isinstance(choice, Tensor):
        numbers = choice.to(device, torch.long)[:, None]  # [batch, 1]
    else:
        numbers = torch.tensor([[choice] if isinstance(choice, int) else list(choice)], dtype=torch.long, device=device)
    if ((numbers >= n) | (numbers < -n)).any():
        raise HeadscopeError(
            f"{name} {numbers.flatten().tolist()}", expected=f"numbers from {-n} to {n - 1}", do="name others"
        )
    chosen = torch.zeros(len(numbers), n, dtype=torch.bool, device=device)
    return chosen.scatter_(1, numbers % n, value=True)


def _misfit(name: str, tensor: Tensor, expected: str) -> HeadscopeError:
    return HeadscopeError(f"{name} {tensor.dtype} {tuple(tensor.shape)}", expected=expected, do="pass that")
