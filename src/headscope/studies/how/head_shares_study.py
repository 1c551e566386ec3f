"""The study "head_shares": which heads make a feature, by DFA above several thresholds and by weights?"""

from typing import TYPE_CHECKING

from headscope.studies.study import FeatureStudy, NoOptions, Tab
from headscope.studies.support.on_page import open_index, thresholds

if TYPE_CHECKING:
    from headscope.encode import Json
    from headscope.studies.how.head_shares import HeadShares
    from headscope.studies.subject import Subject

_N_THRESHOLDS = 8
_WEIGHTS = {
    "decoder": "||W_dec[j, h]||, normalised (the post's); depends on the basis of z",
    "decoder_out": "||W_dec[j, h] W_O[h]||, normalised: in the residual stream, free of the basis of z",
    "encoder": "||W_enc[h, :, j]||, normalised; depends on the basis of z",
    "encoder_in": "||W_V[h] W_enc[h, :, j]||, normalised: in the residual stream, free of the basis of z",
}
_MEASURES = ("squared", "covariance", "linear")


def _run(subject: "Subject", latent: int, _options: NoOptions) -> "tuple[HeadShares, ...]":
    from headscope.studies.how.head_shares import head_shares

    return head_shares(subject.index, latent, thresholds(subject.index, latent, _N_THRESHOLDS))


def _show(subject: "Subject", latent: int, _options: NoOptions, found: "tuple[HeadShares, ...]") -> "Json":
    from headscope.encode import encode

    shares = subject.index.feature(latent).shares
    return {
        "thresholds": [
            {
                "threshold": one.threshold,
                "n": one.n,
                "heads": [encode({name: getattr(share, name) for name in _MEASURES}) for share in one.heads],
            }
            for one in found
        ],
        "weights": {
            name: {"definition": definition, "shares": encode(getattr(shares, name))}
            for name, definition in _WEIGHTS.items()
        },
    }


def _python(subject: "Subject", latent: int, _options: NoOptions, found: "tuple[HeadShares, ...]") -> str:
    opened = open_index(subject, "from headscope.studies.how.head_shares import head_shares")
    return f"{opened}head_shares(index, {latent}, {[r.threshold for r in found]}), index.feature({latent}).shares"


HEAD_SHARES = FeatureStudy(
    name="head_shares",
    group="how",
    question="which heads make the feature, by DFA above several thresholds and by weights?",
    run=_run,
    tabs=(Tab("heads", "DFA by head"),),
    show=_show,
    python=_python,
)
