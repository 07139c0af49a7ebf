"""The page of real runs: self-contained, well-formed, with the numbers of their files; in a browser if there is one."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

from salad_lightning.cli import main
from salad_lightning.report.run_folder import read_run
from salad_lightning.testing.runs import save_tiny_world

VOID = {"meta", "img", "br", "link"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    world = save_tiny_world(tmp_path_factory.mktemp("world"))
    made = []
    for name, rate in (("first", "1e-3"), ("second", "3e-3")):
        options = [f"--model.llm_lr={rate}", "--model.gap_every_n_steps=2", "--trainer.max_steps=6"]
        save = [
            "--trainer.callbacks+=FinalCheckpoint",
            "--trainer.val_check_interval=3",
            "--trainer.limit_val_batches=1",
        ]
        run = world.run("fit", name, *options, *save)
        world.run("test", name, f"--ckpt_path={run.folder / 'checkpoints' / 'final.ckpt'}")
        made.append(run)
    return made


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    rows = {
        str(number): {"web": 0.5, "misalignment": value, "target": 0.5, "texts": 3, "seconds": 60.0 * (number + 1)}
        for number, value in enumerate((0.4, None, 0.2))
    }
    (folder / "selection.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def page(runs, selection, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    folders = [str(run.folder) for run in runs] + [str(selection)]
    assert main(["report", *folders, "--output", str(path), "--title", "Two <runs>"]) == 0
    return path


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.images, self.cells, self.headings, self.outside = [], {}, [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images[values["alt"]] = values["src"]
        self.outside += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def read(page):
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


@pytest.mark.slow
def test_the_page_needs_nothing_else(page, read):
    text = page.read_text(encoding="utf-8")
    assert not read.outside
    assert "<script" not in text
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", text)
    assert "<title>Two &lt;runs&gt;</title>" in text


@pytest.mark.slow
def test_every_plot_is_there(read, selection):
    assert set(read.images) == {
        "Data and speed",
        "Loss",
        "Misalignment and forgetting",
        "Evaluation",
        f"Selection: {selection.name}",
    }
    for source in read.images.values():
        drawing = base64.b64decode(source.partition("base64,")[2])
        assert ElementTree.fromstring(drawing).tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.slow
def test_the_numbers_are_those_of_the_files(runs, read):
    for run in runs:
        tokens = run.results("fit.json")["tokens"]
        assert f"{tokens:,.0f}" in read.cells
        entry = run.results("test.json")["choice"]
        low, high = entry["intervals"]["speech_accuracy"]
        assert f"{entry['all']['speech_accuracy']:.3f} ({low:.3f} – {high:.3f})" in read.cells
        assert f"{entry['all']['misalignment']:.3f}" in read.cells
    assert {"0.001", "0.003"} <= set(read.cells), "settings that differ"
    assert "model.llm_lr" in read.cells


@pytest.mark.slow
def test_curves_are_what_was_logged(runs):
    run = read_run(runs[0].folder)
    losses = runs[0].column("train/loss")
    assert [y for _, y in run.curve("train/loss", True)] == losses
    tokens = runs[0].column("train/tokens")
    assert [x for x, _ in run.curve("train/loss", True)] == pytest.approx(tokens)
    assert [x for x, _ in run.curve("train/loss", False)] == list(range(len(losses)))
    assert run.columns("misalignment") == ["train/misalignment", "val/speech/misalignment"]


@pytest.mark.slow
def test_in_a_browser(page, tmp_path):
    if BROWSER is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2400", f"--screenshot={picture}"]
    subprocess.run([BROWSER, *options, page.as_uri()], check=True, timeout=120, capture_output=True)
    assert picture.stat().st_size > 50_000


def log(folder, version, text):
    (folder / "logs" / f"version_{version}").mkdir(parents=True)
    (folder / "logs" / f"version_{version}" / "metrics.csv").write_text(text)


def test_a_run_that_was_resumed_is_one_curve(tmp_path):
    log(tmp_path, 2, "step,train/loss,train/tokens\n2,8,30\n3,7,40\n")
    log(tmp_path, 0, "step,train/loss,train/tokens\n0,10,10\n1,9,20\n2,99,30\n")
    log(tmp_path, 10, "step,test/x\n4,1\n")
    run = read_run(tmp_path)
    assert run.curve("train/loss", True) == [(10, 10), (20, 9), (30, 8), (40, 7)]


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    for name in ("a/run", "b/run"):
        log(tmp_path / name, 0, "step,train/loss\n0,1\n")
        (tmp_path / name / "fit.json").write_text('{"steps": 3}')
    folders = [str(tmp_path / name) for name in ("a/run", "b/run")]
    assert main(["report", *folders, "--output", str(tmp_path / "r.html")]) == 0
    assert "a/run" in (tmp_path / "r.html").read_text()


def test_a_renamed_log_is_passed_over(tmp_path):
    log(tmp_path / "run", 0, "step,train/loss\n0,1\n")
    log(tmp_path / "run", "0_old", "step,train/loss\n0,7\n")
    assert read_run(tmp_path / "run").curve("train/loss", False) == [(0.0, 1.0)]


BAD = {
    "missing": (lambda f: None, "no such folder"),
    "empty": (lambda f: f.mkdir(), "nothing to report"),
    "json": (lambda f: (f.mkdir(), (f / "test.json").write_text("{")), "not JSON"),
    "list": (lambda f: (f.mkdir(), (f / "fit.json").write_text("[]")), "not a JSON object"),
    "log": (lambda f: log(f, 0, "step,train/loss\n0,x\n"), "line 2: not a number"),
}


@pytest.mark.parametrize("kind", BAD)
def test_mistakes_write_nothing(tmp_path, capsys, kind):
    make, message = BAD[kind]
    make(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "r.html")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("r.html*"))


def test_a_run_twice_and_no_folder_for_the_page(tmp_path, capsys):
    log(tmp_path / "run", 0, "step,train/loss\n0,1\n")
    assert main(["report", str(tmp_path / "run"), str(tmp_path / "run"), "--output", str(tmp_path / "r.html")]) == 2
    assert "named twice" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "none" / "r.html")]) == 2
