"""The explorer as one HTML file that needs no server and no network: the same modules, styles and JSON.

The JSON is compressed and written as base64 in script elements that no browser executes, features in packs,
so that opening the file unpacks only what is looked at. A policy in the file allows its own script and style
and nothing else.
"""

import base64
import gzip
import hashlib
import html
import math
import re
from collections.abc import Sequence
from pathlib import Path

from headscope.artefact import atomic_write
from headscope.errors import ExportError
from headscope.explorer.server import CardSource, Json, about_of, dump_json, static_files

MAX_FEATURES = 2000
"""More features than this make a file that is slow to open; serve the index instead."""

_PACK = 64  # features unpacked together
_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./(\w+\.js)";\n', re.MULTILINE)
_STYLE_LINK = '<link rel="stylesheet" href="/static/style.css">'
_SCRIPT_LINK = '<script type="module" src="/static/app.js"></script>'


def export_html(source: CardSource, path: Path, features: Sequence[int] | None = None) -> Path:
    """Write the explorer with the cards of `features` (all when None) into one HTML file.

    Raises:
        ExportError: more than `MAX_FEATURES` features, none, or a latent that does not exist.
        OutputError: the file cannot be written.
    """
    about, table = about_of(source), source.table()
    chosen = list(dict.fromkeys(table["rows"]["latent"] if features is None else features))
    _check(chosen, about["sae"]["d_sae"])
    packs = [chosen[start : start + _PACK] for start in range(0, len(chosen), _PACK)]
    core = {
        "about": about | {"exported": len(chosen)},
        "vocab": source.vocab(),
        "table": _rows_of(table, chosen),
        "pack_of": {latent: number for number, pack in enumerate(packs) for latent in pack},
    }
    pieces = _page_around(about["title"])
    with atomic_write(Path(path)) as file:
        file.write(pieces[0])
        file.write(_data_block("data-core", core))
        for number, pack in enumerate(packs):
            cards = {str(latent): _lean(source.feature(latent)) for latent in pack}
            file.write(_data_block(f"data-pack-{number}", cards))
        file.write(pieces[1])
    return Path(path)


def _check(chosen: Sequence[int], d_sae: int) -> None:
    if not 1 <= len(chosen) <= MAX_FEATURES:
        raise ExportError(
            f"{len(chosen):,} features to export",
            expected=f"1 to {MAX_FEATURES:,} features in one file",
            do="pass fewer features, or serve the whole index" if chosen else "pass the latents to export",
        )
    unknown = [latent for latent in chosen if not 0 <= latent < d_sae]
    if unknown:
        raise ExportError(
            f"no latent {unknown[0]} to export",
            expected=f"latents from 0 to {d_sae - 1}",
            do="correct the list",
        )


def _rows_of(table: Json, chosen: Sequence[int]) -> Json:
    """Keep the table's rows of the chosen latents, in the table's order."""
    wanted = set(chosen)
    keep = [row for row, latent in enumerate(table["rows"]["latent"]) if latent in wanted]
    return table | {"rows": {name: [values[row] for row in keep] for name, values in table["rows"].items()}}


def _lean(card: Json) -> Json:
    """Round a card's examples to what the page shows, which makes the file four times smaller.

    What rounding takes from a source is given to `rest`, so that each head's parts still add up to it.
    """
    groups = [
        group | {"examples": [_lean_example(example) for example in group["examples"]]} for group in card["groups"]
    ]
    return card | {"groups": groups}


def _lean_example(example: Json) -> Json:
    shown = 3 - math.floor(math.log10(max(abs(example["pre"]), 1e-9)))  # decimals: 3 where pre is 1 to 10
    sources = [source | {"heads": [round(dfa, shown) for dfa in source["heads"]]} for source in example["sources"]]
    heads = [round(dfa, shown + 3) for dfa in example["heads"]]
    parts = [sum(source["heads"][h] for source in sources) for h in range(len(heads))]
    return example | {
        "sources": sources,
        "heads": heads,
        "rest": [round(dfa - part, shown + 3) for dfa, part in zip(heads, parts, strict=True)],
        "acts": [[position, round(value, shown + 1)] for position, value in example["acts"]],
        "activation": round(example["activation"], shown + 3),
        "pre": round(example["pre"], shown + 3),
        "bias": round(example["bias"], shown + 3),
        "residual": float(f"{example['residual']:.0e}"),
    }


def _data_block(name: str, content: Json) -> bytes:
    """Wrap JSON so that no text in it can be markup: compressed, then base64."""
    packed = base64.b64encode(gzip.compress(dump_json(content), compresslevel=9, mtime=0))
    return b'<script type="application/octet-stream" id="%s">%s</script>\n' % (name.encode(), packed)


def _page_around(title: str) -> tuple[bytes, bytes]:
    """Return the page before and after its data, style and script inlined and allowed by their hashes."""
    files = {name: body.decode() for name, body in static_files().items()}
    script, style = _one_script(files), files["style.css"]
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "base-uri 'none'",
        ]
    )
    page = files["index.html"].replace("<title>headscope</title>", f"<title>{html.escape(title)}</title>")
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>'
    page = page.replace(_STYLE_LINK, head)
    before, after = page.split(_SCRIPT_LINK)
    return before.encode(), f'<script type="module">{script}</script>{after}'.encode()


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _one_script(files: dict[str, str]) -> str:
    """Concatenate the modules that app.js needs, each after those it imports.

    The modules import by plain name from their own folder and export declarations only, so that dropping
    `import` and `export` leaves one module with the same meaning.
    """
    done: dict[str, str] = {}

    def add(name: str) -> None:
        if name in done:
            return
        for _, needed in _IMPORT.findall(files[name]):
            add(needed)
        body = re.sub(r"^export ", "", _IMPORT.sub("", files[name]), flags=re.MULTILINE)
        done[name] = f"// {name}\n{body}"

    add("app.js")
    return "\n".join(done.values())
