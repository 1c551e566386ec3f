"""A made-up, deterministic index, with every kind of token that has ever broken such a page, and its cards."""

from dataclasses import replace
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from headscope.errors import IndexFormatError
from headscope.explorer.cards import IndexCards
from headscope.index.config import DEFINITIONS, QUANTILES
from headscope.index.records import (
    Correlated,
    DrawnGroup,
    Example,
    ExampleColumns,
    ExampleGroup,
    Feature,
    Null,
    Shares,
    Source,
    Sources,
    SourceToken,
)
from headscope.index.store import FeatureIndex

D_SAE, N_HEADS, N_BLOCKS, BLOCK = 200, 8, 64, 256
BOS, HOSTILE, EMOJI, LONE, NEWLINE, TAB = 0, 1, (2, 3, 4), (5, 6), 7, 8
TWIN_LATENT, DEAD_LATENT = 3, 7
PERIOD = 40  # in every block, the trigger of latent i stands at positions i % PERIOD + 30, + 70, ...

_HOSTILE_BYTES = b"</script><img src=x onerror=alert(1)>"
_ODD = [b"<|bos|>", _HOSTILE_BYTES, b"\xf0\x9f", b"\xa6", b"\x8a", b"\xff", b"\xc3", b"\n", b"\t", b"\n\n"]
_TEXT = [" שלום", " مرحبا", "漢字", " 東京", "\u202e", "…", " café", " naïve", "&amp;", "<b>"]
_WORDS = [
    "def",
    "self",
    "return",
    "import",
    "for",
    "in",
    "if",
    "else",
    "None",
    "True",
    "False",
    "class",
    "with",
    "as",
    "from",
    "raise",
    "not",
    "and",
    "or",
    "is",
    "lambda",
    "yield",
    "try",
    "except",
    "print",
    "len",
    "range",
    "str",
    "int",
    "list",
    "dict",
    "set",
    "open",
    "read",
    "write",
    "path",
    "name",
    "value",
    "key",
    "item",
    "node",
    "tree",
    "head",
    "query",
    "source",
    "token",
    "model",
    "layer",
    "block",
    "index",
]
_PLAIN = [
    "(",
    ")",
    ":",
    ",",
    ".",
    "=",
    " =",
    "==",
    '"',
    "'",
    "[",
    "]",
    "{",
    "}",
    "_",
    "s",
    "ed",
    "ing",
    " 0",
    " 1",
]
VOCAB = (
    _ODD
    + [text.encode() for text in _TEXT]
    + [(" " + word).encode() for word in _WORDS]
    + [text.encode() for text in _PLAIN]
)[:96]


N_TOKENS = N_BLOCKS * BLOCK
BIAS = -0.21
PLAN = {"top": 12, "random": 8, "quantile": 4, "interval": 4, "threshold": 4}


