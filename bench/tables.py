"""Writes tables of measured results into the documents, from the JSON files of `bench/results`.

    python bench/tables.py

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`; the names are those of
`TABLES`. A table whose file is missing, or was written by an older version, stays as it is.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ablations
import pareto_grids
import pareto_table
import report

RESULTS = report.ROOT / "bench" / "results"
DOCUMENTS = ("README.md", "bench/README.md")
Content = dict[str, Any]
HEADLINE = "calibrated 2x"
"""The variant that sentences about the demo are about, if it is there."""


def write_headline(content: Content) -> str:
    """Returns the sentence about the demo in the main README."""
    rows, steps = content["variants"], content["steps"]
    fast = rows[find_headline(content)]
    fewer = rows[f"{round(steps / 2)} step{'s' * (steps > 2)}"]
    matmul = content["matmul"]
    text = (
        f"On {content['cpus']} CPU cores, the demo computes {fast['calls']} of {steps} calls and"
        f" forecasts the others {fast['speedup_by_less_work']:.2f} times as fast as the same code"
        f" computes all of them, at {fast['psnr']:.1f} dB PSNR from the full model's clips"
        f"{_describe_choice(content)};"
        f" {fewer['calls']} steps of the same sampler are {fewer['psnr']:.1f} dB from them. The"
        " compiled code itself is"
        f" {rows['pabc, no reuse']['speedup_vs_torch_compile']:.2f} times as fast as"
        f" torch.compile's there, with matrix products by {matmul['pabc']} instead of"
        f" {matmul['torch']}, which differs from machine to machine. **Nothing has been measured on"
        " a GPU yet.** All figures, and the commands that make them: [bench](bench/README.md)."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False)


def find_headline(content: Content) -> str:
    """Returns the variant that sentences are about: the calibrated one, or that of older results
    and of few steps."""
    return HEADLINE if HEADLINE in content["variants"] else content["headline"]


def _describe_choice(content: Content) -> str:
    """Returns the rest of a sentence on how calls are chosen: nothing if they are by the rule."""
    if find_headline(content) != HEADLINE:
        return ""
    rule = [row for name, row in content["variants"].items() if name.startswith("skip ")]
    by_rule = f" (by `Schedule.skip`'s own rule: {rule[0]['psnr']:.1f} dB)" if rule else ""
    return f", with calls and weights that `pabc.calibrate` found on other prompts{by_rule}"


def write_demo(content: Content) -> str:
    """Returns the tables of work and of time of one of the demo's models."""
    rows = content["variants"]
    end = "_accuracy"
    judged = [key for key in rows[find_headline(content)] if key.endswith(end)]
    work = [
        [
            name,
            row["calls"],
            f"{row['flop_share']:.0%}",
            f"{row['speedup_by_less_work']:.2f}x",
            "" if row["psnr"] is None else f"{row['psnr']:.1f} dB ({row['psnr_min']:.1f})",
            f"{row['ssim']:.3f}",
            ", ".join(f"{row[key]:.0%}" for key in judged),
        ]
        for name, row in rows.items()
    ]
    time = [
        [
            name,
            report.format_spread(row["seconds_per_clip"]),
            f"{row['speedup_vs_eager']:.2f}x",
            f"{row['speedup_vs_torch_compile']:.2f}x",
            f"{row['speedup_by_less_work']:.2f} x {row['speedup_by_code']:.2f}",
            f"{row['cache_bytes'] / 2**20:.1f} MiB" if row["cache_bytes"] else "",
            f"{row['compile_seconds']:.0f} s" if row["compile_seconds"] else "",
        ]
        for name, row in rows.items()
    ]
    header = ("variant", "calls", "operations", "by less work", "PSNR (worst clip)", "SSIM")
    last = f"{', '.join(key.removesuffix(end) for key in judged)} right"
    first = report.format_markdown((*header, last), work)
    header = ("variant", "s / clip (min to max)", "over eager", "over torch.compile")
    header += ("by less work x by other code", "cache", "compile")
    matmul = content["matmul"]
    about = (
        f"{content['date'][:10]}, {content['processor']}, threads: {content['threads']}; the"
        f" {content['model']} model, {content['steps']} steps, batches of {content['batch']} with"
        f" guidance {content['guidance']}, medians of {content['rounds']} interleaved rounds,"
        f" {content['clips']} samples; matrix products by {matmul['torch']} in PyTorch, by"
        f" {matmul['pabc']} in pabc."
    )
    second = report.format_markdown(header, time)
    about += _describe_calibration(content.get("calibration"))
    return "\n\n".join([textwrap.fill(about, 120, break_on_hyphens=False), first, second])


