from dataclasses import dataclass

import pytest

from mixtral.config.specs import check_value, parse_spec
from mixtral.errors import ConfigError


@dataclass(frozen=True)
class Plain:
    pass


@dataclass(frozen=True)
class Rich:
    share: float = 0.5
    most: int | None = None
    layers: tuple[int, ...] = ()


TABLE: dict[str, type] = {"plain": Plain, "rich": Rich}


def test_a_spec_sets_options_by_type() -> None:
    assert parse_spec("plain", TABLE, "thing") == Plain()
    assert parse_spec("rich?share=1&most=3&layers=0,2", TABLE, "thing") == Rich(1.0, 3, (0, 2))
    assert parse_spec("rich?most=none", TABLE, "thing") == Rich()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rihc", "thing: unknown 'rihc'; did you mean 'rich'?"),
        ("rich?shar=1", "unknown option 'shar=1'; did you mean 'share'?"),
        ("rich?share", "unknown option 'share'"),
        ("plain?x=1", "it has no options"),
        ("rich?most=1.5", "most=1.5: expected int"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec(text, TABLE, "thing")
    assert message in str(caught.value)


BROKEN = [("d\udce9", str), ("d\udce9", str | None), (["a", "d\udce9"], tuple[str, ...])]


@pytest.mark.parametrize(("value", "kind"), BROKEN)
def test_a_text_that_utf8_cannot_hold(value: object, kind: object) -> None:
    with pytest.raises(ConfigError, match=r"^thing: path(\[1\])? must be a text that is UTF-8, not 'd\\udce9'$"):
        check_value("thing: path", value, kind)


ABSURD = ["nan", "inf", "1e400", "-Infinity", "1" + "0" * 400, "1" * 5000, "[" * 100_000, "x" * 5000]


@pytest.mark.parametrize("value", ABSURD)
def test_absurd_values_are_refused_in_one_short_line(value: str) -> None:
    for option in ("share", "most", "layers"):
        with pytest.raises(ConfigError, match=f"thing rich.*{option}=.*: expected ") as caught:
            parse_spec(f"rich?{option}={value}", TABLE, "thing")
        assert len(str(caught.value)) < 600
