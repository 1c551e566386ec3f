"""Train a bundled model: tokenizer, weights, and the model card that says what they were made from.

    python scripts/train_tiny.py text PROSE_FOLDER --work build/tiny         # texts -> tokenizer and token files
    python scripts/train_tiny.py model --work build/tiny --out build/tiny/model --million-tokens 40

The text is half English prose (UTF-8 files in PROSE_FOLDER, documents separated by a line `<|doc|>`) and half Python
source of the running environment: installed packages and the *training* half of the standard library. Modules that
the corpus `python` holds out are never read, nor are copies of them inside packages. The text itself is not kept.

The recipe forms induction heads early: Muon on the block matrices and AdamW on the rest; in the first half of training
the context is 128 and half of each batch are *copy sequences* (k tokens drawn at random from the text, repeated to fill
the row); afterwards the context is full, and a few copy rows stay to the end, since without them induction fades.
"""

import argparse
import importlib.metadata
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from headscope.corpus import SEPARATOR, Document, encode, is_held_out, name_fraction, python_documents
from tiny_card import write_card

BOS = "<|bos|>"
VOCAB = 4096
CONTEXT = 256
PACKAGE_CAP = 5_000_000  # bytes a package, so that no one library is most of the Python half
FILE_CAP = 300_000  # bytes a file; longer Python files are tables
SIZES = {"tiny": 128, "small": 256}  # d_model; 8 heads, 2 layers and d_mlp = 4 d_model in both


# ---------------------------------------------------------------------------------------------------------------- text
def prose_documents(folder: Path) -> Iterator[Document]:
    """The documents of every text file in a folder."""
    for path in sorted(folder.glob("*.txt")):
        for i, text in enumerate(path.read_text(encoding="utf-8")[:-1].split(SEPARATOR)):
            yield Document(f"{path.name}:{i}", text)


def _lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 24}


def package_documents() -> Iterator[tuple[str, Document]]:
    """(distribution, source file) of the installed packages, without tables and without copies of held-out modules."""
    held_out_lines = set().union(*(_lines(d.text) for d in python_documents() if is_held_out(d.name)))
    spent: Counter[str] = Counter()
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        name = distribution.metadata["Name"]
        files = [f for f in distribution.files or [] if f.suffix == ".py" and "site-packages" not in f.parts]
        for file in sorted(files, key=lambda f: (name_fraction(str(f)), str(f))):
            path = Path(str(file.locate()))
            if not path.is_file() or not 400 < path.stat().st_size < FILE_CAP or spent[name] > PACKAGE_CAP:
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            if _is_table(text) or _is_copy(text, held_out_lines):
                continue
            spent[name] += len(text)
            yield name, Document(str(file), text)


def _is_table(text: str) -> bool:
    digits = sum(map(str.isdigit, text)) / len(text)
    return digits > 0.15 or len(text) / (text.count("\n") + 1) > 120 or "\ufffd" in text


def _is_copy(text: str, held_out_lines: set[str]) -> bool:
    lines = _lines(text)
    return len(lines & held_out_lines) > 0.2 * max(len(lines), 1)


