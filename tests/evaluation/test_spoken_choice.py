import pytest
import torch

from salad_lightning.batch import DocumentInfo
from salad_lightning.errors import UserError
from salad_lightning.evaluation.spoken_choice import SpokenChoice


def test_the_highest_mean_log_probability_wins_not_the_highest_sum():
    fields = {"answer": 1, "domain": "rivers"}
    documents = [DocumentInfo("q", "s", fields, choice) for choice in (0, 1)]
    # option 0: one token at -1.0; option 1: three tokens at -0.9 each (sum -2.7, mean -0.9)
    log_probs = torch.tensor([-1.0, -0.9, -0.9, -0.9])
    choice = SpokenChoice()
    choice.update(log_probs, torch.tensor([0, 1, 1, 1]), documents)
    assert choice.accuracy() == {"all": 1.0}
    assert choice.accuracy("domain") == {"rivers": 1.0}


def test_options_may_come_in_different_batches_and_plain_documents_are_passed_over():
    choice = SpokenChoice()
    for option, value in ((0, -1.0), (1, -2.0)):
        info = DocumentInfo("q", "s", {"answer": 1}, option)
        choice.update(torch.tensor([value, -9.0]), torch.tensor([0, 1]), [info, DocumentInfo("plain", "s")])
    assert choice.accuracy() == {"all": 0.0}
    assert choice.accuracy("domain") == {"none": 0.0}
    assert len(choice) == 1


def asked(choice, key="000000000", option=0, answer=0):
    document = DocumentInfo(key, "arc", {"answer": answer}, option)
    choice.update(torch.tensor([-1.0]), torch.tensor([0]), [document])


@pytest.mark.parametrize("other", [{"option": 0}, {"option": 1, "answer": 1}], ids=["an option twice", "other fields"])
def test_two_items_of_one_key_are_refused(other):
    choice = SpokenChoice()
    asked(choice)
    with pytest.raises(UserError, match="two items have this key") as error:
        asked(choice, **other)
    assert error.value.where == "arc: 000000000"
    assert "a source of its own" in error.value.cure


def test_two_items_of_one_key_on_two_ranks_are_refused(monkeypatch):
    def gathered(*keys):
        ranks = [SpokenChoice() for _ in keys]
        for rank, key in zip(ranks, keys, strict=True):
            asked(rank, key)
        told = [(dict(rank._scores), rank._items) for rank in ranks]
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: len(ranks))
        monkeypatch.setattr(torch.distributed, "all_gather_object", lambda into, _: into.__setitem__(slice(None), told))
        ranks[0].gather()
        return ranks[0]

    assert gathered("a", "b").right() == {"a": True, "b": True}
    with pytest.raises(UserError, match="two items have this key") as error:
        gathered("a", "a")
    assert error.value.where == "arc: a"


def test_items_with_missing_options_are_not_counted():
    """A run of a part of the set ends within an item, whose best option of those read says nothing."""
    choice = SpokenChoice()
    for key, options in (("whole", (0, 1, 2)), ("only the right one", (1,)), ("only wrong ones", (0, 2))):
        for option in options:
            info = DocumentInfo(key, "s", {"answer": 1, "choices": ["a", "b", "c"]}, option)
            choice.update(torch.tensor([-1.0 - option]), torch.tensor([0]), [info])
    assert choice.right() == {"whole": False}
    assert choice.accuracy() == {"all": 0.0}
    assert choice.incomplete == 2
