"""Export of the explorer without a server: one HTML file, or a folder for any static host.

Both hold the same modules, styles and JSON as the served page, the JSON compressed and features in packs, so that only
viewed data is unpacked. The file stores it as base64 in script elements that no browser executes, needs no network, and
holds each token of the corpus once, however many examples show it. A content security policy allows the page's own
script and style and nothing else.
"""

import base64
import gzip
import hashlib
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from headscope.artefact import atomic_write, new_folder
from headscope.encode import Json
from headscope.errors import ExportError
from headscope.explorer.answers import dump_json
from headscope.explorer.page_routes import PageRoutes
from headscope.explorer.server import CardSource, about_of, static_files

MAX_FEATURES = 2000
"""Maximum number of features in a file, beyond which it opens slowly; `export_folder` has no such limit."""

_PACK = 64  # features unpacked together
_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./(\w+\.js)";\n', re.MULTILINE)
_LAZY = re.compile(r'^[ \t]*const \{[^}]*\} = await import\("\./(\w+\.js)"\);\n', re.MULTILINE)
_ASIDE = re.compile(r"^[ \t]*//[^\n]*\n|^[ \t]*/\*\*(?:(?!\*/).)*\*/\n|^[ \t]+", re.MULTILINE | re.DOTALL)
_STUDIES = ("dive.js", "upstream.js", "record.js")
_PAGES, _PAGE_STYLE = ("family.js", "head.js"), "pages.css"
_SERVED = ("labels.js", "prompt.js")  # they write or compute, and so need a server
_STYLE_LINK = '<link rel="stylesheet" href="/static/style.css">'
_SCRIPT_LINK = '<script type="module" src="/static/app.js"></script>'
_TOKEN = re.compile(r'<meta name="headscope-token"[^>]*>\n')
_START = '<meta name="headscope-start" content="/f/{latent}?tab=specificity">\n'
_IN_FOLDER = '<meta name="headscope-folder" content="packs">\n'


def export_html(
    source: CardSource, path: Path, features: Sequence[int] | None = None, *, studies: Mapping[int, Json] | None = None
) -> Path:
    """Write the explorer with the cards of `features` (all when None) into one HTML file.

    Args:
        source: the cards to show.
        path: the file.
        features: their latents.
        studies: data of each feature's study tabs (`headscope.explorer.studies.packed`); without it, the cards have no
            such tabs.

    Raises:
        ExportError: more than `MAX_FEATURES` features, none, or a latent that does not exist.
        OutputError: the file cannot be written.
    """
    chosen, core = _chosen(source, features, studies=studies is not None)
    if len(chosen) > MAX_FEATURES:
        raise ExportError(
            f"{len(chosen):,} features to export",
            expected=f"at most {MAX_FEATURES:,} features in one file",
            do="pass fewer features, export a folder, or serve the whole index",
        )
    start = _START.format(latent=chosen[0]) if studies else ""
    before, after = _page_around(core["about"]["title"], connect="'none'", mark=start, studies=studies is not None)
    text = _Text(core["about"]["corpus"]["block_size"])
    with atomic_write(Path(path)) as file:
        file.write(before)
        file.write(_data_block("data-core", dump_json(core)))
        for number, pack in enumerate(_packs_of(chosen)):
            file.write(_data_block(f"data-pack-{number}", dump_json(_cards(source, pack, text))))
        if studies is not None:
            file.write(_data_block("data-studies", dump_json(studies)))
        places, ids = text.as_bytes()
        file.write(_data_block("data-text", dump_json(places)))
        file.write(_data_block("data-ids", ids))
        file.write(after)
    return Path(path)


def export_folder(
    source: CardSource,
    path: Path,
    features: Sequence[int] | None = None,
    *,
    overwrite: bool = False,
    roles: PageRoutes | None = None,
) -> Path:
    """Write the explorer with the cards of `features` (all when None) into a folder that any static host can serve.

    Contains `index.html`, `core.json.gz` (description, vocabulary and table) and `packs/<number>.json.gz`, 64 features
    each with the text they show; with `roles`, also `pages/`: the pages of families and heads, which cover all
    features, and link to the exported ones. Browsers do not let a page read local files, so the folder has to be
    served, if only by `python -m http.server`.

    Raises:
        ExportError: no features, or a latent that does not exist.
        OutputError: the folder is not empty and `overwrite` is false, or it cannot be written.
    """
    chosen, core = _chosen(source, features, pages=roles is not None)
    has_pages = roles is not None
    before, after = _page_around(core["about"]["title"], connect="'self'", mark=_IN_FOLDER, pages=has_pages)
    with new_folder(Path(path), overwrite=overwrite) as scratch:
        (scratch / "index.html").write_bytes(before + after)
        (scratch / "core.json.gz").write_bytes(_gzip(dump_json(core)))
        (scratch / "packs").mkdir()
        for number, pack in enumerate(_packs_of(chosen)):
            text = _Text(core["about"]["corpus"]["block_size"])
            cards = _cards(source, pack, text)
            packed = _gzip(dump_json({"cards": cards} | text.as_json()))
            (scratch / "packs" / f"{number}.json.gz").write_bytes(packed)
        for name, page in roles.every() if roles else ():
            file = scratch / "pages" / f"{name}.json.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(_gzip(dump_json(page)))
    return Path(path)