def train_tokenizer(prose: list[Document], python: list[Document]) -> Tokenizer:
    """Byte-level BPE of 4,096 with single digits and a BOS, from about 12 MB of each half."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = [d.text for half in (prose, python) for d in _sample(half, 12_000_000)]
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def _sample(documents: list[Document], n_bytes: int) -> Iterator[Document]:
    taken = 0
    for document in sorted(documents, key=lambda d: name_fraction(d.name)):
        if taken > n_bytes:
            return
        taken += len(document.text)
        yield document


def tokenise(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """One stream of uint16 ids with a BOS before each document."""
    bos = tokenizer.token_to_id(BOS)
    ids = encode(tokenizer, [d.text for d in documents])
    return np.concatenate([np.array([bos, *row], dtype=np.uint16) for row in ids])


def write_text(prose_folder: Path, held_out_prose: Path | None, work: Path) -> None:
    """Read all text, train the tokenizer, and write token streams and a record of the sources to `work`."""
    prose = list(prose_documents(prose_folder))
    packages = list(package_documents())
    standard = [d for d in python_documents() if not is_held_out(d.name)]
    python = [d for _, d in packages] + standard
    tokenizer = train_tokenizer(prose, python)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(work / "tokenizer.json"))
    streams = {"prose": prose, "python": python}
    streams["heldout_python"] = [d for d in python_documents() if is_held_out(d.name)]
    if held_out_prose is not None:
        streams["heldout_prose"] = list(prose_documents(held_out_prose))
    sources = {"packages": _package_table(packages), "streams": {}}
    for name, documents in streams.items():
        tokens = tokenise(tokenizer, documents)
        np.savez_compressed(work / f"{name}.npz", tokens=tokens)
        (work / "text").mkdir(exist_ok=True)
        (work / "text" / f"{name}.txt").write_text(SEPARATOR.join(d.text for d in documents), encoding="utf-8")
        n_bytes = sum(len(d.text.encode()) for d in documents)
        sources["streams"][name] = {"documents": len(documents), "bytes": n_bytes, "tokens": len(tokens)}
        print(name, sources["streams"][name], flush=True)
    (work / "sources.json").write_text(json.dumps(sources, indent=1))


def _package_table(packages: list[tuple[str, Document]]) -> list[dict]:
    n_bytes: dict[str, int] = defaultdict(int)
    for name, document in packages:
        n_bytes[name] += len(document.text.encode())
    return [
        {"name": name, "version": importlib.metadata.version(name), "licence": licence(name), "bytes": size}
        for name, size in sorted(n_bytes.items())
    ]


def licence(distribution: str) -> str:
    """The licence a distribution declares: its SPDX expression, its classifiers, or its first licence line."""
    metadata = importlib.metadata.metadata(distribution)
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License")]
    declared = (metadata["License"] or "").strip().splitlines()
    return metadata["License-Expression"] or "; ".join(classifiers) or (declared[0] if declared else "not declared")


# --------------------------------------------------------------------------------------------------------------- model
def build_model(size: str, bos: int) -> GPTNeoXForCausalLM:
    """Two layers, eight heads, rotary over the whole head, sequential blocks, untied unembedding."""
    d_model = SIZES[size]
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=d_model,
        num_hidden_layers=2,
        num_attention_heads=8,
        intermediate_size=4 * d_model,
        hidden_act="gelu",
        max_position_embeddings=CONTEXT,
        use_parallel_residual=False,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
        bos_token_id=bos,
        eos_token_id=bos,
        pad_token_id=None,
        use_cache=False,
    )
    return GPTNeoXForCausalLM(config)


@dataclass(frozen=True)
class Recipe:
    """What decides a training run, saved in the model card."""

    size: str
    million_tokens: float
    batch_tokens: int
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.01
    """Share of the steps over which the rates rise."""
    decay: float = 0.4
    """Share of the steps, at the end, over which the rates fall to zero."""
    short_context: int = 128
    copy_rows_first_half: float = 0.5
    copy_rows_second_half: float = 0.1
    seed: int = 0

    @property
    def n_steps(self) -> int:
        """Steps of `batch_tokens` tokens."""
        return max(1, round(self.million_tokens * 1e6 / self.batch_tokens))

    def rate(self, step: int) -> float:
        """Factor on the learning rates: linear warm-up, flat, linear decay to zero."""
        done = (step + 1) / self.n_steps
        return min(1.0, done / self.warmup, (1 - done) / self.decay + 1 / self.n_steps)


class Batches:
    """Rows of text (half prose, half Python, at random offsets) and of copied random tokens."""

    def __init__(self, streams: list[torch.Tensor], bos: int, recipe: Recipe, device: str) -> None:
        """Rows are drawn from `streams` (prose, Python) with the recipe's seed."""
        self.streams = [s.to(device) for s in streams]
        self.bos, self.recipe, self.device = bos, recipe, device
        self.generator = torch.Generator(device).manual_seed(recipe.seed)

    def batch(self, step: int) -> torch.Tensor:
        """[rows, context] int64, a BOS in column 0."""
        recipe, first_half = self.recipe, step < self.recipe.n_steps / 2
        context = recipe.short_context if first_half else CONTEXT
        rows = recipe.batch_tokens // context
        n_copy = int(rows * (recipe.copy_rows_first_half if first_half else recipe.copy_rows_second_half))
        n_prose = (rows - n_copy) // 2
        body = [
            self._text(0, n_prose, context - 1),
            self._text(1, rows - n_copy - n_prose, context - 1),
            self._copies(n_copy, context - 1),
        ]
        start = torch.full((rows, 1), self.bos, device=self.device, dtype=torch.long)
        return torch.cat([start, torch.cat(body).long()], dim=1)

    def _integers(self, low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def _text(self, which: int, rows: int, length: int) -> torch.Tensor:
        stream = self.streams[which]
        start = self._integers(0, len(stream) - length, (rows, 1))
        return stream[start + torch.arange(length, device=self.device)]

    def _copies(self, rows: int, length: int) -> torch.Tensor:
        """K tokens drawn at random positions of the text, 8 <= k <= length/2, repeated to fill the row."""
        halves = [
            s[self._integers(0, len(s), (n, length))]
            for s, n in zip(self.streams, (rows // 2, rows - rows // 2), strict=True)
        ]
        period = self._integers(8, length // 2 + 1, (rows, 1))
        return torch.cat(halves).gather(1, torch.arange(length, device=self.device) % period)


def optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the blocks, AdamW on embeddings, unembedding, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if not (".layers." in n and p.ndim == 2)]
    fused = next(model.parameters()).device.type == "cuda"
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
    ]


def train(model: torch.nn.Module, batches: Batches, recipe: Recipe, device: str) -> list[dict]:
    """Run all steps; returns the curve: step, tokens, seconds and the loss of each step that was logged."""

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(rows).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    step_loss = torch.compile(loss_of, dynamic=False) if device == "cuda" else loss_of
    optims = optimizers(model, recipe)
    base = [o.param_groups[0]["lr"] for o in optims]
    curve, start = [], time.perf_counter()
    for step in range(recipe.n_steps):
        for optim, lr in zip(optims, base, strict=True):
            optim.param_groups[0]["lr"] = lr * recipe.rate(step)
        loss = step_loss(batches.batch(step))
        loss.backward()
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=False)
        if step % max(1, recipe.n_steps // 200) == 0 or step == recipe.n_steps - 1:
            tokens, seconds = (step + 1) * recipe.batch_tokens, time.perf_counter() - start
            curve.append({"step": step, "tokens": tokens, "seconds": round(seconds, 1), "loss": round(loss.item(), 4)})
            if len(curve) % 5 == 1:
                print(f"{step}/{recipe.n_steps} loss {loss.item():.3f} {tokens / seconds:,.0f} tokens/s", flush=True)
    return curve


def write_model(recipe: Recipe, work: Path, out: Path, *, half_precision: bool) -> None:
    """Train and save as an ordinary Hugging Face folder with a record of the run and a model card."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    bos = tokenizer.token_to_id(BOS)
    streams = [torch.from_numpy(np.load(work / f"{n}.npz")["tokens"].astype(np.int32)) for n in ("prose", "python")]
    model = build_model(recipe.size, bos).to(device)
    start = time.perf_counter()
    curve = train(model, Batches(streams, bos, recipe, device), recipe, device)
    record = {
        "recipe": vars(recipe) | {"n_steps": recipe.n_steps},
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - start),
        "sources": json.loads((work / "sources.json").read_text()),
        "curve": curve,
    }
    (model.to(torch.bfloat16) if half_precision else model).save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, model_max_length=CONTEXT).save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=1))
    write_card(work, out)


def main() -> None:
    """Parse the command line and run one of the two stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    text = stages.add_parser("text")
    text.add_argument("prose", type=Path)
    text.add_argument("--heldout-prose", type=Path)
    text.add_argument("--work", type=Path, required=True)
    model = stages.add_parser("model")
    model.add_argument("--work", type=Path, required=True)
    model.add_argument("--out", type=Path, required=True)
    model.add_argument("--size", choices=sorted(SIZES), default="tiny")
    model.add_argument("--million-tokens", type=float, default=40)
    model.add_argument("--batch-tokens", type=int, default=4096)
    model.add_argument("--muon-lr", type=float, default=0.02)
    model.add_argument("--adam-lr", type=float, default=3e-3)
    model.add_argument("--bfloat16", action="store_true", help="round the saved weights to bfloat16")
    args = parser.parse_args()
    if args.stage == "text":
        write_text(args.prose, args.heldout_prose, args.work)
    else:
        recipe = Recipe(args.size, args.million_tokens, args.batch_tokens, args.muon_lr, args.adam_lr)
        write_model(recipe, args.work, args.out, half_precision=args.bfloat16)


if __name__ == "__main__":
    main()
