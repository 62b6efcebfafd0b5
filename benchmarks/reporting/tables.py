"""Makes Markdown tables of rows, one layout for each kind of suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reporting.rows import RESULTS, Row, load_rows, triton_version


def machine(rows: Sequence[Row]) -> str:
    """Returns where the rows were measured, one line."""
    found = []
    for row in rows:
        env = row["environment"]
        name = env["gpu"]["name"] or f"{env['cpu']['name']}, {env['cpu']['cores']} cores"
        found.append(f"{name}, PyTorch {env['packages'].get('torch', '?')}, {env['time'][:10]}")
    return "; ".join(dict.fromkeys(found))


def sources(rows: Sequence[Row]) -> list[str]:
    """Returns one line per file that the rows come from: its name, commit, load before the run, and command."""
    lines = {}
    for row in rows:
        env = row["environment"]
        load = env["cpu"].get("load_before")
        about = [f"commit {env['commit'][:8]}" + (" with local changes" if env.get("dirty") else "")]
        about += [f"load {load:.1f} before"] if load is not None else []
        about += [f"driver {env['gpu']['driver_version']}"] if env["gpu"].get("driver_version") else []
        lines[row["file"]] = f"`{row['file']}` ({', '.join(about)}): `{env['command']}`"
    return list(lines.values())


def table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)) + "\n"


def quality(rows: Sequence[Row]) -> str:
    """Returns a line per trained model and way of running it, then a line per baseline and data set.

    What has been scored with categories follows in a table of its own.
    """
    models, completed, baselines = [], [], {}
    snapshots = [row for row in rows if "training_steps" in row["case"]]
    arms = [row for row in rows if "arm" in row["case"]]
    agreement = [row for row in rows if row["case"].get("mode") == "agreement"]
    apart = [*snapshots, *arms, *agreement]
    aware = [row for row in rows if row["case"].get("mode") == "class-aware" and row not in apart]
    for row in rows:
        if row in aware or row in apart:
            continue
        case, data = row["case"], _images(row["case"])
        pq = _pq(row)
        if case.get("mode") == "inpainting":
            how = f"inpainting, blocks of {case['block']} px" + (f", {case['views']}" if "views" in case else "")
            how += ", unfused" if case.get("unfused") else ""
            completed.append([row["variant"], data, how, pq, "", "", "", ""])
            continue
        edges = f"{row['boundary_pq']:.1f}" if "boundary_pq" in row else ""
        numbers = [pq, f"{row['sq']:.1f}", f"{row['rq']:.1f}", edges]
        if "ms_per_image" in row and ("steps" in case or "ids" in case):  # the baselines of older files share the case
            minutes = row.get("cpu_minutes_in_all", row.get("cpu_minutes"))
            models.append([row["variant"], data, _how(case), *numbers, "" if minutes is None else f"{minutes:g}"])
        else:
            baselines[row["variant"], data] = [row["variant"], data, "", *numbers, ""]
    header = ["class-agnostic, %", "data, images", "sampling", "PQ", "SQ", "RQ", "boundary PQ", "training, CPU minutes"]
    text = table(header, [*models, *completed, *baselines.values()])
    if arms:
        text += "\n" + comparison(arms)
    if snapshots:
        text += "\n" + learning_curve(snapshots)
    if agreement:
        text += "\n" + wrong_by_agreement(agreement)
    if not aware:
        return text
    lines = [
        [
            *(row["variant"], _images(row["case"]), _how(row["case"]) if "steps" in row["case"] else ""),
            *(
                f"{row[key]:.1f}" if key in row else ""
                for key in ("value", "sq", "rq", "boundary_pq", "miou", "category_accuracy")
            ),
        ]
        for row in aware
    ]
    header = ["class-aware, %", "data, images", "sampling", "PQ", "SQ", "RQ", "boundary PQ", "mIoU", "right categories"]
    return text + "\n" + table(header, lines)


def comparison(rows: Sequence[Row]) -> str:
    """Returns a line per arm and way of running it, as they were measured."""
    lines = [
        [
            *(row["variant"], _images(row["case"]), _how(row["case"]), _pq(row)),
            *(f"{row[key]:.1f}" for key in ("sq", "rq", "boundary_pq")),
            *(str(row.get("training_steps", "")), f"{row['cpu_minutes']:.1f}" if "cpu_minutes" in row else ""),
        ]
        for row in rows
    ]
    header = ["trainings compared, %", "data, images", "sampling", "PQ", "SQ", "RQ", "boundary PQ"]
    return table([*header, "steps of training", "its CPU minutes"], lines)


def wrong_by_agreement(rows: Sequence[Row]) -> str:
    """Returns a line per model, data set and band of agreement: its share of all pixels, and how many are wrong."""
    lines = [
        [
            *(row["variant"], _images(row["case"]), f"{_how(row['case'])}, {row['case']['samples']} samples"),
            *(row["case"]["agreement"], f"{row['pixels']:.1f}", f"{row['value']:.1f}" if row["pixels"] else ""),
        ]
        for row in rows
    ]
    header = ["wrong by agreement of samples, %", "data, images", "sampling", "samples that agree, share"]
    return table([*header, "of all pixels", "of these wrong"], lines)


def learning_curve(rows: Sequence[Row]) -> str:
    """Returns class-agnostic PQ of one run at several times, a line per time and a column per data set."""
    rows = [row for row in rows if row["case"]["mode"] == "class-agnostic"]
    sets = list(dict.fromkeys(_images(row["case"]) for row in rows))
    times: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        times.setdefault((row["variant"], row["case"]["training_steps"]), []).append(row)
    lines = []
    for (name, steps), found in sorted(times.items()):
        values = {_images(row["case"]): _pq(row) for row in found}
        minutes = round(found[0]["cpu_minutes_in_all"], 1)
        lines.append([name, str(steps), f"{minutes:g}", *(values.get(each, "") for each in sets)])
    return table(["class-agnostic PQ, %, while training", "steps", "CPU minutes in all", *sets], lines)


def _pq(row: Row) -> str:
    return f"{row['value']:.1f}" + (f" ± {row['deviation']:.1f}" if "deviation" in row else "")


def _images(case: dict[str, Any]) -> str:
    annotators = f", mean of {case['annotators']} annotators" if "annotators" in case else ""
    return f"{case['data']} {case['split']}, {case['images']}{annotators}"


def _how(case: dict[str, Any]) -> str:
    if "steps" not in case:
        return f"{case['ids']} ids, {case['size']} px"
    solver = case.get("solver", "ddim")
    size = f"{case['size']} px" if "size" in case else ""
    least = [
        f"{name} threshold {case[f'{name}_threshold']:g}" for name in ("mask", "overlap") if f"{name}_threshold" in case
    ]
    unfused = "unfused" if case.get("unfused") else ""
    pieces = f"connected, from {case['connected']} px" if "connected" in case else ""
    others = ["" if solver == "ddim" else solver, size, case.get("views", ""), unfused, pieces, *least]
    others.append(f"mean of {case['trainings']} trainings" if "trainings" in case else "")
    return ", ".join([f"{case['steps']} steps", *filter(None, others)])


def timings(rows: Sequence[Row]) -> str:
    """Returns a line per row: median, ratio to the baseline, and the ratio that was wanted."""
    lines = []
    for row in rows:
        case = ", ".join(f"{key} {value}" for key, value in row["case"].items())
        if "value" in row:
            lines.append([row["name"], case, row["variant"], f"{row['value']:.4g} {row['unit']}", "", ""])
        else:
            ratio = f"{row['ratio']:.2f}x" if row["ratio"] else ""
            target = "" if row["target"] is None else f"{row['target']:g}"
            lines.append([row["name"], case, row["variant"], f"{row['p50']:.4g} ms", ratio, target])
    return table(["what", "case", "variant", "median", "ratio to baseline", "target"], lines)


def latency(rows: Sequence[Row]) -> str:
    """Returns `timings` with the spread and the agreement with the baseline beside each number."""
    lines = []
    for row in rows:
        case = ", ".join(f"{key} {value}" for key, value in row["case"].items() if key not in ("model", "threads"))
        quality_of = row.get("quality") or {}
        alike = f"{quality_of['pixels_alike']:.1%}" if "pixels_alike" in quality_of else ""
        target = "" if row["target"] is None else f"{row['target']:g}"
        numbers = [f"{row['p50']:.4g} ms", f"{row['spread']:.2f}", f"{row['ratio']:.2f}x", target, alike]
        lines.append([row["name"], case, row["variant"], *numbers])
    header = ["what", "case", "variant", "median", "p80/p20", "ratio to baseline", "target", "pixels alike"]
    return table(header, lines)


def soak(rows: Sequence[Row]) -> str:
    """Returns what the long tests counted."""
    counted = [row for row in rows if row["variant"] != "duration"]
    return table(["test", "counted"], [[row["name"], f"{row['value']:g} {row['unit']}"] for row in counted])


def instructions(rows: Sequence[Row]) -> str:
    """Returns what each kernel function is compiled to, a line for each architecture, by the last run's Triton.

    Of other versions of Triton it returns sums.
    """
    counts = ("registers", "spill_bytes", "wgmma", "mma", "waits", "value", "loop")
    by_version: dict[str, list[Row]] = {}
    for row in rows:
        by_version.setdefault(triton_version(row), []).append(row)
    version = triton_version(rows[-1])
    counted = any("exponentials" in row for row in by_version[version])  # older runs do not have it
    lines = [
        [f"`{row['name']}`", row["case"]["kernel"], row["variant"]]
        + [str(row[name]) for name in counts]
        + [f"{row['per_element']:g}" if "per_element" in row else ""]
        + ([str(row.get("exponentials") or "")] if counted else [])
        for row in by_version[version]
    ]
    header = ["function", "kernel", "for", "registers", "spilled bytes", "wgmma", "mma", "waits for wgmma"]
    header += ["instructions", "in its loop", "per element", *(["exponentials"] if counted else [])]
    made = f"{table(header, lines)}\nCompiled by Triton {version}.\n"
    if len(by_version) == 1:
        return made
    sums = [
        [name, str(len(own)), str(max(row["registers"] for row in own))]
        + [str(sum(row[count] for row in own)) for count in ("spill_bytes", "wgmma", "mma", "waits", "value")]
        for name, own in sorted(by_version.items())
    ]
    header = ["Triton", "builds", "most registers", "spilled bytes", "wgmma", "mma", "waits for wgmma", "instructions"]
    return f"{made}\nBy each version, in all:\n\n{table(header, sums)}"


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "quality": quality,
    "latency": latency,
    "soak": soak,
    "instructions": instructions,
}


def suite_table(suite: str, folder: Path = RESULTS) -> str:
    """Returns the suite's table and where it was measured; empty where no full run is there."""
    rows = load_rows(suite, folder)
    if not rows:
        return ""
    return f"{TABLES.get(suite, timings)(rows)}\nMeasured on {machine(rows)}.\n"
