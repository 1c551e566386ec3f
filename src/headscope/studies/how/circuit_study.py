"""The studies "circuit" and "qk": attribution tree of a feature at one token, and of a head's attention scores."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from headscope.limits import CountFrom0, Text
from headscope.studies.study import FeatureStudy, Tab
from headscope.studies.support.on_page import AtToken, open_live, prompt_at

if TYPE_CHECKING:
    from headscope.encode import Json
    from headscope.studies.how.levels import Level, WhyAttended
    from headscope.studies.subject import Subject


@dataclass(frozen=True, kw_only=True)
class CircuitOptions(AtToken):
    """A node of recursive DFA."""

    path: Annotated[str, Text(1000, blank=True)] = ""
    """Names of the nodes from the feature down to this one, such as `1.3/source 12/0.2`; the feature itself when blank.
    """


@dataclass(frozen=True, kw_only=True)
class QkOptions(AtToken):
    """A head, and the two tokens that it attends between."""

    layer: CountFrom0
    """Layer of the head."""
    head: CountFrom0
    """Head within the layer."""
    query: CountFrom0
    """Position of the query."""
    key: CountFrom0
    """Position of the key."""


def _circuit(subject: "Subject", latent: int, options: CircuitOptions) -> "Level":
    from headscope.studies.how.levels import Level, path_of

    tokens, query = prompt_at(subject.index, options.at)
    return Level.of(subject.circuits.level(tokens, latent, query, path_of(options.path)))


def _show_circuit(_subject: "Subject", _latent: int, options: CircuitOptions, found: "Level") -> "Json":
    from headscope.encode import encode

    return encode(found) | {"at": options.at, "path": options.path}


def _python_circuit(subject: "Subject", latent: int, options: CircuitOptions, _found: "Level") -> str:
    _, query = divmod(options.at, subject.index.block_size)
    calls = (
        "circuit = PromptCircuit(live.model, live.sae, tokens, saes=saes)\n"
        f"circuit.expand(circuit.root({latent}, {query}))"
    )
    return _python(subject, options.at, "from headscope.studies.how.circuit import PromptCircuit", calls)


CIRCUIT = FeatureStudy(
    name="circuit",
    group="how",
    question="what is the feature the sum of at one token: heads, sources, and parts of the stream there?",
    run=_circuit,
    options=CircuitOptions,
    needs_model=True,
    tabs=(Tab("circuit", "Recursive DFA"),),
    show=_show_circuit,
    python=_python_circuit,
)


def _qk(subject: "Subject", _latent: int, options: QkOptions) -> "WhyAttended":
    from headscope.studies.how.levels import why_attended

    tokens, _ = prompt_at(subject.index, options.at)
    return why_attended(subject.circuits, tokens, options.layer, options.head, options.query, options.key)


def _python_qk(subject: "Subject", _latent: int, options: QkOptions, _found: "WhyAttended") -> str:
    before = f"[sae for sae in saes if sae.site.layer < {options.layer}]"
    split = f"split({options.head}, {options.query}).top({options.key})"
    calls = f"PromptScores(live.model, {options.layer}, tokens, saes={before}).{split}"
    return _python(subject, options.at, "from headscope.studies.how.qk import PromptScores", calls)


QK = FeatureStudy(
    name="qk",
    group="how",
    question="why does a head attend from one token of an example to another?",
    run=_qk,
    options=QkOptions,
    needs_model=True,
    python=_python_qk,
)


def _python(subject: "Subject", at: int, study: str, calls: str) -> str:
    block, query = divmod(at, subject.index.block_size)
    return (
        f"import torch\n{open_live(subject, f'from headscope.sae.formats import load_sae{chr(10)}{study}')}"
        f"saes = [load_sae(name) for name in {list(subject.saes)!r}]\n"
        f"tokens = torch.tensor(live.index.tokens_of({block})[:{query + 1}].astype(int))\n{calls}"
    )
