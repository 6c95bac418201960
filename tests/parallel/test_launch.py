"""A script in several processes of one machine."""

import json
import subprocess
import sys
import time

import pytest

from performer import launch

PRINTS = """
import json, os, sys
given = json.loads(os.environ.get("TF_CONFIG", "{}"))
print(given.get("task", {}).get("index"), *sys.argv[1:], flush=True)
"""


def performer_launch(tmp_path, text, *arguments, script_arguments=()):
    script = tmp_path / "script.py"
    script.write_text(text)
    command = [sys.executable, "-m", "performer", "launch", *arguments, str(script)]
    return subprocess.run(
        [*command, *script_arguments], capture_output=True, text=True, timeout=100
    )


def test_workers_know_the_same_addresses_and_their_own_place():
    configs = [json.loads(worker["TF_CONFIG"]) for worker in launch.cluster(3)]
    assert [config["task"] for config in configs] == [
        {"type": "worker", "index": index} for index in range(3)
    ]
    (addresses,) = {tuple(config["cluster"]["worker"]) for config in configs}
    assert len(set(addresses)) == 3
    assert launch.cluster(1) == [{}]
    with pytest.raises(ValueError, match="workers must be"):
        launch.cluster(0)


def test_every_worker_runs_the_script_and_the_others_are_marked(tmp_path):
    arguments = ["--steps", "3"]
    done = performer_launch(tmp_path, PRINTS, "--workers", "2", script_arguments=arguments)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 --steps 3", "[worker 1] 1 --steps 3"]


def test_a_failure_of_a_worker_ends_all_and_is_the_status(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys, time\n"
        "if json.loads(os.environ['TF_CONFIG'])['task']['index'] == 1: sys.exit(7)\n"
        "time.sleep(100)\n"
    )
    monkeypatch.setattr(launch, "_SECONDS_TO_END", 0.2)
    begin = time.monotonic()
    assert launch.run([sys.executable, str(script)], 2) == 7
    assert time.monotonic() - begin < 50


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "0", "script.py"], "--workers must be at least 1; got 0"),
        (["nothing.py"], "there is no script nothing.py"),
    ],
)
def test_wrong_arguments_are_named(capsys, tmp_path, monkeypatch, arguments, words):
    from performer import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").touch()
    assert cli.main(["launch", *arguments]) == 2
    assert words in capsys.readouterr().err
