"""Kill the demo with SIGKILL at random moments until it ends by itself; its digests must be those of an undisturbed run."""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bench.report import report
from fourmill.pipelines.digests import all_digests


def _start(out: Path, profile: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fourmill.pipelines.cli", "demo", "--out", str(out), "--profile", profile]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _undisturbed(out: Path, profile: str) -> float:
    start = time.monotonic()
    if _start(out, profile).wait() != 0:
        raise SystemExit(f"the undisturbed demo failed; run it by hand: fourmill demo --out {out} --profile {profile}")
    return time.monotonic() - start


def _children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _disturbed(out: Path, profile: str, kills: int, longest_s: float, rng: random.Random) -> list[float]:
    """Kill `kills` times, each after a random share of what an undisturbed run takes; then let it finish."""
    moments: list[float] = []
    for _ in range(kills):
        process = _start(out, profile)
        moment = rng.uniform(2, longest_s)
        try:
            process.wait(timeout=moment)
            break  # it was done before the kill
        except subprocess.TimeoutExpired:
            orphans = _children(process)
            process.send_signal(signal.SIGKILL)
            process.wait()
            psutil.wait_procs(orphans, timeout=60)
            moments.append(round(moment, 1))
    if _start(out, profile).wait() != 0:
        raise SystemExit(f"the demo did not finish after {len(moments)} kills; its folder is {out}")
    return moments


def main() -> None:
    """Run the test; exit code 1 when a digest differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="smallest")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two kills")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fourmill-chaos-") as folder:
        calm, wild = Path(folder) / "calm", Path(folder) / "wild"
        seconds = _undisturbed(calm, given.profile)
        kills = 2 if given.quick else given.kills
        moments = _disturbed(wild, given.profile, kills, seconds, random.Random(given.seed))
        expected, found = all_digests(calm), all_digests(wild)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    rows = [(name, "differs") for name in wrong] or [(f"{len(expected)} digests", "equal")]
    report(
        "chaos",
        ["asset", f"after kills at {moments} s"],
        rows,
        {"kills": len(moments), "digests_that_differ": len(wrong)},
    )
    if wrong:
        print(json.dumps(wrong), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
