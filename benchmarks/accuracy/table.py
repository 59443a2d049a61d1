"""Print the README's tables (results, faults, networks, parts of a training) from `benchmarks/results/*.json`.

python benchmarks/table.py              prints them
python benchmarks/table.py --write      puts them between the README's markers
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ablations import BASE, SUITES, differences, verdict
from record import comparable

HERE = Path(__file__).parent
README = HERE.parent / "README.md"

# Row: what, recipe (name of its results file).
ROWS = [
    ("SmallNet on CIFAR-10, 10 epochs", "smallnet_cpu"),
    ("SmallNet on CIFAR-10, 100 epochs", "smallnet"),
    ("SmallNet at its best on CIFAR-10, 60 epochs", "smallnet_best"),
    ("ResNet-18 on CIFAR-10, 60 epochs", "resnet18"),
    ("WideResNet-28-10 on CIFAR-10, 200 epochs", "strong"),
    ("SmallNet, narrow, on the synthetic set", "quickstart"),
]
# The same of speed recipes, whose results file is of `benchmarks/speedrun.py` and also holds peers.
SPEED_ROWS = [
    ("SpeedNet on CIFAR-10, all 50,000 images", "speedrun94"),
    ("SpeedNet, wider", "speedrun95"),
    ("SpeedNet, wide and deep", "speedrun96"),
]
REPLACED = (
    "| The single script it replaces, CIFAR-10, 100 epochs | 91.86 % (as stated, n=1, no spread) | - | a GPU | - |"
)


def tables() -> dict[str, str]:
    """Return each table as Markdown, by the name of its markers."""
    return {
        "results": results_table(),
        "faults": faults_table(),
        "models": models_table(),
        "ablations": ablations_table(),
    }


def results_table() -> str:
    """Return what runs reached."""
    rows = [
        "| what | test accuracy | training time | hardware | command |",
        "| --- | --- | --- | --- | --- |",
        *(row for plain_row in ROWS for row in _rows(*plain_row)),
        *(row for speed_row in SPEED_ROWS for row in _speed_rows(*speed_row)),
        REPLACED,
    ]
    return "\n".join(rows)


def _command(recipe: str, flags: str = "") -> str:
    return f"`python train.py fit --config configs/{recipe}.yaml{flags and ' '}{flags}`"


def _rows(what: str, recipe: str) -> list[str]:
    """Return a row for each hardware, whose times do not compare, and each set of flags beside the recipe."""
    path = HERE / "results" / f"{recipe}.json"
    lines = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["flags"], line["hardware"]), []).append(line)
    rows = []
    if not any(flags == "" for flags, _ in groups):
        rows.append(f"| {what} | not measured | not measured | - | {_command(recipe)} |")
    for (flags, hardware), runs in sorted(groups.items(), key=lambda item: item[0][0] != ""):
        accuracy = _mean_of([100 * run["test_accuracy"] for run in runs])
        timed = [run["elapsed_s"] for run in runs if not run["note"]]
        took = _time_of(timed) if timed else f"not measured: {runs[0]['note']}"
        name = f"The same with `{flags}`" if flags else what
        rows.append(f"| {name} | {accuracy} | {took} | {hardware} | {_command(recipe, flags)} |")
    return rows


def _speed_rows(what: str, recipe: str) -> list[str]:
    """Return a row for each of ours and the peers, on each hardware."""
    path = HERE / "results" / f"{recipe}.json"
    lines = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in comparable(lines, recipe):
        groups.setdefault((line["who"], line["precision"], line["hardware"]), []).append(line)
    if not groups:
        return [f"| {what} | not measured | not measured | - | {_command(recipe)} |"]
    rows = []
    for (who, precision, hardware), runs in sorted(groups.items(), key=lambda item: item[0][0] != "ours"):
        name = f"{what}, {precision}" if who == "ours" else f"{who}, a record script, {precision}, beside it"
        accuracy = _mean_of([100 * run["accuracy"] for run in runs])
        accuracy += f"; {_mean_of([100 * run['accuracy_no_tta'] for run in runs])} with one view"
        timed = [run["seconds"] for run in runs if not run["note"]]
        took = _time_of(timed) if timed else f"not measured: {runs[0]['note']}"
        rows.append(
            f"| {name} | {accuracy} | {took} | {hardware} | {_command(recipe) if who == 'ours' else SPEEDRUN} |"
        )
    return rows


SPEEDRUN = "`python benchmarks/speedrun.py --peer airbench=DIR`"


def _time_of(seconds: list[float]) -> str:
    """Return a mean time in the unit that suits it."""
    mean = statistics.mean(seconds)
    took = f"{mean / 60:.1f} min" if mean >= 60 else f"{mean:.1f} s"
    return f"{took} (n={len(seconds)})"


def _mean_of(percents: list[float]) -> str:
    """Return a mean with its spread, or that there is none."""
    if len(percents) == 1:
        return f"{percents[0]:.2f} % (n=1, no spread)"
    return (
        f"{statistics.mean(percents):.2f} % ± {statistics.stdev(percents):.2f} (n={len(percents)}, standard deviation)"
    )


def faults_table() -> str:
    """Return what becomes of each fault, here and in a plain Lightning script."""
    ours, plain = _faults("faults"), _faults("faults_plain")
    if ours is None:
        return "What becomes of each of 38 faults (`python benchmarks/faults.py`): not measured."
    simulated = [
        str(result["number"]) for result in ours["results"] if result["verdict"] == "handled" and _is_simulated(result)
    ]
    handled = f" handled ({len(simulated)} of them simulated: {', '.join(simulated)})" if simulated else " handled"
    summary = ours["summary"].replace(" handled", handled, 1)
    rows = [f"`python benchmarks/faults.py` on {ours['hardware']}: {summary}."]
    commits = {result["commit"] for result in ours["results"]}
    if len(commits) > 1:
        rows[0] += f" Not one run: rows were tried again after mends, and stand at {len(commits)} commits."
    verdicts: dict[int, str] = {}
    if plain is not None:
        verdicts = {result["number"]: _verdict(result) for result in plain["results"]}
        rows[0] += (
            " The same done to [a plain Lightning script](benchmarks/plain.py) (`--subject plain`): "
            f"{plain['summary'].partition(',')[0]}."
        )
    rows += ["", "| fault | here | plain Lightning |", "| --- | --- | --- |"]
    for result in ours["results"]:
        number = result["number"]
        rows.append(f"| {number}. {result['what']} | {_verdict(result)} | {verdicts.get(number, 'not measured')} |")
    return "\n".join(rows)


def _is_simulated(result: dict[str, Any]) -> bool:
    """Whether the fault was not real, since the machine lacked what it is about; the row's reason says so."""
    return result["reason"].endswith("(simulated)")


