"""Which studies a report runs, in which order."""

from headscope.report.records import Study

STUDIES: tuple[Study, ...] = ()
"""Each `claims_*` module has its own `STUDIES`; they are joined here, one module a line."""
