"""Examples in docstrings run and print what they say."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import performer

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples():
    """The examples of every module that has some."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for info in pkgutil.walk_packages(performer.__path__, "performer."):
        if info.name.rpartition(".")[2] in ("__main__", "_core", "_ops", "_xla"):
            continue  # a program, or compiled
        try:
            module = importlib.import_module(info.name)
        except ModuleNotFoundError as error:  # of an extra that tests do not need
            assert not error.name.startswith("performer"), error
            continue
        yield from (test for test in finder.find(module) if test.examples)


TESTS = list(examples())


def test_every_public_layer_and_function_has_one():
    names = {test.name for test in TESTS}
    for name in performer.__all__:
        public = getattr(performer, name)
        if inspect.isfunction(public) or inspect.isclass(public):
            # `read` is the other half of the example of `summarize`.
            assert f"{public.__module__}.{'summarize' if name == 'read' else name}" in names, name


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_examples_run(test):
    report = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert not report, "".join(report)