def _describe_calibration(found: Content | None) -> str:
    """Returns sentences on the calibration; nothing for results without one."""
    if not found or found["correlation"] is None:
        return ""
    return (
        f" Calibration: {found['seconds']:.0f} s, on {len(found['captions'])} prompts and noise"
        f" that are not judged; predicted and measured PSNR of the {len(found['runs'])} plans that"
        f" were run correlate with {found['correlation']:.2f}, and differ by"
        f" {found['largest_miss']:.1f} dB at most."
    )


def write_one_clip(content: Content) -> str:
    """Returns a sentence about the demo with one clip at a time."""
    rows = content["variants"]
    names = (find_headline(content), "pabc 2/4/6")
    found = [
        f"{rows[name]['speedup_by_less_work']:.2f}x by less work and {rows[name]['psnr']:.1f} dB"
        f" for {name}"
        for name in names
    ]
    code = rows["pabc, no reuse"]["speedup_by_code"]
    text = (
        f"One clip at a time (the second command): {', '.join(found)}; {code:.2f}x by other code"
        " (`bench/results/demo/metrics_one_clip.json`)."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False)


def write_skips(content: Content) -> str:
    """Returns the table of skipped calls, of `efficiency.py`."""
    header = ("model", "backend", "full call", "skipped call", "share", "speedup")
    lines = [
        [
            row["model"],
            row["backend"],
            f"{1e3 * row['seconds']['full']['median']:.1f} ms",
            f"{1e6 * row['seconds']['skipped']['median']:.0f} us",
            f"{row['share']:.2%}",
            f"{row['speedup']:.2f}x",
            f"{row['of_bound']:.3f}",
        ]
        for row in content["skips"]
    ]
    return _with_date(content, report.format_markdown((*header, "of calls / computed"), lines))


def write_cold_start(content: Content) -> str:
    """Returns the table of seconds until results, of `cold_start.py`."""
    lines = [
        [
            name,
            *(f"{row[key]:.1f} s" for key in ("first", "generation")),
            *(f"{row[key]:.1f} s" if key in row else "" for key in ("compile", "save", "load")),
            f"{row['captures']:.0f}, {row['compiles']:.0f}",
        ]
        for name, row in content["seconds"].items()
    ]
    header = ("demo model, 20 steps, 5 phases", "first result", "whole generation")
    header += ("compiling", "`save`", "`load`", "captures, compiles")
    loaded = content["seconds"]["loaded"]
    notes = f"{loaded['imports']:.1f} s of imports", f"a file of {loaded['mebibytes']:.1f} MiB"
    return _with_date(content, report.format_markdown(header, lines), *notes)


def write_bytes(content: Content) -> str:
    """Returns the table of measured bytes, of `communication.py`."""
    names = ("2/4/6", "skip 2x", "skip 3x")
    rows = [row for name, row in content["rows"].items() if name.endswith("measured")]
    lines = []
    for row in rows:
        none = row["no reuse"]["bytes"]
        cells = [f"{row[n]['bytes'] / 1e6:.1f} MB, {row[n]['bytes'] / none:.2f}" for n in names]
        error = max(row[name]["max_error"] for name in ("no reuse", *names))
        lines.append([row["model"], row["ranks"], f"{none / 1e6:.1f} MB", *cells, f"{error:.1e}"])
    header = ("model", "ranks", "without reuse", *names, "largest difference")
    return _with_date(content, report.format_markdown(header, lines))


def write_equal_calls(content: Content) -> str:
    """Returns the table of variants with equally many computed calls, of `peers.py`."""
    rows = content["models"]["demo"]["rows"]
    full, lines = rows["eager"], []
    found = [name for name in rows if "psnr_min" in rows[name] and name != "eager"]
    for name in sorted(found, key=lambda name: -(rows[name]["psnr"] or 1e9)):
        row = rows[name]
        psnr = "equal" if row["psnr"] is None else f"{row['psnr']:.1f} ({row['psnr_min']:.1f})"
        speedup = full["summary"]["median"] / row["summary"]["median"]
        share = row["attentions"] / full["attentions"]
        lines.append([name, f"{share:.0%}", f"{speedup:.2f}x", psnr, row["note"]])
    header = ("variant", "of all attentions", "over eager", "PSNR (worst clip)", "settings")
    settings = content["settings"]
    note = f"{settings['computed']} of {settings['steps']} calls computed"
    return _with_date(content, report.format_markdown(header, lines), note)


