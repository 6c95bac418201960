"""Examples in docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import performer

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def tests():
    """The examples of every module that has some."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for info in pkgutil.walk_packages(performer.__path__, "performer."):
        if info.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(info.name)
        except ModuleNotFoundError as error:  # of an extra that tests do not need
            assert not error.name.startswith("performer"), error
            continue
        yield from (test for test in finder.find(module) if test.examples)


TESTS = list(tests())


def test_there_are_examples():
    names = {test.name for test in TESTS}
    for name in performer.__all__:
        public = getattr(performer, name)
        if isinstance(public, type) and issubclass(public, tuple | object):
            assert f"{public.__module__}.{name}" in names or not callable(public), name


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_examples_run(test):
    report = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert not report, "".join(report)
