"""The studies "proxies" and "best_proxies": which rules explain when features fire?"""

from typing import TYPE_CHECKING

from headscope.studies.study import DictionaryStudy, FeatureStudy, NoOptions

if TYPE_CHECKING:
    from headscope.proxies.search_records import FeatureProxies
    from headscope.proxies.search_table import Summary
    from headscope.studies.subject import Subject


def _best(subject: "Subject", latent: int, _options: NoOptions) -> "FeatureProxies":
    from headscope.proxies.search import search

    [found] = search(subject.index, [latent])
    return found


def _all(subject: "Subject", _options: NoOptions) -> "Summary":
    from headscope.proxies.search_table import add_proxies

    return add_proxies(subject.index, on_progress=subject.progress)


BEST_PROXIES = FeatureStudy(
    name="best_proxies",
    group="when",
    question="which proxy of each family explains best when the feature fires?",
    run=_best,
    on_page=False,
)
PROXIES = DictionaryStudy(
    name="proxies",
    group="when",
    question="which proxy explains best when each feature fires? chosen on half of the documents, scored on the rest",
    run=_all,
    columns="proxies",
    resumes=True,
)
