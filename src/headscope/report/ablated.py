"""What stands in the place of an ablated head, read once for all studies of a subject."""

from functools import lru_cache

from headscope.index.live import LiveIndex
from headscope.report.records import Settings
from headscope.studies.support.replacement import Kind, Replacement


def mean_replacement(live: LiveIndex, settings: Settings) -> Replacement:
    """The mean of z over the text tokens of some blocks, head by head."""
    return replacement(live, settings, "mean")


@lru_cache(maxsize=3)
def replacement(live: LiveIndex, settings: Settings, kind: Kind) -> Replacement:
    """What stands in the place of z, of as many blocks as the settings have sequences."""
    return Replacement.of(live, kind, max_blocks=settings.sequences, seed=settings.seed)
