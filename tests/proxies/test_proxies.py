import itertools
import operator
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import examples
from headscope.errors import ProxyError
from headscope.proxies import (
    Blocks,
    Proxy,
    Vocabulary,
    after_any,
    algebra,
    bigram,
    document,
    document_regex,
    families,
    in_repeat,
    induction_of,
    matching,
    next_token_in,
    parse,
    regex,
    token_in,
    where,
    within_after,
)
from naive_proxies import holds

BOS, UNKNOWN = 0, 1
TOKENS = [
    b"<bos>",
    b"<unk>",
    b"a",
    b" a",
    b"A",
    b" A",
    b"b",
    b"bc",
    b".",
    b'?"',
    b"x.y",
    b"\n",
    b"\xc3",
    b"\xa9",
    b"",
    b"a",
]
TOKENS += ["é".encode(), b"\xff", b"\xfe", b" ", b"Bc", b"BC"]
SPECIAL = frozenset([BOS, UNKNOWN])
NAMES = ("json.decoder", "json", "re", "a*b?c")


def split(text: str) -> list[str]:
    return [text[i : i + 2] for i in range(0, len(text), 2)]


def make_blocks(tokens: np.ndarray, document: np.ndarray | None = None) -> Blocks:
    numbers = np.zeros(tokens.shape, np.int32) if document is None else document
    return Blocks(tokens.astype(np.int32), numbers, tokens != BOS, Vocabulary(TOKENS, SPECIAL, split), NAMES)


def words(*texts: str) -> Blocks:
    """Each block a row of tokens, told by their texts; `_` is the BOS."""
    ids = {t.decode(errors="replace"): i for i, t in reversed(list(enumerate(TOKENS)))} | {"_": BOS}
    return make_blocks(np.array([[ids[piece] for piece in text] for text in map(list, texts)]))


# A recipe is (function, arguments, keywords): proxies are made from it in the test, where annotations may be executed.
def call(
    function: Callable[..., Proxy], *arguments: st.SearchStrategy, **keywords: st.SearchStrategy
) -> st.SearchStrategy:
    return st.tuples(st.just(function), st.tuples(*arguments), st.fixed_dictionaries(keywords))


def made(recipe: Any) -> Any:
    if not (isinstance(recipe, tuple) and len(recipe) == 3 and callable(recipe[0])):
        return recipe
    function, arguments, keywords = recipe
    return function(*map(made, arguments), **keywords)


TEXTS = st.sampled_from(["a", " a", "A", " A", "b", "bc", "Bc", ".", '?"', "\n", "é", " "])
NAMED = st.one_of(TEXTS, st.integers(0, len(TOKENS) - 1))
PATTERNS = st.sampled_from(
    ["a", "b+c?", "a.b", "é", "[ab]+", "ab|ba", r"\w+", "^a", "a$", "(a|b)b", r"\.", "a{2}", r"\bA"]
)


def families_of(token: st.SearchStrategy, sizes: int, glob: st.SearchStrategy) -> st.SearchStrategy:
    some = st.lists(token, min_size=1, max_size=4)
    stop = st.one_of(st.just("punctuation"), st.lists(token, max_size=2))
    return st.one_of(
        call(induction_of, token, fuzzy=st.booleans()),
        call(within_after, some, st.integers(1, sizes), stop),
        call(after_any, some),
        call(token_in, some),
        call(next_token_in, some),
        call(bigram, token, token),
        call(in_repeat, st.integers(1, sizes)),
        call(regex, PATTERNS),
        call(document, glob),
        call(document_regex, st.sampled_from(["^json$", "e", "x"])),
    )


def compounds(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        call(operator.and_, inner, inner),
        call(operator.or_, inner, inner),
        call(operator.invert, inner),
        call(Proxy.shift, inner, st.integers(-15, 15)),
    )


SIMPLE = families_of(NAMED, 14, st.sampled_from(["json*", "*", "re", "r?", "a*b?c", "J*", ""]))
PROXIES = st.recursive(SIMPLE, compounds, max_leaves=6)


