"""Tables of README and docs, from `benchmarks/results/*.json`: results, speed, faults, models, ablations, insights.

python -m benchmarks.accuracy.table            print them
python -m benchmarks.accuracy.table --write    write them between the markers of the pages
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.accuracy.ablations import BASE, SUITES, Suite, differences, verdict
from benchmarks.accuracy.insight_rates import FINDINGS, NOT_BY_CLASS
from benchmarks.accuracy.record import comparable, present_settings, results_of
from cifar_lightning.formatting import plural

# Table: the page that holds it, between two comments with its name.
PAGES_OF = {
    "results": ROOT / "README.md",
    "speed": ROOT / "README.md",
    "faults": ROOT / "docs" / "faults.md",
    "models": ROOT / "docs" / "models.md",
    "ablations": ROOT / "docs" / "training.md",
    "insight_rates": ROOT / "docs" / "report.md",
}

# Row: model and data, config (and name of its results file).
ROWS = [
    ("SmallNet on CIFAR-10", "smallnet_cpu"),
    ("SmallNet on CIFAR-10", "smallnet"),
    ("SmallNet with cutout on CIFAR-10", "smallnet_best"),
    ("ResNet-18 on CIFAR-10", "resnet18"),
    ("ResNet-18 on CIFAR-100", "cifar100"),
    ("WideResNet-28-10 on CIFAR-10", "strong"),
    ("SmallNet, narrow, on the synthetic set", "quickstart"),
]
# The same for speed configs: `benchmarks.speed.speedrun` writes their results, which include peers.
SPEED_ROWS = [
    ("SpeedNet on CIFAR-10, all 50,000 images", "speedrun94"),
    ("SpeedNet, wider, on CIFAR-10, all 50,000 images", "speedrun95"),
    ("SpeedNet, wide and deep, on CIFAR-10, all 50,000 images", "speedrun96"),
]
REPLACED = (
    "| The single script it replaces, CIFAR-10, 100 epochs | 91.86 % (as stated, n=1, no spread) | - | a GPU | - |"
)


def tables() -> dict[str, str]:
    """Return each table as Markdown, by name."""
    return {
        "results": results_table(),
        "speed": speed_table(),
        "faults": faults_table(),
        "models": models_table(),
        "ablations": ablations_table(),
        "insight_rates": insight_rates_table(),
    }


def results_table() -> str:
    """Return the test accuracies that were measured, with remarks; a config without a measurement has no row."""
    notes: list[str] = []
    rows = [
        "| what | test accuracy | training time | hardware | command |",
        "| --- | --- | --- | --- | --- |",
        *(row for plain_row in ROWS for row in _rows(*plain_row, notes)),
        *(row for speed_row in SPEED_ROWS for row in (*_speed_rows(*speed_row, notes), *_rows(*speed_row, notes))),
        REPLACED,
    ]
    remarks = [f"- [{number}] {note[0].upper()}{note[1:]}." for number, note in enumerate(notes, start=1)]
    return "\n".join([*rows, "", *remarks])


def speed_table() -> str:
    """Return how well the program does its work; what was not measured has no row."""
    rows = ["| what | result | hardware | command |", "| --- | --- | --- | --- |"]

    def add(name: str, what: str, result: Callable[[dict[str, Any]], str], command: str) -> None:
        if (found := _read(name)) is not None:
            hardware = found["hardware"].removesuffix(", no GPU")
            rows.append(f"| {what} | {result(found)} | {hardware} | `python -m benchmarks.{command}` |")

    def startup(found: dict[str, Any]) -> str:
        row = next(row for row in found["results"] if row["asked"] == "fit --help")
        ratios = [plain / ours for plain, ours in zip(row["plain_s"], row["ours_s"], strict=True)]
        return f"{_ratio_of(ratios, 0, 'times as fast')}, {statistics.median(row['ours_s']):.2f} s"

    def faults(found: dict[str, Any]) -> str:
        simulated = sum(map(_is_simulated, found["results"]))
        plain = _read("faults_plain")
        of_plain = f"; plain Lightning {plain['summary'].partition(' handled')[0]}" if plain else ""
        return f"{found['summary'].partition(',')[0]}, {simulated} of them simulated{of_plain}"

    images = "times the images/s"
    what = "`fit --help` against plain LightningCLI over the same classes"
    add("startup", what, startup, "speed.startup")
    what = "Loader against torchvision's v2 transforms in 2 workers"
    add("loader", what, lambda found: _ratio_of(found["ratios"]["torchvision"], 0, images), "speed.loader --rounds 3")
    what = "Streaming 200,000 files against ImageFolder in 2 workers"
    command = "speed.streaming --work DIR --data ROOT --rounds 5"
    add("streaming", what, lambda found: _ratio_of(found["ratios"], 0, images), command)
    what = "Host time added to a training step, against what plain Lightning adds"
    add("overhead", what, lambda found: _ratio_of(found["added_over_plain"], 2, "times"), "speed.overhead --rounds 3")
    what = "Training steps of SmallNet on a CPU in float32 against steps with torch's convolutions"
    add("winograd", what, lambda found: _ratio_of(found["rows"][-1]["ratios"], 2, images), "speed.winograd")
    what = "Folder of images in `predict-images` against one image at a time"
    command = "speed.predict smallnet ROOT/test --num 5000 --rounds 3"
    add("predict", what, lambda found: _ratio_of(found["ratios"], 1, images), command)
    add("faults", "Faults: kills, full disks, damaged files, bad input", faults, "faults.run")
    return "\n".join(rows)


def _ratio_of(ratios: list[float], decimals: int, what: str) -> str:
    """Return the median of paired rounds with their range."""
    median, low, high = (f"{of(ratios):.{decimals}f}" for of in (statistics.median, min, max))
    return f"{median} {what} ({low} to {high}, {len(ratios)} rounds)"


def _command(recipe: str, flags: str = "") -> str:
    return f"`python train.py fit --config configs/{recipe}.yaml{flags and ' '}{flags}`"


def _rows(what: str, recipe: str, notes: list[str]) -> list[str]:
    """Return a row for each kind of hardware and each set of flags that was added to the config.

    Append the remarks on its times to `notes`.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in results_of(recipe):
        groups.setdefault((line["flags"], line["hardware"]), []).append(line)
    rows = []
    for (flags, hardware), runs in sorted(groups.items(), key=lambda item: item[0][0] != ""):
        accuracy = _mean_of([100 * run["test_accuracy"] for run in runs])
        accuracy += _remark(_DIRTY, notes) if any(run["dirty"] for run in runs) else ""
        took = _time_cell([(run["elapsed_s"], run["note"]) for run in runs], notes)
        name = f"{what}, {plural(runs[0]['epochs'], 'epoch')}, {_seeds_of(runs)}"
        rows.append(f"| {name} | {accuracy} | {took} | {hardware} | {_command(recipe, flags)} |")
    return rows


