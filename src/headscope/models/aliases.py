"""TransformerLens' short names of models, which SAE files use, and the hub repositories they refer to."""

import re

_PYTHIA_SIZES = {"19m": "70m", "125m": "160m", "350m": "410m", "800m": "1b", "1.3b": "1.4b", "2.7b": "2.8b"}
_PYTHIA_SIZES |= {"6.7b": "6.9b", "13b": "12b"}
"""Pythia's original size names, and the current ones."""

_SAME: dict[str, str] = {
    "01-ai": "Yi-6B Yi-6B-Chat Yi-34B Yi-34B-Chat",
    "EleutherAI": "gpt-neox-20b",
    "Qwen": """
        Qwen1.5-0.5B Qwen1.5-0.5B-Chat Qwen1.5-1.8B Qwen1.5-1.8B-Chat Qwen1.5-4B Qwen1.5-4B-Chat Qwen1.5-7B
        Qwen1.5-7B-Chat Qwen1.5-14B Qwen1.5-14B-Chat Qwen2-0.5B Qwen2-0.5B-Instruct Qwen2-1.5B Qwen2-1.5B-Instruct
        Qwen2-7B Qwen2-7B-Instruct Qwen2.5-0.5B Qwen2.5-0.5B-Instruct Qwen2.5-1.5B Qwen2.5-1.5B-Instruct Qwen2.5-3B
        Qwen2.5-3B-Instruct Qwen2.5-7B Qwen2.5-7B-Instruct Qwen2.5-14B Qwen2.5-14B-Instruct Qwen2.5-32B
        Qwen2.5-32B-Instruct Qwen2.5-72B Qwen2.5-72B-Instruct Qwen3-0.6B Qwen3-0.6B-Base Qwen3-1.7B Qwen3-4B Qwen3-8B
        Qwen3-14B""",
    "mistralai": "Mistral-Nemo-Base-2407",
    "stanford-crfm": """
        alias-gpt2-small-x21 battlestar-gpt2-small-x49 caprica-gpt2-small-x81 darkmatter-gpt2-small-x343
        expanse-gpt2-small-x777 arwen-gpt2-medium-x21 beren-gpt2-medium-x49 celebrimbor-gpt2-medium-x81
        durin-gpt2-medium-x343 eowyn-gpt2-medium-x777""",
}
"""By organisation: repositories whose short name is their own in lower case."""

_OTHERS: dict[str, str] = {
    "gpt2": "gpt2-small",
    "distilgpt2": "distillgpt2 distill-gpt2 distil-gpt2 gpt2-xs",
    "EleutherAI/gpt-neox-20b": "gpt-neox neox",
    "EleutherAI/pythia-70m": "pythia",
    "EleutherAI/pythia-70m-v0": "pythia-v0",
    "Qwen/QwQ-32B-Preview": "qwen-32b-preview",
    "codellama/CodeLlama-7b-hf": "codellamallama-2-7b",
    "codellama/CodeLlama-7b-Instruct-hf": "codellama-7b-instruct",
    "codellama/CodeLlama-7b-Python-hf": "codellama-7b-python",
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Llama-2-7b-chat-hf": "llama-2-7b-chat",
    "meta-llama/Llama-2-13b-hf": "llama-2-13b",
    "meta-llama/Llama-2-13b-chat-hf": "llama-2-13b-chat",
    "meta-llama/Llama-2-70b-chat-hf": "llama-2-70b-chat meta-llama-2-70b-chat-hf",
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
    "mistralai/Mistral-7B-Instruct-v0.1": "mistral-7b-instruct",
    "stanford-crfm/alias-gpt2-small-x21": "stanford-gpt2-small-a gpt2-mistral-small-a gpt2-stanford-small-a",
    "stanford-crfm/battlestar-gpt2-small-x49": "stanford-gpt2-small-b gpt2-mistral-small-b",
    "stanford-crfm/caprica-gpt2-small-x81": "stanford-gpt2-small-c gpt2-mistral-small-c gpt2-stanford-small-c",
    "stanford-crfm/darkmatter-gpt2-small-x343": "stanford-gpt2-small-d gpt2-mistral-small-d",
    "stanford-crfm/expanse-gpt2-small-x777": "stanford-gpt2-small-e gpt2-mistral-small-e",
    "stanford-crfm/arwen-gpt2-medium-x21": "stanford-gpt2-medium-a gpt2-medium-small-a gpt2-stanford-medium-a",
    "stanford-crfm/beren-gpt2-medium-x49": "stanford-gpt2-medium-b gpt2-medium-small-b gpt2-stanford-medium-b",
    "stanford-crfm/celebrimbor-gpt2-medium-x81": "stanford-gpt2-medium-c gpt2-medium-small-c",
    "stanford-crfm/durin-gpt2-medium-x343": "stanford-gpt2-medium-d gpt2-medium-small-d gpt2-stanford-medium-d",
    "stanford-crfm/eowyn-gpt2-medium-x777": "stanford-gpt2-medium-e gpt2-medium-small-e gpt2-stanford-medium-e",
}
"""By repository: its other short names."""

_ALIASES = {own.lower(): f"{owner}/{own}" for owner, names in _SAME.items() for own in names.split()}
_ALIASES |= {alias: repository for repository, aliases in _OTHERS.items() for alias in aliases.split()}


def repository_of(name: str) -> str:
    """Return the hub name of a model; a name that is not an alias is returned unchanged."""
    short = name.removeprefix("EleutherAI/").lower()
    if short in _ALIASES:
        return _ALIASES[short]
    if "/" in short:
        return name
    if pythia := re.fullmatch(r"pythia-([\d.]+[mb])(-\S+)?", short):
        return f"EleutherAI/pythia-{_PYTHIA_SIZES.get(pythia[1], pythia[1])}{pythia[2] or ''}"
    if short.startswith("gemma-"):
        return f"google/{short}"
    if checkpoint := re.fullmatch(r"((?:gelu|solu|attn-only)-\d+l)-(?:new|c4-code)", short):
        return checkpoint[1]
    return name
