"""The study's plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from corpus import DOMAINS
from figures import Kinds, Summary, by_kind, curve, over_layers, training_flops
from matplotlib.figure import Figure
from plan import BASE

SHOWN = ("none", BASE, "global 0.01", "guided")  # whose experts are drawn by domain


def plots(summaries: Sequence[Summary], folder: Path) -> list[Path]:
    """Draw what there are runs for."""
    drawn: dict[str, Figure] = {}
    if kinds := by_kind(summaries, "objectives"):
        drawn["objectives"] = objectives(kinds)
        drawn["repetition"] = repetition(kinds)
        drawn["domains"] = domains({label: runs for label, runs in kinds.items() if label in SHOWN} or kinds)
    if kinds := by_kind(summaries, "dense"):
        drawn["dense"] = dense(kinds)
    if kinds := by_kind(summaries, "k"):
        drawn["experts"] = experts(kinds)
    if kinds := by_kind(summaries, "failure"):
        drawn["failures"] = failures(kinds)
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"balancing_{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


def _panels(
    count: int, titles: Sequence[str], height: float = 4.2, one_scale: bool = False
) -> tuple[Figure, list[Any]]:  # fmt: skip
    figure = Figure(figsize=(5.2 * count, height), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False, sharey=one_scale)[0])
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
        panel.grid(alpha=0.25)
    return figure, panels


def _legend(figure: Figure, panel: Any) -> None:
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=6)


def objectives(kinds: Kinds) -> Figure:
    """Through training, means over layers and seeds: loss, inequality, information of domain and expert."""
    draws: dict[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
        "held-out loss": ("nats a token", lambda point: point["loss"]),
        "inequality of loads": ("Gini coefficient", lambda point: over_layers(point, "gini")),
        "information of domain and expert": ("bits", lambda point: over_layers(point, "information")),
        "the same beyond what tokens alone explain": ("bits", _beyond_tokens),
    }
    figure, panels = _panels(len(draws), list(draws))
    panels[3].sharey(panels[2])
    for label, runs in kinds.items():
        for panel, (_, draw) in zip(panels, draws.values(), strict=True):
            panel.plot(*curve(runs, draw), label=label)
    for panel, (unit, _) in zip(panels, draws.values(), strict=True):
        panel.set(xlabel="tokens", ylabel=unit)
    _legend(figure, panels[0])
    return figure


def _beyond_tokens(point: Mapping[str, Any]) -> float:
    return over_layers(point, "information") - over_layers(point, "token_information")


def repetition(kinds: Kinds) -> Figure:
    """Through training, by layer: the share of neighbours with the same first choice (arXiv 2401.04088, table 5)."""
    first = next(iter(kinds.values()))[0]
    layers = range(len(first["final"]["layers"]))
    figure, panels = _panels(len(layers), [f"layer {layer}: first choice repeats" for layer in layers], one_scale=True)
    panels[0].set_ylabel("share of neighbours (dotted: by chance)")
    for label, runs in kinds.items():
        for layer, panel in zip(layers, panels, strict=True):
            panel.plot(*curve(runs, lambda point, layer=layer: point["layers"][layer]["first_repeats"]), label=label)
    for panel in panels:
        panel.axhline(1 / first["model"]["n_experts"], color="grey", linestyle=":")
        panel.set_xlabel("tokens")
    _legend(figure, panels[0])
    return figure


def domains(kinds: Kinds) -> Figure:
    """Share of each domain's assignments by expert, a row a kind and a column a layer, of the first seed."""
    layers = len(next(iter(kinds.values()))[0]["final"]["layers"])
    figure = Figure(figsize=(4.6 * layers, 2.2 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), layers, squeeze=False, sharey="row")
    for row, (label, runs) in zip(grid, kinds.items(), strict=True):
        for layer, panel in enumerate(row):
            shares = runs[0]["final"]["layers"][layer]["shares"]
            for place, domain in enumerate(DOMAINS):
                experts = range(len(shares[domain]))
                panel.bar([e + 0.2 * place for e in experts], shares[domain], width=0.2, label=domain)
            panel.axhline(1 / len(experts), color="grey", linestyle=":")
            panel.set_title(f"{label}, layer {layer}", fontsize=9)
            panel.set_xticks([e + 0.3 for e in experts], [str(e) for e in experts])  # under the middle of four bars
        row[0].set_ylabel("share of a domain", fontsize=8)
    for panel in grid[-1]:
        panel.set_xlabel("expert (dotted: a fair share)", fontsize=8)
    _legend(figure, grid[0][0])
    return figure


def dense(kinds: Kinds) -> Figure:
    """Loss against FLOPs and against seconds of training at the pace measured in turn, one thread."""
    figure, panels = _panels(2, ["loss against compute", "loss against time"], one_scale=True)
    for label, runs in kinds.items():
        tokens, losses = curve(runs, lambda point: point["loss"])
        whole = runs[0]["tokens"]
        seconds = runs[0].get("paced_seconds", float("nan"))
        panels[0].plot([t / whole * training_flops(runs[0]) for t in tokens], losses, marker="o", label=label)
        panels[1].plot([t / whole * seconds for t in tokens], losses, marker="o", label=label)
    panels[0].set(xlabel="FLOPs of training", ylabel="held-out loss (nats a token)")
    panels[1].set_xlabel("seconds of training")
    _legend(figure, panels[0])
    return figure


def experts(kinds: Kinds) -> Figure:
    """Final loss of each seed."""
    figure, (panel,) = _panels(1, ["final held-out loss, a dot a seed"])
    figure.set_size_inches(8, 4.2)
    for place, runs in enumerate(kinds.values()):
        losses = [run["final"]["loss"] for run in runs]
        panel.plot([place] * len(losses), losses, "o")
    panel.set_xticks(range(len(kinds)), list(kinds), rotation=20)
    panel.set(xlabel="router, or number of experts", ylabel="nats a token")
    return figure


def failures(kinds: Kinds) -> Figure:
    """How much loss each case adds to the plain one, means over seeds."""
    cases = [case for case in next(iter(kinds.values()))[0]["failures"] if case != "plain"]
    figure, (panel,) = _panels(1, ["loss added to that of plain text"])
    panel.set(xlabel="what is done to the text", ylabel="nats a token")
    figure.set_size_inches(10, 4.6)
    width = 0.8 / len(kinds)
    for place, (label, runs) in enumerate(kinds.items()):
        added = [
            sum(run["failures"][case]["loss"] - run["failures"]["plain"]["loss"] for run in runs) / len(runs)
            for case in cases
        ]
        panel.bar([x + width * place for x in range(len(cases))], added, width, label=label)
    panel.set_xticks([x + 0.4 for x in range(len(cases))], cases)
    panel.axhline(0, color="grey")
    _legend(figure, panel)
    return figure