def _speed_rows(what: str, recipe: str, notes: list[str]) -> list[str]:
    """Return a row for our runs and for each peer, on each kind of hardware; `notes` as for :func:`_rows`."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in comparable(_read(recipe) or [], recipe):
        groups.setdefault((line["who"], line["precision"], line["hardware"]), []).append(line)
    rows = []
    for (who, precision, hardware), runs in sorted(groups.items(), key=lambda item: item[0][0] != "ours"):
        name = f"{what if who == 'ours' else f'{who}, a record script'}, {precision}, {_seeds_of(runs)}"
        accuracy = _mean_of([100 * run["accuracy"] for run in runs])
        accuracy += f"; {_mean_of([100 * run['accuracy_no_tta'] for run in runs])} without TTA"
        took = _time_cell([(run["seconds"], run["note"]) for run in runs], notes)
        is_given = precision == present_settings(recipe)["trainer"]["precision"]
        flags = "" if is_given else f"--trainer.precision {precision}"
        command = _command(recipe, flags) if who == "ours" else _speedrun(runs)
        rows.append(f"| {name} | {accuracy} | {took} | {hardware} | {command} |")
    return rows


_DIRTY = "one of the checkouts had uncommitted changes"


def _speedrun(runs: list[dict[str, Any]]) -> str:
    """Return the command of a peer's runs; seed 0 is the default."""
    seeds = sorted(run["seed"] for run in runs)
    given = "" if seeds == [0] else f" --seeds {','.join(map(str, seeds))}"
    return f"`python -m benchmarks.speed.speedrun --data ROOT{given} --peer airbench=DIR`"


