"""Local copy of a dataset repository: the files of one split of one configuration, as `datasets` chooses them.

A folder is treated as one if its `README.md` starts with the YAML header of a dataset card, or if it has files of rows
that are named by split (`data/train-00000-of-00001.parquet`, `train.jsonl`, `test/`). Card, licence and the like are
not documents then.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from headscope.corpus.reading import Reading
from headscope.errors import CorpusError

_CARD_KEYS = {
    *("configs", "dataset_info", "license", "language", "pretty_name", "size_categories", "task_categories"),
    *("task_ids", "annotations_creators", "language_creators", "source_datasets", "multilinguality"),
}
_FORMATS = {
    **dict.fromkeys((".parquet", ".geoparquet", ".gpq"), "parquet"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".arrow": "arrow",
    ".txt": "text",
}
"""Formats by suffix, as in `datasets`."""
_OWN = {".parquet", ".jsonl", ".ndjson"}
"""Suffixes of row files that are read here."""
_NO_DATA = {
    "README.md",
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dummy_data.zip",
    "dataset_dict.json",
}
_ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog|authors)\b[^/]*", re.IGNORECASE)

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATORS = "[-._ 0-9]"
_IN_FOLDERS = ("**/{0}/**", "**/{0}{1}*/**", "**/*{1}{0}/**", "**/*{1}{0}{1}*/**")
_IN_NAMES = ("**/{0}{1}*", "**/*{1}{0}{1}*")
_SHARD = re.compile(r"data/([^/]*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_ABOUT_CONFIG = {"config_name", "data_files", "data_dir", "default", "version", "description", "features"}
"""Configuration fields that do not affect how its files are read."""


def dataset_rows(folder: Path, files: Mapping[str, Path], reading: Reading) -> dict[str, Path] | None:
    """Select the files of a split; None if a folder is not a copy of a dataset repository.

    Args:
        folder: the folder.
        files: all files in it, by name.
        reading: the configuration and the split.

    Raises:
        CorpusError: no such configuration or split, a card that cannot be read, rows that only `datasets` can read, or
            files that cannot be assigned to a split.
    """
    card = _card(folder)
    data = [name for name in files if Path(name).name not in _NO_DATA and "/__" not in f"/{name}"]
    base, said = "", None
    if card is None:
        splits = _by_name([name for name in data if _ends(name) in _OWN])
        if splits is None:
            return None
        _check_whole(folder, data, splits)
        _config(folder, {}, reading.dataset_config)
    elif any(_format(name) for name in data):
        config = _config(folder, card, reading.dataset_config)
        base, said = f"{str(config.get('data_dir') or '.').strip('/')}/".removeprefix("./"), config.get("data_files")
        inside = [name.removeprefix(base) for name in data if name.startswith(base)]
        splits = (_by_name(inside) or {"train": inside}) if said is None else _said(folder, said, inside)
        if settings := sorted(config.keys() - _ABOUT_CONFIG):
            raise _needs_library(folder, f"its card sets {', '.join(settings)}", reading.dataset_split)
    else:
        return None
    if reading.dataset_split not in splits:
        raise CorpusError(
            f"no split {reading.dataset_split!r} in the dataset {folder}",
            expected=", ".join(splits),
            do=f"name it with --dataset-split, or name the files: --corpus '{folder}/**/*.jsonl'",
        )
    rows = [name for name in splits[reading.dataset_split] if _format(name)]
    if not rows or len({_format(name) for name in rows}) > 1 or any(_ends(name) not in _OWN for name in rows):
        found = ", ".join(rows[:3]) or "no files of rows"
        raise _needs_library(folder, f"the split {reading.dataset_split!r} holds {found}", reading.dataset_split)
    return {base + name: files[base + name] for name in rows}


def _needs_library(folder: Path, why: str, split: str) -> CorpusError:
    return CorpusError(
        f"the dataset {folder} cannot be read here: {why}",
        expected="a split of Parquet files, or of JSONL files",
        do=f"write it as one file: datasets.load_dataset('{folder}', split='{split}').to_parquet('NAME.parquet'), or "
        f"name the files to be read: --corpus '{folder}/**/*.txt'",
    )


def _card(folder: Path) -> dict[str, Any] | None:
    """Read the header of the dataset's card; None if there is none."""
    path = folder / "README.md"
    try:
        text = path.read_text("utf-8-sig") if path.is_file() else ""
    except (OSError, UnicodeDecodeError):  # a README of a text folder, which is reported where it is read
        return None
    header = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if header is None:
        return None
    try:
        card = yaml.safe_load(header[1])
    except yaml.YAMLError as error:
        raise CorpusError(
            f"{path}: its header is no YAML: {str(error).splitlines()[0]}",
            expected="a dataset's card, or text",
            do="mend it, or name the files to be read: --corpus 'FOLDER/**/*.parquet'",
        ) from error
    return card if isinstance(card, dict) and _CARD_KEYS & card.keys() else None


