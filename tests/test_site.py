from typing import get_args

import pytest

from headscope.errors import HeadscopeError
from headscope.site import Kind, Site

NAMES = {
    Site("z", 1): "blocks.1.attn.hook_z",
    Site("attn_out", 0): "blocks.0.hook_attn_out",
    Site("mlp_out", 12): "blocks.12.hook_mlp_out",
    Site("resid_pre", 3): "blocks.3.hook_resid_pre",
}


def test_every_kind_has_a_pinned_name() -> None:
    assert {s.kind for s in NAMES} == set(get_args(Kind))


@pytest.mark.parametrize(("site", "name"), NAMES.items())
def test_hook_names_are_transformerlens_and_parse_back(site: Site, name: str) -> None:
    assert site.hook_name == name
    assert Site.from_hook_name(name) == site


@pytest.mark.parametrize(
    "name",
    ["", "hook_z", "blocks.1.attn.hook_q", "blocks.x.attn.hook_z", "blocks.-1.attn.hook_z", "blocks.1.attn.hook_z.x"],
)
def test_other_hook_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(HeadscopeError, match=r"(?s)hook name.*expected: .*blocks\.L\.attn\.hook_z.*do: "):
        Site.from_hook_name(name)


def test_sites_are_equal_and_hashed_by_value() -> None:
    assert {Site("z", 1): "x"}[Site("z", 1)] == "x"
    assert Site("z", 1) != Site("z", 0)
