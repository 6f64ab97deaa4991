"""Published names at their published places: each resolves, to an object that a module of no higher layer defines."""

from __future__ import annotations

import importlib

import pytest
from test_imports import level

from ldm import compat

NAMES = [
    (module, home, name)
    for module, homes in compat.NAMES.items()
    for home, names in homes.items()
    for name in names.split()
]


@pytest.mark.parametrize(("module", "home", "name"), NAMES, ids=[f"{module}.{name}" for module, _, name in NAMES])
def test_published_name_resolves(module, home, name):
    found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(home), name)
    # `ldm.util` has names of the networks, which it imports on their first use only.
    assert level(home) <= max(level(module), 1)


@pytest.mark.parametrize("module", compat.NAMES)
def test_unknown_name_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'no_such_name'"):
        importlib.import_module(module).no_such_name  # noqa: B018


def test_further_names_are_found():
    find = compat.published_names("main", {"UserError": "ldm.errors"})
    assert find("UserError").__name__ == "UserError"
