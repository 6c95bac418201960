"""Code written for earlier versions finds every public name where it was."""

import importlib

import pytest

import performer

MODULES = {
    "performer.diagnostics": ["approximation_error"],
    "performer.feature_maps": ["FeatureMap", "get", "serialize"],
    "performer.layers": ["Performer", "PerformerDecoder", "PerformerEncoder", "RotaryEmbedding"],
    "performer.library": ["ops", "status", "supports_jit", "xla_status"],
    "performer.networks.linear_attention": ["Performer"],
    "performer.ops": ["AttentionState", "favor_attention", "merge", "read", "summarize"],
    "performer.parallel": ["Mesh", "enable_fit", "favor_attention", "sequence"],
    "performer.projections": ["orthogonal_projection"],
    "performer.state": ["AttentionState", "empty_state", "merge", "read", "summarize"],
    "performer.tolerances": ["tolerances"],
}


@pytest.mark.parametrize("module", MODULES)
def test_a_public_module_is_found_by_its_name(module):
    found = importlib.import_module(module)
    assert all(callable(getattr(found, name)) for name in MODULES[module])
    if module.count(".") == 1:
        assert getattr(performer, module.rpartition(".")[2]) is found


def test_the_names_that_the_package_promises_are_there():
    assert all(getattr(performer, name) is not None for name in performer.__all__)


def test_the_known_path_gives_the_same_layer():
    module = importlib.import_module("performer.networks.linear_attention")
    assert module.Performer is performer.Performer