@st.composite
def block_arrays(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n_blocks, size = draw(st.integers(1, 4)), draw(st.integers(1, 13))
    some = draw(st.lists(st.integers(0, len(TOKENS) - 1), min_size=1, max_size=5))  # few, so that they repeat
    tokens = draw(st.lists(st.sampled_from(some), min_size=n_blocks * size, max_size=n_blocks * size))
    numbers = draw(st.lists(st.integers(0, len(NAMES) - 1), min_size=n_blocks * size, max_size=n_blocks * size))
    return np.reshape(tokens, (n_blocks, size)), np.reshape(numbers, (n_blocks, size)).astype(np.int32)


# -------------------------------------------------------------------------------------------------------- the families
@given(SIMPLE, block_arrays())
@examples(400)
def test_every_family_is_what_a_loop_over_tokens_says(recipe: tuple, arrays: tuple) -> None:
    proxy, blocks = made(recipe), make_blocks(*arrays)
    np.testing.assert_array_equal(proxy.holds(blocks), holds(proxy, blocks))


@given(PROXIES, block_arrays())
def test_every_combination_is_what_a_loop_over_tokens_says(recipe: tuple, arrays: tuple) -> None:
    proxy, blocks = made(recipe), make_blocks(*arrays)
    np.testing.assert_array_equal(proxy.holds(blocks), holds(proxy, blocks))


@given(PROXIES, block_arrays())
def test_no_proxy_is_true_at_a_special_token_or_sees_another_block(recipe: tuple, arrays: tuple) -> None:
    proxy, blocks = made(recipe), make_blocks(*arrays)
    whole = proxy.holds(blocks)
    assert not whole[~blocks.text].any()
    alone = [
        proxy.holds(
            Blocks(
                blocks.tokens[i : i + 1], blocks.document[i : i + 1], blocks.text[i : i + 1], blocks.vocabulary, NAMES
            )
        )
        for i in range(len(whole))
    ]
    np.testing.assert_array_equal(whole, np.concatenate(alone))


def positions(proxy: Proxy, text: str) -> list[int]:
    return np.flatnonzero(proxy.holds(words(text))[0]).tolist()


def test_induction_is_at_the_second_a() -> None:
    assert positions(induction_of("b"), "_ab.ba.a") == [5, 6, 7]
    assert positions(induction_of("b"), "_bb") == [2]  # the first b has a b after it: the one at hand


def test_fuzzy_induction_edits_the_present_token_once() -> None:
    assert positions(induction_of("b"), "_abA") == []
    assert positions(induction_of("b", fuzzy=True), "_abA") == [3]  # lower
    assert positions(induction_of("b", fuzzy=True), "_Aba") == [3]  # capitalised
    tokens = np.array([[BOS, 2, 6, 3, 5]])  # a b " a" " A"
    assert induction_of("b", fuzzy=True).holds(make_blocks(tokens))[0].tolist() == [0, 0, 0, 1, 0]  # not two edits
    tokens = np.array([[BOS, 3, 6, 2]])  # " a" b a
    assert induction_of("b", fuzzy=True).holds(make_blocks(tokens))[0].tolist() == [0, 0, 0, 1]


def test_capitalised_is_not_upper_case() -> None:
    for source, found in ((20, 1), (21, 0)):  # Bc, BC; then: b bc
        blocks = make_blocks(np.array([[BOS, source, 6, 7]]))
        assert induction_of("b", fuzzy=True).holds(blocks)[0].tolist() == [0, 0, 0, found]


def test_a_window_begins_after_its_token_and_ends_before_a_stop_or_its_document() -> None:
    assert positions(within_after(["a"], n=2), "_abbb") == [2, 3]
    assert positions(within_after(["a"], n=5), "_ab.b") == [2]
    assert positions(within_after(["a"], n=5, stop=[]), "_ab.b") == [2, 3, 4]
    assert positions(within_after(["a"], n=5, stop=[]), "_ab_b") == [2]
    assert positions(within_after(["."], n=2), "_.bb") == [2, 3]  # a trigger does not stop itself


def test_a_window_however_wide_begins_with_its_token() -> None:
    blocks = make_blocks(np.array([[6, 2, 6]]))  # b a b, without a BOS that would stop it
    assert within_after(["a"], n=10**12, stop=[]).holds(blocks)[0].tolist() == [0, 0, 1]
    assert positions(token_in(["a"]).shift(10**12) | token_in(["a"]).shift(-(10**12)), "_bab") == []


def test_a_repeat_may_be_as_long_as_the_block_allows() -> None:
    blocks = make_blocks(np.full((2, 5), 2))
    assert in_repeat(4).holds(blocks).tolist() == [[0, 0, 0, 0, 1]] * 2
    assert not in_repeat(5).holds(blocks).any()


def test_a_token_without_text_overlaps_nothing() -> None:
    assert regex("ab").holds(make_blocks(np.array([[BOS, 2, 14, 6]])))[0].tolist() == [0, 1, 0, 1]


def test_stops_are_punctuation_without_letters_and_special_tokens() -> None:
    stops = Vocabulary(TOKENS, SPECIAL, split).stops
    assert [TOKENS[i] for i in np.flatnonzero(stops)] == [b"<bos>", b"<unk>", b".", b'?"', b"\n"]


def test_after_any_sees_an_earlier_document_of_its_block() -> None:
    assert positions(after_any(["a"]), "_ab_b") == [2, 4]


def test_a_regex_covers_all_tokens_that_its_matches_overlap() -> None:
    tokens = np.array([[BOS, 7, 2, 6, BOS, 6]])  # bc a b BOS b
    assert regex("ca|bb").holds(make_blocks(tokens))[0].tolist() == [0, 1, 1, 0, 0, 0]
    assert regex("^b").holds(make_blocks(tokens))[0].tolist() == [0, 1, 0, 0, 0, 1]


def test_a_character_may_be_of_two_tokens_and_half_a_character_matches_nothing() -> None:
    tokens = np.array([[BOS, 12, 13, 12, 2], [BOS, 13, 17, 18, 16]])  # \xc3 \xa9 \xc3 a | \xa9 \xff \xfe é
    assert regex("é").holds(make_blocks(tokens)).tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert regex("(?s).").holds(make_blocks(tokens)).tolist() == [[0, 1, 1, 0, 1], [0, 0, 0, 0, 1]]


def test_tokens_with_the_same_bytes_are_meant_alike() -> None:
    tokens = np.array([[BOS, 2, 15]])
    assert token_in(["a"]).holds(make_blocks(tokens))[0].tolist() == [0, 1, 1]
    assert token_in([15]).holds(make_blocks(tokens))[0].tolist() == [0, 0, 1]
    vocabulary = Vocabulary(TOKENS, SPECIAL, split)
    assert vocabulary.name(6) == "b"
    assert [vocabulary.name(i) for i in (2, 15, 12, BOS)] == [2, 15, 12, BOS]  # no text names these alone


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(a*)*b", "(x+x+)+y"])
def test_a_pattern_that_makes_other_engines_backtrack_is_quick(pattern: str) -> None:
    blocks = make_blocks(np.full((40, 500), 2))
    start = time.process_time()
    regex(pattern).holds(blocks)
    assert time.process_time() - start < 5


def test_a_slow_pattern_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "SECONDS", 0.0)
    with pytest.raises(ProxyError, match="not done after 0 s"):
        regex("a").holds(words("_a"))


