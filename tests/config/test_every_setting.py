"""Every setting refuses nonsense by name, on every way in; a new one without a range is found here."""

import math
import typing
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, Literal

import pytest

from ldmseg_fast.config import PRESETS, Config, load_config, update, validate
from ldmseg_fast.config.limits import Form, Length, Range
from ldmseg_fast.errors import ConfigError

NOT_A_NUMBER = [None, True, "many", [], {}, math.nan, math.inf, -math.inf, "nan", "inf", "1e400", 10**400]


def walk(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Key -> annotation of every setting below a group."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        found |= walk(hint, f"{prefix}{name}.") if is_dataclass(hint) else {prefix + name: hint}
    return found


SETTINGS = walk(Config)
NESTED = [name for name, hint in typing.get_type_hints(Config).items() if is_dataclass(hint)]


def parts(hint: Any) -> tuple[Any, list[Any]]:
    """The type and what limits it."""
    if typing.get_origin(hint) is Annotated:
        kind, *limits = typing.get_args(hint)
        return kind, limits
    return hint, []


def unlimited(hint: Any) -> list[Any]:
    """The numbers and texts in an annotation that nothing limits."""
    kind, limits = parts(hint)
    if typing.get_origin(kind) is tuple:
        return [bare for item in typing.get_args(kind) if item is not Ellipsis for bare in unlimited(item)]
    wanted = {int: Range, float: Range, str: Form}.get(kind)
    return [kind] if wanted is not None and not any(isinstance(limit, wanted) for limit in limits) else []


def nonsense(hint: Any, default: Any) -> list[Any]:
    """Values that a setting must refuse, by its type and limits."""
    kind, limits = parts(hint)
    if typing.get_origin(kind) is Literal:
        return [None, 3, True, "", "nonsense", [], {}]
    if kind is bool:
        return [None, 2, -1, 0.5, math.nan, "", "maybe", [], {}]
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        bad = [None, 5, True, {}]
        bad += [(value, *default[1:]) for value in nonsense(items[0], default[0] if default else None)]
        bad += [] if items[-1] is Ellipsis else [(), default[:1], (*default, default[0])]
        for limit in limits:
            bad += [(), default[:1] * (limit.most + 1)] if isinstance(limit, Length) and limit.least else []
        return bad
    if kind is str:
        return [None, 3, True, [], {}, "null\0character"]
    (limit,) = (limit for limit in limits if isinstance(limit, Range))
    beyond = [limit.least - 1, limit.most + 1] + ([limit.most] if limit.under else [])
    if kind is int:
        return [*NOT_A_NUMBER, *beyond, limit.least + 0.5, "1.5"]
    near = [math.nextafter(limit.least, -math.inf), math.nextafter(limit.most, math.inf)]
    return [*NOT_A_NUMBER, *beyond, *near]


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def put(config: Any, key: str, value: Any) -> Any:
    """`config` with a value put in as code can, past every check."""
    name, _, rest = key.partition(".")
    return replace(config, **{name: put(getattr(config, name), rest, value) if rest else value})


def default_of(key: str) -> Any:
    value: Any = PRESETS["tiny"]
    for part in key.split("."):
        value = getattr(value, part)
    return value


def refused(key: str, value: Any, act: Any) -> None:
    try:
        act()
    except ConfigError as error:
        assert key in str(error), f"{key}={value!r}: the message does not name the key: {error}"
    else:
        pytest.fail(f"{key}={value!r} was accepted")


def test_all_settings_are_walked():
    assert len(SETTINGS) >= 130 and {"train.clip", "mask_vae.widths", "output_dir"} <= SETTINGS.keys()
    assert len(NESTED) == len(fields(Config)) - 2


@pytest.mark.parametrize("key", SETTINGS)
def test_every_number_has_a_range_and_every_text_a_form(key):
    assert unlimited(SETTINGS[key]) == [], f"{key}: write Annotated[type, Range(least, most)] beside it in settings.py"


@pytest.mark.parametrize("key", SETTINGS)
def test_nonsense_is_refused_by_name(key):
    for value in nonsense(SETTINGS[key], default_of(key)):
        refused(key, value, lambda value=value: update(Config(), nested(key, value)))
        refused(key, value, lambda value=value: validate(put(PRESETS["tiny"], key, value)))


@pytest.mark.parametrize("key", SETTINGS)
def test_nonsense_of_the_command_line_is_refused_by_name(key):
    kind, _ = parts(SETTINGS[key])
    if kind is str or typing.get_origin(kind) is tuple:
        return  # any text is a text; tuples are below
    for value in nonsense(SETTINGS[key], default_of(key)):
        refused(key, value, lambda value=value: load_config("tiny", [f"{key}={value}"]))


@pytest.mark.parametrize("name", NESTED)
def test_a_group_is_no_value(name):
    for value in (None, 3, "text", []):
        refused(name, value, lambda value=value: update(Config(), {name: value}))
        refused(name, value, lambda value=value: validate(put(PRESETS["tiny"], name, value)))


@pytest.mark.parametrize("key", SETTINGS)
def test_both_ends_of_a_range_are_inside(key):
    for limit in parts(SETTINGS[key])[1]:
        if isinstance(limit, Range):
            for value in (limit.least, *([] if limit.under else [limit.most])):
                assert update(Config(), nested(key, value)) == put(Config(), key, value)


@pytest.mark.parametrize(
    "setting",
    [
        *("data.num_workers=-1", "train.clip=-1", "loss.importance=7", "loss.oversample=-3", "data.flip=9"),
        *("train.threads=-5", "data.timeout=-1", "data.scale_min=-2", "few_step.steps=-4", "loss.ce=-1"),
        *("diffusion.image_noise=-1", "train.max_minutes=-1", "train.keep_best=-3", "scheduler.beta_start=-1"),
        *("data.num_workers=100000", "train.threads=100000", "train.batch_size=1000000000", "data.image_size=64000"),
        *("mask_vae.widths=", "mask_vae.widths=32,0,128", "unet.num_heads=4,-4,4", "unet.attention=true,maybe,no"),
        *("train.betas=0.9,1", "train.betas=0.9,nan", "train.betas=0.9,0.99,0.999", "train.zero_stage=4"),
        *("train.no_decay=norms", "train.lr_factors=unet", "train.lr_factors=unet:-1", "train.lr_factors=unet:nan"),
        *("train.lr_factors=:3", "train.lr_factors=unet:1e300", "train.compile_backend=", "train.wandb=a/b"),
        *("data.train_split=", "data.train_split=../val2017", "data.val_split=a\\b", 'model.freeze="",conv_in'),
        *('unet.num_heads="4', "train.ema=1", "train.seed=-1", "train.seed=1e30", "train.precision=bfloat16"),
    ],
)
def test_mistakes_that_once_passed(setting):
    refused(setting.partition("=")[0], setting, lambda: load_config("tiny", [setting]))


def test_whole_numbers_stay_exact():
    assert load_config("tiny", ["train.seed=9223372036854775807"]).train.seed == 2**63 - 1
    assert load_config("tiny", ["train.steps=1e3"]).train.steps == 1000


@pytest.mark.parametrize("factor", ["unet.conv_in:10", "unet:.5", "unet:0", "a.b_c:1.", "x:1e-3", "x:2.5e+02"])
def test_learning_rate_factors(factor):
    assert load_config("tiny", [f"train.lr_factors={factor}"]).train.lr_factors == (factor,)


def test_keys_that_are_no_text():
    with pytest.raises(ConfigError, match="unknown setting 3"):
        update(Config(), {3: 4})  # type: ignore[dict-item]  # YAML's keys may be numbers
