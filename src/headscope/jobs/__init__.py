"""The commands as functions: names and paths in, files out. `headscope.commands` is a thin layer over them.

Each job validates its output path before it computes anything, and its output is whole or absent. Heavy imports
are inside the functions: `headscope --help` is quick, and a served page loads no torch.
"""

from headscope.jobs.indexes import index, live, survey, upstream_sae
from headscope.jobs.inputs import CorpusChoice, Hardware, Progress
from headscope.jobs.pages import dive, export, serve
from headscope.jobs.saes import convert, eval, info, measure, measured_quality
from headscope.jobs.studies import study, study_all, study_of, subject
from headscope.jobs.training import train

__all__ = [
    "CorpusChoice",
    "Hardware",
    "Progress",
    "convert",
    "dive",
    "eval",
    "export",
    "index",
    "info",
    "live",
    "measure",
    "measured_quality",
    "serve",
    "study",
    "study_all",
    "study_of",
    "subject",
    "survey",
    "train",
    "upstream_sae",
]
