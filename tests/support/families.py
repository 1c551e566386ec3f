"""Random models of every family, by the names that tests are parametrised with."""

PYTHIAS = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
FAMILIES = {
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-parallel": ("gpt_neox", {"use_parallel_residual": True, "rope_parameters": PYTHIAS}),
    "gpt2": ("gpt2", {}),
    **{name: (name, {}) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")},
}


def build(make, name, **options):
    family, changes = FAMILIES[name]
    return make(family, **changes, **options)
