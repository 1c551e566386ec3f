"""A made-up, deterministic source of cards, with every kind of token that has ever broken such a page."""

from typing import Any

import numpy as np

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

_COLUMNS = [
    ("latent", "latent", "int"),
    ("alive", "alive", "bool"),
    ("density", "density", "percent"),
    ("n_active", "n active", "int"),
    ("max", "max", "float"),
    ("mean", "mean", "float"),
    ("top_head", "top head", "head"),
    ("top_head_share", "DFA share", "percent"),
    ("decoder_head", "decoder head", "head"),
    ("decoder_share", "decoder share", "percent"),
    ("top_logit", "top logit", "token"),
    ("top_logit_value", "logit", "float"),
    ("top_source", "top source", "token"),
    ("top_source_share", "source share", "percent"),
]


class FakeSource:
    """Cards of a dictionary that never was; every identity that a real card keeps, these keep."""

    def __init__(self, d_sae: int = D_SAE) -> None:
        self.d_sae = d_sae
        self.blocks = _blocks()
        self.kept: dict[int, dict[str, Any]] = {}

    def about(self) -> dict[str, Any]:
        return {
            "format": 1,
            "title": "made-up attention SAE",
            "site": "blocks.1.attn.hook_z",
            "model": {"name": "made-up", "n_layers": 2, "n_heads": N_HEADS, "d_model": 128},
            "sae": {
                "name": "made-up-z",
                "architecture": "batchtopk",
                "d_sae": self.d_sae,
                "d_in": 128,
                "hash": "sha256:0",
            },
            "corpus": {
                "name": "nonsense",
                "n_tokens": N_BLOCKS * BLOCK,
                "n_blocks": N_BLOCKS,
                "block_size": BLOCK,
                "n_documents": 2 * N_BLOCKS,
                "split": "held out",
            },
            "n_alive": sum(self.alive(latent) for latent in range(self.d_sae)),
            "n_dead": sum(not self.alive(latent) for latent in range(self.d_sae)),
            "l0": 12.1,
            "quality": [
                {
                    "name": "L0",
                    "value": "12.1 [12.0, 12.2]",
                    "post": "12",
                    "definition": "Active latents on a token, on average.",
                },
                {
                    "name": "loss_recovered",
                    "value": "91.0 % [90.5, 91.4]",
                    "post": "87 %",
                    "definition": "Share of the loss won back.",
                },
                {
                    "name": "explained_variance",
                    "value": "82.0 %",
                    "post": "",
                    "definition": "1 - residual variance.",
                },
            ],
            "definitions": {"density": "Share of tokens on which the feature is active."},
            "created": "2026-01-01T00:00:00Z",
            "version": "0.1.0",
        }

    def vocab(self) -> dict[str, Any]:
        return {"tokens": [token.decode("latin-1") for token in VOCAB], "special": [BOS]}

    def alive(self, latent: int) -> bool:
        return latent % 25 != DEAD_LATENT

    def table(self) -> dict[str, Any]:
        names = [name for name, _, _ in _COLUMNS] + ["logit_tokens", "example_tokens"]
        rows: dict[str, list[Any]] = {name: [] for name in names}
        for latent in range(self.d_sae):
            row = self._row(latent)
            for name in names:
                rows[name].append(row[name])
        columns = [
            {"name": name, "label": label, "kind": kind, "definition": f"What {label} is."}
            for name, label, kind in _COLUMNS
        ]
        return {"columns": columns, "rows": rows}

    def _row(self, latent: int) -> dict[str, Any]:
        if not self.alive(latent):
            empty: dict[str, Any] = {name: None for name, _, _ in _COLUMNS}
            return (
                empty
                | {"latent": latent, "alive": False, "density": 0.0, "n_active": 0}
                | {
                    "logit_tokens": [],
                    "example_tokens": [],
                }
            )
        stats, heads, logits = self._stats(latent), self._heads(latent), self._logits(latent)
        top, decoder = int(np.argmax(heads["dfa"])), int(np.argmax(heads["decoder"]))
        return {
            "latent": latent,
            "alive": True,
            **{name: stats[name] for name in ("density", "n_active", "max", "mean")},
            "top_head": heads["names"][top],
            "top_head_share": heads["dfa"][top],
            "decoder_head": heads["names"][decoder],
            "decoder_share": heads["decoder"][decoder],
            "top_logit": logits["top"][0][0],
            "top_logit_value": logits["top"][0][1],
            "top_source": self.trigger(latent),
            "top_source_share": 0.5,
            "logit_tokens": [token for token, _ in logits["top"]],
            "example_tokens": [self.trigger(latent)],
        }

    def trigger(self, latent: int) -> int:
        """The token on which a latent fires; latent 1 has the hostile one."""
        return latent % len(VOCAB) or 20

    def feature(self, latent: int) -> dict[str, Any]:
        if not 0 <= latent < self.d_sae:
            raise IndexError(f"latents go from 0 to {self.d_sae - 1}")
        if latent not in self.kept:
            self.kept[latent] = self._card(latent)
        return self.kept[latent]

    def _card(self, latent: int) -> dict[str, Any]:
        alive = self.alive(latent)
        stats = self._stats(latent) if alive else {"n_tokens": N_BLOCKS * BLOCK, "n_active": 0, "density": 0.0}
        return {
            "latent": latent,
            "alive": alive,
            "stats": stats | {"density_upper95": 3 / (N_BLOCKS * BLOCK)},
            "histogram": self._histogram(latent) if alive else None,
            "heads": self._heads(latent),
            "logits": self._logits(latent),
            "sources": [[self.trigger(latent), 0.5, 20], [BOS, 0.3, 12], [30, 0.1, 4]] if alive else [],
            "bias": -0.21,
            "groups": self._groups(latent) if alive else [],
        }

    def context(self, block: int) -> dict[str, Any]:
        if not 0 <= block < N_BLOCKS:
            raise IndexError(f"blocks go from 0 to {N_BLOCKS - 1}")
        names = [[1, f"package/file{2 * block}.py"], [128, f"package/file{2 * block + 1}.py"]]
        return {"block": block, "document_at": names, "ids": self.blocks[block].tolist()}

    def _maximum(self, latent: int) -> float:
        return round(0.5 + (latent * 37 % 100) / 10, 3)

    def _stats(self, latent: int) -> dict[str, Any]:
        n_tokens, n_active = N_BLOCKS * BLOCK, 300 + latent * 11 % 977
        top = self._maximum(latent)
        quantiles = [[p, round(top * p**2, 4)] for p in (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)]
        stats = {"n_tokens": n_tokens, "n_active": n_active, "density": n_active / n_tokens, "max": top}
        return stats | {"mean": top / 3, "std": top / 5, "quantiles": quantiles}

    def _histogram(self, latent: int) -> dict[str, Any]:
        edges = np.linspace(0, self._maximum(latent), 51)
        counts = np.floor(400 * np.exp(-np.arange(50) / 9) + 6 * np.exp(-(((np.arange(50) - 33) / 5) ** 2))).astype(int)
        mass = counts * (edges[:-1] + edges[1:]) / 2
        return {"edges": edges.tolist(), "counts": counts.tolist(), "mass": mass.tolist()}

    def _heads(self, latent: int) -> dict[str, Any]:
        rng = np.random.default_rng(latent)
        names = [f"1.{head}" for head in range(N_HEADS)]
        boost = np.eye(N_HEADS)[latent % N_HEADS]
        rows = {
            key: rng.dirichlet(np.ones(N_HEADS) + 20 * boost) for key in ("encoder", "decoder_out", "dfa", "dfa_cov")
        }
        agree = boost if latent % 5 else np.roll(boost, 1)
        rows["decoder"] = rng.dirichlet(np.ones(N_HEADS) + 12 * agree)
        return {"names": names} | {key: row.tolist() for key, row in rows.items()}

    def _logits(self, latent: int) -> dict[str, Any]:
        order = np.random.default_rng(1000 + latent).permutation(len(VOCAB))
        if latent == HOSTILE:
            order = np.roll(order, -int(np.flatnonzero(order == HOSTILE)[0]))
        values = np.linspace(3.2, 0.9, 20)
        top = [[int(token), float(value)] for token, value in zip(order[:20], values, strict=True)]
        bottom = [[int(token), -float(value)] for token, value in zip(order[::-1][:20], values, strict=True)]
        return {"top": top, "bottom": bottom, "mean": 0.0, "std": 0.7}

    def _groups(self, latent: int) -> list[dict[str, Any]]:
        top = self._maximum(latent)
        groups = [self._group(latent, "top", 0, "Top activations", 1.0, 0.6, 20)]
        groups += [self._group(latent, "random", 0, "Random active tokens", 0.9, 0.05, 10)]
        for kind, label in (("quantile", "Quantile"), ("interval", "Interval")):
            for index in range(10):
                lo, hi = index / 10, (index + 1) / 10
                name = f"{label} {lo:.1f} to {hi:.1f}"
                groups.append(self._group(latent, kind, index, name, hi, lo, 5))
                groups[-1] |= {
                    "lo": lo * top,
                    "hi": hi * top,
                    "share_active": 0.1,
                    "share_mass": (2 * index + 1) / 100,
                }
        return groups

    def _group(self, latent: int, kind: str, index: int, label: str, high: float, low: float, n: int) -> dict[str, Any]:
        salt = {"top": 0, "random": 20, "quantile": 30, "interval": 45}[kind] + (index if n == 5 else 0)
        levels = np.linspace(high, low, n + 1)[:n] * self._maximum(latent)
        examples = [self._example(latent, (salt + i) % N_BLOCKS, float(level)) for i, level in enumerate(levels)]
        return {"kind": kind, "index": index, "label": label, "lo": None, "hi": None, "n": n} | {
            "share_active": n / 300,
            "share_mass": 0.1,
            "examples": examples,
        }

    def _example(self, latent: int, block: int, activation: float) -> dict[str, Any]:
        rng = np.random.default_rng([latent, block])
        ids = self._block_with(latent, block)
        twin = latent == TWIN_LATENT and block == 1
        dst = 255 if block == 2 else latent % PERIOD + 30 + PERIOD * (0 if twin else block % 5)
        sources = sorted({0, dst, dst - 3, max(dst - 38, 1), *rng.integers(1, dst, 4).tolist()})
        parts = rng.normal(0, 0.04, (len(sources), N_HEADS)) * activation
        parts[-3, latent % N_HEADS] += 0.7 * activation
        parts[1, (latent + 1) % N_HEADS] -= 0.3 * activation
        rest, bias = rng.normal(0, 0.01, N_HEADS), -0.21
        rest[0] += activation - bias - parts.sum() - rest.sum()
        heads = parts.sum(0) + rest
        order = np.argsort(-np.abs(parts.sum(1)), kind="stable")
        segments = _segments(dst, sources, int(sources[int(order[0])]), ids)
        seen = [pos for start, run in segments for pos in range(start, start + len(run))]
        acts = {pos: activation * 0.4 for pos in seen if ids[pos] == self.trigger(latent)} | {dst: activation}
        return {
            "position": block * BLOCK + dst,
            "block": block,
            "dst": dst,
            "document": f"package/file{2 * block + (dst > 127)}.py",
            "activation": activation,
            "pre": activation,
            "bias": bias,
            "residual": float(activation - (heads.sum() + bias)),
            "next": int(ids[dst + 1]) if dst + 1 < BLOCK else None,
            "segments": segments,
            "acts": [[pos, acts[pos]] for pos in sorted(acts)],
            "heads": heads.tolist(),
            "sources": [{"pos": int(sources[i]), "heads": parts[i].tolist()} for i in order.tolist()],
            "rest": rest.tolist(),
            "n_rest": dst + 1 - len(sources),
            "duplicates": block % 7 // 5,
        }

    def _block_with(self, latent: int, block: int) -> np.ndarray:
        """A block with the latent's trigger where it fires; blocks 0 and 1 are twins for TWIN_LATENT."""
        twin = latent == TWIN_LATENT and block == 1
        ids = self.blocks[0 if twin else block].copy()
        ids[latent % PERIOD + 30 :: PERIOD] = self.trigger(latent)
        if twin:
            at = latent % PERIOD + 30
            ids[at - 1], ids[at - 2] = ids[at - 2], ids[at - 1]
        return ids


def _blocks() -> np.ndarray:
    """Blocks of words, with each odd token planted in all of them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(9, len(VOCAB), (N_BLOCKS, BLOCK))
    ids[:, 0] = BOS
    for row in ids:
        start = int(rng.integers(1, 200))
        row[start : start + 8] = [HOSTILE, *EMOJI, *LONE, NEWLINE, TAB]
        row[start + 20 : start + 23] = [NEWLINE, TAB, 20]
    return ids


def _segments(dst: int, sources: list[int], top: int, ids: np.ndarray) -> list[list[Any]]:
    """Runs of the block that an example keeps: the destination's window, the top source and the others."""
    keep = np.zeros(BLOCK, bool)
    keep[max(dst - 16, 0) : dst + 17] = True
    for pos in sources:
        width = 5 if pos == top else 1
        keep[max(pos - width, 0) : pos + width + 1] = True
    starts = np.flatnonzero(keep & ~np.r_[False, keep[:-1]])
    ends = np.flatnonzero(keep & ~np.r_[keep[1:], False]) + 1
    return [[int(a), ids[a:b].tolist()] for a, b in zip(starts, ends, strict=True)]
