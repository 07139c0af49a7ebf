"""Entry points are read from real package metadata; one bad package never stops the others."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from salad_lightning import errors, interfaces, registry
from salad_lightning.errors import UserError
from salad_lightning.training.base import TokenLossModule

OBJECTIVE = """
class {name}(Base):
    needs_teacher = False
    def forward(self, student, teacher, labels_M): ...
"""


@pytest.fixture
def load(site, monkeypatch):
    """Load everything, with what the test installed in front on the import path."""
    site.on_path(monkeypatch)
    return registry.load_all


def part(loaded, package):
    (found,) = [part for part in loaded.parts if part.package == package]
    return found


def test_built_in_parts_all_load():
    loaded = registry.load_all()
    ours = [part for part in loaded.parts if part.package == "salad-lightning"]
    assert [part for part in ours if part.state != "ok"] == []
    assert len({(part.kind, part.name) for part in ours}) == len(ours) == 15
    for found in ours:
        assert found.cls.__name__ == found.name
        assert issubclass(found.cls, getattr(interfaces, found.kind.capitalize()))
        assert loaded.find(found.kind, found.name) is found.cls


def test_every_interface_has_a_group():
    assert registry.INTERFACES["module"] == f"{TokenLossModule.__module__}.{TokenLossModule.__name__}"
    for kind in ("encoder", "connector", "objective", "synthesizer"):
        assert registry.INTERFACES[kind] == f"{interfaces.__name__}.{kind.capitalize()}"
        assert registry.load_all([kind]).names(kind)


def test_a_package_is_found_by_being_there(site, load):
    site.install("good-pack", kind="objective", name="GoodLoss", code=OBJECTIVE.format(name="GoodLoss"), version="2.5")
    loaded = load()
    assert loaded.find("objective", "GoodLoss").__module__ == "good_pack"
    assert (part(loaded, "good-pack").version, part(loaded, "good-pack").state) == ("2.5", "ok")
    assert "GoodLoss" in loaded.names("objective")
    assert "GoodLoss" not in loaded.names("connector")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise RuntimeError('needs a newer driver')", "RuntimeError: needs a newer driver"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("BadLoss = 5", "is not a class"),
        (OBJECTIVE.format(name="OtherName") + "BadLoss = OtherName", "leads to the class OtherName"),
        ("class BadLoss: pass", "is not a subclass of salad_lightning.interfaces.Objective"),
        ("class BadLoss(Base): pass", "does not define forward"),
        ("", "AttributeError"),
    ],
)
def test_a_broken_package_is_recorded_and_isolated(site, load, code, reason):
    site.install("bad-pack", kind="objective", name="BadLoss", code=code)
    loaded = load()
    broken = part(loaded, "bad-pack")
    assert broken.state == "failed"
    assert broken.cls is None
    assert reason in broken.reason
    assert loaded.find("objective", "NLLObjective").__name__ == "NLLObjective"
    with pytest.raises(UserError) as caught:
        loaded.find("objective", "BadLoss", where="my.yaml:3")
    assert reason in str(caught.value)
    assert "bad-pack 1.0" in str(caught.value)
    assert str(caught.value).startswith("my.yaml:3")
    # Whoever misspells something else learns of it too.
    with pytest.raises(UserError, match="not usable: BadLoss of bad-pack"):
        loaded.find("objective", "GoodLoss")


def test_ctrl_c_while_loading_is_not_swallowed(site, load):
    site.install("slow-pack", kind="objective", name="SlowLoss", code="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load()


def test_two_packages_with_one_name_are_refused_by_both_names(site, load):
    for package in ("first-pack", "second-pack"):
        site.install(package, kind="objective", name="TwiceLoss", code=OBJECTIVE.format(name="TwiceLoss"))
    loaded = load()
    assert {part(loaded, "first-pack").state, part(loaded, "second-pack").state} == {"clash"}
    assert "TwiceLoss" not in loaded.names("objective")
    with pytest.raises(UserError, match=r"first-pack.*second-pack") as caught:
        loaded.find("objective", "TwiceLoss")
    assert "first_pack.TwiceLoss" in caught.value.cure


def test_a_built_in_cannot_be_replaced_in_silence(site, load):
    site.install("bold-pack", kind="objective", name="NLLObjective", code=OBJECTIVE.format(name="NLLObjective"))
    with pytest.raises(UserError, match=r"bold-pack.*salad-lightning"):
        load().find("objective", "NLLObjective")


def test_one_name_in_two_kinds_is_no_clash(site, load):
    site.install("kind-pack", kind="objective", name="MLPConnector", code=OBJECTIVE.format(name="MLPConnector"))
    loaded = load()
    assert loaded.find("connector", "MLPConnector") is not loaded.find("objective", "MLPConnector")


def test_an_unknown_name_gets_the_known_ones_and_the_nearest():
    with pytest.raises(UserError) as caught:
        registry.load_all().find("connector", "mlpConector")
    text = str(caught.value)
    assert "no installed package offers the connector 'mlpConector'" in text
    assert "did you mean MLPConnector?" in text
    for name in registry.load_all().names("connector"):
        assert name in text
    assert "LogMelEncoder" not in text


def test_registry_alone_imports_only_the_standard_library():
    code = (
        "import sys, salad_lightning.registry as r\n"
        "print(sorted({'torch', 'numpy', 'lightning', 'yaml', 'transformers', 'jsonargparse'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_user_error_survives_a_process_border():
    error = errors.UserError("bad", where="x.yaml:3", cure="write good")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "x.yaml:3: bad\n  → write good"
    assert (again.what, again.where, again.cure) == ("bad", "x.yaml:3", "write good")
