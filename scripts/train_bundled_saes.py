"""Train the SAEs that are bundled with `tiny`, on all of its Python and a quarter of its prose.

    python scripts/train_bundled_saes.py --text build/tiny/text --out build/tiny

`--text` is the folder of texts that `scripts/train_tiny.py text` wrote. Copy `cfg.json` and `sae_weights.safetensors`
of each to `src/headscope/sae`.
"""

import argparse
import json
from pathlib import Path

from headscope import jobs
from headscope.corpus import SEPARATOR, name_fraction
from headscope.sae.config import TrainConfig, Variant
from headscope.site import Kind
from train_tiny import prose_documents

SAES: dict[str, tuple[Kind, int, Variant, int]] = {
    "tiny-z1": ("z", 1, "batchtopk", 32_000_000),
    "tiny-z1-relu": ("z", 1, "relu", 32_000_000),
    "tiny-mlp0": ("mlp_out", 0, "batchtopk", 32_000_000),
}
PROSE_SHARE = 0.25
TEXT = "the text tiny was trained on: all of its Python, a quarter of its prose"
"""What the SAEs say of it, instead of a folder's path."""


def write_mixture(text: Path, mixture: Path) -> None:
    """All of python.txt and the documents of prose.txt whose name's hash lies below PROSE_SHARE."""
    mixture.mkdir(parents=True, exist_ok=True)
    (mixture / "python.txt").write_text((text / "python.txt").read_text(encoding="utf-8"), encoding="utf-8")
    prose = [d for d in prose_documents(text) if d.name.startswith("prose") and name_fraction(d.name) < PROSE_SHARE]
    (mixture / "prose.txt").write_text(SEPARATOR.join(d.text for d in prose), encoding="utf-8")


def name_text(config: Path) -> None:
    """Write TEXT into an SAE's `cfg.json`."""
    said = json.loads(config.read_text(encoding="utf-8"))
    said["metadata"]["corpus"]["name"] = TEXT
    config.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Train each and write it as a SAELens folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    mixture = args.out / "sae_text"
    write_mixture(args.text, mixture)
    for name, (site, layer, variant, tokens) in SAES.items():
        jobs.train(
            args.out / name,
            model="tiny",
            text=jobs.CorpusChoice(corpus=str(mixture), split="all"),
            site=site,
            layer=layer,
            config=TrainConfig(variant=variant, tokens=tokens),
            on_step=lambda s, name=name: s.step % 500 or print(name, s.step, s.n_steps, s.l0, s.explained_variance),
        )
        name_text(args.out / name / "cfg.json")


if __name__ == "__main__":
    main()