def test_a_million_tokens_are_a_fraction_of_a_second() -> None:
    rng = np.random.default_rng(0)
    blocks = make_blocks(rng.integers(1, len(TOKENS), (4096, 256)))
    proxies = [induction_of("b", fuzzy=True), within_after(["a"]), after_any(["b"]), token_in(["a"]), in_repeat(3)]
    proxies += [next_token_in(["a"]), bigram("a", "b"), regex("a.b"), document("json*"), ~token_in(["a"])]
    for proxy in proxies:
        proxy.holds(blocks)  # what a vocabulary makes once
        start = time.process_time()
        proxy.holds(blocks)
        assert time.process_time() - start < 1.0, proxy.name


# ----------------------------------------------------------------------------------------------------------- functions
def test_a_function_of_blocks() -> None:
    proxy = where(lambda blocks: blocks.tokens == 6, "is b")
    assert positions(proxy, "_abb") == [2, 3]
    assert positions(proxy & token_in(["b"]).shift(1), "_abb") == [3]
    assert proxy.name == 'where("is b")'


def test_a_function_that_raises() -> None:
    with pytest.raises(ProxyError, match=r'(?s)where\("f"\) raised ZeroDivisionError: .*takes Blocks'):
        where(lambda blocks: 1 / 0, "f").holds(words("_a"))


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda blocks: blocks.tokens, r"int32 \[1, 2\]"),
        (lambda blocks: blocks.text[:, :1], r"bool \[1, 1\]"),
        (lambda blocks: True, "bool\n"),
        (lambda blocks: None, "NoneType"),
    ],
)
def test_a_function_that_returns_something_else(no_type_checks: None, function, got: str) -> None:
    with pytest.raises(ProxyError, match=rf"(?s)returned {got}.*a bool array \[1, 2\]"):
        where(function, "f").holds(words("_a"))