def _time_of(seconds: list[float]) -> str:
    """Return a mean time in minutes or seconds, with its range."""
    mean = statistics.mean(seconds)
    unit, name = (60, "min") if mean >= 60 else (1, "s")
    span = f"{min(seconds) / unit:.1f} to {max(seconds) / unit:.1f}, " if len(seconds) > 1 else ""
    return f"{mean / unit:.1f} {name} ({span}n={len(seconds)})"


def _time_cell(runs: list[tuple[float | None, str]], notes: list[str]) -> str:
    """Return the time of runs without a remark; without such runs, a bound and the number of the remark in `notes`.

    Args:
        runs: The seconds of each run, None where an epoch was not timed, and the remark on them or "".
        notes: Remarks so far; a new one is appended.
    """
    if undisturbed := [seconds for seconds, note in runs if seconds is not None and not note]:
        return _time_of(undisturbed)
    known = [(seconds, note) for seconds, note in runs if seconds is not None]
    bound = f"at most {_time_of([seconds for seconds, _ in known])}" if known else "-"
    return bound + _remark((known or runs)[0][1], notes)


def _remark(text: str, notes: list[str]) -> str:
    """Return the number of a remark among `notes`, to which a new one is appended."""
    if text not in notes:
        notes.append(text)
    return f" [{notes.index(text) + 1}]"


def _seeds_of(runs: list[dict[str, Any]]) -> str:
    """Return the seeds of runs: "seed 0", "seeds 0, 2"."""
    seeds = sorted(run["seed"] for run in runs)
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _mean_of(percents: list[float]) -> str:
    """Return a mean with its standard deviation and the number of seeds."""
    if len(percents) == 1:
        return f"{percents[0]:.2f} % (n=1, no spread)"
    return (
        f"{statistics.mean(percents):.2f} % ± {statistics.stdev(percents):.2f} (n={len(percents)}, standard deviation)"
    )


def faults_table() -> str:
    """Return the verdict on each fault, for this program and for a plain Lightning script."""
    ours, plain = _read("faults"), _read("faults_plain")
    if ours is None:
        return "`python -m benchmarks.faults.run`: not measured."
    rows = [
        f"`python -m benchmarks.faults.run` on {ours['hardware']}: {ours['summary'].removesuffix(', 0 skipped: none')}."
    ]
    numbers = Counter(f"{result['commit'][:7]}{' with changes' * result['dirty']}" for result in ours["results"])
    of_commits = [f"{commit} ({plural(num, 'row')})" for commit, num in numbers.most_common()]
    rows[0] += f" Commits: {', '.join(of_commits)}."
    verdicts: dict[int, str] = {}
    if plain is not None:
        verdicts = {result["number"]: _verdict(result) for result in plain["results"]}
        rows[0] += (
            " A plain Lightning script, `benchmarks/faults/plain.py` (`--subject plain`): "
            f"{plain['summary'].partition(',')[0]}."
        )
    rows += ["", "| fault | this program | plain Lightning |", "| --- | --- | --- |"]
    for result in ours["results"]:
        number = result["number"]
        rows.append(f"| {number}. {result['what']} | {_verdict(result)} | {verdicts.get(number, 'not measured')} |")
    return "\n".join(rows)


def _is_simulated(result: dict[str, Any]) -> bool:
    """Whether the fault was simulated because the machine cannot produce it."""
    return result["reason"].endswith("(simulated)")


def _verdict(result: dict[str, Any]) -> str:
    return result["verdict"] + (" (simulated)" if _is_simulated(result) else "")


