"""Several processes of one run."""

import os
import random

import pytest

from salad_lightning.testing.ranks import finish_ranks, start_ranks

PRINTS_ITS_PORT = ("-c", "import os; print(os.environ['MASTER_PORT'])")


def test_seeded_test_processes_choose_ports_of_their_own(tmp_path):
    """Two test processes with the same seed once chose the same port, and their ranks met."""
    for name in ("one", "other"):
        random.seed(0)
        finish_ranks(tmp_path, start_ranks(tmp_path, 2, *PRINTS_ITS_PORT, name=name), name=name)
    ports = [[(tmp_path / f"{name}-{rank}.log").read_text() for rank in range(2)] for name in ("one", "other")]
    assert ports[0][0] == ports[0][1]
    assert ports[1][0] == ports[1][1]
    assert ports[0] != ports[1]


@pytest.fixture(scope="module")
def sharded_run():
    """What Lightning leaves in the environment of the process that starts the others."""
    os.environ.update(LOCAL_RANK="0", WORLD_SIZE="1", MASTER_PORT="1")


@pytest.mark.usefixtures("sharded_run")
def test_runs_in_fixtures_leave_nothing_to_the_next_command():
    """A two-process command that inherited a rank once waited for one that nobody started."""
    assert not {"LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"} & set(os.environ)
