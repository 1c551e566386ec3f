"""Which studies a report runs, in which order; every `claims_*` module has its own, and they are joined here."""

from headscope.report import claims_downstream, claims_feature, claims_training
from headscope.report.records import Study

STUDIES: tuple[Study, ...] = (
    *claims_training.STUDIES,
    *claims_feature.STUDIES,
    *claims_downstream.STUDIES,
)
