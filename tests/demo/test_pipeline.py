"""Steps that are run once, again where what they depend on has changed, and never believed where they broke off."""

import sys

import pytest

from salad_lightning.demo.pipeline import Step, run_steps
from salad_lightning.errors import UserError


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