def write_frontier(content: Content) -> str:
    """Returns the tables of the setup that is compared most closely, and the aims of all."""
    return _with_date(content, pareto_table.format_documents(content["rows"]))


def write_seconds(content: Content) -> str:
    """Returns the tables of the points of the frontier that were timed."""
    header = ("variant", "s / generation", "over torch.compile", "PSNR (worst)")
    parts = []
    for row in content["rows"].values():
        lines = [
            [
                name,
                report.format_spread(found["seconds"]),
                f"{found['over_torch_compile']:.2f}x",
                f"{found['psnr']:.1f} ({found['psnr_min']:.1f})",
            ]
            for name, found in row["variants"].items()
            if "seconds" in found
        ]
        parts.append(report.format_markdown(header, lines))
    return _with_date(content, "\n\n".join(parts))


def write_ablations(content: Content) -> str:
    """Returns the table of each setup of `ablations.py`."""
    parts = [
        f"{setup}, PSNR in dB to the full run, mean (worst):\n\n{report.format_markdown(*table)}"
        for setup, *table in ablations.list_tables(content["rows"])
    ]
    return _with_date(content, "\n\n".join(parts))


def write_grids(content: Content) -> str:
    """Returns the table of each model of `pareto.py --part grids`, with what suffices."""
    parts = []
    for found in pareto_grids.list_grids(content["rows"]):
        verdicts = "\n".join(f"- {line}" for line in found.verdicts)
        table = report.format_markdown(found.header, found.lines)
        parts.append(f"{found.model}:\n\n{table}\n\n{verdicts}")
    return _with_date(content, "\n\n".join(parts))


def _with_date(content: Content, table: str, *notes: str) -> str:
    facts = [content["date"][:10], content["cpu"], f"{content['threads']} threads", *notes]
    return f"{', '.join(facts)}:\n\n{table}"


TABLES: dict[str, tuple[str, Callable[[Content], str]]] = {
    "headline": ("demo/metrics.json", write_headline),
    "demo": ("demo/metrics.json", write_demo),
    "emoji": ("demo/metrics_emoji.json", write_demo),
    "one clip": ("demo/metrics_one_clip.json", write_one_clip),
    "skips": ("efficiency.json", write_skips),
    "cold start": ("cold_start.json", write_cold_start),
    "bytes": ("communication.json", write_bytes),
    "skipped bytes": ("communication_skips.json", write_bytes),
    "equal calls": ("peers_skips.json", write_equal_calls),
    "frontier, digits": ("pareto_digits.json", write_frontier),
    "frontier, emoji": ("pareto_emoji.json", write_frontier),
    "seconds, digits": ("pareto_seconds.json", write_seconds),
    "seconds, emoji": ("pareto_seconds_emoji.json", write_seconds),
    "ablations, digits": ("ablations.json", write_ablations),
    "ablations, emoji": ("ablations_emoji.json", write_ablations),
    "grids, digits": ("pareto_grids.json", write_grids),
    "grids, emoji": ("pareto_grids_emoji.json", write_grids),
}
"""Name of a table -> its file, and what makes it."""


def fill(text: str, results: Path = RESULTS) -> str:
    """Returns a document with its tables made anew."""
    return re.sub(
        r"(<!-- table: (.*?) -->\n)(.*?)(\n?<!-- end -->)",
        lambda found: f"{found[1]}{make(found[2], found[3].strip(), results)}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def make(name: str, former: str, results: Path) -> str:
    """Returns a table; the former one if its file is missing or lacks an entry."""
    file, write = TABLES[name]
    try:
        return write(json.loads((results / file).read_text()))
    except (FileNotFoundError, KeyError) as error:
        print(f"{name}: left as it is: {file}: {type(error).__name__}: {error}")
        return former


def main() -> None:
    """Fills all documents."""
    for name in DOCUMENTS:
        path = report.ROOT / name
        path.write_text(fill(path.read_text()))
        print(f"wrote {name}")


if __name__ == "__main__":
    main()
