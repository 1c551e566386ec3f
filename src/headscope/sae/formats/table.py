"""What is read of each format, as the table of docs/saes.md."""

from headscope.sae.formats import FORMATS, Format


def supported() -> str:
    """Markdown: a section for each format, with what it consists of, what is read and what is refused."""
    return "\n\n".join(map(_section, FORMATS))


def _section(format_: Format) -> str:
    lines = [
        f"### {format_.name.replace('the ', 'The ', 1)}",  # libraries are spelled as they spell themselves
        "",
        f"Files: {format_.layout}.",
        f"Activations: {format_.convention}.",
        "",
        "| in the file | here |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {read} |" for name, read in format_.architectures.items()]
    lines += [f"| `{name}` | refused: {why} |" for name, why in format_.refused.items()]
    return "\n".join(lines)
