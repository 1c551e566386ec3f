"""Processes that train, each in its own environment, which is made the first time and kept.

An environment is a `venv` in `$XDG_CACHE_HOME/headscope-benchmarks` (else `~/.cache/...`) with pinned versions. It also
sees the packages of the environment that runs the benchmark, so that what fits is not installed again. Freed memory is
kept in all of them as the program keeps it (`headscope.memory`).
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile

from safetensors.torch import load_file
from torch import Tensor

from headscope.memory import SETTINGS
from peers.common import Task, is_gpu

HERE = Path(__file__).parent
_ERROR = re.compile(
    r"[\w.]+(Error|Exception|Exit)\b|ERROR:"
)  # the line of a traceback, or of pip, that says what it is
TORCH = f"torch=={version('torch').partition('+')[0]}"
"""That of the environment that runs the benchmark, for the CPU or for a GPU: all train with the same."""


@dataclass(frozen=True)
class Peer:
    """A library and the script that trains with it."""

    script: str
    pins: tuple[str, ...]
    dependencies: bool = True
    """Let pip install what the pins depend on."""
    cpu_variables: dict[str, str] = field(default_factory=dict)
    """Of its process, where it trains on a CPU."""


PEERS = {
    "saelens": Peer("run_saelens.py", ("sae-lens==6.54.12", TORCH)),
    "dictionary_learning": Peer(
        "run_dictionary_learning.py",
        ("dictionary-learning==0.1.0", "einops==0.8.2", "tqdm==4.70.1"),
        dependencies=False,  # it asks for a version of nnsight that does not go with transformers 5
    ),
    "sparsify": Peer(
        "run_sparsify.py",
        ("eai-sparsify==1.3.3", "natsort==8.4.0", "schedulefree==1.4.1", TORCH),
        # It decodes by Triton wherever Triton can be imported, also on a CPU, where Triton's first kernel fails as
        # there is no driver. This is its own switch to its other decoder, torch's embedding_bag: all there is on a CPU.
        cpu_variables={"SPARSIFY_DISABLE_TRITON": "1"},
    ),
}
OURS = "headscope"


@dataclass(frozen=True)
class Trained:
    """What a process hands back."""

    seconds: list[float]
    """Of each step."""
    peak_mb: float
    """Largest resident memory, less what was resident when everything was imported and nothing was made; on a GPU, the
    most that tensors took there."""
    version: str
    weights: dict[str, Tensor]


class ProcessError(Exception):
    """A process ended badly; the message is the end of what it said."""


def train(library: str, task: Task) -> Trained:
    """Train in a process of its own.

    Args:
        library: `headscope` or one of `PEERS`.
        task: its `out` is ignored.

    Raises:
        ProcessError: no environment could be made, or training failed.
    """
    variables: dict[str, str] = {}
    if library == OURS:
        command = [sys.executable, str(HERE / "ours.py")]
    else:
        peer = PEERS[library]
        command = [str(environment(library)), str(HERE / "peers" / peer.script)]
        variables = {} if is_gpu(task.device) else peer.cpu_variables
    with NamedTemporaryFile(suffix=".safetensors") as out:
        said = run([*command, *replace(task, out=out.name).arguments()], threads=task.threads, variables=variables)
        return Trained(**json.loads(said.splitlines()[-1]), weights=load_file(out.name))


def run(command: list[str], *, threads: int | None = None, variables: Mapping[str, str] | None = None) -> str:
    """Run to its end and return what it printed.

    Args:
        command: what to run.
        threads: of OpenMP; as many as it takes by itself where none is given.
        variables: of its environment, beside those that are inherited.

    Raises:
        ProcessError: it ended with another status than 0.
    """
    quiet = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    memory = {name: str(size) for name, _, size in SETTINGS}  # as the program has it; the peers too
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    surroundings = {**os.environ, **quiet, **memory, **limits, **(variables or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise ProcessError(next((line for line in reversed(said) if _ERROR.match(line)), said[-1]))
    return done.stdout


def environment(name: str) -> Path:
    """The interpreter of a peer's environment, made where it is not there yet.

    Raises:
        ProcessError: pip could not install the pins.
    """
    peer = PEERS[name]
    seen = sysconfig.get_paths()["purelib"]
    key = hashlib.sha256(json.dumps([peer.pins, sys.version, seen]).encode()).hexdigest()[:12]
    folder = _cache() / f"{name}-{key}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists():
        return python
    print(f"making {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped half-way
    run([sys.executable, "-m", "venv", str(folder)])
    own = run([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip()
    Path(own, "running.pth").write_text(f"{seen}\n")
    how = [] if peer.dependencies else ["--no-deps"]
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *how, *peer.pins])
    ready.touch()
    return python


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "headscope-benchmarks"
