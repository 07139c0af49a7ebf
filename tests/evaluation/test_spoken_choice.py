import torch

from salad_lightning.batch import DocumentInfo
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
