"""Check that a model computes what its weights imply.

Studies use W_O, W_U and the norms as weights, and assume that the residual stream is the sum of its additions and that
attention is causal. A wrapped module (an unmerged adapter, a quantised layer), a hook or a changed `forward` can
compute something else and still have a `weight`. So a model is run once, on a few tokens, when it is loaded, and each
step is compared with the weights; attention step by step, and W_V, on first use.
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

_LENGTH, _SHARED = 32, 16  # tokens in each of two rows, and the number that they share
_STREAM: tuple[AnyKind, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}  # RMSNorms of transformers compute in float32 at most
_OURS = ("torch.nn.modules.", "transformers.", "headscope.")
_SPREAD = 8.0  # rounding errors of one component: they vary more than those of all together
_SUMMED = 20.0  # rounding errors of what is computed in other steps, each of them rounded
_PARAMETRISED = "parametrizations"  # of torch: `weight` is computed from these on access
_NAMED = 3  # unusual parts of a model
_UNREADABLE = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


class _Step(NamedTuple):
    """One step of a run, as computed and as implied by the weights."""

    what: str
    module: nn.Module
    got: Tensor
    read: Callable[[], Tensor]
    loose: float = 0.25
    """Tolerance, in rounding errors: products and sums are recomputed as `transformers` does, mostly bit for bit."""


class _Call(NamedTuple):
    """Input and output of a module."""

    x: Tensor
    out: Tensor


@torch.no_grad()
def check_agreement(model: "Model") -> None:
    """Run a model on a few tokens and compare its modules with their weights.

    Raises:
        ModelError: a module deviates from its weights, the residual stream from the sum of its parts, or attention sees
            later tokens. It names the unusual part.
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
    """Compare z, and z computed step by step, with `pattern @ value` on a few tokens.

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
    """Compare the values of a layer with its W_V, for a few inputs, and with those in a run on a few tokens.

    Raises:
        ModelError: they are not linear in the output of the norm before attention, or differ between a single token,
            which W_V is read from, and a sequence.
    """
    norm, attention = model._blocks[layer].attention_norm, model._blocks[layer].attention
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, model.spec.d_model, generator=generator).to(model.device, model.module.dtype)
    got = model._value_of(layer, norm.formula(x))
    normed = (norm.numerator(x) / norm.scale(x)).to(weights.dtype)
    read = _as_is(normed @ weights + model.value_offset(layer))
    check_step(model, f"values of layer {layer}", attention, got, read, loose=_SUMMED)
    stream_at, value_at = Site("resid_pre", layer), Site("v", layer)
    with model._hooks.suspended():
        found = model.read(_tokens(model), [stream_at, value_at])
    value = found[value_at].repeat_interleave(model.spec.n_heads // found[value_at].shape[2], dim=2).flatten(2)
    alone = model._value_of(layer, norm.apply(found[stream_at]))
    check_step(model, f"values of layer {layer} in a sequence", attention, value, _as_is(alone), loose=_SUMMED)


def check_step(
    model: "Running", what: str, module: nn.Module, got: Tensor, read: Callable[[], Tensor], *, loose: float = 1.0
) -> None:
    """Raise ModelError where a step of a run deviates from its recomputation by more than rounding.

    Numbers that overflow in half precision are not compared.

    Args:
        model: the model of the module.
        what: name of the quantity.
        module: the module that computed it.
        got: the computed value.
        read: recomputes it.
        loose: tolerance relative to the rounding of one product.
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
    """Raise ModelError where one component of all vectors deviates: a few large ones hide the others in a norm of all.

    The tolerance of a component is the rounding of its own size, of the typical one, and of a ten thousandth of the
    largest.
    """
    miss, size = (got - expected).norm(dim=0), torch.maximum(got.norm(dim=0), expected.norm(dim=0))
    excess = miss - tolerance * (size + size.median() + 1e-4 * size.max())
    if not (excess <= 0).all():
        at = int(excess.argmax())
        part = f"component {at} of {what} misses what its weights say by {(miss / size)[at].item():.2g} of its size"
        raise not_plain(model.spec.name, part, module)


def not_plain(name: str, what: str, module: nn.Module) -> ModelError:
    """Make the error for a module that deviates from its weights.

    Args:
        name: name of the model.
        what: the problem.
        module: the module; the error names its parts that are not from `transformers`.
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
    """Describe what is unusual about a module and its submodules."""
    for path, part in module.named_modules():
        own, at = type(part), f" at {path}" if path else ""
        if not f"{own.__module__}.".startswith(_OURS):
            yield f"a {own.__module__}.{own.__qualname__}{at}"
        if part._forward_hooks or part._forward_pre_hooks:
            yield f"a hook{at}"
        if "forward" in vars(part):
            yield f"another forward{at}"


def _read_off(model: "Model") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose weights are used."""
    for layer, part in enumerate(model._blocks):
        yield f"the output projection of layer {layer}", part.output_projection
        norms = part.attention_norm, part.attention_post_norm, part.mlp_norm, part.mlp_post_norm
        yield from ((f"a norm of layer {layer}", norm.module) for norm in norms if norm is not None)
    yield "the final norm", model._final_norm.module
    yield "the unembedding", model._unembedding


def _check_no_others(name: str, what: str, module: nn.Module) -> None:
    """Reject weights besides those that are used, even without effect yet: an adapter that starts at 0."""
    read = [getattr(module, key, None) for key in ("weight", "bias")]
    others = [
        key
        for key, weight in module.named_parameters()
        if not any(weight is own for own in read) and key.split(".")[0] != _PARAMETRISED
    ]
    if others:
        raise not_plain(name, f"{what} has weights that are not read ({', '.join(others[:_NAMED])})", module)


def _tokens(model: "Running") -> Int[Tensor, "2 position"]:
    """Return two rows with a common prefix."""
    length = min(_LENGTH, model.spec.context)
    rows = torch.arange(1, 2 * length + 1, device=model.device).view(2, length) * 7919 % model.spec.d_vocab
    rows[1, : min(_SHARED, length - 1)] = rows[0, : min(_SHARED, length - 1)]
    return rows


def _steps(model: "Model", tokens: Tensor) -> Iterator[_Step]:
    """Yield all steps of a run that are recomputed from weights somewhere."""
    calls, stream, last, logits = _run(model, tokens)
    for layer, part in enumerate(model._blocks):
        of = f"of layer {layer}"
        projected, before = calls[part.output_projection], stream[Site("resid_pre", layer)]
        weights = partial(nn.functional.linear, projected.x, model._output_weight(layer).T, model.b_O(layer))
        yield _Step(f"z @ W_O + b_O {of}", part.output_projection, projected.out, weights)
        prefixes = _prefixes(projected.x)  # threads may sum the two rows in different orders
        yield _Step(f"z {of}, before tokens that it must not see,", part.attention, *prefixes, loose=_SUMMED)
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
    """Run the model; return inputs and outputs of modules, residual stream, last hidden state and logits."""
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
    """Return the part of z where both rows agree: of the first, and of the second."""
    n = min(_SHARED, z.shape[1] - 1)
    return z[0, :n], _as_is(z[1, :n])


def _as_is(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


def _sum(*parts: Tensor) -> Callable[[], Tensor]:
    """Sum in the order of `transformers`, so that rounding is the same."""
    return partial(sum, parts[1:], start=parts[0])
