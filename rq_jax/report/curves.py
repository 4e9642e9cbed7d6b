"""Line plots of logged metrics."""

import io
import itertools
import json
import os
from collections.abc import Mapping, Sequence

from rq_jax.files import write_atomic

MARK_TEXT = {"fontsize": "xx-small", "color": "grey", "ha": "right", "va": "top"}


def curves(metrics_jsonl_path: str | os.PathLike, names: Sequence[str], out_path: str | os.PathLike) -> None:
    """Draw metrics against the step, a panel for each, as PNG.

    Args:
      metrics_jsonl_path: log of `training.log.MetricWriter`.
      names: metrics to draw; non-finite values leave a gap, and so do the zeros of a loss that has not begun. A dotted
        line in all panels marks where it does.
      out_path: PNG file to write.

    Raises:
      FileNotFoundError: no such log.
      ValueError: no names, or a name that is not in the log.
    """
    if not names:
        raise ValueError("names: empty; give at least one metric")
    logged = read_metrics(metrics_jsonl_path)
    unknown = [name for name in names if name not in logged]
    if unknown:
        raise ValueError(
            f"names: '{unknown[0]}' is not in '{metrics_jsonl_path}'; allowed are {', '.join(sorted(logged))}"
        )
    lines, joins = {}, {}
    for name in names:
        steps, values = logged[name]
        idle = len(list(itertools.takewhile(lambda value: value == 0, values)))
        if 0 < idle < len(values):
            joins[steps[idle]] = ", ".join(filter(None, (joins.get(steps[idle]), name)))
            values = [float("nan")] * idle + values[idle:]
        lines[name] = {"": (steps, values, None)}
    panels(lines, "step", out_path, joins)


def panels(
    lines: Mapping[str, Mapping[str, tuple[Sequence, Sequence, Sequence | None]]],
    xlabel: str,
    out_path: str | os.PathLike,
    marks: Mapping[float, str] | None = None,
) -> None:
    """Draw lines, a panel for each title, as PNG.

    Args:
      lines: title -> label -> (x, y, half length of the error bars or None); labels that are empty or start with "_"
        are left out of the legend.
      xlabel: label of the x axes.
      out_path: PNG file to write.
      marks: x -> what begins there: a dotted line in every panel, with its name in the first.
    """
    from matplotlib.figure import Figure

    columns = min(3, len(lines))
    # Figure in place of pyplot, which has global state and may open a window.
    figure = Figure(figsize=(4.5 * columns, 3.0 * -(-len(lines) // columns)), layout="constrained")
    # With marks the x axes are one, so that a line that begins late leaves its gap.
    axes = list(figure.subplots(-(-len(lines) // columns), columns, squeeze=False, sharex=bool(marks)).flat)
    for panel, (title, of_panel) in zip(axes, lines.items(), strict=False):
        for label, (x, y, error) in of_panel.items():
            is_short = len(x) < 20
            panel.errorbar(x, y, error, label=label or "_", marker="." if is_short else None, capsize=2)
        for x, name in (marks or {}).items():
            panel.axvline(x, color="grey", linestyle=":", linewidth=1)
            if panel is axes[0]:
                panel.text(x, 0.98, f"{name} ", transform=panel.get_xaxis_transform(), rotation=90, **MARK_TEXT)
        panel.set(title=title, xlabel=xlabel)
        panel.tick_params(labelbottom=True)
        panel.grid(alpha=0.3)
        if any(of_panel):
            panel.legend(
                fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2)
            )  # below the panel, where it covers no line
    for panel in axes[len(lines) :]:
        panel.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomic(out_path, buffer.getvalue())


def read_metrics(metrics_jsonl_path: str | os.PathLike) -> dict[str, tuple[list[int], list[float]]]:
    """Read the log of a run.

    Args:
      metrics_jsonl_path: log of `training.log.MetricWriter`; an unfinished last line is left out.

    Returns:
      Metric name -> (steps, values), in the order of the log.

    Raises:
      FileNotFoundError: no such log.
      ValueError: a line that is none of a log.
    """
    logged: dict[str, tuple[list[int], list[float]]] = {}
    with open(metrics_jsonl_path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
                step, scalars = record.pop("step"), {name: float(value) for name, value in record.items()}
                if type(step) is not int:
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                raise ValueError(f"'{metrics_jsonl_path}': line {number} is no line of a log; delete it") from None
            for name, value in scalars.items():
                steps, values = logged.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return logged
