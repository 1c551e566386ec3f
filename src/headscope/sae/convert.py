"""Fit an SAE to a model: check compatibility, and convert an SAE of processed weights to the model's own activations.

TransformerLens folds constants and means out of a model's weights by default. With them folded, z is `z - c` with `c =
b_V + b_ln1 @ W_V` (`Model.value_offset`), and what LayerNorm models write to the residual stream has its mean removed.
An SAE trained on these computes the same on the model's own activations after

    z             b_dec += c;   where b_dec is not applied to the input, b_enc -= c @ W_enc
    other sites   W_enc -= its mean over d_in;   where b_dec is applied, b_enc += b_dec @ (new W_enc - W_enc)

and any activation scaling is folded into the weights beforehand, when the file is read.
"""

from dataclasses import replace

from headscope.errors import SAEError
from headscope.models.hf import Model
from headscope.names import short
from headscope.sae.model import MODULE_OUTPUT, SAE

FORCED = "forced_from"
"""Metadata key of an SAE forced onto weights other than those its files name: the hash of the latter."""


def check_shape(sae: SAE, model: Model) -> None:
    """Reject an SAE whose site or width the model does not have.

    Raises:
        ModelError: the model has no such site.
        SAEError: the widths differ, or it reads a module output that is followed by a norm.
    """
    model.check_site(sae.site)
    width, spec = model.width(sae.site), model.spec
    if sae.d_in != width:
        made = f" ({spec.n_heads} heads x {spec.d_head})" if sae.site.kind == "z" else ""
        raise SAEError(
            f"an SAE for vectors of {sae.d_in} ({sae.site.hook_name} of {sae.model_name})",
            expected=f"{width}{made}, the width of that site in {spec.name}",
            do="pass the model it was trained on",
        )
    if spec.post_norm and sae.site.kind in ("attn_out", "mlp_out") and sae.metadata.get("reads") == MODULE_OUTPUT:
        raise SAEError(
            f"an SAE of a module's output at {sae.site.hook_name}, where {spec.name} has a norm after the module",
            expected="an SAE of what is added to the residual stream, behind that norm",
            do="use an SAE of another site",
        )


def trained_on(sae: SAE) -> tuple[str, str] | None:
    """Return (hash, dtype) of the model that an SAE was trained on or converted with; None where not stated."""
    said, converted = sae.metadata, sae.metadata.get("converted")
    known, dtype = said.get("model_hash"), said.get("dtype", "float32")
    if known is None and isinstance(converted, dict):
        known, dtype = converted.get("model_hash"), converted.get("dtype", "float32")
    return None if known is None else (str(known), str(dtype))


def check_model(sae: SAE, model: Model) -> None:
    """Reject an SAE whose files name weights other than the model's.

    Raises:
        SAEError: the hash of the model is not the one that the SAE stores.
    """
    known = trained_on(sae)
    if known is None or model.matches(*known):
        return
    dtype = str(model.module.dtype).removeprefix("torch.")
    raise SAEError(
        f"an SAE trained on {sae.model_name} in {known[1]} ({known[0][:19]}...), whose weights are not those of "
        f"{model.spec.name} in {dtype}",
        expected="the model it was trained on, in the same precision or a higher one",
        do="pass that model (--model, --dtype); if you know that the two fit, eval and index take --force, and "
        "`headscope convert SAE --model MODEL --force --out FOLDER` writes an SAE that all commands take",
    )


def check_fits(sae: SAE, model: Model) -> None:
    """Reject an SAE that does not fit a model without conversion.

    Raises:
        ModelError, SAEError: as `check_shape` and `check_model`; or it reads activations of processed weights.
    """
    check_shape(sae, model)
    sae.check_raw()
    check_model(sae, model)


def fitted(sae: SAE, model: Model, *, force: bool = False) -> SAE:
    """Return the SAE for this model's own activations: itself, or converted from processed weights.

    The conversion is recorded in its metadata.

    Args:
        sae: any.
        model: the one that it was trained on.
        force: accept it even if its files name other weights; its metadata then name these, and record it.

    Raises:
        ModelError, SAEError: as `check_shape` and `check_model`.
    """
    check_shape(sae, model)
    if force:
        sae = _forced(sae, model)
    check_model(sae, model)
    if not sae.processed:
        return sae
    converted = _shifted(sae, model) if sae.site.kind == "z" else _centred(sae, model)
    said = {"from": sae.metadata["z_convention"], "model": short(model.spec.name)} | _of_weights(model)
    loaded_with = {"model_from_pretrained_kwargs": {}} if "model_from_pretrained_kwargs" in sae.metadata else {}
    return replace(converted, metadata=sae.metadata | loaded_with | {"z_convention": "raw", "converted": said})


def _forced(sae: SAE, model: Model) -> SAE:
    known = trained_on(sae)
    if known is None or model.matches(*known):
        return sae
    return replace(sae, metadata=sae.metadata | _of_weights(model) | {FORCED: known[0]})


def _of_weights(model: Model) -> dict[str, str]:
    """Identify the model's weights, as stored in artefacts."""
    return {"model_hash": model.fingerprint(), "dtype": str(model.module.dtype).removeprefix("torch.")}


def _shifted(sae: SAE, model: Model) -> SAE:
    c = model.value_offset(sae.site.layer).to(sae.W_enc)
    b_enc = sae.b_enc if sae.apply_b_dec_to_input else sae.b_enc - c @ sae.W_enc
    return replace(sae, b_dec=sae.b_dec + c, b_enc=b_enc)


def _centred(sae: SAE, model: Model) -> SAE:
    encoder = model.centred(sae.site.layer, sae.W_enc.T).T
    b_enc = sae.b_enc + sae.b_dec @ (encoder - sae.W_enc) if sae.apply_b_dec_to_input else sae.b_enc
    return replace(sae, W_enc=encoder.contiguous(), b_enc=b_enc)
