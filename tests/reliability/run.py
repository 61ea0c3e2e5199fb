"""Run it all, or one part: ``python tests/reliability/run.py [mutants|kills|disk] [--only TEXT]``.

Each case's result is appended to a file of lines, so that a second start goes on where the first was broken off.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.reliability import disk, kills, mutants

HERE = Path(__file__).parent
RESULTS, BEFORE = HERE / "results.json", HERE / "before.json"
PAGE = HERE.parents[1] / "docs" / "explanation" / "reliability.md"
MARK = "<!-- figures: tests/reliability/run.py writes them from its results -->"
NAMES = {"mutants": "commands on damaged inputs", "kills": "kills", "disk": "full disks, read-only folders, odd names"}
GOOD = ("ok", "error")
PARTS: dict[str, Any] = {"mutants": mutants.run, "kills": kills.run, "disk": disk.run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", choices=[*PARTS], help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="the cases whose id holds this text")
    parser.add_argument("--again", action="store_true", help="run what went wrong before once more")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lowrank-ft-reliability")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.part or PARTS:
        lines = options.work / f"{name}.jsonl"
        results = read_lines(lines)
        if options.again:
            results = {k: r for k, r in results.items() if r["verdict"] in GOOD}
        shutil.rmtree(options.work / name, ignore_errors=True)  # what went wrong last time is kept until here
        began = time.monotonic()
        for result in PARTS[name](options.work, options.seed, set(results), options.only):
            results[result["id"]] = result
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            if result["verdict"] not in GOOD:
                shown = (result["verdict"], result["id"], result.get("damage", ""), result["message"][:300])
                print(*shown, sep=": ", flush=True)
        counts = Counter(r["verdict"] for r in results.values())
        print(f"{name}: {len(results)} cases, {time.monotonic() - began:.0f} s; {dict(counts)}")
    write_summary(options.work, options.seed)
    head, _, tail = PAGE.read_text(encoding="utf-8").split(MARK)
    PAGE.write_text(MARK.join((head, f"\n{figures()}\n", tail)), encoding="utf-8")


def figures() -> str:
    """The tables of the page."""
    now, before = (json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS, BEFORE))
    rows = ["| | cases | usable result | one sentence | wrong | wrong before the fixes |", "|---|---|---|---|---|---|"]
    for part, name in NAMES.items():
        if part in now:
            good = [now[part]["verdicts"].get(verdict, 0) for verdict in GOOD]
            first = before[part]["verdicts"]
            wrong = ", ".join(f"{n} {verdict}" for verdict, n in first.items() if verdict not in GOOD) or "none"
            rows.append(
                f"| {name} | {now[part]['cases']} | {good[0]} | {good[1]} | {len(now[part]['bad'])} | {wrong} |"
            )
    rows += ["", "| damaged file | commands | usable result | one sentence | wrong |", "|---|---|---|---|---|"]
    for target, found in now["mutants"]["by_target"].items():
        good = [found.get(verdict, 0) for verdict in GOOD]
        total = sum(found.values())
        rows.append(f"| `{target}` | {total} | {good[0]} | {good[1]} | {total - sum(good)} |")
    return "\n".join(rows)


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The newest result of every case."""
    if not path.is_file():
        return {}
    return {r["id"]: r for r in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def write_summary(work: Path, seed: int) -> None:
    """Counts of the verdicts by part and by what was damaged, and every case that went wrong."""
    summary: dict[str, Any] = {"seed": seed}
    for name in PARTS:
        results = [r for r in read_lines(work / f"{name}.jsonl").values() if r["id"].startswith(f"{seed}/")]
        if not results:
            continue
        groups: dict[str, Counter[str]] = {}
        for r in results:
            groups.setdefault(r["target"], Counter())[r["verdict"]] += 1
        summary[name] = {
            "cases": len(results),
            "mutants": len({(r["target"], r.get("mutant")) for r in results}),
            "verdicts": dict(sorted(Counter(r["verdict"] for r in results).items())),
            "by_target": {k: dict(sorted(v.items())) for k, v in sorted(groups.items())},
            "bad": [r for r in results if r["verdict"] not in GOOD],
        }
        if name != "mutants":
            del summary[name]["mutants"]
        if name == "kills":
            summary[name]["killed"] = sum(r["killed"] for r in results)
    RESULTS.write_text(json.dumps(summary, indent=2, sort_keys=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
