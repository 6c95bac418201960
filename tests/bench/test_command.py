"""`performer bench`: its options, the cases they choose, and its exit status."""

import argparse
import itertools
import json

import pytest

from performer.bench import command, plan, processes
from performer.bench.cases import Case
from performer.bench.checking import WrongResult
from performer.bench.report import results
from performer.cli import main


def test_a_wrong_result_leaves_status_1_and_no_file(monkeypatch, tmp_path, capsys):
    def wrong(task, job_done):
        raise WrongResult("stabilised, causal: the output must be right")
        yield

    monkeypatch.setattr(processes, "records", wrong)
    assert main(["bench", "--quick", "--output", str(tmp_path)]) == 1
    assert "no figures" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_process_that_dies_is_reported(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    arguments = ["bench", "--quick", "--cases", "decode", "--output", str(tmp_path)]
    assert main(arguments) == 1
    assert "failed: window, heads, decode: " in capsys.readouterr().out
    failures = results.of_kind(json.loads((tmp_path / "results.json").read_text()), "failed")
    assert len(failures) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "128", "100"], "--lengths must be multiples of 64 from 64 to"),
        (["--lengths", "0"], "--lengths must be multiples of 64"),
        (["--features", "0"], "--features must be from 1 to 1024; got 0"),
        (["--dims", "2000"], "--dims must be from 1 to 1024; got 2000"),
        (["--threads", "0"], "--threads must be from 1 to"),
        (["--minutes", "0"], "--minutes must be more than 0; got 0"),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["bench", *options, "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("option", ["--cases", "--dtypes"])
def test_unknown_names_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", option, "nonsense"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert option in error
    assert "nonsense" in error
    assert "choose from" in error


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert main(["bench", "--output", str(file)]) == 2
    assert "--output must be a folder" in capsys.readouterr().err


def chosen(*options):
    """The plan of command line options."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.chosen(parser.parse_args(options))


def test_the_options_choose_the_cases():
    quick = chosen("--quick", "--lengths", "512", "--cases", "causal", "memory")
    assert quick.quick
    jobs = quick.time_jobs("tensorflow")
    assert [job["entries"][0][1]["length"] for job in jobs] == [512]
    assert {impl for impl, _ in jobs[0]["entries"]} == {
        "performer", "stabilised", "stabilised_xla", "textbook", "textbook_xla", "exact"
    }  # fmt: skip
    case = Case(True, False, 512)
    (job,) = quick.memory_jobs("tensorflow", {("stabilised", case), ("textbook", case)})
    assert [impl for impl, _ in job["entries"]] == ["stabilised"]
    assert quick.extra_jobs() == quick.thread_jobs() == []


def test_a_full_run_covers_every_size():
    cases = [Case(**job["entries"][0][1]) for job in chosen().time_jobs("tensorflow")]
    assert {case.setting for case in cases} == set(
        itertools.product((64, 128, 256), (64, 128), plan.DTYPES)
    )
    main = cases[0].setting
    assert {case.length for case in cases if case.setting == main} == {2**n for n in range(7, 18)}
    assert {case.length for case in cases if case.setting != main} == {1024, 4096, 16384}
    assert len({case.mode for case in cases}) == 4


def test_calls_with_a_window_take_turns_with_what_they_are_compared_with():
    jobs = chosen("--quick", "--cases", "window").extra_jobs()
    assert [job["kind"] for job in jobs] == ["window"] * 4
    for job, mode in zip(jobs, plan.MODES.values(), strict=True):
        entries = {(impl, Case(**case)) for impl, case in job["entries"]}
        wanted = {
            ("performer", Case(*mode, 4096)),
            ("performer", Case(*mode, 4096, window=64)),
            ("performer", Case(*mode, 4096, 64, window=64)),
            ("performer", Case(*mode, 256, 64, window=64)),
            ("exact", Case(*mode, 256)),
        }
        assert entries == wanted | (
            {("exact", Case(*mode, 4096))} if mode == (True, False) else set()
        )


@pytest.mark.parametrize("options", [["--minutes", "3"], ["--minutes", "3", "--quick"]])
def test_minutes_bound_a_run(options):
    assert chosen(*options).most_total == 180
