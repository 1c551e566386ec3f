"""headscope finds and explains what the attention layers of language models compute.

Names are imported when they are first used: `import headscope` loads no torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Corpus": "headscope.corpus",
    "FeatureIndex": "headscope.index.store",
    "HeadscopeError": "headscope.errors",
    "Model": "headscope.models.hf",
    "SAE": "headscope.sae.model",
    "Site": "headscope.site",
    "TrainConfig": "headscope.sae.config",
    "build_index": "headscope.index.build",
    "evaluate": "headscope.sae.quality",
    "load_corpus": "headscope.corpus",
    "load_model": "headscope.models.load",
    "load_sae": "headscope.sae.formats",
    "save_sae": "headscope.sae.formats",
    "train_sae": "headscope.sae.train",
}

__all__ = sorted([*_HOME, "jobs"])


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name == "jobs":
        return import_module("headscope.jobs")
    if name not in _HOME:
        raise AttributeError(f"module 'headscope' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