# --------------------------------------------------------------------------------------------------------- the algebra
@given(PROXIES, PROXIES, block_arrays())
def test_de_morgan(recipe: tuple, other: tuple, arrays: tuple) -> None:
    a, b, blocks = made(recipe), made(other), make_blocks(*arrays)
    np.testing.assert_array_equal((~(a & b)).holds(blocks), (~a | ~b).holds(blocks))
    np.testing.assert_array_equal((~~a).holds(blocks), a.holds(blocks))


def test_joining_is_flat_and_keeps_its_order() -> None:
    a, b, c = (token_in([t]) for t in "abc")
    assert (a & b) & c == a & (b & c) == parse('token_in(["a"]) & token_in(["b"]) & token_in(["c"])')
    assert (a | b | c).name == 'token_in(["a"]) | token_in(["b"]) | token_in(["c"])'
    assert ((a | b) & c).name == '(token_in(["a"]) | token_in(["b"])) & token_in(["c"])'
    assert (a & b) != (b & a)


def test_sets_do_not_depend_on_their_order() -> None:
    assert token_in(["b", "a", "b", 7, 3]) == token_in([3, "a", 7, "b"])
    assert token_in(["b", "a", 3]).hash == token_in(["a", "b", 3]).hash != token_in(["a", "b"]).hash
    assert token_in(["a"]).hash.startswith("sha256:")


def test_proxies_too_deep_are_refused() -> None:
    proxy: Proxy = token_in(["a"])
    for _ in range(algebra.MAX_DEPTH - 1):
        proxy = ~proxy
    assert parse(proxy.name) == proxy
    with pytest.raises(ProxyError, match=r"33 deep"):
        ~proxy  # noqa: B018