def _chosen(source: CardSource, features: Sequence[int] | None, **parts: bool) -> tuple[list[int], Json]:
    """Return the features to export, and all shared data of the page."""
    about, table = about_of(source, **parts), source.table()
    chosen = list(dict.fromkeys(table["rows"]["latent"] if features is None else features))
    if not chosen:
        raise ExportError("no features to export", expected="at least one", do="pass the latents to export")
    d_sae = about["sae"]["d_sae"]
    unknown = [latent for latent in chosen if not 0 <= latent < d_sae]
    if unknown:
        raise ExportError(
            f"no latent {unknown[0]} to export",
            expected=f"latents from 0 to {d_sae - 1}",
            do="correct the list",
        )
    return chosen, {
        "about": about | {"exported": len(chosen)},
        "vocab": source.vocab(),
        "table": _rows_of(table, chosen),
        "pack_of": {latent: position // _PACK for position, latent in enumerate(chosen)},
    }


def _packs_of(chosen: Sequence[int]) -> list[Sequence[int]]:
    return [chosen[start : start + _PACK] for start in range(0, len(chosen), _PACK)]


def _cards(source: CardSource, pack: Sequence[int], text: "_Text") -> Json:
    """Return the cards of a pack; their corpus text is collected in `text`."""
    cards = {}
    for latent in pack:
        card = source.feature(latent, lean=True)
        text.add(card)
        cards[str(latent)] = {name: part for name, part in card.items() if name not in _Text.PARTS}
    return cards


def _rows_of(table: Json, chosen: Sequence[int]) -> Json:
    """Keep the table's rows of the chosen latents, in the table's order."""
    wanted = set(chosen)
    keep = [row for row, latent in enumerate(table["rows"]["latent"]) if latent in wanted]
    return table | {"rows": {name: [values[row] for row in keep] for name, values in table["rows"].items()}}


class _Text:
    """The text shown by some cards, each token once, with its documents."""

    PARTS = ("text", "document_at", "documents")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: dict[int, np.ndarray] = {}  # token ids, -1 where none is shown
        self._documents: Json = {"document_at": {}, "documents": {}}

    def add(self, card: Json) -> None:
        """Add the text of a card."""
        for block, start, ids in card["text"]:
            if block not in self._blocks:
                self._blocks[block] = np.full(self._block_size, -1, dtype=np.int64)
            self._blocks[block][start : start + len(ids)] = ids
        for name, own in self._documents.items():
            own.update(card[name])

    def _runs(self) -> Iterator[tuple[int, int, np.ndarray]]:
        for block, ids in sorted(self._blocks.items()):
            shown = np.flatnonzero(ids >= 0)
            for run in np.split(shown, np.flatnonzero(np.diff(shown) > 1) + 1):
                yield block, int(run[0]), ids[run]

    def as_json(self) -> Json:
        """Return the text in the form of a card's text."""
        return self._documents | {"text": [[block, start, ids.tolist()] for block, start, ids in self._runs()]}

    def as_bytes(self) -> tuple[Json, bytes]:
        """Return the same with the token ids apart, as little-endian integers: smaller, and without parsing."""
        runs = list(self._runs())
        ids = np.concatenate([ids for _, _, ids in runs]) if runs else np.zeros(0, dtype=np.int64)
        size = 2 if ids.max(initial=0) < 1 << 16 else 4
        places = [number for block, start, own in runs for number in (block, start, len(own))]
        return self._documents | {"runs": places, "bytes": size}, ids.astype(f"<u{size}").tobytes()


def _gzip(content: bytes) -> bytes:
    return gzip.compress(content, compresslevel=9, mtime=0)


def _data_block(name: str, content: bytes) -> bytes:
    """Wrap data so that no text in it can be markup: compressed, then base64."""
    packed = base64.b64encode(_gzip(content))
    return b'<script type="application/octet-stream" id="%s">%s</script>\n' % (name.encode(), packed)


def _page_around(
    title: str, *, connect: str, mark: str, studies: bool = False, pages: bool = False
) -> tuple[bytes, bytes]:
    """Return the page before and after its data, style and script inlined and allowed by their hashes.

    Args:
        title: title of the page.
        connect: what its content security policy lets it fetch.
        mark: the element with the location of the data, or the initial view.
        studies: whether its cards have the tabs of studies, and so their scripts.
        pages: whether it has the pages of families and heads, and so their scripts.
    """
    files = {name: body.decode() for name, body in static_files().items()}
    without = {*_SERVED, *(() if studies else _STUDIES), *(() if pages else _PAGES)}
    script, style = _one_script(files, without), files["style.css"] + (files[_PAGE_STYLE] if pages else "")
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"connect-src {connect}",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "base-uri 'none'",
        ]
    )
    page = files["index.html"].replace("<title>headscope</title>", f"<title>{html.escape(title)}</title>")
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>'
    page = _TOKEN.sub(mark, page).replace(_STYLE_LINK, head)
    before, after = page.split(_SCRIPT_LINK)
    return before.encode(), f'<script type="module">{script}</script>{after}'.encode()


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _one_script(files: dict[str, str], without: set[str]) -> str:
    """Concatenate the modules that app.js needs, each after those it imports.

    The modules import by plain name from their own folder and export declarations only, so that dropping `import` and
    `export` leaves one equivalent module; lazily imported ones are included like the others, unless the page is
    `without` them. No string literal spans lines, so that comments and indentation can be dropped too.
    """
    done: dict[str, str] = {}

    def add(name: str) -> None:
        if name in done or name in without:
            return
        for needed in [n for _, n in _IMPORT.findall(files[name])] + _LAZY.findall(files[name]):
            add(needed)
        body = _LAZY.sub("", _IMPORT.sub("", files[name]))
        done[name] = _ASIDE.sub("", re.sub(r"^export ", "", body, flags=re.MULTILINE))

    add("app.js")
    return "\n".join(done.values())
