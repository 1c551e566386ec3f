"""Which studies a report runs, in which order; every `claims_*` module has its own, and they are joined here."""

from headscope.report import (
    claims_ablation,
    claims_downstream,
    claims_families,
    claims_feature,
    claims_heads,
    claims_patching,
    claims_training,
    claims_upstream,
)
from headscope.report.records import Study

STUDIES: tuple[Study, ...] = (
    *claims_training.STUDIES,
    *claims_feature.STUDIES,
    *claims_downstream.STUDIES,
    *claims_upstream.STUDIES,
    *claims_heads.STUDIES,
    *claims_patching.STUDIES,
    *claims_families.STUDIES,
    *claims_ablation.STUDIES,
)
