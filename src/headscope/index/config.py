"""Configuration of an index; plain values, no torch."""

from dataclasses import asdict, dataclass
from typing import Any

from headscope.errors import IndexFormatError
from headscope.limits import Count, From0, check_fields

FORMAT_VERSION = 3
CARRIED = "sae"
"""Folder within an index that holds a copy of its SAE."""
N_BINS = 50
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
N_LOGITS = 20
N_COPY = 10
N_CORRELATED = 10
N_SOURCE_TOKENS = 20
N_NULLS = 64
"""Null directions of each kind."""

DEFINITIONS = {
    "density": "share of text tokens on which the feature is active; Wilson 95 % interval",
    "activation": "f = activation(pre), pre = (x - b_dec) @ W_enc + b_enc, without b_dec where the SAE's encoder does "
    "without it, x the raw z of all heads",
    "dfa": "C[h, s] = pattern[h, q, s] (v[s, h] - c_h) . W_enc[h, :, j]: direct feature attribution of the "
    "pre-activation to head h and source s, before the activation function; C_h is its sum over sources",
    "dfa_share": "sum over active tokens of C_h^2, divided by its sum over heads (the post's fraction of variance)",
    "dfa_covariance": "Cov(C_h, pre) / Var(pre) over active tokens; sums to 1, may be negative",
    "dfa_mean": "mean of C_h over active tokens, divided by its sum over heads",
    "decoder_share": "||W_dec[j, h, :]|| divided by its sum over heads (the post's; depends on the basis of z)",
    "decoder_out_share": "||W_dec[j, h, :] W_O[h]|| divided by its sum over heads (free of the basis of z)",
    "encoder_share": "||W_enc[h, :, j]|| divided by its sum over heads (depends on the basis of z)",
    "encoder_in_share": "||W_V[h] W_enc[h, :, j]|| divided by its sum over heads (free of the basis of z)",
    "participation": "1 / sum over heads of dfa_share^2: 1 when one head makes the feature, n_heads when all do alike",
    "disagreement": "half the summed |dfa_share - decoder_share|: 0 when they agree, 1 when they share no head",
    "null": "dfa_share of directions without meaning, active as often as real features: Gaussian ones, and encoders "
    "whose heads were exchanged",
    "logits": "W_dec W_O W_U at activation 1; final norm's gain and centring folded in, its scale left out, centred",
    "copying table": "(v_t - c) . W_enc of the head with the largest dfa_share, v_t the value of token t read alone",
    "copy_rank": "share of the vocabulary above the top logit token in the copying table",
    "sources": "share of (sum_h C[h, s])^2 over all sources of all active tokens, by source token, over the kept "
    "sources: the largest of each active token by |sum_h C[h, s]|",
    "attention": "mean attention from an active token to a kept source with this token / to such a source in all other "
    "pairs of a destination and a source. Kept sources are kept for their contribution, so the first is high by "
    "selection; an index with exact sources has neither bias",
    "correlated": "Pearson correlation of two features' activations over all tokens, zeros included",
    "sum check": "sum of DFA over heads and sources + bias = pre-activation; checked at every active token",
    "bias": "b_enc - b_dec . W_enc + c . W_enc: the part of the pre-activation that no head makes",
    "threshold": "the weakest active tokens",
}


@dataclass(frozen=True)
class IndexPlan:
    """Configuration of what an index stores per feature."""

    n_sources: Count | None = 8
    """Sources stored per active token, by |DFA| summed over heads; None stores all (exact, but slow)."""
    thresholds: tuple[From0, ...] = (0.0,)
    """Source tokens are reported for the active tokens above each of these activations; the first is 0."""
    losses: bool = False
    """Run the model to the logits, and store the loss of each next token."""
    carry_sae: bool = True
    """Copy the SAE into the index, so that it needs no other folder but the model's."""
    top: Count = 12
    """Examples of each kind."""
    random: Count = 8
    quantiles: Count = 5
    per_quantile: Count = 4
    intervals: Count = 10
    per_interval: Count = 4
    near_threshold: Count = 4
    part_tokens: Count = 1 << 16
    """Tokens read between writes: the most that a killed build loses."""
    range_rows: Count = 1 << 20
    """Activations in memory at a time when those of a feature are merged."""

    def __post_init__(self) -> None:
        """Reject numbers out of bounds, and thresholds that do not increase from 0."""
        check_fields(self, IndexFormatError)
        if not self.thresholds or self.thresholds[0] != 0 or list(self.thresholds) != sorted(set(self.thresholds)):
            raise IndexFormatError(
                f"thresholds {self.thresholds}", expected="0 and then larger ones", do="for example: 0 5"
            )
        for name in ("losses", "carry_sae"):
            if type(value := getattr(self, name)) is not bool:
                raise IndexFormatError(f"{name} {value!r}", expected="true or false", do="pass one of these")

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON types."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