@pytest.mark.parametrize(
    "make",
    [
        lambda: token_in([]),
        lambda: within_after(["a"], n=0),
        lambda: in_repeat(0),
        lambda: token_in([-1]),
        lambda: token_in(["\ud800"]),
        lambda: regex("(a"),
        lambda: regex("(?<=a)b"),
        lambda: regex("(a)\\1"),
        lambda: regex("a" * 1001),
        lambda: document_regex("["),
        lambda: document("\udfff"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_made(make) -> None:
    with pytest.raises(ProxyError):
        make()


# -------------------------------------------------------------------------------------------------------------- tokens
def test_a_text_of_several_tokens_names_its_pieces() -> None:
    with pytest.raises(ProxyError, match=r"'abcde' is no token but 3 pieces: 'ab', 'cd', 'e'"):
        token_in(["abcde"]).holds(words("_a"))


def test_an_id_that_is_no_token() -> None:
    with pytest.raises(ProxyError, match=rf"token #{len(TOKENS)}\n  expected: #0 to #{len(TOKENS) - 1}"):
        induction_of(len(TOKENS)).holds(words("_a"))


def test_a_special_token_is_named_by_its_id_alone() -> None:
    with pytest.raises(ProxyError, match="'<bos>' is no token"):
        after_any(["<bos>"]).holds(words("_a"))
    assert positions(next_token_in([BOS]), "_a_a") == [1]


# -------------------------------------------------------------------------------------------------------------- parser
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
ANY_TOKEN = st.one_of(ANY_TEXT, st.integers(0, 10**17))


@given(st.recursive(families_of(ANY_TOKEN, 10**6, ANY_TEXT), compounds, max_leaves=12))
@examples(200)
def test_a_name_is_read_back_as_the_same_proxy(recipe: tuple) -> None:
    proxy = made(recipe)
    again = parse(proxy.name)
    assert again == proxy
    assert again.name == proxy.name
    assert again.hash == proxy.hash
    assert proxy.name.isprintable()


@given(st.one_of(st.text(max_size=60), st.text('inductoregxshf_("a\\",[]#1&|~ =)', max_size=60)))
def test_any_text_is_a_proxy_or_an_error_of_ours(text: str) -> None:
    with suppress(ProxyError):
        assert parse(parse(text).name) == parse(text)


def test_spaces_and_parentheses_do_not_matter() -> None:
    text = ' (  token_in( [ "a" ,#7 ] )\n& ~ ( (in_repeat(2)) ) ) '
    assert parse(text) == token_in(["a", 7]) & ~in_repeat(2)
    assert parse('token_in(["a"]) | in_repeat(1) & in_repeat(2)') == token_in(["a"]) | (in_repeat(1) & in_repeat(2))
    assert parse('within_after(["a"], stop=[], n=3)') == within_after(["a"], 3, [])
    assert parse('induction("\\u00e9\\n")') == induction_of("é\n")


@pytest.mark.parametrize(
    ("text", "column", "expected"),
    [
        ("", 1, "induction"),
        ("foo(1)", 1, "one of induction"),
        ('token_in["a"]', 9, r"\("),
        ("induction('b')", 11, "double quotes"),
        ('induction("b"', 14, r", or \)"),
        ('induction("b", fuzzy=1)', 22, "True or False"),
        ('induction("b", n=1)', 16, "one of fuzzy="),
        ('token_in("a")', 10, "a list of tokens"),
        ('token_in(["a" "b"])', 15, r", or \]"),
        ("token_in([])", 1, "at least one token"),
        ('bigram("a")', 11, ", and token"),
        ("shift(in_repeat(1), x)", 21, "whole number"),
        ("in_repeat(1) in_repeat(2)", 14, r"&, \| or the end"),
        ("in_repeat(1) & & in_repeat(1)", 16, "one of induction"),
        ("(in_repeat(1)", 14, r"&, \| or \)"),
        ('regex("(")', 1, "RE2"),
        ('induction("\\q")', 11, "JSON string"),
        ('where("f")', 1, "passed in Python"),
        ("__import__(1)", 1, "one of induction"),
        ('within_after(["a"], n=2, n=3)', 26, "one of stop="),
        ("in_repeat(1).name", 13, "name, a text"),
    ],
)
def test_what_is_wrong_is_said_with_its_column(text: str, column: int, expected: str) -> None:
    with pytest.raises(ProxyError, match=rf"(?s)^column {column}: .*expected: [^\n]*{expected}"):
        parse(text)


@pytest.mark.parametrize("text", ["(" * 5000, "~" * 5000 + "in_repeat(1)", "shift(" * 3000, "a" * 30_000, '"' * 19_999])
def test_a_long_or_deep_text_is_an_error_and_no_recursion(text: str) -> None:
    with pytest.raises(ProxyError):
        parse(text)


def test_every_family_can_be_written() -> None:
    records = {c for c in vars(families).values() if isinstance(c, type) and issubclass(c, Proxy) and c is not Proxy}
    texts = ['induction("a")', 'within_after(["a"])', 'after_any(["a"])', 'token_in(["a"])', 'next_token_in(["a"])']
    texts += ['bigram("a", "b")', "in_repeat(1)", 'regex("a")', 'document("a")', 'document_regex("a")']
    assert {type(parse(text)) for text in texts} == records
    for a, b in itertools.combinations(texts, 2):
        assert parse(a).hash != parse(b).hash
