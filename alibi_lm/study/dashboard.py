"""The dashboard of a Weights & Biases project, as code: which panels there are and what they draw.

A dashboard is a saved view of a project. It holds names only: of metrics that the trainer logs, of the table that
`scripts/evaluate.py` logs, and of the settings by which runs are grouped. The numbers stay with the runs.
"""

from __future__ import annotations

import re
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

CURVE_TABLE = "extrapolation"
"""Table of all results that an evaluation logs, a row for each run and inference length."""
GROUPING = ("position.name", "train_length")
"""Settings that runs are grouped by, inside their experiment: what is left in a group are seeds, and a line is
their mean with the band from the lowest to the highest."""
MAX_LINES = 100
"""Lines of a panel; the app's own limit of ten would leave schemes out without a word."""


def build(project: str, entity: str | None = None, experiment: str | None = None) -> Workspace:
    """The dashboard, in memory; no network is used.

    Args:
        project: of Weights & Biases, as in `tracking.project`.
        entity: user or team that the project belongs to; None: the account's default, known when it is published.
        experiment: shows only runs of this group; None: all, under their groups.

    Raises:
        ValueError: a name that cannot be one, or the package wandb-workspaces is missing.
    """
    if not project or re.search(r"[/\\#?%:]", project):
        raise ValueError(f"project = {project!r}. Use a name without any of / \\ # ? % :")
    if entity is not None and not re.fullmatch(r"[\w.-]+", entity):
        raise ValueError(f"entity = {entity!r}. Use the name of a user or team: letters, digits, _ . and -.")
    if experiment is not None and not re.fullmatch(r"[\w.-]+", experiment):
        raise ValueError(f"experiment = {experiment!r}. Use letters, digits, _ . and -.")
    ws, wr = _libraries()
    return ws.Workspace(
        entity=entity or "",
        project=project,
        name="alibi_lm" if experiment is None else f"alibi_lm {experiment}",
        sections=_sections(ws, wr),
        settings=ws.WorkspaceSettings(max_runs=MAX_LINES),
        runset_settings=ws.RunsetSettings(
            filters="" if experiment is None else f"Metric('Group') == '{experiment}'",
            groupby=[ws.Metric("Group"), *(ws.Config(name) for name in GROUPING)],
        ),
    )


def specification(dashboard: Workspace) -> dict[str, Any]:
    """What publishing would send: entity, project, displayName and spec, of JSON types; uses no network."""
    view = dashboard._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return {name: view[name] for name in ("entity", "project", "displayName", "spec")}


def publish(dashboard: Workspace) -> str:
    """Save the dashboard as a new view of its project.

    Returns:
        Its address in the app.

    Raises:
        ValueError: no API key, no network, or the server refuses.
    """
    import wandb

    try:
        if not wandb.login(prompt=False, verify=False):
            raise ValueError("no API key")
        if not dashboard.entity:
            dashboard.entity = wandb.Api().default_entity or ""
        return dashboard.save().url
    except Exception as error:  # of a dozen kinds: of wandb, of its service process, of the transport
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"The dashboard was not published: {reason}. It needs a network and an API key (wandb login, or "
            "WANDB_API_KEY); dry_run=true shows the specification without either."
        ) from error


def _sections(ws: ModuleType, wr: ModuleType) -> list[Any]:
    def line(title: str, metric: str, unit: str, x: str = "Step", **settings: Any) -> Any:
        return wr.LinePlot(
            title=title,
            x=x,
            y=[metric],
            title_x="tokens" if x == "tokens_seen" else "step",
            title_y=unit,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=MAX_LINES,
            **settings,
        )

    def bar(title: str, metric: str, unit: str) -> Any:
        return wr.BarPlot(
            title=title,
            metrics=[metric],
            title_x=unit,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=MAX_LINES,
            max_bars_to_show=MAX_LINES,
        )

    def curve(title: str, column: str) -> Any:
        return wr.CustomChart(
            query={"summaryTable": {"tableKey": CURVE_TABLE}},
            chart_name="wandb/line/v0",
            chart_fields={"x": "inference_length", "y": column, "stroke": "curve"},
            chart_strings={"title": title},
        )

    def section(name: str, *panels: Any) -> Any:
        layout = ws.SectionLayoutSettings(columns=2, rows=(len(panels) + 1) // 2)
        return ws.Section(name=name, panels=list(panels), is_open=True, layout_settings=layout)

    nats, speed = "nats per token", "tokens per second"
    return [
        section(
            "Extrapolation",
            # As the evaluation draws it: a line for each run, split and stride.
            curve("Perplexity against inference length", "perplexity"),
            wr.WeavePanelSummaryTable(table_name=CURVE_TABLE),
        ),
        section(
            "Training loss by scheme",
            line("Training loss", "train/loss", nats),
            line("Training loss against tokens seen", "train/loss", nats, x="tokens_seen"),
            line("Gradient norm before clipping", "train/grad_norm", "norm", log_y=True),
            line("Learning rate", "train/lr", "learning rate"),
        ),
        section(
            "Validation loss by scheme",
            line("Validation loss at the training length", "validation/loss", nats),
            line(
                "Validation perplexity at the training length", "validation/perplexity", "perplexity", log_y=True
            ),
            bar("Last validation loss", "validation/loss", nats),
            bar("Last validation perplexity", "validation/perplexity", "perplexity"),
        ),
        section(
            "Throughput and memory",
            line("Training throughput", "train/tokens_per_second", speed),
            bar("Training throughput, last", "train/tokens_per_second", speed),
            curve("Evaluation throughput against inference length", "tokens_per_second"),
            curve("Evaluation peak memory against inference length", "peak_memory_bytes"),
        ),
    ]


def _libraries() -> tuple[ModuleType, ModuleType]:
    """The modules of workspaces and of panels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its own use of pydantic, once on import
            import wandb_workspaces.reports.v2 as wr
            import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ValueError(
            f"The dashboard needs the package wandb-workspaces ({error}). "
            "Install it with: pip install alibi_lm[dashboard] (in a checkout: pip install -e '.[dashboard]')."
        ) from error
    return ws, wr
