"""A dashboard of a Weights & Biases project: python examples/wandb_dashboard.py project=alibi_lm experiment=quick.

A dashboard is a saved view of a project. It holds only names: of metrics that training logs, of the table that
`scripts/evaluate.py` logs, and of the settings by which runs are grouped. With dry_run=true it is printed as JSON,
without network or account. Needs `pip install -e '.[dashboard]'`; see docs/dashboard.md.
"""

import json
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

from alibi_lm.cli import command

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # from its own use of pydantic, once on import
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

GROUPING = ("position.name", "train_length")
"""Runs are grouped by these inside their experiment; the runs left in a group are seeds: a mean and its range."""
ALL_LINES = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax", "max_runs_to_show": 100}


@dataclass
class DashboardConfig:
    """Which project, and which of its runs."""

    project: str = "alibi_lm"
    """Project of the runs, as in `tracking.project`."""
    entity: str | None = None
    """User or team; null: the account's default."""
    experiment: str | None = None
    """Show only runs of this group."""
    dry_run: bool = False
    """Print the dashboard as JSON instead of publishing it."""


def line(title: str, metric: str, unit: str, x: str = "Step", **settings: Any) -> Any:
    """A line plot of one metric, one line per group of runs."""
    x_title = "tokens" if x == "tokens_seen" else "step"
    return wr.LinePlot(title=title, x=x, y=[metric], title_x=x_title, title_y=unit, **ALL_LINES, **settings)


def bar(title: str, metric: str, unit: str) -> Any:
    """A bar chart of a metric's last value, one bar per group of runs."""
    return wr.BarPlot(title=title, metrics=[metric], title_x=unit, max_bars_to_show=100, **ALL_LINES)


def curve(title: str, column: str) -> Any:
    """A line plot of a column of the table that an evaluation logs, against the inference length."""
    return wr.CustomChart(
        query={"summaryTable": {"tableKey": "extrapolation"}},
        chart_name="wandb/line/v0",
        chart_fields={"x": "inference_length", "y": column, "stroke": "curve"},
        chart_strings={"title": title},
    )


def section(name: str, *panels: Any) -> Any:
    """A section of panels in two columns."""
    layout = ws.SectionLayoutSettings(columns=2, rows=(len(panels) + 1) // 2)
    return ws.Section(name=name, panels=list(panels), is_open=True, layout_settings=layout)


def build(config: DashboardConfig) -> Any:
    """The dashboard, in memory; no network is used."""
    loss, perplexity = partial(line, unit="nats per token"), partial(line, unit="perplexity", log_y=True)
    sections = [
        section(
            "Extrapolation",
            curve("Perplexity against inference length", "perplexity"),
            wr.WeavePanelSummaryTable(table_name="extrapolation"),
        ),
        section(
            "Training loss by scheme",
            loss("Training loss", "train/loss"),
            loss("Training loss against tokens seen", "train/loss", x="tokens_seen"),
            line("Gradient norm before clipping", "train/grad_norm", "norm", log_y=True),
            line("Learning rate", "train/lr", "learning rate"),
        ),
        section(
            "Validation loss by scheme",
            loss("Validation loss at the training length", "validation/loss"),
            perplexity("Validation perplexity at the training length", "validation/perplexity"),
            bar("Last validation loss", "validation/loss", "nats per token"),
            bar("Last validation perplexity", "validation/perplexity", "perplexity"),
        ),
        section(
            "Throughput and memory",
            line("Training throughput", "train/tokens_per_second", "tokens per second"),
            bar("Training throughput, last", "train/tokens_per_second", "tokens per second"),
            curve("Evaluation throughput against inference length", "tokens_per_second"),
            curve("Evaluation peak memory against inference length", "peak_memory_bytes"),
        ),
    ]
    return ws.Workspace(
        entity=config.entity or "",
        project=config.project,
        name="alibi_lm" if config.experiment is None else f"alibi_lm {config.experiment}",
        sections=sections,
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters="" if config.experiment is None else f"Metric('Group') == '{config.experiment}'",
            groupby=[ws.Metric("Group"), *(ws.Config(name) for name in GROUPING)],
        ),
    )


@command(DashboardConfig)
def main(config: DashboardConfig) -> None:
    """Publish the dashboard and print its address, or print its specification."""
    dashboard = build(config)
    if config.dry_run:
        print(
            json.dumps(dashboard._to_model().model_dump(mode="json", by_alias=True, exclude_none=True), indent=2)
        )
    else:
        print(dashboard.save().url)


if __name__ == "__main__":
    main()
