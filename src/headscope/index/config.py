"""What an index holds; plain values, no torch."""

from dataclasses import dataclass

FORMAT_VERSION = 1
N_BINS = 50
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
N_SOURCES = 8
"""Sources kept for each example, by summed |DFA| over heads; the rest is stored as one sum a head."""

DEFINITIONS = {
    "density": "share of tokens (BOS left out) on which the feature is active",
    "activation": "f = activation(pre), pre = (x - b_dec) @ W_enc + b_enc, x the raw z of all heads",
    "dfa": "C_h = (z_h - c_h) . W_enc[h, :, j]: direct feature attribution of the pre-activation to heads, pre-ReLU",
    "dfa_share": "sum over active tokens of C_h^2, divided by its sum over heads (the post's fraction of variance)",
    "dfa_covariance": "Cov(C_h, pre) / Var(pre) over active tokens; sums to 1, may be negative",
    "dfa_mean": "mean of C_h over active tokens, divided by its sum over heads",
    "decoder_share": "||W_dec[j, h, :]|| divided by its sum over heads (the post's; depends on the basis of z)",
    "decoder_out_share": "||W_dec[j, h, :] W_O[h]|| divided by its sum over heads (free of the basis of z)",
    "encoder_share": "||W_enc[h, :, j]|| divided by its sum over heads",
    "logits": "W_dec W_O W_U at activation 1; final norm's gain and centring folded in, its scale left out, centred",
    "sources": "share of squared DFA (heads summed) over the stored sources of the shown examples, by source token",
    "sum check": "sum of DFA over heads and sources + bias = pre-activation; the residual is stored with each example",
    "bias": "b_enc - b_dec . W_enc + c . W_enc: the part of the pre-activation that no head makes",
}


@dataclass(frozen=True)
class ExamplePlan:
    """How many examples of each kind are stored for a feature."""

    top: int = 12
    random: int = 8
    quantiles: int = 5
    per_quantile: int = 4
    intervals: int = 10
    per_interval: int = 4
