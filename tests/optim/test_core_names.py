"""The public names of `zotune` are there, lazily; former names still work and say what they are called now."""

import subprocess
import sys

import pytest

import zotune as zo


@pytest.mark.parametrize("name", zo.__all__)
def test_every_public_name_is_there(name):
    assert getattr(zo, name) is not None


def test_a_former_name_warns_and_is_the_present_one():
    with pytest.warns(DeprecationWarning, match=r"zotune\.TunedTensors is now zotune\.ParameterSet"):
        assert zo.TunedTensors is zo.ParameterSet


def test_a_name_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'zo_sdg'"):
        zo.zo_sdg  # noqa: B018


def test_the_package_is_imported_without_torch():
    code = "import sys, zotune, zotune.llm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
