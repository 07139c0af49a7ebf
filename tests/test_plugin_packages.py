"""The packages in ``plugins/``: installed together into a fresh environment, used, and taken out again.

The fresh environment is a folder of links to everything that is installed here but this project's own packages; a
process started with ``-S`` sees nothing beside it. A package is installed as pip does it: its modules are copied, and
its metadata and entry points are written from its ``pyproject.toml``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import salad_lightning
from salad_lightning.registry import INTERFACES
from salad_lightning.testing.runs import save_tiny_world
from salad_lightning.testing.tiny_encoders import save_tiny_causal_conv

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no tomllib")

PLUGINS = Path(__file__).parents[1] / "plugins"
PACKAGES = sorted(path.parent.name for path in PLUGINS.glob("*/pyproject.toml"))
TOGETHER = {"salad-cif": "CIFConnector", "salad-dual-encoder": "DualEncoder", "salad-on-policy": "OnPolicyModule"}


def project(package):
    return tomllib.loads((PLUGINS / package / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_whole(package):
    """What a stranger needs: a description, a license, a README with a command, tests by the contract, typed code."""
    meta, folder = project(package), PLUGINS / package
    assert meta["name"] == package
    assert meta["license"] == "Apache-2.0"
    assert any(dependency.startswith("salad-lightning") for dependency in meta["dependencies"])
    ((group, names),) = meta["entry-points"].items()
    assert group in {f"salad_lightning.{kind}s" for kind in INTERFACES}
    readme = (folder / "README.md").read_text()
    tests = "".join(path.read_text() for path in folder.glob("tests/test_*.py"))
    for name, target in names.items():
        module, _, cls = target.partition(":")
        assert cls == name
        assert f"`{name}`" in readme
        assert f"pip install ./plugins/{package}" in readme
        assert (folder / "src" / module.split(".")[0] / "py.typed").is_file()
        assert name in tests
    for recipe in folder.glob("*.yaml"):
        assert recipe.read_text() in readme, f"{recipe.name} and the README's copy of it differ"
    if group != "salad_lightning.modules":
        assert "Contract)" in tests


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh") / "packages"
    folder.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        ours = any(path.name.startswith(prefix) for prefix in ("salad", "__editable__", "easy-install"))
        if not ours and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    own = Path(salad_lightning.__file__).parent
    (info,) = Path(sysconfig.get_path("purelib")).glob("salad_lightning-*.dist-info")
    for path in (own, info):
        (folder / path.name).symlink_to(path)
    return folder


def install(fresh, package):
    """Copy the modules, write the metadata; returns what uninstalling would remove."""
    meta = project(package)
    paths = [shutil.copytree(path, fresh / path.name) for path in (PLUGINS / package / "src").glob("salad_*")
             if path.suffix != ".egg-info"]  # fmt: skip
    info = fresh / f"{package.replace('-', '_')}-{meta['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {meta['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in names.items())
        for group, names in meta["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    return [*paths, info]


def main_in(fresh, *command_lines):
    """Run command lines one after the other in one process of that environment: exit codes and outputs."""
    script = (
        "import sys, json, contextlib, io\n"
        "from salad_lightning.cli import main\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        code = main(line)\n"
        "    print(json.dumps([code, out.getvalue(), err.getvalue()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, json.dumps(command_lines)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(fresh)},
        cwd=fresh.parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Loggers may have kept the real output.
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.mark.slow
def test_three_packages_installed_used_together_and_uninstalled(fresh, tmp_path):
    world = save_tiny_world(tmp_path / "world")
    encoder = save_tiny_causal_conv(world.folder / "encoder")
    together = world.arguments(
        "fit",
        "together",
        "--model=OnPolicyModule",
        "--model.rollout_tokens=4",
        "--model.objective=ReverseKLObjective",
        "--model.connector=CIFConnector",
        "--model.encoder=DualEncoder",
        "--model.encoder.first=LogMelEncoder",
        "--model.encoder.second=CausalConvEncoder",
        f"--model.encoder.second.path={encoder}",
        "--trainer.max_steps=3",
    )
    installed = [path for package in TOGETHER for path in install(fresh, package)]
    (listed, out, _), (fitted, _, err) = main_in(fresh, ["plugins", "--json"], together)
    rows = {row["package"]: row for row in json.loads(out)}
    assert listed == 0
    assert {package: (rows[package]["name"], rows[package]["state"]) for package in TOGETHER} == {
        package: (name, "ok") for package, name in TOGETHER.items()
    }
    assert fitted == 0, err
    assert json.loads((world.folder / "together" / "fit.json").read_text())["steps"] == 3

    for path in installed:
        shutil.rmtree(path)
    plain = world.arguments("fit", "plain", "--trainer.max_steps=2")
    with_connector = world.arguments("fit", "x", "--model.connector=CIFConnector")
    with_module = world.arguments("fit", "x", "--model=OnPolicyModule")
    (listed, out, _), (fitted, _, err), missing, no_module = main_in(
        fresh, ["plugins", "--json"], plain, with_connector, with_module
    )
    assert listed == 0
    assert not TOGETHER.keys() & {row["package"] for row in json.loads(out)}
    assert fitted == 0, err
    assert missing[0] == no_module[0] == 2
    assert "no installed package offers the connector 'CIFConnector'" in missing[2]
    assert "OnPolicyModule" in no_module[2]
    assert not (world.folder / "x").exists()
