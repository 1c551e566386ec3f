"""Human-readable descriptions of SAEs and models, and whether the two are compatible."""

from dataclasses import dataclass

from headscope.artefact import file_hash
from headscope.errors import HeadscopeError
from headscope.models.hf import Model
from headscope.sae.convert import check_shape, trained_on
from headscope.sae.formats import Files
from headscope.sae.model import SAE, JumpReLU, TopK
from headscope.site import Site

Lines = list[tuple[str, str]]
"""(label, value) pairs."""


@dataclass(frozen=True)
class Fit:
    """Compatibility of an SAE with a model."""

    fits: bool
    lines: Lines


def describe_sae(sae: SAE, files: Files) -> Lines:
    """Describe an SAE and its conventions."""
    said = sae.metadata
    corpus = said.get("corpus", said.get("dataset_path"))
    return [
        ("SAE", f"{files.weights} ({files.format.name})"),
        ("architecture", _architecture(sae)),
        ("size", f"{sae.d_sae:,} latents on vectors of {sae.d_in:,}"),
        ("site", sae.site.hook_name),
        ("trained on", sae.model_name),
        ("hash of that model", said.get("model_hash", "not stated")),
        ("pre-activation", "(x - b_dec) @ W_enc + b_enc" if sae.apply_b_dec_to_input else "x @ W_enc + b_enc"),
        ("decoder norms", _norms(sae)),
        ("activations", _convention(sae)),
        ("context", f"{said['context_size']} tokens" if said.get("context_size") else "not stated"),
        ("BOS", _bos(sae)),
        ("corpus", corpus["name"] if isinstance(corpus, dict) and "name" in corpus else str(corpus or "not stated")),
        ("hash of the SAE", file_hash(files.weights)),
    ]


def _architecture(sae: SAE) -> str:
    match sae.activation:
        case JumpReLU(threshold) if (threshold == threshold[0]).all():
            return f"{sae.kind}, threshold {threshold[0].item():.4g} for all latents"
        case JumpReLU(threshold):
            low, high = threshold.min().item(), threshold.max().item()
            return f"{sae.kind}, thresholds {low:.4g} to {high:.4g}"
        case TopK():
            return f"{sae.kind}: whether a latent is active depends on the others"
        case _:
            return sae.kind


def _norms(sae: SAE) -> str:
    norms = sae.W_dec.norm(dim=1)
    low, high = norms.min().item(), norms.max().item()
    return f"{low:.4g} to {high:.4g}"


_BOS_AT = {
    "both": "before each block and each document",
    "block": "before each block",
    "document": "before each document",
    "nowhere": "nowhere but where the text brings it",
}


def _bos(sae: SAE) -> str:
    """Describe where the training text had a BOS."""
    corpus = sae.metadata.get("corpus")
    said = corpus.get("bos") if isinstance(corpus, dict) else None
    if said is not None:
        return f"token {said['id']}, {_BOS_AT.get(said['at'], said['at'])}"
    first = sae.metadata.get("prepend_bos")
    return "not stated" if first is None else "before each block" if first else "not before each block"


def _convention(sae: SAE) -> str:
    if sae.processed:
        return "of weights that TransformerLens processed; converted when the SAE is put to a model"
    if "converted" in sae.metadata:
        return f"the model's own; converted from {sae.metadata['converted']['from']}"
    return "the model's own" if "z_convention" in sae.metadata else "not stated; read as the model's own"


def describe_model(model: Model) -> Lines:
    """Describe a model and its sizes."""
    spec = model.spec
    offsets = [model.value_offset(layer).norm().item() for layer in range(spec.n_layers)]
    shared = "" if spec.n_kv_heads == spec.n_heads else f", {spec.n_kv_heads} of keys and values"
    return [
        ("model", f"{spec.name} ({spec.family})"),
        ("layers", f"{spec.n_layers}, attention and MLP side by side" if spec.parallel else str(spec.n_layers)),
        ("heads", f"{spec.n_heads} of {spec.d_head} components{shared}"),
        ("residual stream", f"{spec.d_model:,} components"),
        ("z", f"{model.width(Site('z', 0)):,} components"),
        (
            "constant part of z",
            f"||c|| = {min(offsets):.4g} to {max(offsets):.4g} by layer" if any(offsets) else "none",
        ),
        ("vocabulary", f"{spec.d_vocab:,} tokens; BOS is {model.bos}"),
        ("context", f"{spec.context:,} tokens"),
        ("dtype", str(model.module.dtype).removeprefix("torch.")),
        ("hash of the model", model.fingerprint()),
    ]


def fit(sae: SAE, model: Model) -> Fit:
    """Check whether an SAE is compatible with a model, and if not, why."""
    try:
        check_shape(sae, model)
    except HeadscopeError as error:
        return Fit(False, [("fit", f"no: {error.got}; expected: {error.expected}")])
    lines = [("fit", f"yes: {sae.site.hook_name} of {model.spec.name} has {sae.d_in} components")]
    known = trained_on(sae)
    if known is not None:
        same = model.matches(*known)
        lines.append(("same weights", "yes" if same else "no: the SAE was trained on others, or in another dtype"))
    if sae.processed:
        how = "the constant part of z joins its biases" if sae.site.kind == "z" else "its encoder is centred"
        lines.append(("conversion", how))
    return Fit(True, lines)