class FakeIndex(FeatureIndex):
    """An index of a dictionary that never was; every identity that a real one keeps, it keeps."""

    n_blocks = N_BLOCKS

    def __init__(self, d_sae: int = D_SAE) -> None:
        self.blocks = _blocks()
        self.documents = [f"package/file{i}.py" for i in range(2 * N_BLOCKS)]
        self.token_texts = SimpleNamespace(vocabulary=(list(VOCAB), [BOS]), byte_tokens=[], prefix=b"")
        n_alive = sum(self.alive(latent) for latent in range(d_sae))
        self.manifest: dict[str, Any] = {
            "format_version": 2,
            "headscope": "0.1.0",
            "created": "2026-01-01T00:00:00Z",
            "site": "blocks.1.attn.hook_z",
            "layer": 1,
            "model": {
                "name": "made-up",
                "n_layers": 2,
                "n_heads": N_HEADS,
                "d_head": 16,
                "d_model": 128,
                "hash": "sha256:1",
            },
            "sae": {
                "name": "made-up-z",
                "architecture": "jumprelu",
                "kind": "BatchTopK (k = 12), applied as JumpReLU",
                "d_sae": d_sae,
                "d_in": 128,
                "hash": "sha256:0",
            },
            "corpus": {
                "name": "nonsense",
                "n_tokens": N_TOKENS,
                "n_blocks": N_BLOCKS,
                "block_size": BLOCK,
                "n_documents": 2 * N_BLOCKS,
                "split": "held out",
            },
            "n_alive": n_alive,
            "l0": 12.1,
            "quality": None,
            "thresholds": [0.0, 1.5],
            "definitions": DEFINITIONS | {"density": "Share of tokens, as the index has it."},
        }

    def stamp(self) -> None:
        """No study adds to it."""

    @staticmethod
    def alive(latent: int) -> bool:
        return latent % 25 != DEAD_LATENT

    @staticmethod
    def trigger(latent: int) -> int:
        """The token on which a latent fires; latent 1 has the hostile one."""
        return latent % len(VOCAB) or 20

    @staticmethod
    def maximum(latent: int) -> float:
        return round(0.5 + (latent * 37 % 100) / 10, 3)

    def tokens_of(self, block: int) -> np.ndarray:
        return self.blocks[block]

    def documents_of(self, block: int) -> np.ndarray:
        return 2 * block + (np.arange(BLOCK) >= BLOCK // 2).astype(np.int64)

    def nulls(self) -> tuple[Null, ...]:
        rng = np.random.default_rng(9)
        kinds = {"random": 8.0, "permuted": 2.0}
        return tuple(
            Null(kind, latent, 300, shares, shares)
            for kind, even in kinds.items()
            for latent, shares in enumerate(rng.dirichlet(np.full(N_HEADS, even), 50))
        )

    def table(self) -> pa.Table:
        rows = [self._row(latent) for latent in range(self.n_latents)]
        return pa.table({name: [row[name] for row in rows] for name in rows[0]})

    def _row(self, latent: int) -> dict[str, Any]:
        f, sources = self.feature(latent), self.sources(latent)
        top = f.shares.top_head
        decoder = int(np.argmax(f.shares.decoder))
        return {
            "latent": latent,
            **{name: getattr(f, name) for name in ("n_active", "density", "mean", "std", "maximum")},
            **{name: getattr(f, name) for name in ("skew", "kurtosis", "copy_rank", "bias")},
            "top_head": top,
            "top_head_share": None if f.shares.dfa is None else float(f.shares.dfa.max()),
            "participation": f.shares.participation,
            "disagreement": f.shares.disagreement,
            "decoder_head": decoder,
            "decoder_share": float(f.shares.decoder[decoder]),
            "top_logit": f.logit_top[0][0],
            "top_logit_value": f.logit_top[0][1],
            "top_source": sources.tokens[0].token if sources else None,
            "top_source_share": sources.tokens[0].share if sources else None,
            "logit_tokens": [token for token, _ in f.logit_top[:10]],
            "example_tokens": [self.trigger(latent)] if f.alive else [],
        }

    def feature(self, latent: int) -> Feature:
        if not 0 <= latent < self.n_latents:
            raise IndexFormatError(f"latent {latent}", expected=f"0 to {self.n_latents - 1}", do="choose another")
        alive, top = self.alive(latent), self.maximum(latent)
        histogram, mass = _histogram(latent, top)
        n_active = int(histogram.sum()) if alive else 0
        order = np.random.default_rng(1000 + latent).permutation(len(VOCAB))
        if latent == HOSTILE:
            order = np.roll(order, -int(np.flatnonzero(order == HOSTILE)[0]))
        values = np.linspace(3.2, 0.9, 20).tolist()
        copy = np.roll(order, 1 if latent % 3 else 0)
        return Feature(
            latent=latent,
            n_active=n_active,
            density=n_active / N_TOKENS,
            density_interval=(n_active / N_TOKENS * 0.9, n_active / N_TOKENS * 1.1),
            mean=top / 3 if alive else None,
            std=top / 5 if alive else None,
            skew=1.25 if alive else None,
            kurtosis=4.5 if alive else None,
            maximum=top if alive else None,
            quantiles=np.array([top * p**2 for p in QUANTILES]) if alive else None,
            histogram=histogram if alive else None,
            mass=mass if alive else None,
            shares=_shares(latent, alive),
            bias=BIAS,
            logit_top=tuple(zip(order[:20].tolist(), values, strict=True)),
            logit_bottom=tuple((token, -value) for token, value in zip(order[::-1][:20].tolist(), values, strict=True)),
            logit_mean=0.0,
            logit_std=0.7,
            logit_skew=0.4,
            logit_kurtosis=3.3,
            copy_top=tuple(zip(copy[:10].tolist(), np.linspace(2.5, 1.0, 10).tolist(), strict=True)),
            copy_rank=(0.0 if latent % 3 == 0 else 0.25) if alive else None,
            correlated=tuple(Correlated((latent + 64 * i + 7) % self.n_latents, 0.8 / i, 0.5 / i) for i in range(1, 6))
            if alive
            else (),
        )

    def sources(self, latent: int, threshold: float | None = None) -> Sources | None:
        if not self.alive(latent):
            return None
        rng = np.random.default_rng([latent, 5])
        boost = np.eye(N_HEADS)[latent % N_HEADS]
        tokens = [self.trigger(latent), *(30 + np.arange(9)).tolist()]
        shares = [0.5, 0.1, *np.linspace(0.05, 0.01, 8).tolist()]
        return Sources(
            threshold=threshold or 0.0,
            n_active=200 if threshold else 400,
            kept=0.93,
            bos_share=0.12,
            kept_by_head=np.full(N_HEADS, 0.9),
            bos_share_by_head=np.full(N_HEADS, 0.1),
            tokens=tuple(
                SourceToken(
                    token=token,
                    n=40 - rank,
                    share=share,
                    share_by_head=share * rng.dirichlet(0.2 + 5 * boost),
                    share_linear=share * 1.2,
                    attention=0.05 + 0.6 * boost,
                    attention_elsewhere=0.01 + 0.03 * boost,
                    frequency=0.002 * (rank + 1),
                )
                for rank, (token, share) in enumerate(zip(tokens, shares, strict=True))
            ),
        )

    def examples(self, latent: int) -> tuple[ExampleGroup, ...]:
        if not self.alive(latent):
            return ()
        feature, top = self.feature(latent), self.maximum(latent)
        assert feature.histogram is not None
        assert feature.mass is not None
        made = [self._group(latent, "top", 0, 1.0, 0.6, 0.1), self._group(latent, "random", 0, 0.9, 0.05, 1.0)]
        made += [self._group(latent, "quantile", i, 1 - i / 5, 0.8 - i / 5, 0.2) for i in range(5)]
        for i in range(9, -1, -1):
            bins = slice(5 * i, 5 * i + 5)
            group = self._group(latent, "interval", i, (i + 1) / 10, i / 10, 0.0)
            shares = (feature.histogram[bins].sum() / feature.n_active, feature.mass[bins].sum() / feature.mass.sum())
            made.append(_with(group, low=i / 10 * top, high=(i + 1) / 10 * top, shares=shares))
        return (*made, self._group(latent, "threshold", 0, 0.04, 0.01, 0.01))

    def example_columns(self, latent: int) -> tuple[tuple[DrawnGroup, ...], ExampleColumns]:
        groups = self.examples(latent)
        examples = list({e.position: e for group in groups for e in group.examples}.values())
        plain = ("kind", "number", "low", "high", "n", "share_active", "share_mass", "sampled")
        drawn = tuple(
            DrawnGroup(
                **{name: getattr(group, name) for name in plain},
                positions=tuple(e.position for e in group.examples),
                duplicates=tuple(e.duplicates for e in group.examples),
            )
            for group in groups
        )
        numbers = ("activation", "pre", "bias", "residual")
        sources = [source for e in examples for source in e.sources]
        return drawn, ExampleColumns(
            position=np.array([e.position for e in examples], dtype=np.int64),
            **{name: np.array([getattr(e, name) for e in examples], dtype=np.float64) for name in numbers},
            heads=np.array([e.heads for e in examples]).reshape(-1, N_HEADS),
            rest=np.array([e.rest for e in examples]).reshape(-1, N_HEADS),
            n_sources=np.array([len(e.sources) for e in examples], dtype=np.int64),
            source=np.array([source.position for source in sources], dtype=np.int64),
            source_heads=np.array([source.heads for source in sources]).reshape(-1, N_HEADS),
            source_pattern=np.array([source.pattern for source in sources]).reshape(-1, N_HEADS),
            n_active=np.array([len(e.active_at) for e in examples], dtype=np.int64),
            active_at=np.concatenate([np.zeros(0, dtype=np.int64), *(e.active_at for e in examples)]),
            active_value=np.concatenate([np.zeros(0), *(e.active_value for e in examples)]),
        )

    def _group(self, latent: int, kind: str, number: int, high: float, low: float, share: float) -> ExampleGroup:
        n, top = PLAN[kind], self.maximum(latent)
        salt = {"top": 0, "random": 12, "quantile": 20, "interval": 40, "threshold": 80}[kind] + n * number
        levels = (np.linspace(high, low, n + 1)[:n] * top).tolist()
        examples = tuple(self._example(latent, salt + i, level) for i, level in enumerate(levels))
        if kind == "quantile" and number == 0:  # what is strongest is in several groups
            examples = (self._example(latent, 0, top), *examples[1:])
        return ExampleGroup(kind, number, low * top, high * top, n, share, share, False, examples)

    def _example(self, latent: int, number: int, activation: float) -> Example:
        turn, block = divmod(number, N_BLOCKS)
        rng = np.random.default_rng([latent, number])
        twin = latent == TWIN_LATENT and block == 1
        dst = 255 if number == 2 else latent % PERIOD + 30 + PERIOD * (0 if twin else (block + turn) % 5)
        positions = sorted({0, dst, dst - 3, max(dst - 38, 1), *rng.integers(1, dst, 4).tolist()})
        parts = rng.normal(0, 0.01, (len(positions), N_HEADS)) * activation
        parts[-3, latent % N_HEADS] += 0.7 * activation
        parts[1, (latent + 1) % N_HEADS] -= 0.3 * activation
        rest = rng.normal(0, 0.01, N_HEADS) * activation
        rest[0] += activation - BIAS - parts.sum() - rest.sum()
        heads = parts.sum(0) + rest
        pattern = rng.dirichlet(np.ones(len(positions) + 1) * 0.4, N_HEADS).T
        order = np.argsort(-np.abs(parts.sum(1)), kind="stable")
        ids = self.blocks[block]
        others = np.flatnonzero((ids == self.trigger(latent)) & (np.arange(BLOCK) != dst))
        active = np.sort(np.append(others, dst))
        return Example(
            position=block * BLOCK + dst,
            activation=activation,
            pre=activation,
            bias=BIAS,
            residual=float(activation - (heads.sum() + BIAS)),
            heads=heads,
            sources=tuple(Source(int(positions[i]), parts[i], pattern[i]) for i in order.tolist()),
            rest=rest,
            rest_pattern=pattern[-1],
            active_at=active,
            active_value=np.where(active == dst, activation, activation * 0.4),
            duplicates=block % 7 // 5,
        )


class FakeSource(IndexCards):
    """The cards of a made-up index."""

    def __init__(self, d_sae: int = D_SAE) -> None:
        self.index = FakeIndex(d_sae)
        super().__init__(self.index)
        self.d_sae = d_sae

    @cached_property
    def rows(self) -> dict[str, list[Any]]:
        """The table, by column."""
        return super().table()["rows"]

    @lru_cache(maxsize=256)  # noqa: B019
    def feature(self, latent: int, *, lean: bool = False) -> dict[str, Any]:
        return super().feature(latent, lean=lean)

    @lru_cache(maxsize=256)  # noqa: B019
    def records(self, latent: int) -> tuple[ExampleGroup, ...]:
        """The example groups of a latent, as the index has them."""
        return self.index.examples(latent)

    def about(self) -> dict[str, Any]:
        figures = [
            ("L0", "12.1 [12.0, 12.2]", "12", "Active latents on a token, on average."),
            ("loss_recovered", "91.0 % [90.5, 91.4]", "87 %", "Share of the loss won back."),
            ("explained_variance", "82.0 %", "", "1 - residual variance."),
        ]
        names = ("name", "value", "post", "definition")
        return super().about() | {"quality": [dict(zip(names, row, strict=True)) for row in figures]}


def _with(group: ExampleGroup, *, low: float, high: float, shares: tuple[float, float]) -> ExampleGroup:
    active, mass = (float(share) for share in shares)
    return replace(group, low=low, high=high, share_active=active, share_mass=mass)


def _histogram(latent: int, top: float) -> tuple[np.ndarray, np.ndarray]:
    bins = np.arange(50)
    counts = np.ceil((40 + latent % 60) * np.exp(-bins / 9) + 6 * np.exp(-(((bins - 33) / 5) ** 2))).astype(np.int64)
    return counts, counts * (bins + 0.5) / 50 * top


def _shares(latent: int, alive: bool) -> Shares:
    rng = np.random.default_rng(latent)
    boost = np.eye(N_HEADS)[latent % N_HEADS]
    rows = {
        key: rng.dirichlet(np.ones(N_HEADS) + 20 * boost)
        for key in ("encoder", "encoder_in", "decoder_out", "dfa", "dfa_covariance", "dfa_mean")
    }
    rows["decoder"] = rng.dirichlet(np.ones(N_HEADS) + 12 * (boost if latent % 5 else np.roll(boost, 1)))
    if not alive:
        return Shares(**(rows | {"dfa": None, "dfa_covariance": None, "dfa_mean": None}))
    return Shares(**rows)


def _blocks() -> np.ndarray:
    """Blocks of words, with each odd token planted in all of them; the second is the first with two tokens swapped."""
    rng = np.random.default_rng(0)
    ids = rng.integers(9, len(VOCAB), (N_BLOCKS, BLOCK))
    ids[:, 0] = BOS
    for row in ids:
        start = int(rng.integers(1, 200))
        row[start : start + 8] = [HOSTILE, *EMOJI, *LONE, NEWLINE, TAB]
        row[start + 20 : start + 23] = [NEWLINE, TAB, 20]
    ids[0, HOSTILE + 30] = HOSTILE  # where the strongest example of that latent is
    at = TWIN_LATENT + 30
    ids[0, at] = ids[1, at] = TWIN_LATENT
    ids[1] = ids[0]
    ids[1, [at - 1, at - 2]] = ids[0, [at - 2, at - 1]]
    return ids
