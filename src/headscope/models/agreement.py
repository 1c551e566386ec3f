"""Whether a model computes what is read off its weights.

Studies read W_O, W_U and the norms as weights, take the residual stream to be the sum of what is added to it, and
attention to be causal. A module that is wrapped (an adapter that is not merged, a quantised layer), a hook or a changed
`forward` can compute something else and still have a `weight`. So a model is run once, on a few tokens, when it is
loaded, and each step is held against the weights; attention step by step, and W_V, when they are first read.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.errors import ModelError
from headscope.models.norms import Norm
from headscope.site import AnyKind, Site

if TYPE_CHECKING:
    from headscope.models.hf import Model
    from headscope.models.running import Running

_LENGTH, _SHARED = 32, 16  # tokens of each of two rows, and how many of them are the same in both
_STREAM: tuple[AnyKind, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}  # RMSNorms of transformers compute in float32 at most
_OURS = ("torch.nn.modules.", "transformers.", "headscope.")
_SPREAD = 8.0  # roundings of one component: they differ more than those of all together
_SUMMED = 20.0  # roundings of what is computed in other steps, each of them rounded
_PARAMETRISED = "parametrizations"  # of torch: `weight` is made of these whenever it is read
_NAMED = 3  # of what is unusual about a model
_UNREADABLE = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


class _Step(NamedTuple):
    """One step of a run, as it was computed and as it is read."""

    what: str
    module: nn.Module
    got: Tensor
    read: Callable[[], Tensor]
    loose: float = 0.25
    """The tolerance, in roundings: products and sums are recomputed as `transformers` does, mostly bit for bit."""


class _Call(NamedTuple):
    """What a module was given and what it put out."""

    x: Tensor
    out: Tensor


@torch.no_grad()
def check_agreement(model: "Model") -> None:
    """Run a model on a few tokens and hold what its modules compute against their weights.

    Raises:
        ModelError: a module computes something else than its weights say, something else than its parts is added to
            the residual stream, or attention sees later tokens. It names what was found there.
    """
    try:
        for step in _steps(model, _tokens(model)):
            check_step(model, step.what, step.module, step.got, step.read, loose=step.loose)
        for what, module in _read_off(model):
            _check_no_others(model.spec.name, what, module)
    except _UNREADABLE as error:
        raise not_plain(model.spec.name, f"a run on a few tokens fails ({error!r})", model.module) from error


@torch.no_grad()
def check_attention(model: "Running", layer: int) -> None:
    """Hold z, and z as it is computed step by step, against `pattern @ value` on a few tokens.

    Raises:
        ModelError: the layer mixes values in another way.
    """
    tokens, attention = _tokens(model), model._blocks[layer].attention
    value_at, pattern_at, z_at = (Site(kind, layer) for kind in ("v", "pattern", "z"))
    own = model.read(tokens, [z_at])[z_at]
    found = model.read(tokens, [value_at, pattern_at, z_at])
    value, pattern, z = found[value_at], found[pattern_at], found[z_at]
    value = value.repeat_interleave(pattern.shape[1] // value.shape[2], dim=2)
    mixed = torch.einsum("bhqs,bshe->bqhe", pattern, value).flatten(2)
    check_step(model, f"z of layer {layer}, as pattern @ value,", attention, mixed, _as_is(z), loose=_SUMMED)
    check_step(model, f"z of layer {layer}, computed step by step,", attention, z, _as_is(own), loose=_SUMMED)


@torch.no_grad()
def check_values(model: "Model", layer: int, weights: Float[Tensor, "d_model z"]) -> None:
    """Hold the values of a layer against its W_V, for a few inputs.

    Raises:
        ModelError: they are not linear in what the norm before attention puts out.
    """
    norm = model._blocks[layer].attention_norm
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, model.spec.d_model, generator=generator).to(model.device, model.module.dtype)
    got = model._value_of(layer, norm.formula(x))
    normed = (norm.numerator(x) / norm.scale(x)).to(weights.dtype)
    read = _as_is(normed @ weights + model.value_offset(layer))
    check_step(model, f"values of layer {layer}", model._blocks[layer].attention, got, read, loose=_SUMMED)


def check_step(
    model: "Running", what: str, module: nn.Module, got: Tensor, read: Callable[[], Tensor], *, loose: float = 1.0
) -> None:
    """Raise ModelError where a step of a run is not what is read of it, but for rounding.

    Numbers that overflow in half precision are not compared.

    Args:
        model: of which a module is.
        what: was computed.
        module: that computed it.
        got: what it computed.
        read: gives what is read instead.
        loose: how much more than the rounding of one product is allowed.
    """
    try:
        expected = read()
        both = got.isfinite() & expected.isfinite()
        got, expected = (
            torch.where(both, t, 0).to(torch.promote_types(t.dtype, torch.float32)) for t in (got, expected)
        )
    except _UNREADABLE as error:
        raise not_plain(model.spec.name, f"{what} cannot be read ({error})", module) from error
    tolerance = _TOLERANCE.get(model.module.dtype, torch.finfo(model.module.dtype).eps / 2)
    miss, size = (got - expected).norm().item(), max(got.norm().item(), expected.norm().item())
    if not miss <= loose * tolerance * size:
        raise not_plain(model.spec.name, f"{what} misses what its weights say by {miss / size:.2g} of its size", module)
    _check_components(model, what, module, got.flatten(0, -2), expected.flatten(0, -2), tolerance * max(loose, _SPREAD))


def _check_components(
    model: "Running", what: str, module: nn.Module, got: Tensor, expected: Tensor, tolerance: float
) -> None:
    """Raise ModelError where one component of all vectors is off: a few large ones hide the others in a norm of all.

    A component is allowed the rounding of its own size, of the usual one, and of a ten thousandth of the largest.
    """
    miss, size = (got - expected).norm(dim=0), torch.maximum(got.norm(dim=0), expected.norm(dim=0))
    excess = miss - tolerance * (size + size.median() + 1e-4 * size.max())
    if not (excess <= 0).all():
        at = int(excess.argmax())
        part = f"component {at} of {what} misses what its weights say by {(miss / size)[at].item():.2g} of its size"
        raise not_plain(model.spec.name, part, module)


def not_plain(name: str, what: str, module: nn.Module) -> ModelError:
    """The error for a module that computes something else than its weights say.

    Args:
        name: of the model.
        what: is wrong.
        module: where; what it holds that `transformers` does not put there is named.
    """
    found = list(_found(module))
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ModelError(
        f"{what} in {name}" + (f": there is {', '.join(found[:_NAMED])}{more}" if found else ""),
        expected="a model whose modules compute what their weights say",
        do="merge the adapter first (PEFT: model.merge_and_unload()), remove hooks and other changes, or load the "
        "model that it was made from",
    )


def _found(module: nn.Module) -> Iterator[str]:
    """What is unusual about a module and those in it."""
    for path, part in module.named_modules():
        own, at = type(part), f" at {path}" if path else ""
        if not f"{own.__module__}.".startswith(_OURS):
            yield f"a {own.__module__}.{own.__qualname__}{at}"
        if part._forward_hooks or part._forward_pre_hooks:
            yield f"a hook{at}"
        if "forward" in vars(part):
            yield f"another forward{at}"


def _read_off(model: "Model") -> Iterator[tuple[str, nn.Module]]:
    """The modules whose weights are read."""
    for layer, part in enumerate(model._blocks):
        yield f"the output projection of layer {layer}", part.output_projection
        norms = part.attention_norm, part.attention_post_norm, part.mlp_norm, part.mlp_post_norm
        yield from ((f"a norm of layer {layer}", norm.module) for norm in norms if norm is not None)
    yield "the final norm", model._final_norm.module
    yield "the unembedding", model._unembedding


def _check_no_others(name: str, what: str, module: nn.Module) -> None:
    """Refuse weights besides those that are read, though they add nothing yet: an adapter that begins at 0."""
    read = [getattr(module, key, None) for key in ("weight", "bias")]
    others = [
        key
        for key, weight in module.named_parameters()
        if not any(weight is own for own in read) and key.split(".")[0] != _PARAMETRISED
    ]
    if others:
        raise not_plain(name, f"{what} has weights that are not read ({', '.join(others[:_NAMED])})", module)


def _tokens(model: "Running") -> Int[Tensor, "2 position"]:
    """Two rows that begin alike."""
    length = min(_LENGTH, model.spec.context)
    rows = torch.arange(1, 2 * length + 1, device=model.device).view(2, length) * 7919 % model.spec.d_vocab
    rows[1, : min(_SHARED, length - 1)] = rows[0, : min(_SHARED, length - 1)]
    return rows


def _steps(model: "Model", tokens: Tensor) -> Iterator[_Step]:
    """All that a run of the model computes and that is read off weights somewhere."""
    calls, stream, last, logits = _run(model, tokens)
    for layer, part in enumerate(model._blocks):
        of = f"of layer {layer}"
        projected, before = calls[part.output_projection], stream[Site("resid_pre", layer)]
        weights = partial(nn.functional.linear, projected.x, model._output_weight(layer).T, model.b_O(layer))
        yield _Step(f"z @ W_O + b_O {of}", part.output_projection, projected.out, weights)
        yield _Step(f"z {of}, before tokens that it must not see,", part.attention, *_prefixes(projected.x))
        for which, norm, given in (
            ("before attention", part.attention_norm, before),
            ("after attention", part.attention_post_norm, projected.out),
            ("before the MLP", part.mlp_norm, None),
            ("after the MLP", part.mlp_post_norm, None),
        ):
            if norm is not None and norm.module in calls:
                yield from _of_norm(f"the norm {which} {of}", norm, calls[norm.module], given)
        sites = {site.kind: value for site, value in stream.items() if site.layer == layer}
        after, added = sites["resid_post"], [sites[kind] for kind in ("mlp_out", "attn_out") if kind in sites]
        if "resid_mid" in sites:
            yield _Step(f"what attention adds {of}", part.block, sites["resid_mid"], _sum(sites["attn_out"], before))
            before, added = sites["resid_mid"], [sites["mlp_out"]]
        yield _Step(f"what the layer adds {of}", part.block, after, _sum(*added, before))
        following = stream.get(Site("resid_pre", layer + 1))
        if following is not None:
            yield _Step(f"the input of layer {layer + 1}", model._blocks[layer + 1].block, following, _as_is(after))
    norm, unembedding = model._final_norm, model._unembedding
    yield from _of_norm("the final norm", norm, calls[norm.module], stream[Site("resid_post", model.spec.n_layers - 1)])
    yield _Step("the last hidden state", norm.module, last, _as_is(calls[norm.module].out))
    yield _Step("the input of the unembedding", unembedding, calls[unembedding].x, _as_is(last))
    weights = nn.functional.linear(last, unembedding.weight, unembedding.bias)
    yield _Step("x @ W_U + b_U", unembedding, logits, partial(model._capped, weights))


def _run(model: "Model", tokens: Tensor) -> tuple[dict[nn.Module, _Call], dict[Site, Tensor], Tensor, Tensor]:
    """What modules are given and put out, the residual stream, the last hidden state and the logits."""
    calls: dict[nn.Module, _Call] = {}
    stream: dict[Site, Tensor] = {}
    last: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        calls[module] = _Call(args[0], output)

    def keep_last(_module: nn.Module, _args: tuple, output: Any) -> None:
        last.append(output.last_hidden_state)

    kinds: list[AnyKind] = [kind for kind in model.spec.kinds if kind in _STREAM]
    sites = [Site(kind, layer) for layer in range(model.spec.n_layers) for kind in kinds]
    modules = [model._final_norm.module, model._unembedding]
    for part in model._blocks:
        norms = part.attention_norm, part.attention_post_norm, part.mlp_norm, part.mlp_post_norm
        modules += [part.output_projection, *(norm.module for norm in norms if norm is not None)]
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        stack.callback(model.module.base_model.register_forward_hook(keep_last).remove)
        stack.enter_context(model._hooks.at({site: partial(stream.__setitem__, site) for site in sites}))
        logits = model.logits(tokens)
    return calls, stream, last[0], logits


def _of_norm(what: str, norm: Norm, call: _Call, given: Tensor | None) -> Iterator[_Step]:
    if given is not None:
        yield _Step(f"the input of {what}", norm.module, call.x, _as_is(given))
    yield _Step(what, norm.module, call.out, partial(norm.formula, call.x), loose=1.0)


def _prefixes(z: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """The part of z where both rows are alike: of the one, and of the other."""
    n = min(_SHARED, z.shape[1] - 1)
    return z[0, :n], _as_is(z[1, :n])


def _as_is(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


def _sum(*parts: Tensor) -> Callable[[], Tensor]:
    """In the order in which `transformers` adds, so that rounding is the same."""
    return partial(sum, parts[1:], start=parts[0])