def _config(folder: Path, card: Mapping[str, Any], wanted: str | None) -> dict[str, Any]:
    """Return the requested configuration, or the only or default one."""
    said = card.get("configs") or []
    if not isinstance(said, list) or not all(isinstance(c, dict) and "config_name" in c for c in said):
        raise CorpusError(
            f"{folder / 'README.md'}: `configs` is not a list of configurations with a `config_name`",
            expected="a dataset's card",
            do="fetch the dataset again, or name the files to be read",
        )
    by_name = {str(config["config_name"]): config for config in said}
    if wanted is None:
        default = [name for name, c in by_name.items() if len(by_name) == 1 or name == "default" or c.get("default")]
        if not by_name:
            return {}
        if len(default) == 1:
            return by_name[default[0]]
    if wanted not in by_name:
        raise CorpusError(
            f"{'no configuration named' if wanted is None else f'no configuration {wanted!r}'} of the dataset {folder}",
            expected=", ".join(by_name) or "none: the dataset has no configurations",
            do="name it with --dataset-config" if by_name else "leave --dataset-config out",
        )
    return by_name[wanted]


def _said(folder: Path, said: Any, names: Iterable[str]) -> dict[str, list[str]]:
    """Return the files of each split according to a configuration."""
    entries = said if isinstance(said, list) else [said]
    if not any(isinstance(entry, dict) for entry in entries):
        entries = [{"split": "train", "path": entries}]
    splits: dict[str, list[str]] = {}
    for entry in entries:
        try:
            split, path = str(entry["split"]), entry["path"]
        except (TypeError, KeyError) as error:
            raise CorpusError(
                f"{folder / 'README.md'}: `data_files` has the entry {entry!r}",
                expected="`split` and `path`",
                do="fetch the dataset again, or name the files to be read",
            ) from error
        patterns = [str(p).removeprefix("./") for p in (path if isinstance(path, list) else [path])]
        found = _matching(names, patterns)
        missing = [p for p in patterns if not re.search(r"[*?\[]", p) and p not in found]
        if missing or not found:
            raise CorpusError(
                f"{', '.join(missing or patterns)} of the split {split!r} of the dataset {folder}: no such file",
                expected="the files that its card names",
                do="fetch the dataset again",
            )
        splits[split] = found
    return splits


def _by_name(names: Iterable[str]) -> dict[str, list[str]] | None:
    """Return the files of each split by their names; None if no name has one."""
    shards: dict[str, list[str]] = {}
    for name in sorted(names):
        if shard := _SHARD.fullmatch(name):
            shards.setdefault(shard[1], []).append(name)
    if shards:
        return {split: shards[split] for split in sorted(shards, key=lambda s: ([*_KEYWORDS, s].index(s), s))}
    for kinds in (_IN_FOLDERS, _IN_NAMES):
        splits = {
            split: _matching(names, [kind.format(word, _SEPARATORS) for word in words for kind in kinds])
            for split, words in _KEYWORDS.items()
        }
        if any(splits.values()):
            return {split: found for split, found in splits.items() if found}
    return None


def _check_whole(folder: Path, data: Iterable[str], splits: Mapping[str, list[str]]) -> None:
    """Reject, without a card, files that belong to no split: they may be meant as text."""
    of_splits = {name for found in splits.values() for name in found}
    others = [name for name in data if name not in of_splits and not _ABOUT.fullmatch(name)]
    if others:
        raise CorpusError(
            f"{folder} holds rows of the split {', '.join(splits)} by their names, and {', '.join(others[:3])}",
            expected="files of rows that all belong to a split, or none that does",
            do=f"name what is to be read: --corpus '{folder}/**/*.jsonl', or take the other files out",
        )


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return names that match one of the patterns: by pattern, then in order."""
    found = [name for pattern in patterns for name in sorted(names) if _regex(pattern).fullmatch(name)]
    return list(dict.fromkeys(found))


def _regex(pattern: str) -> re.Pattern[str]:
    """Compile a file pattern, in which `*` matches anything but `/` and `**` any number of folders."""
    *folders, last = pattern.split("/")
    parts = ["(?:[^/]+/)*" if part == "**" else f"{_part(part)}/" for part in folders]
    return re.compile("".join(parts) + ("(?:[^/]+/)*[^/]+" if last == "**" else _part(last)))


def _part(pattern: str) -> str:
    pieces = re.split(r"(\*+|\?|\[[^\]]+\])", pattern)
    known = {"*": "[^/]*", "?": "[^/]", "[": None}
    return "".join((known[p[0]] or p.replace("[!", "[^")) if i % 2 else re.escape(p) for i, p in enumerate(pieces) if p)


def _ends(name: str) -> str:
    return Path(name).suffix.lower()


def _format(name: str) -> str | None:
    """Return the format by any of its suffixes: `a.jsonl.gz` is JSON."""
    return next((_FORMATS[s] for s in map(str.lower, Path(name).suffixes) if s in _FORMATS), None)
