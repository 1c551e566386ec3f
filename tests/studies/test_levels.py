"""Recursive DFA and QK attribution as JSON: the numbers of the studies' records, sums that close, what is refused."""

import json

import numpy as np
import pytest

from headscope.encode import encode
from headscope.errors import HeadscopeError, StudyError
from headscope.site import Site
from headscope.studies.how.circuit import PromptCircuit
from headscope.studies.how.levels import Level, path_of, why_attended
from headscope.studies.how.prompt_circuits import PromptCircuits
from headscope.studies.how.qk import PromptScores
from precise import precise, text

LATENT, QUERY = 3, 11


@pytest.fixture(scope="module")
def subject(random_model, random_sae):
    model = precise(random_model, "gpt_neox")
    saes = [random_sae(model, 40, site=Site("mlp_out", 0)), random_sae(model, 30, "topk", site=Site("z", 1))]
    sae = random_sae(model, 20)
    return PromptCircuits(model, sae, saes=saes), tuple(text(model, QUERY + 1).tolist())


def strict(content):
    return json.loads(json.dumps(content, allow_nan=False))


def test_levels_are_those_of_the_study_and_add_up(subject):
    source, tokens = subject
    circuit = PromptCircuit(source.model, source.sae, text(source.model, QUERY + 1), saes=source.saes)
    todo = [((), circuit.root(LATENT, QUERY))]
    seen = set()
    while todo:
        path, node = todo.pop()
        children = circuit.expand(node)
        level = strict(encode(Level.of(source.level(tokens, LATENT, QUERY, path), most=5)))
        assert level["node"]["value"] == pytest.approx(node.value, rel=1e-6)
        assert level["node"]["expands"] == bool(children)
        named = {child.name: child.value for child in children}
        assert len(named) == len(children), "names tell children apart"
        for child in level["children"]:
            assert child["value"] == pytest.approx(named[child["name"]], rel=1e-6)
        assert len(level["children"]) + level["rest"]["n"] == len(children)
        if children:
            shown = sum(child["value"] for child in level["children"]) + level["rest"]["value"]
            assert shown == pytest.approx(node.value, abs=1e-5)
            assert level["sum"] == pytest.approx(node.value, rel=1e-6, abs=1e-9)
        seen.add(node.kind if node.part is None else node.part.kind)
        if len(path) < 5:
            largest = sorted(children, key=lambda child: -abs(child.value))
            chosen = largest[:1] + [c for c in largest[1:] if c.part is not None and c.part.kind == "head"][:1]
            todo += [((*path, child.name), child) for child in chosen]
    assert seen >= {"feature", "head", "source"}


def test_a_source_says_who_attended_to_it_from_where(subject):
    source, tokens = subject
    head = encode(Level.of(source.level(tokens, LATENT, QUERY, ("2.1",))))
    assert {tuple(child["attended"].values()) for child in head["children"]} == {
        (2, 1, QUERY, child["position"]) for child in head["children"]
    }
    deeper = encode(Level.of(source.level(tokens, LATENT, QUERY, ("2.1", "source 7", "0.2"))))
    assert {(c["attended"]["layer"], c["attended"]["head"], c["attended"]["query"]) for c in deeper["children"]} == {
        (0, 2, 7)
    }


def test_scores_are_those_of_the_study_and_add_up(subject):
    source, tokens = subject
    split = PromptScores(source.model, 2, text(source.model, QUERY + 1), saes=source.saes).split(1, QUERY)
    found = strict(encode(why_attended(source, tokens, 2, 1, QUERY, 4)))
    assert found["scores"] == pytest.approx(split.scores.tolist(), rel=1e-6)
    assert found["pattern"] == pytest.approx(split.pattern.tolist(), rel=1e-6)
    for name, whole in (("contrast", split.contrast(4)), ("attention", split.attention(4))):
        shown = np.array(found[name])
        assert shown.shape == (len(found["query_parts"]), len(found["key_parts"]))
        assert shown.sum() == pytest.approx(whole.sum(), abs=1e-5)
        names = [part.name for part in split.parts]
        for i, row in enumerate(found["query_parts"][:-1]):
            for j, column in enumerate(found["key_parts"][:-1]):
                expected = whole[names.index(row["name"]), names.index(column["name"])]
                assert shown[i, j] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert sum(map(sum, found["contrast"])) == pytest.approx(found["score"] - found["mean"], abs=1e-5)
    assert why_attended(source, tokens, 2, 1, QUERY, None).key == split.keys[split.pattern.argmax()]
    own = {part["name"] for part in found["key_parts"] if part["kind"] == "head"}
    assert own
    assert {read["part"] for read in found["read"]} <= own
    pairs = split.pairs[..., 4].sum(0)
    for read in found["read"]:
        assert read["value"] == pytest.approx(pairs[names.index(read["part"])], rel=1e-6)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("2.9", "'2.9' below feature 3"),
        ("2.1/source 99", "no node"),
        ("constant/x", "nothing"),
        ("x" * 1001, "a path"),
    ],
)
def test_a_node_that_there_is_not_is_refused(subject, path, said):
    source, tokens = subject
    with pytest.raises(StudyError, match=r"path|node") as caught:
        source.level(tokens, LATENT, QUERY, path_of(path))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "ask",
    [
        lambda s, t: s.level((), LATENT, 0, ()),
        lambda s, t: s.level((0,), LATENT, 0, ()),
        lambda s, t: s.level((0, 10**6), LATENT, 0, ()),
        lambda s, t: s.level((0,) + (5,) * 500, LATENT, 0, ()),
        lambda s, t: s.level(t, 20, QUERY, ()),
        lambda s, t: s.level(t, LATENT, QUERY + 1, ()),
        lambda s, t: s.scores(t, 2, 4, QUERY),
        lambda s, t: s.scores(t, 3, 0, QUERY),
        lambda s, t: s.read(t, 2, 1, QUERY, 3, "embedding"),
        lambda s, t: s.read(t, 2, 1, QUERY, 3, "none"),
        lambda s, t: why_attended(s, t, 2, 1, 4, 7),
    ],
)
def test_what_there_is_not_is_refused(subject, ask):
    with pytest.raises(HeadscopeError):
        ask(*subject)


def test_the_last_prompts_are_kept(subject, monkeypatch):
    source, tokens = subject
    source.level(tokens, LATENT, QUERY, ())
    monkeypatch.setattr("headscope.studies.how.prompt_circuits.PromptCircuit", None)
    source.level(tokens, LATENT, QUERY, ("2.1",))
    with pytest.raises(TypeError):
        source.level(tokens[:5], LATENT, 4, ())
