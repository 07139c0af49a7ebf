"""Steps that are run once, again where what they depend on has changed, and never believed where they broke off."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path

import pytest

from salad_lightning.demo import launcher as launcher_module
from salad_lightning.demo.launcher import Launcher
from salad_lightning.demo.pipeline import Step, run_steps
from salad_lightning.errors import UserError
from salad_lightning.testing.runs import TinyRun, save_tiny_world


def copying(recipe, after=()):
    """A step that appends its recipe to out.txt, and fails on the recipe "broken" after having written."""
    script = "import sys; text = open(sys.argv[1]).read(); open('out.txt', 'a').write(text); sys.exit(text == 'broken')"
    return Step("copy", [sys.executable, "-c", script, str(recipe)], after, (recipe,))


@pytest.fixture
def recipe(tmp_path):
    return tmp_path / "recipe.txt"


def test_a_step_is_run_once_and_again_after_a_change(tmp_path, recipe):
    for text, expected in (("a", "a"), ("a", "a"), ("b", "ab"), ("a", "aba")):
        recipe.write_text(text)
        run_steps([copying(recipe)], tmp_path)
        assert (tmp_path / "out.txt").read_text() == expected
    run_steps([copying(recipe)], tmp_path, fingerprint="new code")
    assert (tmp_path / "out.txt").read_text() == "abaa"


def test_results_of_a_step_that_broke_off_are_not_taken_for_the_old_ones(tmp_path, recipe):
    recipe.write_text("a")
    run_steps([copying(recipe)], tmp_path)
    recipe.write_text("broken")
    with pytest.raises(UserError):
        run_steps([copying(recipe)], tmp_path)
    recipe.write_text("a")
    run_steps([copying(recipe)], tmp_path)
    assert (tmp_path / "out.txt").read_text() == "abrokena"


def test_stamps_lie_where_they_are_told_to(tmp_path, recipe):
    recipe.write_text("a")
    run_steps([copying(recipe)], tmp_path, state=tmp_path / "results" / "stamps")
    assert sorted(path.name for path in (tmp_path / "results" / "stamps").iterdir()) == ["copy.json", "copy.log"]
    assert not (tmp_path / ".steps").exists()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    with closing(Launcher(tmp_path_factory.mktemp("launched"))) as launcher:
        yield launcher


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes a script that is started as if it were ``salad-lightning``."""

    def write(code):
        path = tmp_path / "own.py"
        path.write_text(f"import atexit, multiprocessing, os, pathlib, signal, sys, time\n{code}\n")
        monkeypatch.setattr(launcher_module, "_SCRIPT", path)
        return str(path)

    return write


def until(condition):
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def ended(process):
    until(lambda: process.poll() is not None)
    return process.poll()


def alive(pid):
    try:  # a zombie is not: whoever adopted it may be slow to bury it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids(path):
    """What a script has written, once it has."""
    return list(map(int, until(lambda: path.exists() and path.read_text()).split()))


@pytest.mark.slow
def test_a_command_of_the_package_is_a_process_that_finds_its_imports_done(launcher, script, tmp_path):
    code = f"""
        print([name in sys.modules for name in ("torch", "lightning", "transformers")], os.getpid() != {os.getpid()})
        print(sys.argv, __name__, sys.stdin.read(), multiprocessing.current_process().name)
        print("wrong", file=sys.stderr)
        atexit.register(print, "late")
    """
    command = [script(textwrap.dedent(code)), "an option"]
    assert ended(launcher.start(command, tmp_path / "log")) == 0
    lines = set((tmp_path / "log").read_text().splitlines())
    assert lines == {"[True, True, True] True", f"{command} __main__  MainProcess", "wrong", "late"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "expected", "log"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no such thing')", 1, "no such thing\n"),
        ("raise EOFError('a bug')", 1, "EOFError: a bug\n"),
        ("print('half', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "half\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)", -signal.SIGTERM, ""),
    ],
)
def test_an_exit_code_is_that_of_a_process(launcher, script, tmp_path, code, expected, log):
    command = [script(code)]
    assert ended(launcher.start(command, tmp_path / "log")) == expected
    assert (tmp_path / "log").read_text().endswith(log)
    assert subprocess.run([sys.executable, *command], capture_output=True, check=False).returncode == expected


@pytest.mark.slow
def test_a_fork_trains_as_a_new_process_does(launcher, tmp_path):
    world = save_tiny_world(tmp_path)
    new = world.start("fit", "new", "--trainer.max_steps=3")
    assert new.wait() == 0
    new.stdout.close()
    command = [sys.executable, "-m", "salad_lightning", *world.arguments("fit", "fork", "--trainer.max_steps=3")]
    assert ended(launcher.start(command, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    runs = [TinyRun(tmp_path / name) for name in ("new", "fork")]
    assert runs[0].column("train/loss") == runs[1].column("train/loss")
    assert len(runs[0].column("train/loss")) == 3


@pytest.mark.slow
def test_a_fork_has_workers(launcher, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n' * 8)
    options = ["--text", str(tmp_path / "texts.jsonl"), "--samples-per-shard", "2", "--workers", "2"]
    command = [str(launcher_module._SCRIPT), "prepare", *options, "--output", str(tmp_path / "shards")]
    assert ended(launcher.start(command, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 4


@pytest.mark.slow
def test_a_failure_ends_the_other_steps_and_is_told(tmp_path, script):
    code = "if sys.argv[1] == 'wait':\n    pathlib.Path('pid').write_text(str(os.getpid()))\n    time.sleep(600)\n"
    path = script(code + "while not pathlib.Path('pid').exists(): time.sleep(0.02)\nsys.exit('out of luck')")
    steps = [Step(name, [path, name]) for name in ("wait", "fail")]
    with pytest.raises(UserError, match=r"'fail' failed with exit code 1:\nout of luck"):
        run_steps(steps, tmp_path)
    assert not alive(*pids(tmp_path / "pid"))


@pytest.mark.slow
def test_the_end_of_what_forks_is_told(tmp_path, script):
    path = script(
        "pathlib.Path('pid').write_text(str(os.getppid()))\ntime.sleep(1)\nos.kill(os.getppid(), signal.SIGKILL)"
    )
    with pytest.raises(UserError, match="forked from was ended"):
        run_steps([Step("kill", [path])], tmp_path)
    assert not alive(*pids(tmp_path / "pid"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_steps_end_with_the_process_that_started_them(tmp_path, script, number):
    path = script("pathlib.Path('pid').write_text(f'{os.getpid()} {os.getppid()}')\ntime.sleep(600)")
    code = (
        "import signal, sys\nfrom pathlib import Path\nfrom salad_lightning.demo import launcher, pipeline\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background ignores it
        "launcher._SCRIPT = Path(sys.argv[1])\npipeline.run_steps([pipeline.Step('wait', sys.argv[1:])], Path())"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        found = pids(tmp_path / "pid")
        process.send_signal(number)
    until(lambda: not any(map(alive, found)))
