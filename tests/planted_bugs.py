"""Plants five classic mistakes in a copy of the package, one at a time, and shows that the tests notice each.

    python tests/planted_bugs.py

Exits with 1 if a mistake goes unnoticed, if its place in the code is not found, or if the tests fail without any.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ONE_STEP = "tests/training/test_one_step.py"
LEAK = "tests/model/test_llm.py::test_packed_documents_equal_hugging_face_one_by_one[qwen2]"
RANKS = "tests/training/test_normalisation.py::test_two_processes_take_the_same_steps_as_one[ddp]"


class Bug(NamedTuple):
    """A mistake: ``right`` in ``file`` becomes ``wrong``; ``tests`` are those that should notice."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


BUGS = [
    Bug(
        "labels shifted by one",
        "data/packing.py",
        "labels_M=_join([document.token_ids[document.predicted] for document in self.documents])",
        "labels_M=_join([np.roll(document.token_ids, -1)[document.predicted] for document in self.documents])",
        (ONE_STEP,),
    ),
    Bug(
        "a leaked document",
        "model/llm.py",
        "same = document_ids_BS[:, None, :, None] == document_ids_BS[:, None, None, :]",
        "same = (document_ids_BS[:, None, :, None] >= 0) == (document_ids_BS[:, None, None, :] >= 0)",
        (LEAK,),
    ),
    Bug(
        "KL reversed",
        "objectives/forward_kl.py",
        "LossTerms(kl=1.0, temperature=temperature)",
        "LossTerms(reverse_kl=1.0, temperature=temperature)",
        (ONE_STEP,),
    ),
    Bug(
        "a rank's count dropped",
        "training/base.py",
        "torch.distributed.all_reduce(totals)",
        "pass",
        (RANKS,),
    ),
    Bug(
        "a wrong teacher position",
        "data/packing.py",
        "np.flatnonzero(document.predicted) - 1)",
        "np.flatnonzero(document.predicted))",
        (ONE_STEP,),
    ),
]


def failures(package_parent: Path, tests: tuple[str, ...]) -> int:
    """Failed tests when the package is that of ``package_parent``.

    Raises:
        RuntimeError: If the tests did not run at all.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Only this copy is under test, and no data of it is to be mixed with the coverage of the package itself.
    environment = {name: value for name, value in environment.items() if not name.startswith(("COV", "PYTEST"))}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=no"]
    command += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", *(str(ROOT / test) for test in tests)]
    # `python -m` looks for packages in the folder it runs in before anywhere else.
    done = subprocess.run(command, cwd=package_parent, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return sum(line.startswith(("FAILED", "ERROR")) for line in done.stdout.splitlines())


def plant(bug: Bug, folder: Path) -> None:
    """Copy the package to ``folder`` with the bug in it.

    Raises:
        LookupError: If the line is not there exactly once: the package has changed, and this script must too.
    """
    copied = shutil.copytree(
        ROOT / "salad_lightning", folder / "salad_lightning", ignore=shutil.ignore_patterns("__pycache__")
    )
    path = copied / bug.file
    text = path.read_text()
    if text.count(bug.right) != 1:
        raise LookupError(f"{bug.name}: {bug.file} holds {text.count(bug.right)} times {bug.right!r}")
    path.write_text(text.replace(bug.right, bug.wrong))


def noticed(bug: Bug) -> int:
    """How many tests fail with the bug planted."""
    with tempfile.TemporaryDirectory() as folder:
        plant(bug, Path(folder))
        return failures(Path(folder), bug.tests)


def main() -> int:
    """Print a table; 0 if every bug is noticed."""
    every = tuple(sorted({test for bug in BUGS for test in bug.tests}))
    clean = failures(ROOT, every)
    print(f"{'planted':28} {'in':20} failing tests")
    print(f"{'nothing':28} {'':20} {clean}")
    counts = []
    for bug in BUGS:
        counts.append(noticed(bug))
        print(f"{bug.name:28} {bug.file:20} {counts[-1]}", flush=True)
    return int(clean > 0 or 0 in counts)


if __name__ == "__main__":
    sys.exit(main())
