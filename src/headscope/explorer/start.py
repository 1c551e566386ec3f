"""Initial data of the study tabs: proxies to try, columns of studies, and whether there is a model."""

from collections.abc import Iterator

from headscope.encode import Json
from headscope.errors import HeadscopeError
from headscope.index.columns import studies
from headscope.proxies import Proxy, after_any, induction_of, token_in, vocabulary_of, within_after
from headscope.studies.subject import Subject
from headscope.studies.support.on_page import open_index

_SUGGESTED = 5  # tokens of a suggested proxy
_SEARCHED = ("proxy", "induction_proxy", "local_proxy", "context_proxy", "token_proxy")  # of the columns `proxies`
_LARGE = 0.05  # minimum share of squared DFA for a source token to be suggested


def start_json(subject: Subject, latent: int) -> Json:
    """Return the initial data for one feature.

    Raises:
        IndexFormatError: no such latent, or a damaged index.
    """
    index = subject.index
    index.check_latent(latent)
    folder = index.folder
    return {
        "proxies": list(_suggested(subject, latent)),
        "columns": {study: _columns(subject, study, latent) for study in studies(folder)},
        "live": subject.has_model,
        "saes": list(subject.saes),
        "command": f"headscope serve --index {folder} --with-model",
        "advice": (
            f"`headscope study effects {folder}` writes the exact effect by the direct path of every feature into the "
            "index; `headscope serve --with-model` also removes this feature from the model, for the proxy above."
        ),
        "python": {"columns": f'{open_index(subject, "")}index.columns("effects").slice({latent}, 1).to_pylist()'},
    }


def _suggested(subject: Subject, latent: int) -> Iterator[Json]:
    """Suggest proxies to try: those found by a search, else those suggested by the card."""
    if "proxies" in studies(subject.index.folder):
        found = _columns(subject, "proxies", latent).get("values", {})
        best = [found[name] for name in _SEARCHED if found.get(name)]
        if best:
            yield {"proxy": best[0], "why": f"the best that the study of proxies found; kind: {found['kind']}"}
        for proxy in dict.fromkeys(best[1:]):
            if proxy != best[0]:
                yield {"proxy": proxy, "why": "the best of another family that the study of proxies found"}
        if best:
            return
    for proxy, why in _guessed(subject, latent):
        yield {"proxy": proxy.name, "why": why}


def _guessed(subject: Subject, latent: int) -> list[tuple[Proxy, str]]:
    index = subject.index
    feature, sources = index.feature(latent), index.sources(latent)
    if not feature.alive or sources is None:
        return []
    vocabulary, special = vocabulary_of(index), set(index.vocabulary[1])
    top = feature.logit_top[0][0]
    text_sources = [t for t in sources.tokens if t.token not in special]
    from_tokens = [t.token for i, t in enumerate(text_sources[:_SUGGESTED]) if i == 0 or t.share >= _LARGE]
    examples = index.table()["example_tokens"][latent].as_py()
    on_tokens = [t for t in examples if t not in special][:_SUGGESTED]
    made: list[tuple[Proxy, str]] = []
    if on_tokens:
        made.append((token_in(map(vocabulary.name, on_tokens)), "the tokens of its strongest examples"))
    if from_tokens:
        made.append((within_after(map(vocabulary.name, from_tokens)), "soon after its top source tokens"))
        made.append((after_any(map(vocabulary.name, from_tokens)), "anywhere after its top source tokens"))
    copies = from_tokens[:1] == [top]
    induction = (induction_of(vocabulary.name(top), fuzzy=True), "its top logit token is next by induction")
    return [induction, *made] if copies else [*made, induction]


def _columns(subject: Subject, study: str, latent: int) -> Json:
    """Return the columns that one study added for a feature; columns of another index are rejected with the reason."""
    try:
        table, provenance = subject.index.study(study)
    except HeadscopeError as error:
        return {"refused": f"{error.got}. {error.do}"}
    row = table.slice(latent, 1).to_pylist()[0]
    values = {name: value for name, value in row.items() if name != "latent"}
    said = {name: provenance[name] for name in ("definitions", "n", "created", "headscope")}
    return said | {"n": str(said["n"]), "values": values}