def _read(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def models_table() -> str:
    """Return parameters, multiply-adds and speed of each named model."""
    if (found := _read("models")) is None:
        return "`python -m benchmarks.speed.models`: not measured."
    size = found["image_size"]
    changes = "; the checkout had uncommitted changes" if found["dirty"] else ""
    rows = [
        f"`python -m benchmarks.speed.models`, {size}x{size} images, batch size {found['batch_size']}, 32 bits, "
        f"{found['hardware']} (median of {found['num_steps']} steps, slowest to fastest{changes}).",
        "",
        "| `--model.name` | parameters | multiply-adds | feature map before pooling | trained images/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for one in found["models"]:
        sides = " x ".join(map(str, one["map"]))
        speed = f"{one['images_per_s']:.3g} ({one['slowest']:.3g} to {one['fastest']:.3g})"
        costs = f"{one['parameters'] / 1e6:.2f} M | {one['multiply_adds'] / 1e6:,.0f} M"
        rows.append(f"| `{one['name']}` | {costs} | {sides} | {speed} |")
    return "\n".join(rows)


def ablations_table() -> str:
    """Return the difference in validation accuracy that each setting makes alone."""
    rows = []
    for name, suite in SUITES.items():
        of_suite = [line for line in _read("ablations") or [] if line["suite"] == name]
        rows += [row for lines in _alike(of_suite) for row in _ablation_rows(name, suite, lines)]
    return "\n".join(rows).rstrip()


def _alike(lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return runs by their hardware and precision, in the order of the first of each."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(tuple(line[key] for key in ("hardware", "precision", "asked_precision")), []).append(line)
    return [*groups.values()]


def _ablation_rows(name: str, suite: Suite, lines: list[dict[str, Any]]) -> list[str]:
    base = [100 * line["accuracy"] for line in lines if line["setting"] == BASE]
    where = f"{lines[0]['hardware']}, {lines[0]['precision']}"
    asked = f" --precision {lines[0]['asked_precision']}" if lines[0]["asked_precision"] else ""
    seeds = ",".join(map(str, sorted({line["seed"] for line in lines})))
    given = "" if seeds == "0" else f" --seeds {seeds}"
    command = f"`python -m benchmarks.accuracy.ablations --data ROOT --suite {name}{given}{asked}`"
    rows = [f"{command}, {where}: {suite.about}. Base: {_mean_of(base)}.", ""]
    rows += ["| setting | flags | difference to the base |", "| --- | --- | --- |"]
    for setting, flags in suite.settings.items():
        points = differences(lines, setting)
        if setting != BASE and points:
            given = " ".join(f"`{flag}`" for flag in flags) or "-"
            rows.append(f"| {setting} | {given} | {verdict(points, lines[0]['num_images'])} |")
    return [*rows, ""]


def insight_rates_table() -> str:
    """Return how often each insight is false in simulated test sets, by number of classes and of images."""
    if (found := _read("insight_rates")) is None:
        return "`python -m benchmarks.accuracy.insight_rates`: not measured."
    by_row: dict[tuple[str, int], dict[int, float]] = {}
    for one in found["rates"]:
        by_row.setdefault((one["finding"], one["classes"]), {})[one["images"]] = one["rate"]
    sizes = sorted({size for rates in by_row.values() for size in rates})
    largest = max(one["rate"] for one in found["rates"])
    rows = [
        f"`python -m benchmarks.accuracy.insight_rates`: {found['num_draws']:,} test sets each, so that the standard "
        f"error of 5 % is {100 * found['standard_error']:.1f} %. The largest rate is {100 * largest:.1f} %.",
        "",
        "| false, % of test sets of n images | classes |" + "".join(f" n={size:,} |" for size in sizes),
        "| --- | --- |" + " ---: |" * len(sizes),
    ]
    for (name, num_classes), rates in by_row.items():
        cells = "".join(f" {100 * rates[size]:.1f} |" for size in sizes)
        rows.append(f"| {FINDINGS[name][0]} | {'any' if name in NOT_BY_CLASS else num_classes} |{cells}")
    return "\n".join(rows)


def main() -> None:
    """Print the tables, or write them into README and docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the tables of README and docs")
    args = parser.parse_args()
    if not args.write:
        print("\n\n".join(tables().values()))
        return
    for name, table in tables().items():
        text = PAGES_OF[name].read_text(encoding="utf-8")
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(start)
        PAGES_OF[name].write_text(f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
