"""What one sees while training: a live panel on a terminal, plain lines elsewhere, nothing in scripts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from mixtral.analysis.report import load_strip
from mixtral.moe.stats import LayerStats
from mixtral.train.config import PretrainConfig
from mixtral.train.metrics import Speed
from mixtral.train.step import StepResult, Validation

LINE_SECONDS = 10  # between lines where there is no terminal


class Display:
    """Called at everything that happens in a run; this one prints nothing, for tests and scripts."""

    def say(self, text: str) -> None:
        """A line about what is going on."""

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[Callable[[str], None]]:
        """Around long work before the loop; yields a function that says how far it is."""
        del what
        yield lambda _: None

    @contextlib.contextmanager
    def live(self, config: PretrainConfig, step: int) -> Iterator[None]:
        """Around the loop, which starts after `step` steps."""
        del config, step
        yield

    def step(self, step: int, result: StepResult, bits_per_byte: float, speed: Speed) -> None:
        """A step is done."""

    def validation(self, step: int, result: Validation) -> None:
        """A validation is done."""


class TerminalDisplay(Display):
    """A progress bar with the time left, the step's figures, and a line for each layer, all within 100 columns."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.numbers: tuple[int, ...] = ()  # of the sparse layers
        self.layers: list[LayerStats] = []
        self.figures = ""
        self.next_line = 0.0
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
        )
        self.panel = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._render)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[Callable[[str], None]]:
        if self.console.is_terminal:
            with self.console.status(what) as status:
                yield status.update
        else:
            self.say(what)
            yield lambda _: None

    @contextlib.contextmanager
    def live(self, config: PretrainConfig, step: int) -> Iterator[None]:
        self.numbers = config.model.sparse_layers
        self.progress.add_task("train", total=config.steps, completed=step)
        with self.panel if self.console.is_terminal else contextlib.nullcontext():
            yield

    def step(self, step: int, result: StepResult, bits_per_byte: float, speed: Speed) -> None:
        self.layers = result.layers or self.layers
        self.figures = figures_line(result, bits_per_byte, speed)
        task = self.progress.tasks[0]
        self.progress.update(task.id, completed=step)
        if not self.console.is_terminal and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + LINE_SECONDS
            left = "" if task.time_remaining is None else f"  {task.time_remaining:,.0f} s left"
            self.say(f"step {step}/{task.total:.0f}  {self.figures}{left}")

    def validation(self, step: int, result: Validation) -> None:
        bits = f"{result.bits_per_byte:.4f} bits a byte"
        self.say(f"step {step}: validation {result.cross_entropy:.4f} nats a token, {bits}")

    def _render(self) -> Group:
        blocks = not self.console.options.ascii_only
        lines = [self.figures] if self.figures else []
        numbered = zip(self.numbers, self.layers, strict=True)
        lines += [f"layer {i:<3} {layer_line(layer, blocks)}" for i, layer in numbered]
        rows: list[RenderableType] = [Text(f"  {line}", no_wrap=True, overflow="ellipsis") for line in lines]
        return Group(self.progress, *rows)


def figures_line(result: StepResult, bits_per_byte: float, speed: Speed) -> str:
    """A step in figures: loss (nats a token), bits a byte, gradient norm, speed, memory."""
    figures = [f"loss {result.cross_entropy:.3f}", f"{bits_per_byte:.2f} b/B", f"grad {result.grad_norm:.2f}"]
    figures.append(f"{speed.tokens_per_second:,.0f} tok/s")
    if speed.share_of_peak is not None:
        figures.append(f"{100 * speed.share_of_peak:.0f} % of peak matmul")
    return "  ".join([*figures, f"{speed.memory_bytes / 1e9:.1f} GB"])


def layer_line(layer: LayerStats, blocks: bool = True) -> str:
    """A layer in figures: its experts' loads as a strip, how uneven they are, how undecided the router is, the dead.

    And the share of assignments that capacity dropped, where it did.
    """
    dropped = f"  {100 * layer.dropped:.1f} % dropped" if layer.dropped else ""
    return (
        f"{load_strip(layer.load, not blocks)}  max/mean {layer.max_over_mean:.2f}  gini {layer.gini:.2f}  "
        f"entropy {layer.entropy:.2f}  {layer.dead} dead{dropped}"
    )
