"""A dataclass is a command line: beside each option stand its default, its help and its range."""

import argparse
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, field, fields
from functools import partial

RANGES = {"above": operator.gt, "least": operator.ge, "below": operator.lt, "most": operator.le}
RANGES["choices"] = lambda value, choices: value in choices
RANGE_WORDS = {"least": "at least", "most": "at most", "choices": "one of"}


def option(default, text: str, **ranges):
    """A field of a Config: its default, its sentence in --help, its range (of RANGES)."""
    assert ranges.keys() <= RANGES.keys()
    metadata = {"help": text, "ranges": ranges}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str):  # argparse's own prints the usage of forty options above it
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def _kind(annotation) -> tuple[type, bool]:
    """The type behind `int`, `int | None` and `list[str]`, and whether it is a list."""
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    return annotation, False


def _parser(config: type, presets: dict[str, dict], doc: str, prog: str) -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog, description=doc, formatter_class=form, allow_abbrev=False)
    for f in fields(config):
        kind, is_list = _kind(f.type)
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
    """The command line over the preset that --data names over the defaults. Whatever is unknown or out of its
    range ends the program."""
    parser = _parser(config, presets, doc, prog)
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    if known.data is not None and known.data not in presets:
        parser.error(f"--data {known.data}: there are {', '.join(presets)}")
    parser.set_defaults(**presets.get(known.data, {}))
    values = config(**vars(parser.parse_args(argv)))
    try:
        check_options(values)
    except ValueError as error:
        parser.error(str(error))
    return values


def _lies_within(value, ranges: dict) -> bool:
    finite = not isinstance(value, float) or math.isfinite(value)
    return finite and all(RANGES[name](value, bound) for name, bound in ranges.items())


def _range_text(ranges: dict) -> str:
    return " and ".join(f"{RANGE_WORDS.get(name, name)} {bound}" for name, bound in ranges.items())


def check_options(config) -> None:
    """Raises ValueError, naming the option, where a value lies outside its range or is not finite."""
    for f in fields(config):
        value, ranges = getattr(config, f.name), f.metadata["ranges"]
        for item in value if isinstance(value, list) else [value]:
            if item is not None and not _lies_within(item, ranges):
                raise ValueError(f"--{f.name} {item}: wanted {_range_text(ranges) or 'a finite number'}")
            if isinstance(item, str) and "\0" in item:
                raise ValueError(f"--{f.name} {item!r}: wanted text without a null character")


def within(kind: type, **ranges) -> Callable[[str], float]:
    """For argparse's `type`: text -> a finite number of `kind` in its range, as of `option`."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not _lies_within(value, ranges):
            wanted = f"a {'whole ' if kind is int else ''}number {_range_text(ranges)}".strip()
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


def check_together(config, unused: dict[str, Sequence[str]], needed: dict[str, Sequence[str]]) -> None:
    """Raises ValueError, naming both options, where one is given beside one that does not use it (`unused`:
    option -> those), or without any that does (`needed`)."""
    values = settings_of(config)
    given = [name for name in values if values[name] not in (None, []) and values[name] is not False]
    for name in given:
        for clash in unused.get(name, ()):
            if clash in given:
                raise ValueError(f"--{name} with --{clash}, which does not use it: wanted one of the two")
        if name in needed and not set(given) & set(needed[name]):
            raise ValueError(f"--{name} without --{' or --'.join(needed[name])}: wanted both, or neither")
