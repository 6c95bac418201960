"""For which instruction sets the CPU kernels are compiled."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from performer import _core

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
pytestmark = pytest.mark.skipif(CMAKE is None, reason="CMake is not installed")


@pytest.fixture(scope="module")
def choose(tmp_path_factory):
    """Configures the core alone; the names that were chosen, or the message of an error."""
    folder = tmp_path_factory.mktemp("build")
    left_out = [f"-DPERFORMER_{part}=OFF" for part in ("TENSORFLOW", "BINDINGS", "CUDA")]
    # The wish of this build would be the default of the one here.
    environment = {name: x for name, x in os.environ.items() if name != "PERFORMER_ISAS"}

    def run(wish):
        command = [CMAKE, "-S", ROOT, "-B", folder, *left_out, f"-DPERFORMER_ISAS={wish}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return " ".join(done.stderr.split())
        return re.search(r"CPU kernels: (.*)", done.stdout)[1].split(", ")

    return run


def test_a_library_that_stays_has_the_best_kernels_of_this_machine(choose):
    assert choose("NATIVE") == _core.isas()[-1:]


def test_a_library_that_travels_has_all_kernels(choose):
    every = choose("ALL")
    assert choose("") == every  # the default
    assert set(_core.isas()) <= set(every)


def test_chosen_instruction_sets_are_those_that_are_compiled(choose):
    one = choose("ALL")[0]
    assert choose(one) == [one]
    assert choose(f"NATIVE,{one}") == list(dict.fromkeys([*choose("NATIVE"), one]))


@pytest.mark.parametrize("wish", ["v9", "native", "NATIVE,", "ALL,NATIVE"])
def test_an_unknown_instruction_set_is_an_error(choose, wish):
    known = ", ".join(choose("ALL"))
    message = choose(wish)
    assert f"PERFORMER_ISAS must be ALL, or NATIVE and names of {known}" in message
    assert f"got {wish}" in message