def _verdict(result: dict[str, Any]) -> str:
    return result["verdict"] + (" (simulated)" if _is_simulated(result) else "")


def _faults(name: str) -> dict[str, Any] | None:
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def models_table() -> str:
    """Return what each named network costs."""
    path = HERE / "results" / "models.json"
    if not path.exists():
        return "What each network costs (`python benchmarks/models.py`): not measured."
    found = json.loads(path.read_text(encoding="utf-8"))
    size = found["image_size"]
    rows = [
        f"`python benchmarks/models.py`, images of {size} pixels, steps of {found['batch_size']} in 32 bits "
        f"on {found['hardware']} (median of {found['num_steps']} steps, slowest to fastest).",
        "",
        "| `--model.name` | parameters | multiply-adds | map before pooling | trained images/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for one in found["networks"]:
        sides = " x ".join(map(str, one["map"]))
        speed = f"{one['images_per_s']:.3g} ({one['slowest']:.3g} to {one['fastest']:.3g})"
        costs = f"{one['parameters'] / 1e6:.2f} M | {one['multiply_adds'] / 1e6:,.0f} M"
        rows.append(f"| `{one['name']}` | {costs} | {sides} | {speed} |")
    return "\n".join(rows)


def ablations_table() -> str:
    """Return what each part of a training gave alone."""
    path = HERE / "results" / "ablations.json"
    every = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = []
    for name, suite in SUITES.items():
        lines = [line for line in every if line["suite"] == name]
        if not lines:
            rows.append(f"{suite.about}: not measured.")
            continue
        base = [100 * line["accuracy"] for line in lines if line["part"] == BASE]
        where = f"{lines[0]['num_usable_cpus']} cores of {lines[0]['cpu']}, {lines[0]['precision']}"
        asked = f" --precision {lines[0]['asked_precision']}" if lines[0]["asked_precision"] else ""
        command = f"`python benchmarks/ablations.py --data ROOT --suite {name}{asked}`"
        rows += [f"{command}, {where}: {suite.about}. Base: {_mean_of(base)}.", ""]
        rows += ["| part | flags | difference to the base |", "| --- | --- | --- |"]
        for part, flags in suite.parts.items():
            points = differences(lines, part)
            if part != BASE and points:
                given = " ".join(f"`{flag}`" for flag in flags) or "-"
                rows.append(f"| {part} | {given} | {verdict(points, lines[0]['num_pictures'])} |")
        rows.append("")
    return "\n".join(rows).rstrip()


def main() -> None:
    """Print the tables, or put them into the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the README's tables")
    args = parser.parse_args()
    if not args.write:
        print("\n\n".join(tables().values()))
        return
    text = README.read_text(encoding="utf-8")
    for name, table in tables().items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
