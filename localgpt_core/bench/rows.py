"""What a benchmark found, `Row`: a JSON file of rows, and a table of them for people."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from localgpt_core.common.environment import environment
from localgpt_core.common.files import atomic_write, parse_json, read_regular
from localgpt_core.common.validation import Refusal, require

__all__ = ["Row", "read_rows", "render", "write_rows"]

LARGEST_FILE = 2**24  # bytes
RATES = "gemm_gflops"  # of the machine, in the environment of a file, by precision


@dataclass(frozen=True)
class Row:
    """Ratios of a variant to its reference: step time (median, quartiles), step memory, matmul FLOPs.

    ``milliseconds`` is the variant's own step, the median. ``update`` is what moving the feedback costs in
    each step, in forward passes; it is part of the rest.

    ``tokens_per_second`` are those of that median step. ``step_gflop`` are its matmul FLOPs, in units of
    10^9, and ``peak_share`` is their rate over the best at which the machine multiplies matrices. These three
    are None in files of earlier versions, which did not measure them.
    """

    name: str
    milliseconds: float
    time: float
    time_low: float
    time_high: float
    memory: float
    flops: float
    update: float
    tokens_per_second: float | None = None
    step_gflop: float | None = None
    peak_share: float | None = None


OPTIONAL = {item.name for item in fields(Row) if item.default is None}


def _short(values: dict[str, Any]) -> dict[str, Any]:
    """Return ``values`` with 4 significant digits: a time has no more to say."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}


def write_rows(
    rows: list[Row], path: Path, preset_name: str, device: str, gemm_gflops: dict[str, float] | None = None
) -> None:
    """Write the rows and what they were measured on as JSON, atomically.

    ``gemm_gflops`` are the best rates of the machine by precision, see `localgpt_core.bench.peak`; they stand
    in the environment.
    """
    measured_on = environment(device)
    if gemm_gflops:
        measured_on[RATES] = _short(gemm_gflops)
    content = {
        "preset": preset_name,
        "environment": measured_on,
        "rows": [_short(asdict(row)) for row in rows],
    }
    atomic_write(path, json.dumps(content, indent=1) + "\n")


def read_rows(path: Path) -> tuple[dict[str, Row], dict[str, Any]]:
    """Return the rows of such a file by name, and its environment.

    A file of an earlier version lacks the best rates of the machine, and its rows lack what needs them.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    try:
        content = parse_json(read_regular(path, LARGEST_FILE).decode("utf-8-sig"))
        rows = {row["name"]: _checked(Row(**row)) for row in content["rows"]}
        measured_on = content["environment"]
        require(isinstance(measured_on, dict), "environment", measured_on, "must be a table")
        rates = measured_on.get(RATES, {})
        valid = isinstance(rates, dict) and all(_is_quantity(rate) for rate in rates.values())
        require(valid, RATES, rates, "must be a table of numbers, finite and not negative")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"benchmark {path.name} cannot be read: {error}") from None
    return rows, measured_on


def _checked(row: Row) -> Row:
    require(isinstance(row.name, str), "name", row.name, "must be a string")
    for quantity, value in asdict(row).items():
        unmeasured = quantity in OPTIONAL and value is None
        valid = quantity == "name" or unmeasured or _is_quantity(value)
        require(valid, f"{row.name}: {quantity}", value, "must be a number, finite and not negative")
    return row


def _is_quantity(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def render(rows: list[Row]) -> str:
    """Return the rows as a text table."""
    width = max(len(row.name) for row in rows)
    columns = "  step time  quartiles     step memory  matmul FLOPs  feedback update  tokens/s  of GEMM peak"
    lines = [f"{'relative to bp':<{width}}{columns}"]
    for row in rows:
        lines.append(
            f"{row.name:<{width}}  {row.time:9.2f}  {row.time_low:.2f} .. {row.time_high:.2f}"
            f"  {row.memory:11.2f}  {row.flops:12.3f}  {row.update:6.2f} forward"
            f"  {_or_dash(row.tokens_per_second, ',.0f'):>9}  {_or_dash(row.peak_share, '.1%'):>12}"
        )
    return "\n".join(lines)
