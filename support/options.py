"""A dataclass is a command line: beside each option stand its default, its help and its range."""

import argparse
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, field, fields

RANGES = {"above": ("above", lambda x, y: x > y), "least": ("at least", lambda x, y: x >= y)}
RANGES |= {"below": ("below", lambda x, y: x < y), "most": ("at most", lambda x, y: x <= y)}
RANGES |= {"choices": ("one of", lambda x, y: x in y)}


def option(default, text: str, **ranges):
    """A field of a Config: its default, its sentence in --help, its range: above, least, below, most a
    number, or choices."""
    assert ranges.keys() <= RANGES.keys()
    metadata = {"help": text, "ranges": ranges}
    if isinstance(default, list):
        return field(default_factory=lambda: [*default], metadata=metadata)
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


def _parser(config: type, presets: dict[str, dict], doc: str, prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for f in fields(config):
        kind, many = _kind(f.type)
        names = list(dict.fromkeys([f"--{f.name}", f"--{f.name.replace('_', '-')}"]))
        others = [f"{name}: {values[f.name]}" for name, values in presets.items() if f.name in values]
        default = f.default_factory() if many else f.default
        values = [f"default: {default}"] * (default not in (None, [])) + others
        text = f.metadata["help"] + (f" [{'; '.join(values)}]" if values else "")
        how = {"help": text.replace("%", "%%"), "default": default, "dest": f.name}
        if kind is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **how)
        else:
            parser.add_argument(
                *names, type=kind, metavar=kind.__name__.upper(), nargs="+" if many else None, **how
            )
    return parser


def parse(config: type, presets: dict[str, dict], doc: str, prog: str, argv: Sequence[str]):
    """The command line over the dataset's preset over the defaults. Whatever is unknown or out of its range
    ends the program."""
    parser = _parser(config, presets, doc, prog)
    known = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0]
    if known.data is not None and known.data not in presets:
        parser.error(f"--data {known.data}: there are {', '.join(presets)}")
    parser.set_defaults(**presets.get(known.data, {}))
    values = config(**vars(parser.parse_args(argv)))
    try:
        check_options(values)
    except ValueError as error:
        parser.error(str(error))
    return values


def check_options(config) -> None:
    """Raises ValueError, naming the option, where a number is not finite or a value lies outside its declared
    range."""
    for f in fields(config):
        value, ranges = getattr(config, f.name), f.metadata["ranges"]
        for item in value if isinstance(value, list) else [value]:
            if item is None:
                continue
            finite = not isinstance(item, float) or math.isfinite(item)
            if not finite or not all(RANGES[name][1](item, bound) for name, bound in ranges.items()):
                wanted = [f"{RANGES[name][0]} {bound}" for name, bound in ranges.items()]
                raise ValueError(f"--{f.name} {item}: wanted {' and '.join(wanted) or 'a finite number'}")
            if isinstance(item, str) and "\0" in item:
                raise ValueError(f"--{f.name} {item!r}: wanted text without a null character")


def within(kind: type, **ranges) -> Callable[[str], float]:
    """For argparse's `type`: text -> a finite number of `kind` in its range, as of `option`."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (-math.inf < value < math.inf) or not all(RANGES[n][1](value, x) for n, x in ranges.items()):
            wanted = " and ".join(f"{RANGES[name][0]} {bound}" for name, bound in ranges.items())
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:60]!r}, wanted {what} {wanted}".strip())
        return value

    return number


def check_name(name: str, option_name: str = "--run") -> str:
    """A name that is one folder: letters, digits, and . _ + - after the first. Raises ValueError for
    another."""
    if not re.fullmatch(r"[\w+][\w.+-]{0,99}", name):
        raise ValueError(
            f"{option_name} {name[:120]}: wanted at most 100 letters, digits and . _ + -, no dot first"
        )
    return name


def settings_of(config, *without: str) -> dict:
    """A Config as a dictionary, for config.json."""
    return {name: value for name, value in asdict(config).items() if name not in without}


def check_together(config, unused: dict[str, Sequence[str]], needed: dict[str, Sequence[str]]) -> None:
    """Raises ValueError, naming both options, where one is given beside another that does not use it
    (`unused`: option -> those), or without any of the others that do (`needed`)."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    given = [
        name for name, value in values.items() if value is not None and value is not False and value != []
    ]
    for name in given:
        clashes = [other for other in unused.get(name, ()) if other in given]
        if clashes:
            raise ValueError(f"--{name} with --{clashes[0]}, which does not use it: wanted one of the two")
        if name in needed and not set(given) & set(needed[name]):
            raise ValueError(f"--{name} without --{' or --'.join(needed[name])}: wanted both, or neither")
