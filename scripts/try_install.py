"""Use an installation as a newcomer would: every command, page and study, and every snippet of the documents.

    cd EMPTY_FOLDER && ENVIRONMENT/bin/python CHECKOUT/scripts/try_install.py [--quick]

The environment holds the package and its declared dependencies only, and the folder is not the checkout, so the package
is found where it was installed. `try_install.sh` makes both. Writes into the current folder; stops with status 1 at the
first failure and prints it.
"""

import argparse
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import get_args
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

CHECKOUT = Path(__file__).parents[1]
HEADSCOPE = [sys.executable, "-m", "headscope"]
INDEX = "runs/tiny"  # where the documents' commands put it
LATENT = 1540  # the feature of the documents
PROXY = 'induction("._")'
UPSTREAM_SAE = "tiny-mlp0"
TOKENS = 150_000
PAGES = ("README.md", "docs/index-format.md", "docs/deep-dives.md", "docs/prompt-explorer.md")


def main() -> None:
    """Try everything, in the order in which a newcomer meets it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only what reads and serves an index")
    quick = parser.parse_args().quick
    check_environment()
    try_help()
    run("index", "--sae", "tiny-z1", "--max-tokens", str(TOKENS), "--out", INDEX)
    if not quick:
        run("demo", "--quick", "--no-serve", "--out", "runs/demo")
        try_commands()
    try_pages()
    if not quick:
        run_snippets()
        run("report", "runs/report", "--quick")
    say("everything works")


def say(line: str) -> None:
    """Print what is being tried, with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def check_environment() -> None:
    """Refuse an environment that holds development packages: they would hide what is not declared."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [r for of in distributions() for r in of.requires or () if "extra ==" not in r]
    brought = {named(requirement) for requirement in requirements}
    development = {named(of) for of in project["optional-dependencies"]["dev"]} - brought
    there = sorted(development & {named(of.name) for of in distributions()})
    if there:
        raise SystemExit(f"development packages are installed: {', '.join(there)}")
    package = importlib.util.find_spec("headscope")
    if package is None or package.origin is None or Path(package.origin).is_relative_to(CHECKOUT):
        raise SystemExit(f"headscope is not installed, or is the checkout's: {package and package.origin}")


def named(requirement: str) -> str:
    """The name of a distribution in a requirement, in one spelling."""
    return re.split(r"[\s\[<>=!~;(]", requirement)[0].lower().replace("-", "_")


def run(*arguments: str) -> str:
    """Run a command; what it prints."""
    say(f"headscope {' '.join(arguments)}")
    done = subprocess.run([*HEADSCOPE, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"headscope {' '.join(arguments)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def try_help() -> None:
    """The help of every command."""
    from headscope.cli import Command
    from headscope.studies.registry import STUDIES

    listed = run("--help")
    for command in get_args(Command):
        name = command.__name__.lower()
        if name not in listed or "usage" not in run(name, "--help"):
            raise SystemExit(f"no help of {name}")
    for name in ("all", *STUDIES):
        run("study", name, "--help")


def try_commands() -> None:
    """The commands that end by themselves."""
    few = ("--max-tokens", "20000")
    run("info", "tiny-z1", "--model", "tiny")
    run("eval", "--sae", "tiny-z1", *few)
    run("convert", "tiny-z1", "--out", "runs/converted")
    run("train", "--out", "runs/one", "--tokens", "20000", "--d-sae", "64", "--buffer", "8192", "--max-tokens", "30000")
    run("sweep", "--out", "runs/sweep", "--tokens", "20000", "--d-sae", "64", "--buffer", "8192",
        "--variants", "relu", "--target-l0s", "8", "--max-tokens", "30000", "--eval-tokens", "10000")  # fmt: skip
    run("runs", "runs")
    run("survey", INDEX, "--sample", "first:50")
    run("study", "all", "runs/demo/index", "--again")
    latent = str(most_active("runs/demo/index"))
    run("study", "specificity", "runs/demo/index", latent, "--proxy", PROXY)
    run("study", "best-proxies", "runs/demo/index", latent)
    run("dive", "runs/demo/index", latent, "--model", "tiny", "--out", "dive.html")
    run("export", "--index", "runs/demo/index", "--out", "page.html")
    run("export", "--index", "runs/demo/index", "--out", "site")


def most_active(folder: str) -> int:
    """The feature of an index that is active most often."""
    from headscope import FeatureIndex

    table = FeatureIndex.open(folder).table()
    return max(zip(table["n_active"].to_pylist(), table["latent"].to_pylist(), strict=True))[1]


# ---------------------------------------------------------------------------------------------------------- over HTTP
def requests_of(index: str) -> dict[str, list[tuple[str, dict | None]]]:
    """Of each route of the page, what to ask: paths, and what is posted, if anything."""
    from headscope import FeatureIndex

    opened = FeatureIndex.open(index)
    latent = LATENT if opened.feature(LATENT).alive else most_active(index)
    at = max((e for g in opened.examples(latent) for e in g.examples), key=lambda e: e.activation).position
    query, layer = at % opened.block_size, opened.manifest["layer"]
    key = max(0, query - 1)
    proxy = f"proxy={quote(PROXY)}"
    prompt = {"prompt": {"text": "def add(first, second):\n    return first"}}
    asked: dict[str, list[tuple[str, dict | None]]] = {
        "/f/{number}": [(f"/f/{latent}", None)],
        "/static/{name}": [("/static/app.js", None)],
        "/api/feature/{number}": [(f"/api/feature/{latent}", None)],
        "/api/context/{number}": [("/api/context/0", None)],
        "/family/{name}": [("/family/induction", None)],
        "/head/{name}": [("/head/0.6", None)],
        "/api/family/{name}": [(f"/api/family/{name}", None) for name in ("induction", "token")],
        "/api/family/{name}/{head}": [("/api/family/induction/1.6", None)],
        "/api/head/{name}": [("/api/head/1.6", None)],
        "/api/queue": [("/api/queue?sample=first:5", None)],
        "/api/survey": [("/api/survey?sample=first:5", None)],
        "/api/labels/{number}": [(f"/api/labels/{latent}", None)],
        "/api/start/{number}": [(f"/api/start/{latent}", None)],
        "/api/prompt/run": [("/api/prompt/run", prompt | {"ablations": []})],
        "/api/prompt/token": [("/api/prompt/token", prompt | {"ablations": [], "query": 3, "target": None})],
        "/api/prompt/dfa": [("/api/prompt/dfa", prompt | {"latent": latent, "query": 3})],
        "/api/prompt/level": [("/api/prompt/level", prompt | {"latent": latent, "query": 3, "path": ""})],
        "/api/prompt/scores": [("/api/prompt/scores", prompt | {"layer": layer, "head": 6, "query": 3, "key": None})],
    }
    studies = {
        **dict.fromkeys(("specificity", "ablation", "predictions", "source_sets"), proxy),
        **dict.fromkeys(("logits", "head_shares"), ""),
        "sources": "tokens=5,12",
        "compare_heads": f"at={at}",
        "patching": f"at={at}&how=sources&nodes=heads",
        "feature_patching": f"at={at}&how=sources&features_of={UPSTREAM_SAE}",
        "circuit": f"at={at}&path=",
        "qk": f"at={at}&layer={layer}&head=6&query={query}&key={key}",
    }
    asked |= {f"/api/study/{n}/{{number}}": [(f"/api/study/{n}/{latent}?{q}", None)] for n, q in studies.items()}
    label = {"latent": latent, "annotator": "a newcomer", "blind": False, "queue": "", "verdict": "interpretable"}
    label |= {"confidence": 2, "family": "", "text": "", "notes": ""}
    return asked | {"/api/labels": [("/api/labels", label)]}


def try_pages() -> None:
    """Every page and every study over HTTP; retracting a label comes last."""
    routes, asked = all_routes(), requests_of(INDEX)
    with served("--index", INDEX, "--model", "tiny", "--upstream-sae", UPSTREAM_SAE) as page:
        for route in sorted(routes - {"/api/retractions"}):
            if "{" in route and route not in asked:
                raise SystemExit(f"no request is known for {route}: add it to requests_of")
            for path, body in asked.get(route, [(route, None)]):
                page.ask(path, body)
        label = json.loads(page.ask(f"/api/labels/{asked['/api/labels'][0][1]['latent']}"))["labels"][0]
        page.ask("/api/retractions", {"annotator": label["annotator"], "label": label["id"]})
    say(f"{len(routes)} routes answered")


def all_routes() -> set[str]:
    """The routes of the page, from the application that `serve` would run."""
    from headscope import jobs
    from headscope.explorer import server

    apps = []
    server.serve = lambda app, **_options: apps.append(app)
    jobs.serve(INDEX, model="tiny", upstream_saes=[UPSTREAM_SAE])
    return {route.path for route in apps[0].routes}


class Page:
    """A served page."""

    def __init__(self, address: str) -> None:
        """Find the token that the page gives its scripts."""
        self.address = address
        found = re.search(r'name="headscope-token" content="([^"]+)"', self.ask("/"))
        self.token = found[1] if found else ""

    def ask(self, path: str, body: dict | None = None) -> str:
        """The answer to a request; anything but 200 ends the program."""
        say(f"{'GET' if body is None else 'POST'} {path}")
        headers = {} if body is None else {"content-type": "application/json", "x-headscope-token": self.token}
        data = None if body is None else json.dumps(body).encode()
        for left in (2, 1, 0):
            try:
                with urlopen(Request(self.address + path, data, headers), timeout=300) as answer:
                    return answer.read().decode()
            except HTTPError as error:
                if error.code not in (503, 504) or not left:  # a busy machine: the page asks again too
                    raise SystemExit(f"{path}: {error.code} {error.read().decode()[:2000]}") from error
        raise AssertionError


@contextmanager
def served(*arguments: str) -> Iterator[Page]:
    """`headscope serve` in a process of its own, ended by Ctrl-C."""
    server = subprocess.Popen(
        [*HEADSCOPE, "serve", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said = []
        for line in server.stdout:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield Page(found[0])
                return
        raise SystemExit(f"headscope serve ended:\n{''.join(said)}")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


# ------------------------------------------------------------------------------------------------------------ documents
def run_snippets() -> None:
    """Every Python snippet of the documents that needs no more than an index in `runs/tiny`, in its order."""
    for name in PAGES:
        text = (CHECKOUT / name).read_text(encoding="utf-8")
        for number, snippet in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE), 1):
            wanted = re.findall(r"^(?:import|from) (\w+)", snippet, re.MULTILINE)
            missing = [module for module in wanted if importlib.util.find_spec(module) is None]
            if missing:
                say(f"{name}, snippet {number}: left out, needs {', '.join(missing)}")
                continue
            say(f"{name}, snippet {number}")
            done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}, snippet {number}:\n{snippet}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
