"""Renders the demo's report as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from pabc.calibration.calibration import Calibration
from pabc.demo import charts, metrics, predictions
from pabc.demo.table import draw_table
from pabc.explanation import Explanation
from pabc.plan import Plan

TEMPLATE = Path(__file__).with_name("report.html")
_FACTS = [
    "device",
    "processor",
    "cpus",
    "threads",
    "backend",
    "matmul",
    "seed",
    "pabc",
    "torch",
    "diffusers",
    "python",
]
"""The entries of `metrics.json` that say how it was measured."""


def render(
    content: Mapping[str, Any],
    *,
    method: str,
    pictures: Mapping[str, bytes],
    plans: Mapping[str, tuple[Plan, Explanation]],
    worst: bytes | None,
    curves: charts.Curves,
    window: tuple[float, float],
    calibration: Calibration | None,
) -> str:
    """Returns the page.

    Args:
        content: the content of `metrics.json`.
        method: a description of how the figures were measured.
        pictures: file name -> the bytes of what was generated, `clips.gif` or `clips.png`.
        plans: variant -> its plan, and the explanation of its model.
        worst: the bytes of `worst.png`; None: there is none.
        curves: differences from step to step, see `pabc.differences`.
        window: the first and last step of the shaded range in charts of curves.
        calibration: the plans of the calibrated variants; None: there are none.
    """
    found = next(found for _, found in plans.values())
    panels = charts.draw_kinds(curves, window)
    work_header, work = metrics.format_work(content["variants"])
    times_header, times = metrics.format_time(content["variants"])
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        headline=escape(_headline(content)),
        subtitle=escape(_subtitle(content)),
        warnings="".join(f'<p class="warning">{escape(w)}</p>' for w in content["warnings"]),
        work=draw_table(work, work_header, content["headline"]),
        time=draw_table(times, times_header, content["headline"]),
        about="".join(["<ul>", *_list_variants(content["variants"]), "</ul>"]),
        method=escape(method),
        figures="".join(_draw_figure(name, data) for name, data in pictures.items()),
        worst=_draw_figure("worst.png", worst) if worst else "<p>None leaves anything out.</p>",
        calibration=predictions.draw(content["calibration"], calibration) if calibration else "",
        calls=charts.draw_calls(
            {name: row["timesteps"] for name, row in content["variants"].items()}
        ),
        plans="".join(
            _draw_plan(name, content["variants"][name]["about"], *plans[name]) for name in plans
        ),
        means=charts.draw_means(curves, window),
        kinds="".join(f"<div><h3>{escape(kind)}</h3>{svg}</div>" for kind, svg in panels.items()),
        found=escape(_describe_found(found)),
        explanation=escape(_explain_model(found)),
        machine=draw_table([[key, _format_fact(content[key])] for key in _FACTS]),
    )


def _headline(content: Mapping[str, Any]) -> str:
    name = content["headline"]
    row = content["variants"][name]
    quality = "identical samples" if row["psnr"] is None else f"PSNR {row['psnr']:.1f} dB"
    return (
        f"{name}: {row['speedup_by_less_work']:.2f}x by less work ({row['calls']} of"
        f" {content['steps']} calls, {row['flop_share']:.0%} of the operations), {quality}"
    )


def _subtitle(content: Mapping[str, Any]) -> str:
    name, matmul = content["headline"], content["matmul"]
    row = content["variants"][name]
    return (
        f"{name}: {row['about']}. Here it is {row['speedup_vs_torch_compile']:.2f}x as fast as"
        f" torch.compile, of which {row['speedup_by_code']:.2f}x is due to cheaper formulas and"
        f" matrix products ({matmul['pabc']} in pabc, {matmul['torch']} in PyTorch), and differs"
        f" from machine to machine. The embedded {content['about']}, {content['device']},"
        f" {content['date'][:10]}."
    )


def _list_variants(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"<li><b>{escape(name)}</b>: {escape(row['about'])}</li>" for name, row in table.items()
    ]


def _draw_plan(name: str, about: str, plan: Plan, found: Explanation) -> str:
    shares = metrics.flop_shares(plan, found)
    rows = [["phase", "steps", "reuses", "operations that run"]]
    for phase in plan.phases:
        kinds = list(dict.fromkeys(plan.slots[slot].kind for slot in phase.reused))
        share = f"{shares[phase.steps[0]]:.0%}"
        rows.append([str(phase.index), str(len(phase.steps)), ", ".join(kinds) or "nothing", share])
    return (
        f'<h3>{escape(name)}</h3><p class="faint">{escape(about)};'
        f" {len(plan.phases)} phases, at most {plan.peak_bytes / 2**20:.1f} MiB stored</p>"
        f'<div class="wide">{charts.draw_timeline(plan)}</div>'
        f"<details><summary>Its phases</summary>{draw_table(rows[1:], rows[0])}</details>"
    )


def _describe_found(found: Explanation) -> str:
    total = sum(found.flops.values()) or 1
    shares = ", ".join(f"{kind} {count / total:.0%}" for kind, count in found.flops.items())
    return (
        f"{len(found.attention)} attentions and {len(found.regions)} reusable branches, named by"
        f" dataflow alone. {total / 1e9:.2f} GFLOP a call: {shares}."
    )


def _explain_model(found: Explanation) -> str:
    lines = str(found).splitlines()
    return "\n".join(line for line in lines[: len(found.regions) + 2])


def _format_fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {each}" for name, each in value.items())
    return str(value)


def _draw_figure(name: str, data: bytes) -> str:
    source = f"data:image/{name.rpartition('.')[2]};base64,{base64.b64encode(data).decode()}"
    alt = "What was generated, a row per prompt and a column per variant"
    return f'<figure><img src="{source}" alt="{alt}"></figure>'
