"""headscope finds and explains what the attention layers of language models compute.

Names are imported when they are first used: `import headscope` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headscope import jobs
    from headscope.corpus import Corpus, load_corpus
    from headscope.errors import HeadscopeError
    from headscope.index.build import build_index
    from headscope.index.config import IndexPlan
    from headscope.index.live import LiveIndex
    from headscope.index.store import FeatureIndex
    from headscope.jobs.studies import study
    from headscope.models.hf import Model
    from headscope.models.load import load_model
    from headscope.sae.config import TrainConfig
    from headscope.sae.formats import load_sae, save_sae
    from headscope.sae.model import SAE
    from headscope.sae.quality import evaluate
    from headscope.sae.training.run import train_sae
    from headscope.site import Site
    from headscope.studies.prompt.dfa import dfa

_HOME = {
    "Corpus": "headscope.corpus",
    "FeatureIndex": "headscope.index.store",
    "HeadscopeError": "headscope.errors",
    "IndexPlan": "headscope.index.config",
    "LiveIndex": "headscope.index.live",
    "Model": "headscope.models.hf",
    "SAE": "headscope.sae.model",
    "Site": "headscope.site",
    "TrainConfig": "headscope.sae.config",
    "build_index": "headscope.index.build",
    "dfa": "headscope.studies.prompt.dfa",
    "evaluate": "headscope.sae.quality",
    "load_corpus": "headscope.corpus",
    "load_model": "headscope.models.load",
    "load_sae": "headscope.sae.formats",
    "save_sae": "headscope.sae.formats",
    "study": "headscope.jobs.studies",
    "train_sae": "headscope.sae.training.run",
}

__all__ = [
    "SAE",
    "Corpus",
    "FeatureIndex",
    "HeadscopeError",
    "IndexPlan",
    "LiveIndex",
    "Model",
    "Site",
    "TrainConfig",
    "build_index",
    "dfa",
    "evaluate",
    "jobs",
    "load_corpus",
    "load_model",
    "load_sae",
    "save_sae",
    "study",
    "train_sae",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name == "jobs":
        return import_module("headscope.jobs")
    if name not in _HOME:
        raise AttributeError(f"module 'headscope' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
