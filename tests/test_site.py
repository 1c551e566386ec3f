from typing import get_args

import pytest

from headscope.errors import HeadscopeError
from headscope.site import KINDS, Kind, Site

SAE_NAMES = {
    Site("z", 1): "blocks.1.attn.hook_z",
    Site("attn_out", 0): "blocks.0.hook_attn_out",
    Site("mlp_out", 12): "blocks.12.hook_mlp_out",
    Site("resid_pre", 3): "blocks.3.hook_resid_pre",
    Site("resid_mid", 2): "blocks.2.hook_resid_mid",
    Site("resid_post", 2): "blocks.2.hook_resid_post",
}
OTHER_NAMES = {
    Site("q", 0): "blocks.0.attn.hook_rot_q",
    Site("k", 1): "blocks.1.attn.hook_rot_k",
    Site("v", 12): "blocks.12.attn.hook_v",
    Site("scores", 0): "blocks.0.attn.hook_attn_scores",
    Site("pattern", 0): "blocks.0.attn.hook_pattern",
    Site("mlp_in", 2): "blocks.2.hook_mlp_in",
    Site("ln1_scale", 2): "blocks.2.ln1.hook_scale",
    Site("ln2_scale", 2): "blocks.2.ln2.hook_scale",
    Site("ln_final_scale", 5): "ln_final.hook_scale",
}


def test_every_kind_has_a_pinned_name() -> None:
    assert {s.kind for s in SAE_NAMES} == set(get_args(Kind))
    assert {s.kind for s in SAE_NAMES | OTHER_NAMES} == set(KINDS)


@pytest.mark.parametrize(("site", "name"), (SAE_NAMES | OTHER_NAMES).items())
def test_hook_names_are_transformerlens(site: Site, name: str) -> None:
    assert site.hook_name == name


@pytest.mark.parametrize(("site", "name"), SAE_NAMES.items())
def test_names_of_places_of_saes_parse_back(site: Site, name: str) -> None:
    assert Site.from_hook_name(name) == site


@pytest.mark.parametrize("name", OTHER_NAMES.values())
def test_names_of_other_sites_are_no_places_of_saes(name: str) -> None:
    with pytest.raises(HeadscopeError, match=r"(?s)hook name.*expected: .*blocks\.L\.attn\.hook_z.*do: "):
        Site.from_hook_name(name)


def test_sites_are_ordered_as_a_model_computes_them() -> None:
    kinds = ["pattern", "mlp_out", "resid_pre", "z", "scores", "resid_post", "attn_out", "mlp_in", "resid_mid", "v"]
    sites = [Site(kind, layer) for layer in (1, 0) for kind in kinds]
    order = ["resid_pre", "v", "scores", "pattern", "z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"]
    assert sorted(sites, key=lambda site: site.depth) == [Site(kind, layer) for layer in (0, 1) for kind in order]


@pytest.mark.usefixtures("no_type_checks")
def test_a_kind_that_no_model_has_is_refused() -> None:
    with pytest.raises(HeadscopeError, match=r"(?s)site 'resid'.*expected: one of resid_pre, .*do: "):
        Site("resid", 0)


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
