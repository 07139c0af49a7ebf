"""How fast ``salad-lightning prepare`` is, and whether a corpus killed three times has the bytes of an unbroken one.

Run by: python -m benchmarks.prepare --utterances 10000 --kills 3
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import soundfile

from salad_lightning.demo.report import environment
from salad_lightning.testing.shards import random_text, speak_tones

RATE_HZ = 16_000


def main() -> int:
    """Make the corpus, measure, kill, resume, compare; returns 1 where bytes differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=10_000)
    parser.add_argument("--words", type=int, default=4, help="of an utterance, 0.2 s each")
    parser.add_argument("--hours", type=float, default=2.0, help="of 12 s utterances, for the speed")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/prepare"), help="folder of the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_corpus(root / "corpus", args.utterances, args.words)
        begin = time.perf_counter()
        subprocess.run(command(root, "whole", args.workers), check=True)
        wall_s = time.perf_counter() - begin
        seconds = json.loads((root / "whole" / "index.json").read_text())["seconds"]
        kills = killed_and_resumed(root, args.workers, args.kills)
        same = contents(root / "whole") == contents(root / "killed")
        write_corpus(root / "long", round(args.hours * 300), 60)
        speeds = {name: speed(root, name, options) for name, options in VARIANTS.items()}
    result = {
        "utterances": args.utterances,
        "audio_hours": round(seconds / 3600, 3),
        "workers": args.workers,
        "wall_seconds": round(wall_s, 2),
        "times_real_time_per_core": speeds,
        "killed_after_shards": kills,
        "same_bytes": same,
        **environment(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "prepare.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if same else 1


def write_corpus(folder: Path, num_utterances: int, num_words: int) -> None:
    """FLAC files of tones with their words' times, listed in a manifest."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    with (folder / "manifest.jsonl").open("w") as manifest:
        for number in range(num_utterances):
            text = random_text(rng, num_words)
            audio, words = speak_tones(text, sample_rate_hz=RATE_HZ, seed=number)
            soundfile.write(folder / f"{number}.flac", audio, RATE_HZ)
            manifest.write(json.dumps({"audio": f"{number}.flac", "text": text, "words": words}) + "\n")


VARIANTS = {
    "as it is": [],
    "to 24 kHz": ["--sample-rate", "24000"],
    "all on": [
        *("--sample-rate", "24000", "--trim", "--loudness", "-23", "--min-seconds", "0.5", "--max-seconds", "30"),
        *("--min-level", "-60", "--max-clipped", "0.01", "--max-chars-per-second", "40"),
    ],
}


def speed(root: Path, name: str, options: list[str]) -> float:
    """Seconds of audio a second of one core, start-up included."""
    output = "speed-" + name.replace(" ", "-")
    before = os.times()
    subprocess.run([*command(root, output, 1, corpus="long"), *options], check=True)
    after = os.times()
    core_s = after.children_user + after.children_system - before.children_user - before.children_system
    seconds = json.loads((root / output / "index.json").read_text())["seconds"]
    shutil.rmtree(root / output)
    return round(float(seconds) / core_s, 1)


def killed_and_resumed(root: Path, workers: int, kills: int) -> list[int]:
    """Kill the command at random places, and let it end; returns how many shards were finished at each kill."""
    rng, done = random.Random(1), []
    total = sum(1 for _ in (root / "whole").glob("*.tar"))
    for kill in range(kills):
        target = max(total * (kill + 1) // (kills + 1), 1)
        process = subprocess.Popen(command(root, "killed", workers))
        while finished(root / "killed") < target:
            if process.poll() is not None:
                raise RuntimeError("it ended before it could be killed: give more utterances")
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        done.append(finished(root / "killed"))
    subprocess.run(command(root, "killed", workers), check=True)
    return done


def finished(output: Path) -> int:
    return len(list(output.glob(".partial/*.tar.json")))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*")}


def command(root: Path, output: str, workers: int, corpus: str = "corpus") -> list[str]:
    return [
        *(sys.executable, "-m", "salad_lightning", "prepare", "--manifest", str(root / corpus / "manifest.jsonl")),
        *("--output", str(root / output), "--source", "x", "--samples-per-shard", "200", "--workers", str(workers)),
    ]


if __name__ == "__main__":
    sys.exit(main())
