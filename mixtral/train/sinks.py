"""TensorBoard and Weights & Biases: sinks for the numbers of the JSON lines, which cannot stop or change a run."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mixtral.errors import UsageError
from mixtral.files import atomic_write
from mixtral.train.config import PretrainConfig


class Tracker(Protocol):
    """Keeps numbers by step somewhere else."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard. Opened at `step`, it marks what earlier files hold of later steps as void."""

    def __init__(self, folder: Path, config: PretrainConfig, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        del config
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # else a kill would lose up to two minutes

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """One run of project "mixtral", its id kept in RUN/wandb_id, so that a resumed run goes on in the same curves."""

    def __init__(self, folder: Path, config: PretrainConfig, step: int) -> None:
        import wandb

        del step  # the service knows how far it was sent, and leaves out steps up to there
        place = folder / "wandb_id"
        if not place.exists():
            atomic_write(place, secrets.token_hex(4))
        self.run: Any = wandb.init(
            project="mixtral", name=folder.resolve().name, id=place.read_text(), resume="allow", dir=str(folder),
            config=config.to_dict(), settings=wandb.Settings(console="off"),  # the terminal stays ours
        )  # fmt: skip

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


_KINDS: dict[str, Callable[[Path, PretrainConfig, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def require_packages(names: Iterable[str]) -> None:
    """Raise UsageError, with the line that installs it, when a tracker's package is missing."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a mere folder of that name, such as wandb leaves behind
            remedy = f'pip install "mixtral[{name}]", or leave it out of trackers'
            raise UsageError(f"trackers: {name} is not installed; {remedy}")


class Trackers:
    """All trackers of a run. One that fails is reported once, through `say`, and left out from then on."""

    def __init__(self, folder: Path, config: PretrainConfig, step: int, say: Callable[[str], None]) -> None:
        self._say = say
        self.layers = config.model.sparse_layers
        self._open: dict[str, Tracker] = {}
        for name in config.trackers:
            if tracker := self._attempt(name, partial(_KINDS[name], folder, config, step)):
                self._open[name] = tracker

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, tracker in list(self._open.items()):
            self._attempt(name, partial(tracker.log, step, values))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._attempt(name, tracker.close)
        self._open = {}

    def _attempt(self, name: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # a full disk, no network, no login: whatever it is, the run is worth more
            self._open.pop(name, None)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self._say(f"{name} is left out from here on: {reason}; the run goes on, its lines are in metrics.jsonl")


def flatten(line: dict[str, Any], prefix: str = "", layers: Sequence[int] = ()) -> dict[str, float]:
    """The numbers of a JSON line by flat names: `cross_entropy`, `aux/z_loss`, `layer3/gini`, `layer3/load/0`.

    `layers` are the model's sparse layers, which a line lists in order.
    """
    return dict(leaf for key, value in line.items() if key != "step" for leaf in _named(key, value, prefix, layers))


def _named(key: str, value: Any, prefix: str, layers: Sequence[int]) -> Iterator[tuple[str, float]]:
    if key in ("layers", "val_loads"):
        of_layer = "/val_load" if key == "val_loads" else ""
        for number, layer in zip(layers, value, strict=True):
            yield from _leaves(f"layer{number}{of_layer}", layer)
    else:
        yield from _leaves(f"{prefix}/{key}" if prefix else key, value)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{path}/{key}", inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(f"{path}/{number}", inner)
    elif isinstance(value, int | float):
        yield path, value
