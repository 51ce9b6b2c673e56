"""The study's tables, in Markdown. A figure is the mean over seeds, ± half of the distance between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from corpus import DOMAINS
from figures import Kinds, Summary, by_kind, mean_k, over_layers, spread, training_flops

from mixtral.presets import tiny

Value = Callable[[Summary], float]
Column = tuple[str, Callable[[Sequence[Summary]], str]]


def tables(summaries: Sequence[Summary]) -> str:
    """All tables; a question without runs has none."""
    parts = [
        ("Objectives", "objectives", OBJECTIVES),
        ("Loss by domain (nats a token)", "objectives", BY_DOMAIN),
        ("Repetition by layer, first choice / any choice (%)", "objectives", REPEATS),
        ("Sparse and dense", "dense", DENSE),
        ("How many experts, and how many a token", "k", EXPERTS),
    ]
    made = [(title, _table(kinds, columns)) for title, group, columns in parts if (kinds := by_kind(summaries, group))]
    if kinds := by_kind(summaries, "failure"):
        made += [(title, _table(kinds, columns)) for title, columns in _failure_columns(kinds).items()]
    page = ["# The study of balancing in tables", *(f"## {title}\n\n{table}" for title, table in made)]
    return "\n\n".join(page) + "\n"


def _table(kinds: Kinds, columns: Sequence[Column]) -> str:
    head = ["run", "seeds", *(name for name, _ in columns)]
    lines = [head, ["---"] * len(head)]
    lines += [[label, str(len(runs)), *(cell(runs) for _, cell in columns)] for label, runs in kinds.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(name: str, figure: Value, digits: int = 3) -> Column:
    def cell(runs: Sequence[Summary]) -> str:
        mean, half = spread(runs, figure)
        if mean != mean:
            return ""
        return f"{mean:,.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")

    return name, cell


def _of_layers(name: str, figure: str, digits: int = 3) -> Column:
    return _number(name, lambda run: over_layers(run["final"], figure), digits)


def _dead(run: Summary) -> float:
    return sum(layer["dead"] for layer in run["final"]["layers"])


def _repeats(layer: int) -> Column:
    def cell(runs: Sequence[Summary]) -> str:
        shares = [spread(runs, _in_layer(layer, name)) for name in ("first_repeats", "any_repeats")]
        return " / ".join(f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in shares)

    return f"layer {layer}", cell


def _in_layer(layer: int, name: str) -> Value:
    return lambda run: run["final"]["layers"][layer][name]


def _loss_of(domain: str) -> Value:
    return lambda run: run["final"]["losses"][domain]


LOSS = _number("loss", lambda run: run["final"]["loss"])
OBJECTIVES: tuple[Column, ...] = (
    LOSS,
    _of_layers("Gini", "gini"),
    _of_layers("max / mean", "max_over_mean", 2),
    _number("dead", _dead, 1),
    _of_layers("entropy", "entropy"),
    _of_layers("information (bits)", "information"),
    _of_layers("by tokens alone", "token_information"),
    _of_layers("mean K", "mean_k", 2),
)
BY_DOMAIN = tuple(_number(domain, _loss_of(domain)) for domain in DOMAINS)
REPEATS = tuple(_repeats(layer) for layer in range(tiny().n_layers))
SIZES: tuple[Column, ...] = (
    _number("parameters (M)", lambda run: run["parameters"] / 1e6, 2),
    _number("active (M)", lambda run: run["active_parameters"] / 1e6, 2),
    _number("TFLOP", lambda run: training_flops(run) / 1e12, 2),
)
DENSE: tuple[Column, ...] = (
    *SIZES,
    _number("seconds", lambda run: run.get("paced_seconds", float("nan")), 0),
    LOSS,
)
EXPERTS: tuple[Column, ...] = (
    *SIZES,
    _number("mean K", mean_k, 2),
    LOSS,
    _of_layers("Gini", "gini"),
    _of_layers("information (bits)", "information"),
)


def _failure_columns(kinds: Kinds) -> dict[str, tuple[Column, ...]]:
    cases = list(next(iter(kinds.values()))[0]["failures"])

    def columns(figure: str, digits: int) -> tuple[Column, ...]:
        return tuple(_number(case, _of_case(case, figure), digits) for case in cases)

    return {
        "Failure: loss (nats a token)": columns("loss", 3),
        "Failure: bits a byte": columns("bits_per_byte", 2),
        "Failure: entropy of the router's scores": columns("entropy", 3),
        "Failure: Gini": columns("gini", 3),
    }


def _of_case(case: str, figure: str) -> Value:
    """A figure of one case, the mean over layers where each has one."""

    def value(run: Summary) -> float:
        found = run["failures"][case][figure]
        values = found if isinstance(found, list) else [found]
        return fmean(values) if values else float("nan")

    return value
