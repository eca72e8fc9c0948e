"""A dataclass is a command line: beside each option stand its default, its help and its range."""

import argparse
import math
import operator
import re
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, field, fields
from functools import partial

RANGES = {"above": operator.gt, "least": operator.ge, "below": operator.lt, "most": operator.le}
RANGES["choices"] = lambda value, choices: value in choices
RANGE_WORDS = {"least": "at least", "most": "at most", "choices": "one of"}


def option(default, text: str, **ranges):
    """A field of a Config: its default, its sentence in --help, its range (of RANGES)."""
    metadata = {"help": text, "ranges": ranges}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str):  # argparse's own prints the usage of forty options above it
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def _parser(config: type, presets: dict[str, dict], doc: str, prog: str) -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog, description=doc, formatter_class=form, allow_abbrev=False)
    for f in fields(config):
        is_list = typing.get_origin(f.type) is list
        kind, *_ = typing.get_args(f.type) or (f.type,)  # of list[str], or of int | None
        default = f.default_factory() if is_list else f.default
        values = [] if default in (None, []) else [f"default: {default}"]
        values += [f"{name}: {preset[f.name]}" for name, preset in presets.items() if f.name in preset]
        text = f.metadata["help"] + (f" [{'; '.join(values)}]" if values else "")
        flags = dict.fromkeys([f"--{f.name}", f"--{f.name.replace('_', '-')}"])
        add = partial(parser.add_argument, *flags, default=default, help=text.replace("%", "%%"))
        if kind is bool:
            add(action=argparse.BooleanOptionalAction)
        else:
            add(type=kind, nargs="+" if is_list else None, metavar=kind.__name__.upper())
    return parser


def parse(config: type, presets: dict[str, dict], doc: str, prog: str, argv: Sequence[str]):
    """The command line over the preset of --data over the defaults. What is unknown or out of range ends the
    program."""
    parser = _parser(config, presets, doc, prog)
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    if known.data is not None and known.data not in presets:
        parser.error(f"--data {known.data}: there are {', '.join(presets)}")
    parser.set_defaults(**presets.get(known.data, {}))
    values = config(**vars(parser.parse_args(argv)))
    for f in fields(config):
        value, ranges = getattr(values, f.name), f.metadata["ranges"]
        for item in value if isinstance(value, list) else [value]:
            if item is not None and not lies_within(item, ranges):
                parser.error(f"--{f.name} {item}: wanted {range_text(ranges) or 'a finite number'}")
    return values


def lies_within(value, ranges: dict) -> bool:
    finite = not isinstance(value, float) or math.isfinite(value)
    return finite and all(RANGES[name](value, bound) for name, bound in ranges.items())


def range_text(ranges: dict) -> str:
    return " and ".join(f"{RANGE_WORDS.get(name, name)} {bound}" for name, bound in ranges.items())


def within(kind: type, **ranges) -> Callable[[str], float]:
    """For argparse's `type`: text -> a finite number of `kind` in its range, as of `option`."""

    def number(text: str) -> float:
        value = math.nan
        with suppress(ValueError):
            value = kind(text)
        if not lies_within(value, ranges):
            wanted = f"a {'whole ' if kind is int else ''}number {range_text(ranges)}".strip()
            raise argparse.ArgumentTypeError(f"{text[:60]!r}, wanted {wanted}")
        return value

    return number


def check_name(name: str) -> str:
    """The name itself, where it can be that of one folder. Raises ValueError for another."""
    if not re.fullmatch(r"[\w+][\w.+-]{0,99}", name):
        raise ValueError(f"--run {name[:120]}: wanted at most 100 letters, digits and . _ + -, no dot first")
    return name


def settings_of(config, *without: str) -> dict:
    """A Config as a dictionary, for config.json."""
    return {name: value for name, value in asdict(config).items() if name not in without}


def without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """The words of a command line without these options and their values."""
    rest, is_left_out = [], False
    for word in words:
        if word.startswith("--"):
            is_left_out = word[2:].split("=")[0].replace("-", "_") in names
        rest += [] if is_left_out else [word]
    return rest


def check_together(
    config, unused: dict[str, Sequence[str]], needed: dict[str, Sequence[str]], usual: dict | None = None
) -> None:
    """Raises ValueError where an option is given beside one that does not use it (`unused`: option -> those),
    or without any that does (`needed`). usual: values that are not given; else None, [] and False are."""
    given = []
    for name, value in asdict(config).items():
        is_usual = value is False if usual is None else value == usual[name]
        if value not in (None, []) and not is_usual:
            given.append(f"no-{name}" if value is False else name)
    for name in given:
        for clash in unused.get(name, ()):
            if clash in given:
                raise ValueError(f"--{name} with --{clash}, which does not use it: wanted one of the two")
        if name in needed and not set(given) & set(needed[name]):
            raise ValueError(f"--{name} without --{' or --'.join(needed[name])}: wanted both, or neither")
