"""The tables that `gpu_check.py` prints last."""

from __future__ import annotations

from typing import Any


def benchmark_lines(content: dict[str, Any] | None) -> list[str]:
    """A line a case: milliseconds, useful GB/s, its share of the copy bandwidth and extra memory for ours; for a peer
    milliseconds and how many times longer than the best of ours that is. Then the promises."""
    if not content or not content["rows"]:
        return []
    cases: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        cases.setdefault((row["case"], row["rows"], row["vocab"]), []).append(row)
    lines = []
    for (case, rows, vocab), found in cases.items():
        ours = [r["milliseconds"] for r in found if r["implementation"] in content["ours"] and r["milliseconds"]]
        parts = [_part(row, row["implementation"] in content["ours"], min(ours, default=None)) for row in found]
        floor = found[0]["floor_milliseconds"]
        copied = f" (copying as much {floor:.3g} ms)" if floor else ""
        lines.append(f"{case} {rows}×{vocab}{copied}: " + " | ".join(parts))
    lines += [*_targets(content["targets"]), *(f"left out: {case}" for case in content["left_out"])]
    return [*lines, ""]


def _part(row: dict[str, Any], is_ours: bool, best: float | None) -> str:
    if row["milliseconds"] is None:
        return f"{row['implementation']} {row['error']}"
    text = f"{row['implementation']} {row['milliseconds']:.3g} ms"
    if is_ours:
        text += f" {row['useful_gb_per_second']:.0f} GB/s" if row["useful_gb_per_second"] else ""
        text += f" {row['share_of_copy']:.0%} of copy" if row["share_of_copy"] else ""
    elif best:
        text += f" {row['milliseconds'] / best:.1f}×"
    if row["extra_bytes"] is not None:
        text += f" +{row['extra_bytes'] / 2**20:.0f} MiB " + (
            f" (dlogits {row['gradient_bytes'] / 2**20:.0f})" if row["gradient_bytes"] else ""
        )
    return text + (f" (call {row['call_milliseconds']:.3g} ms)" if row["call_milliseconds"] else "")


def _targets(targets: list[dict[str, Any]]) -> list[str]:
    if not targets:
        return []
    """Two verdicts: in milliseconds where those were promised, and as a share of copying, with what it should reach."""
    lines = [f"{'target':76} {'floor':>6} {'reach':>6} {'got':>8}"]
    words = {True: "met", False: "NOT MET", None: ""}
    for target in targets:
        floor, reach, measured = (_number(target[key]) for key in ("floor", "reach", "measured"))
        kept = words[target["met"]]
        if target["share_met"] is not None:
            share = f"{target['share']:.0%} of copying, of {target['share_reach']:.0%}"
            kept = "; ".join(part for part in (kept, f"{share}: {words[target['share_met']]}") if part)
        lines.append(f"{target['target']:76} {floor:>6} {reach:>6} {measured:>8}  {kept or 'no verdict'}")
    return lines


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.4g}"


def dram_lines(calls: list[dict[str, Any]], reach: float) -> list[str]:
    lines = []
    for call in calls:
        planned, over = call["planned"], call["over_floor"]
        plan = "" if planned is None else f", plan {planned / 1e9:.2f}"
        kernels = ", ".join(f"{k['kernel'].partition('(')[0]} {k['milliseconds']:.3g} ms" for k in call["kernels"])
        lines.append(
            f"dram {call['backend']} {call['case']} {call['rows']}×{call['vocab']}: {call['bytes'] / 1e9:.2f} GB, "
            f"floor {call['floor_bytes'] / 1e9:.2f}{plan}: {over:.3f}× ({'within' if over <= reach else 'above'} "
            f"{reach:g}); {kernels}"
        )
    return lines


def cluster_lines(found: dict[str, Any]) -> list[str]:
    """A line a kind of row: CTAs of a cluster × stages (KiB each): clusters that the device holds."""
    rows: dict[tuple[int, int], list[str]] = {}
    for shape in found.get("shapes", []):
        text = f"{shape['cluster']}×{shape['stages']} ({shape['shared_bytes'] / 1024:.0f} KiB): {shape['clusters']}"
        rows.setdefault((shape["vocab"], shape["tensors"]), []).append(text)
    return [
        f"clusters for {tensors} bf16 row{'s' * (tensors > 1)} of {vocab}: {', '.join(shapes)}"
        for (vocab, tensors), shapes in rows.items()
    ]


def tune_lines(content: dict[str, Any] | None) -> list[str]:
    """A line a case: the plan that the library chose, and the plans from the fastest."""
    cases: dict[tuple[str, int, int], list[tuple[float, str]]] = {}
    for row in content["rows"] if content else []:
        if row["milliseconds"] is not None:
            case = cases.setdefault((row["case"], row["rows"], row["vocab"]), [])
            case.append((row["milliseconds"], row["implementation"].partition(" ")[2] or "CHOSEN"))
    return [
        f"tune {case} {rows}×{vocab}: "
        + " | ".join(f"{name} {milliseconds:.4g}" for milliseconds, name in sorted(times))
        for (case, rows, vocab), times in cases.items()
    ]
