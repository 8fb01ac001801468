"""One evaluation for people: a self-contained HTML page, and a table and examples for the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softguard.files import write_text
from softguard.report.answers import Answers, examples, pick
from softguard.report.charts import bar_chart, training_panels
from softguard.report.measures import SYSTEMS, Verdict, cost_lines, measure_lines, rows_of, systems_of, table, verdict

__all__ = ["Verdict", "examples", "table", "verdict", "write_report"]


def write_report(
    results: Mapping[str, Any],
    answers: Answers,
    prompts: Mapping[str, Sequence[str]],
    refusals: Sequence[str],
    log: Sequence[Mapping[str, Any]],
    recipe_yaml: str,
    out: Path,
) -> None:
    """Write the page of one evaluation to `out`; it loads nothing from elsewhere.

    `results`: content of `results.json`; `answers`: system -> suite -> answers; `prompts`: suite -> prompts, in the order
    of the answers; `refusals`: the system's; `log`: lines of `log.jsonl`, none for a model that was not trained here. Systems,
    suites and figures that are missing are left out. Raises SoftguardError if `out` cannot be written.
    """
    import jinja2

    # Texts come from users and models: the template escapes everything it is given.
    loader = jinja2.PackageLoader("softguard", "report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("template.html").render(
        results=results,
        verdict=verdict(results),
        systems=[(system, SYSTEMS[system]) for system in systems_of(results)],
        methods={row.system: row.method for row in rows_of(results)},
        measures=measure_lines(results),
        costs=cost_lines(results),
        chart=bar_chart(results),
        panels=training_panels(log),
        examples=pick(results, answers, prompts, refusals),
        recipe=recipe_yaml,
    )
    write_text(out, page)
