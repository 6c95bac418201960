"""What the package takes from inside other packages, where any of their versions may change it."""

import re
from pathlib import Path

import keras
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
INSIDE = {
    "keras.src.backend.tensorflow": ["parallel/keras_fit.py"],  # what `fit` does with replicas
    "keras.src.models.functional": ["convert/replacement.py"],  # class of a functional model
    "tensorflow.python.eager.context": ["loader.py"],  # whether TensorFlow has started
    "tensorflow.python.ops": ["layers/_projection.py"],  # whether XLA compiles a graph
    "tensorflow.python.ops.parallel_for": ["ops/vectorize.py"],  # vectorized loops
}


def requirements():
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL).group(1)
    found = (Requirement(line) for line in re.findall(r'^\s*"(.*)",$', listed, re.MULTILINE))
    return {requirement.name: requirement.specifier for requirement in found}


def test_modules_from_inside_other_packages_are_those_that_are_known():
    package, found = ROOT / "python" / "performer", {}
    for path in sorted(package.rglob("*.py")):
        for name in re.findall(r"\b(?:keras\.src|tensorflow\.python)[\w.]*", path.read_text()):
            found.setdefault(name, []).append(path.relative_to(package).as_posix())
    assert found == INSIDE


def test_packages_that_are_used_from_inside_have_an_upper_bound():
    wanted = requirements()
    assert keras.__version__ in wanted["keras"]
    major, minor = map(int, keras.__version__.split(".")[:2])
    assert f"{major}.{minor + 1}" not in wanted["keras"]
    assert f"{major + 1}.0" not in wanted["keras"]
