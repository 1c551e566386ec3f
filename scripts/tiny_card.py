"""Measure a bundled model with the package's own code and write its model card.

python scripts/tiny_card.py --work build/tiny --out src/headscope/models/tiny
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headscope.models.hf import Model
from headscope.models.load import load_model
from headscope.studies.heads.scores import head_scores

CARD = """\
# {size}

A language model of {n_parameters:,} parameters for trying out headscope without a network: 2 layers, 8 heads, d_model
{d_model}, GELU, rotary positions over the whole head, LayerNorm, sequential blocks, untied unembedding, context
{context}, byte-level BPE of {vocab:,} with single digits. It writes no sensible text.

## Measured

| | tokens | nats a token | bits a byte |
|---|---|---|---|
{loss_rows}

On `[BOS, r(100), r(100)]`, r uniform random tokens, 32 sequences: previous-token score {previous[1]:.3f} (head
{previous[0]}), induction score on the second copy {induction[1]:.3f} (head {induction[0]}), loss on the second copy
{copy_loss} nats (uniform guessing: {uniform:.3f}).

| score | layer | {heads} |
|---|---|{rules}
{score_rows}

## Training

{n_steps:,} steps of {batch_tokens:,} tokens ({million_tokens:g} million) in {minutes:.0f} minutes on {device}; torch
{torch}. The recipe is the docstring of `scripts/train_tiny.py`; its numbers are in `training.json`.

| tokens | loss on the batch |
|---|---|
{curve_rows}

In the first half of training, half of each batch are copied random tokens, later a tenth; the batch's loss counts them.

## Text

Half English prose: {prose_documents:,} documents, {prose_mb:.1f} MB. Wikipedia (2015, CC BY-SA 3.0), opensource.com and
Fedora Magazine (CC BY-SA), novels of 1839-1929 (public domain in the USA), Digital.gov and 18F (US government, public
domain), Stack Exchange (CC BY-SA 3.0), OpenStax U.S. History and Psychology (CC BY 4.0), task dialogues (CC BY-SA 4.0),
recipes (public domain), African Storybook (CC BY).

Half Python: {python_documents:,} files, {python_mb:.1f} MB. The training half of the standard library (PSF licence),
and at most 5 MB a package of: {packages}.

No text is part of this folder.
"""


def measure(out: Path, work: Path) -> dict[str, Any]:
    """Head scores and held-out losses of a saved model, by the package's own code."""
    model = load_model(str(out))
    scores = head_scores(model)
    measured: dict[str, Any] = {
        "previous_token": scores.previous_token.round(decimals=3).tolist(),
        "induction": scores.induction.round(decimals=3).tolist(),
        "best_previous_token": scores.best("previous_token"),
        "best_induction": scores.best("induction"),
        "copy_loss": round(scores.copy_loss, 4),
    }
    for name in ("heldout_prose", "heldout_python"):
        if (work / f"{name}.npz").exists():
            measured[name] = text_loss(model, np.load(work / f"{name}.npz")["tokens"])
    return measured


def text_loss(model: Model, tokens: np.ndarray) -> dict[str, Any]:
    """Loss on held-out text in blocks of BOS + 255 tokens: nats a token and bits a byte, document marks left out."""
    # in byte-level BPE each character of a piece is one byte
    n_bytes = torch.tensor([len(model.tokenizer.id_to_token(i)) for i in range(model.spec.d_vocab)])
    context = model.spec.context
    rows = len(tokens) // (context - 1)
    body = torch.from_numpy(tokens[: rows * (context - 1)].astype(np.int64)).view(rows, context - 1)
    blocks = torch.cat([torch.full((rows, 1), model.bos), body], dim=1)
    nats, n_tokens, total_bytes = 0.0, 0, 0
    for chunk in blocks.split(32):
        counted = chunk[:, 1:] != model.bos
        nats += model.losses(chunk)[counted].double().sum().item()
        n_tokens += int(counted.sum())
        total_bytes += int(n_bytes[chunk[:, 1:][counted]].sum())
    bits = nats / math.log(2)
    return {
        "n_tokens": n_tokens,
        "nats_per_token": round(nats / n_tokens, 4),
        "bits_per_byte": round(bits / total_bytes, 4),
    }


def write_card(work: Path, out: Path) -> None:
    """Measure a saved model and write its card, README.md, from that and its record."""
    record = json.loads((out / "training.json").read_text())
    record["measured"] = measured = measure(out, work)
    (out / "training.json").write_text(json.dumps(record, indent=1))
    recipe, streams = record["recipe"], record["sources"]["streams"]
    step = max(1, len(record["curve"]) // 20)
    points = [*record["curve"][::step], record["curve"][-1]]
    config = json.loads((out / "config.json").read_text())
    rows = {"heldout_prose": "held-out prose", "heldout_python": "held-out standard library"}
    text = CARD.format(
        **recipe,
        n_parameters=record["n_parameters"],
        d_model=config["hidden_size"],
        context=config["max_position_embeddings"],
        vocab=config["vocab_size"],
        loss_rows=_rows([label, *measured[key].values()] for key, label in rows.items() if key in measured),
        previous=measured["best_previous_token"],
        induction=measured["best_induction"],
        copy_loss=measured["copy_loss"],
        uniform=math.log(config["vocab_size"] - 1),
        heads=" | ".join(f"head {h}" for h in range(config["num_attention_heads"])),
        rules="---|" * config["num_attention_heads"],
        score_rows=_rows(
            [name.replace("_", " "), layer, *(f"{v:.2f}" for v in values)]
            for name in ("previous_token", "induction")
            for layer, values in enumerate(measured[name])
        ),
        minutes=record["seconds"] / 60,
        device=record["device"],
        torch=record["torch"],
        curve_rows=_rows([f"{p['tokens']:,}", f"{p['loss']:.3f}"] for p in points),
        prose_documents=streams["prose"]["documents"],
        prose_mb=streams["prose"]["bytes"] / 1e6,
        python_documents=streams["python"]["documents"],
        python_mb=streams["python"]["bytes"] / 1e6,
        packages="; ".join(f"{p['name']} {p['version']} ({p['licence']})" for p in record["sources"]["packages"]),
    )
    (out / "README.md").write_text(text)
    print(json.dumps(measured, indent=1))


def _rows(cells: Any) -> str:
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in cells)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder that train_tiny.py filled")
    parser.add_argument("--out", type=Path, required=True, help="the model folder")
    args = parser.parse_args()
    write_card(args.work, args.out)


if __name__ == "__main__":
    main()
